"""The three frozen encoders of U-SAM as transformers' modules with random weights, and how their sequences become one.

    mel, 30 s pad ── Whisper encoder ── 1500 frames ─┐ interpolated
    waveform 24 kHz ─ MERT ─ 75 frames/s, mixed ─────┤ to the length of CED's
    mel ── CED ── 4 frames for each 16 of mel ───────┴─ concatenated: (B, T, 3D)

Whisper small (arXiv 2212.04356) is the library's own encoder. MERT-v1-95M (2306.00107) is a HuBERT (2106.07447) of 12 layers and
width 768 whose 13 hidden layers a 1×1 convolution mixes. CED-base (2308.11957) has no module in the library: the stand-in is its
Audio Spectrogram Transformer (2104.01778) with CED's patches (16×16 of 64 mels, no overlap), width and depth; its two extra tokens
are dropped. Mel spectrograms and the waveform are drawn: computing them is not part of the encoders.

Shapes: B clips, T frames, D width of each encoder, H hidden layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F
from transformers import ASTConfig, ASTModel, HubertConfig, HubertModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from effbench.modules.usam_forms import (
    CED_MELS,
    MERT_HZ,
    PATCH,
    WHISPER_FRAMES,
    WHISPER_MELS,
    EncoderSizes,
    mel_frames,
    num_frames,
)

Sound = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class AudioEncoders(nn.Module):
    """Whisper, MERT and CED side by side."""

    def __init__(self, sizes: EncoderSizes, seconds: float):
        super().__init__()
        width, layers, heads, inner = sizes.width, sizes.layers, sizes.heads, 4 * sizes.width
        self.seconds, self.frames = seconds, num_frames(seconds)
        self.whisper = WhisperEncoder(
            WhisperConfig(
                d_model=width, encoder_layers=layers, encoder_attention_heads=heads, encoder_ffn_dim=inner,
                num_mel_bins=WHISPER_MELS, max_source_positions=WHISPER_FRAMES // 2,
            )
        )  # fmt: skip
        self.mert = HubertModel(
            HubertConfig(
                hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner,
                conv_dim=(sizes.conv_width,) * 7, mask_time_prob=0.0,
            )
        )  # fmt: skip
        self.mixture = nn.Conv1d(layers + 1, 1, kernel_size=1)
        self.ced = ASTModel(
            ASTConfig(
                hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner,
                patch_size=PATCH, frequency_stride=PATCH, time_stride=PATCH, num_mel_bins=CED_MELS,
                max_length=mel_frames(seconds),
            )
        )  # fmt: skip

    def forward(self, sound: Sound) -> torch.Tensor:
        """(B, T, 3D) of the three inputs that `draw` gives."""
        return torch.cat([stretched(found, self.frames) for found in self.streams(sound)], dim=-1)

    def streams(self, sound: Sound) -> Iterator[torch.Tensor]:
        """What each encoder says, one after the other, at its own rate."""
        mel_BMT, wave_BT, patches_BTM = sound
        yield self.ced(patches_BTM).last_hidden_state[:, 2:]
        yield self.whisper(mel_BMT).last_hidden_state
        layers_HBTD = self.mert(wave_BT, output_hidden_states=True).hidden_states
        batch, frames, width = layers_HBTD[0].shape
        mixed_B1N = self.mixture(torch.stack(layers_HBTD, 1).flatten(2))
        yield mixed_B1N.view(batch, frames, width)

    def draw(self, batch: int, like: torch.Tensor) -> Sound:
        """Inputs of the right sizes, N(0, 1)."""
        sizes = ((WHISPER_MELS, WHISPER_FRAMES), (round(MERT_HZ * self.seconds),), (mel_frames(self.seconds), CED_MELS))
        mel, wave, patches = (torch.randn(batch, *size, dtype=like.dtype, device=like.device) for size in sizes)
        return mel, wave, patches


def stretched(stream_BSD: torch.Tensor, frames: int) -> torch.Tensor:
    """(B, S, D) → (B, T, D), linearly; the same where the length is right already."""
    if stream_BSD.shape[1] == frames:
        return stream_BSD
    return F.interpolate(stream_BSD.transpose(1, 2), size=frames, mode="linear", align_corners=False).transpose(1, 2)
