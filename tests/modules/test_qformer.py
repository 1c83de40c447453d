"""The window Q-Former: how many windows there are, what each reads, and what a plan knows of its weights and FLOPs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from effbench.modules.qformer import WindowQFormer
from effbench.modules.usam_forms import WINDOW, mert_frames, num_frames, num_windows, qformer_flops, qformer_weights

WIDTH, ENCODER = 16, 24


def former() -> WindowQFormer:
    torch.manual_seed(0)
    return WindowQFormer(ENCODER, WIDTH, heads=2).double().eval()


@pytest.mark.parametrize(("seconds", "frames", "windows"), [(10, 252, 14), (5, 128, 7), (30, 752, 44), (0.5, 16, 1)])
def test_ten_seconds_are_252_frames_and_14_windows(seconds: float, frames: int, windows: int) -> None:
    assert num_frames(seconds) == frames
    assert num_windows(frames) == windows


@pytest.mark.parametrize(("frames", "windows"), [(1, 1), (16, 1), (17, 1), (33, 1), (34, 2), (35, 2), (255, 15)])
def test_the_tail_that_fills_no_window_is_dropped_but_never_all(frames: int, windows: int) -> None:
    with torch.no_grad():
        assert former()(torch.randn(2, frames, ENCODER, dtype=torch.float64)).shape == (2, windows, WIDTH)


def test_no_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="zero frames"):
        former()(torch.zeros(1, 0, ENCODER, dtype=torch.float64))


def test_mert_hears_75_frames_a_second() -> None:
    assert mert_frames(10)[-1] == 749


@torch.no_grad()
def test_each_window_is_read_by_itself() -> None:
    model, frames_BTS = former(), torch.randn(3, 4 * WINDOW + 5, ENCODER, dtype=torch.float64)
    whole = model(frames_BTS)
    for clip in range(3):
        for window in range(4):
            alone = model(frames_BTS[clip : clip + 1, window * WINDOW : (window + 1) * WINDOW])
            torch.testing.assert_close(whole[clip, window], alone[0, 0], rtol=1e-12, atol=1e-12)
    changed = frames_BTS.clone()
    changed[:, WINDOW : 2 * WINDOW] += 1
    changed[:, 4 * WINDOW :] += 1
    other = model(changed)
    differs = (other - whole).abs().amax((0, 2)) > 1e-6
    assert differs.tolist() == [False, True, False, False], "the tail is read by no window"


@torch.no_grad()
def test_a_short_clip_is_read_without_what_is_missing() -> None:
    model, frames_BTS = former(), torch.randn(2, 5, ENCODER, dtype=torch.float64)
    plain = model.former(query_embeds=model.query.expand(2, -1, -1), encoder_hidden_states=frames_BTS).last_hidden_state
    torch.testing.assert_close(model(frames_BTS), plain, rtol=1e-12, atol=1e-12)
    padded = torch.nn.functional.pad(frames_BTS, (0, 0, 0, WINDOW - 5))
    assert (model(padded) - plain).abs().max() > 1e-3, "without the mask the padding would be read"


@pytest.mark.parametrize("width", [64, 768])
def test_a_plan_knows_its_weights_and_flops(width: int) -> None:
    with torch.device("meta"):
        model = WindowQFormer(3 * width, width, heads=width // 64).eval().requires_grad_(False)
        frames_BTS = torch.empty(2, 3 * WINDOW, 3 * width)
    assert sum(p.numel() for p in model.parameters()) == sum(w.size for w in qformer_weights(width))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(frames_BTS)
    assert counter.get_total_flops() == qformer_flops(width, 2 * 3)
