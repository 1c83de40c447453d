"""Flex attention of PyTorch: mask and score changes are compiled into one Triton kernel that skips blocks all masked.

Paper: Flex Attention (arXiv 2412.05496), section 3.
Changes: which kernel computes attention (transformers' backend "flex_attention"); results only by rounding.
Should improve: time and memory where much is masked (sliding windows, packed sequences).
Costs: a compilation per shape; no gradient on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from effbench import surgery
from effbench.schema import Spec
from effbench.technique import YES, Context, Paper, Support, Technique, no

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class FlexAttention(Technique):
    """Flex attention of PyTorch: mask and score changes are compiled into one Triton kernel that skips blocks all masked."""

    name = "flex_attention"
    axis = "kernel"
    summary = "PyTorch's flex attention: masks compiled into a Triton kernel"
    paper = Paper(
        title="Flex Attention: A Programming Model for Generating Optimized Attention Kernels",
        arxiv="2412.05496",
        where="section 3",
        year=2024,
    )

    def supports(self, context: Context) -> Support:
        if context.device != "cuda":
            return no(f"flex attention has no gradient on {context.device} and is slow there; choose sdpa, or a CUDA device")
        return surgery.own_kernels(context) or YES

    def configure(self, config: PretrainedConfig) -> None:
        config._attn_implementation = "flex_attention"

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return "sdpa", {}
