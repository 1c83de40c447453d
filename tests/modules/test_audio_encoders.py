"""U-SAM's encoders: their sizes, what a plan knows of them, and how their sequences are joined."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from effbench.modules.audio_encoders import AudioEncoders, stretched
from effbench.modules.usam_forms import encoder_flops, encoder_sizes, encoder_weights, num_frames


@pytest.mark.parametrize(("kind", "width"), [("paper", 768), ("tiny", 64), ("tiny", 128)])
@pytest.mark.parametrize("seconds", [0.5, 10.0])
def test_a_plan_knows_the_weights_and_flops_of_the_encoders(kind: str, width: int, seconds: float) -> None:
    sizes = encoder_sizes(kind, width)
    with torch.device("meta"):
        encoders = AudioEncoders(sizes, seconds).eval().requires_grad_(False)
        sound = encoders.draw(2, torch.empty(0))
    assert sum(p.numel() for p in encoders.parameters()) == encoder_weights(sizes, seconds)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = encoders(sound)
    assert out.shape == (2, num_frames(seconds), 3 * width)
    assert counter.get_total_flops() == pytest.approx(2 * encoder_flops(sizes, seconds), rel=0.01)


def test_the_paper_s_encoders_have_about_their_published_weights() -> None:
    with torch.device("meta"):
        encoders = AudioEncoders(encoder_sizes("paper", 768), 10.0)
    sizes = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in encoders.named_children()}
    assert sizes["whisper"] == pytest.approx(88, abs=1)  # of the 244M of small, its encoder
    assert sizes["mert"] == pytest.approx(95, abs=1)
    assert sizes["ced"] == pytest.approx(86, abs=1)


def test_sequences_are_stretched_linearly_and_left_alone_where_they_fit() -> None:
    x = torch.arange(4.0).view(1, 4, 1)
    assert stretched(x, 4) is x
    assert stretched(x, 2).flatten().tolist() == [0.5, 2.5]


@torch.no_grad()
def test_every_encoder_reaches_its_own_third_of_the_frames() -> None:
    torch.manual_seed(0)
    encoders = AudioEncoders(encoder_sizes("tiny", 64), 0.5).eval()
    mel, wave, patches = encoders.draw(1, torch.empty(0))
    plain = encoders((mel, wave, patches))
    changed = (encoders((mel, wave, patches + 1)), encoders((mel + 1, wave, patches)), encoders((mel, wave.flip(1), patches)))
    for third, other in enumerate(changed):
        moved = [(other - plain)[..., 64 * n : 64 * (n + 1)].abs().max() > 1e-4 for n in range(3)]
        assert [bool(m) for m in moved] == [n == third for n in range(3)]
