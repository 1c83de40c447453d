"""Multi-query attention: all query heads share one key and one value head.

Paper: Fast Transformer Decoding: One Write-Head is All You Need (arXiv 1911.02150), section 3.
Changes: `num_key_value_heads` = 1; loaded weights have their key/value heads mean-pooled (GQA, arXiv 2305.13245, section 2.1).
Should improve: cache size and decode traffic, by the number of query heads.
Costs: quality, the most of its family; the score FLOPs stay the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from effbench import surgery
from effbench.costs import SoftmaxCost
from effbench.schema import Spec
from effbench.technique import Context, Cost, Paper, Support, Technique

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class MQA(Technique):
    """All query heads share one set of keys and values."""

    name = "mqa"
    axis = "attention"
    summary = "multi-query attention: one key/value head for all query heads"
    paper = Paper(
        title="Fast Transformer Decoding: One Write-Head is All You Need", arxiv="1911.02150", where="section 3", year=2019
    )

    def supports(self, context: Context) -> Support:
        return surgery.supports_key_value_heads(context, 1)

    def configure(self, config: PretrainedConfig) -> None:
        config.num_key_value_heads = 1

    def cost(self, context: Context) -> Cost:
        return surgery.attention_cost(context, SoftmaxCost.of(context.config, 1))

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return "mha", {}
