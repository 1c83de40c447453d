"""ReLU in the place of the activation of feed-forward layers: many of the numbers between the layers are exactly zero.

Paper: ReLU Strikes Back: Exploiting Activation Sparsity in Large Language Models (arXiv 2310.04564), section 3.
Changes: `hidden_act` becomes "relu".
Should improve: nothing with the library's kernels, which multiply the zeros as well.
Costs: loaded weights were trained for another activation and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from effbench import surgery
from effbench.schema import Spec
from effbench.technique import Context, Paper, Support, Technique, no

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class SparseReLU(Technique):
    """Feed-forward layers that gate with ReLU."""

    name = "sparse_relu"
    axis = "ffn"
    summary = "plain ReLU in the feed-forward layers"
    paper = Paper(
        title="ReLU Strikes Back: Exploiting Activation Sparsity in Large Language Models",
        arxiv="2310.04564",
        where="section 3",
        year=2023,
    )

    def supports(self, context: Context) -> Support:
        if context.weights in ("path", "hub"):
            return no("loaded weights were trained for another activation; use random or trained weights")
        return surgery.supports_feed_forward(context)

    def configure(self, config: PretrainedConfig) -> None:
        config.hidden_act = "relu"

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return "dense", {}
