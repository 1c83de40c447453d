"""Multi-head attention: one key and one value head for every query head.

Paper: Attention Is All You Need (arXiv 1706.03762), section 3.2.2.
Changes: `num_key_value_heads` = `num_attention_heads`; loaded weights with fewer key/value heads have them repeated.
Should improve: nothing; it is the reference of its axis and keeps the most capacity for keys and values.
Costs: the largest cache (2 H D elements per token and layer) and the widest projections.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from effbench import surgery
from effbench.costs import SoftmaxCost, query_heads
from effbench.schema import Spec
from effbench.technique import Context, Cost, Paper, Support, Technique

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class MHA(Technique):
    """Every query head has its own keys and values."""

    name = "mha"
    axis = "attention"
    summary = "multi-head attention: a key/value head per query head"
    paper = Paper(title="Attention Is All You Need", arxiv="1706.03762", where="section 3.2.2", year=2017)

    def supports(self, context: Context) -> Support:
        return surgery.supports_key_value_heads(context, query_heads(context.config))

    def configure(self, config: PretrainedConfig) -> None:
        config.num_key_value_heads = config.num_attention_heads

    def cost(self, context: Context) -> Cost:
        return surgery.attention_cost(context, SoftmaxCost.of(context.config, query_heads(context.config)))

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return None

    @property
    def is_reference(self) -> bool:
        return True
