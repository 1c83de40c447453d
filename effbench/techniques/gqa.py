"""Grouped-query attention: groups of query heads share one key and one value head.

Paper: GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints (arXiv 2305.13245), section 2.2.
Changes: `num_key_value_heads` = `groups`; loaded weights are converted by mean pooling (section 2.1) or repetition.
Should improve: cache size and decode traffic, by H / groups; time per token where reading the cache is what takes time.
Costs: quality, less than MQA; the score FLOPs stay the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from effbench import surgery
from effbench.costs import SoftmaxCost
from effbench.schema import Spec
from effbench.technique import Context, Cost, Paper, Params, Support, Technique

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class GQAParams(Params):
    """Parameters of `gqa`."""

    groups: int = Field(default=4, ge=1, description="key/value heads; divides the number of query heads")


class GQA(Technique):
    """Groups of query heads share keys and values."""

    name = "gqa"
    axis = "attention"
    summary = "grouped-query attention: groups of query heads share a key/value head"
    paper = Paper(
        title="GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
        arxiv="2305.13245",
        where="section 2.2",
        year=2023,
    )
    Params = GQAParams

    def supports(self, context: Context) -> Support:
        return surgery.supports_key_value_heads(context, self.params.groups)

    def configure(self, config: PretrainedConfig) -> None:
        config.num_key_value_heads = self.params.groups

    def cost(self, context: Context) -> Cost:
        return surgery.attention_cost(context, SoftmaxCost.of(context.config, self.params.groups))

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return "mha", {}
