"""Rotary position embedding: queries and keys are rotated by an angle that grows with the position.

Paper: RoFormer: Enhanced Transformer with Rotary Position Embedding (arXiv 2104.09864), section 3.2.
Changes: nothing; the families here are built with it, and it is the reference of its axis.
Should improve: scores depend on distances only, without parameters; EfficientLLM measured its best perplexity with it.
Costs: a few elementwise operations on queries and keys in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effbench.families import FAMILIES
from effbench.schema import Spec
from effbench.technique import YES, Context, Paper, Support, Technique, no


class RoPE(Technique):
    """The model's own rotation."""

    name = "rope"
    axis = "position"
    summary = "rotary position embedding, as the model has it"
    paper = Paper(
        title="RoFormer: Enhanced Transformer with Rotary Position Embedding",
        arxiv="2104.09864",
        where="section 3.2",
        year=2021,
    )

    def supports(self, context: Context) -> Support:
        if context.model_type not in FAMILIES:
            return no(f"model type {context.model_type!r} is not known to rotate; choose a model of type {', '.join(FAMILIES)}")
        return YES

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return None

    @property
    def is_reference(self) -> bool:
        return True
