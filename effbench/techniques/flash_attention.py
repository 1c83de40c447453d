"""FlashAttention-2 from the flash-attn package.

Paper: FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning (arXiv 2307.08691), section 3.
Changes: which kernel computes attention (transformers' backend "flash_attention_2"); results only by rounding.
Should improve: time and memory against eager attention; against sdpa, which takes the same kernel, little.
Costs: an extra package compiled for the GPU; fp16 and bf16 only.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from effbench import surgery
from effbench.schema import Spec
from effbench.technique import YES, Context, Paper, Support, Technique, no

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class FlashAttention(Technique):
    """FlashAttention-2 from the flash-attn package."""

    name = "flash_attention"
    axis = "kernel"
    summary = "the flash-attn package's kernels, fp16 and bf16"
    paper = Paper(
        title="FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
        arxiv="2307.08691",
        where="section 3",
        year=2023,
    )

    def supports(self, context: Context) -> Support:
        if context.device != "cuda":
            return no(f"flash-attn has no kernels for {context.device}; choose sdpa, or a CUDA device")
        if find_spec("flash_attn") is None:
            return no("the package flash-attn is not installed; install it with: pip install flash-attn, or choose sdpa")
        if not {"fp16", "bf16"} & set(context.stack):
            return no("flash-attn computes in fp16 and bf16 only; add bf16 to the stack, or choose sdpa")
        return surgery.own_kernels(context) or YES

    def configure(self, config: PretrainedConfig) -> None:
        config._attn_implementation = "flash_attention_2"

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return "sdpa", {}
