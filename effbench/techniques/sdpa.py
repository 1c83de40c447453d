"""Scaled-dot-product attention of PyTorch: a fused kernel that never writes the score matrix, chosen by shape and device.

Paper: FlashAttention-2 (arXiv 2307.08691), section 3, which is the kernel it takes on most GPUs.
Changes: which kernel computes attention (transformers' backend "sdpa"); results only by rounding.
Should improve: nothing; it is the reference of its axis and the library's default.
Costs: a mask of one byte per query and key where there is padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from effbench import surgery
from effbench.schema import Spec
from effbench.technique import YES, Context, Paper, Support, Technique

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class SDPA(Technique):
    """Scaled-dot-product attention of PyTorch: a fused kernel that never writes the score matrix, chosen by shape and device."""

    name = "sdpa"
    axis = "kernel"
    summary = "PyTorch's scaled-dot-product attention: the fastest of its kernels that fits"
    paper = Paper(
        title="FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
        arxiv="2307.08691",
        where="section 3",
        year=2023,
    )

    def supports(self, context: Context) -> Support:
        return surgery.written_out(context) or YES

    def configure(self, config: PretrainedConfig) -> None:
        config._attn_implementation = "sdpa"

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return None

    @property
    def is_reference(self) -> bool:
        return True
