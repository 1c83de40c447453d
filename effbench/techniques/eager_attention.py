"""Attention as two matrix products and a softmax, nothing fused: what fused kernels are compared with.

Paper: Attention Is All You Need (arXiv 1706.03762), equation 1.
Changes: which kernel computes attention (transformers' backend "eager"); results only by rounding.
Should improve: nothing.
Costs: a score matrix of T × S elements per head is written and read; grouped keys and values are repeated in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from effbench import surgery
from effbench.schema import Spec
from effbench.technique import YES, Context, Paper, Support, Technique

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class EagerAttention(Technique):
    """Attention as two matrix products and a softmax, nothing fused: what fused kernels are compared with."""

    name = "eager_attention"
    axis = "kernel"
    summary = "attention as plain matrix products and a softmax, nothing fused"
    paper = Paper(title="Attention Is All You Need", arxiv="1706.03762", where="section 3.2.1", year=2017)

    def supports(self, context: Context) -> Support:
        return surgery.own_kernels(context) or YES

    def configure(self, config: PretrainedConfig) -> None:
        config._attn_implementation = "eager"

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return "sdpa", {}
