"""U-SAM's parts as numbers: frames of a clip, weights, FLOPs, and what a step makes on a tape. Torch-free.

Shapes: B clips, T frames of the joined encoders, D their width, S = 3D, W windows, P prompt tokens, O width of the language model,
E experts, K experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from effbench.layout import Weight
from effbench.modules.usam_arms import weight

STREAMS = 3  # CED, Whisper, MERT
WINDOW, QFORMER_LAYERS = 17, 2
MEL_HZ, PATCH, CED_MELS = 100, 16, 64  # mel frames a second (hop 160 at 16 kHz), and CED's patches of 16×16
WHISPER_MELS, WHISPER_FRAMES = 80, 3000  # always 30 s
MERT_HZ = 24_000
CONVOLUTIONS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))  # kernel and stride of HuBERT's feature encoder
POSITION_KERNEL, POSITION_GROUPS = 128, 16


def mel_frames(seconds: float) -> int:
    """Mel frames of a clip, padded to whole patches."""
    return PATCH * ceil(round(MEL_HZ * seconds, 6) / PATCH)


def num_frames(seconds: float) -> int:
    """T: CED's frames of a clip, 4 of frequency for each patch of time; 252 of 10 s."""
    return mel_frames(seconds) // PATCH * (CED_MELS // PATCH)


def num_windows(frames: int, window: int = WINDOW) -> int:
    """W: whole windows; a shorter clip is one. Raises ValueError for no frames."""
    if frames < 1:
        raise ValueError("a stream of zero frames has no window")
    return max(1, frames // window)


@dataclass(frozen=True, kw_only=True)
class EncoderSizes:
    """Width, depth and heads that the three encoders share, and the channels of MERT's feature encoder."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    conv_width: int = 512


def encoder_sizes(kind: str, width: int) -> EncoderSizes:
    """The paper's sizes, or the same modules with 2 layers for a CPU."""
    heads = num_heads(width)
    return (
        EncoderSizes(width=width, heads=heads)
        if kind == "paper"
        else EncoderSizes(width=width, layers=2, heads=heads, conv_width=32)
    )


def num_heads(width: int) -> int:
    """Heads of 64 channels."""
    return max(1, width // 64)


def qformer_weights(width: int) -> list[Weight]:
    """Of the window Q-Former: a query, a norm, and in each layer two attentions and one feed-forward layer."""
    per_layer = [(width, width)] * 6 + [(width, STREAMS * width)] * 2 + [(4 * width, width), (width, 4 * width)]
    vectors = 8 * width + (4 + 1) * width + 3 * 2 * width  # biases and three norms
    matrices = [weight(f"qformer.*.{n}", "other", *shape, count=QFORMER_LAYERS) for n, shape in enumerate(per_layer)]
    return [
        *matrices,
        weight("qformer.*.vectors", "other", vectors, count=QFORMER_LAYERS),
        weight("qformer.query", "other", 3 * width),
    ]


def contrastive_weights(out: int, patches: int) -> list[Weight]:
    """Of the loss: importance, norm, and the layers that make patches."""
    narrow = max(1, out // 4)
    shapes = ((narrow, out), (narrow,), (1, narrow), (1,), (2, out), (out, out), (out,), (patches, out), (patches,))
    return [weight(f"contrastive.{n}", "other", *shape) for n, shape in enumerate(shapes)]


def encoder_weights(sizes: EncoderSizes, seconds: float) -> int:
    """Number of weights of the three encoders, the mixture of MERT's layers included."""
    width, conv = sizes.width, sizes.conv_width
    layer = 4 * width * width + 8 * width * width + (4 + 5) * width + 4 * width  # matrices, biases, two norms
    shared = STREAMS * sizes.layers * layer - sizes.layers * width  # Whisper's keys have no bias
    whisper = width * (3 * WHISPER_MELS + 1) + width * (3 * width + 1) + WHISPER_FRAMES // 2 * width + 2 * width
    inputs = (1, *[conv] * (len(CONVOLUTIONS) - 1))
    mert = sum(conv * into * kernel for into, (kernel, _) in zip(inputs, CONVOLUTIONS, strict=True)) + 2 * conv
    mert += 2 * conv + conv * width + width + 2 * width
    mert += width * width // POSITION_GROUPS * POSITION_KERNEL + POSITION_KERNEL + width + sizes.layers + 2
    ced = width * (PATCH * PATCH + 1) + (2 + 2 + num_frames(seconds)) * width + 2 * width
    return shared + whisper + mert + ced


def qformer_flops(width: int, windows: int) -> int:
    """Forward, for so many windows with one query each: matrix products and scores."""
    row = 2 * (6 + 8) * width * width + 4 * (1 + WINDOW) * width
    return QFORMER_LAYERS * windows * (row + 2 * 2 * WINDOW * STREAMS * width * width)


def contrastive_flops(out: int, patches: int, clips: int, tokens: int, text: int) -> int:
    """Forward, for clips of so many audio and text tokens; each text is matched twice, as a clip's own and as another's."""
    narrow = max(1, out // 4)
    each = narrow * (out + 1) + out * (out + patches) + patches * out
    return 2 * clips * (tokens * each + 2 * patches * out * text)


def encoder_flops(sizes: EncoderSizes, seconds: float) -> int:
    """Forward of the three encoders for one clip: matrix products, convolutions and scores."""
    width, conv, mert, ced = sizes.width, sizes.conv_width, mert_frames(seconds), num_frames(seconds) + 2
    half = WHISPER_FRAMES // 2
    layers = sizes.layers * sum(24 * width * width * t + 4 * width * t * t for t in (half, mert[-1], ced))
    whisper = 2 * 3 * WHISPER_MELS * width * WHISPER_FRAMES + 2 * 3 * width * width * half
    inputs = (1, *[conv] * (len(CONVOLUTIONS) - 1))
    waves = sum(2 * conv * into * kernel * t for into, (kernel, _), t in zip(inputs, CONVOLUTIONS, mert, strict=True))
    waves += 2 * conv * width * mert[-1] + 2 * width * width // POSITION_GROUPS * POSITION_KERNEL * mert[-1]
    return layers + whisper + waves + 2 * PATCH * PATCH * width * (ced - 2) + 2 * (sizes.layers + 1) * mert[-1] * width


def mert_frames(seconds: float) -> list[int]:
    """Frames behind each convolution of MERT's feature encoder."""
    found = [round(MERT_HZ * seconds)]
    for kernel, stride in CONVOLUTIONS:
        found.append((found[-1] - kernel) // stride + 1)
    return found[1:]
