"""LoRA: train a low-rank change of each linear layer, the weights themselves frozen.

Paper: LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685), section 4.1: h = W x + (α / r) B A x.
Changes: the linear layers of the decoder get A (r × in, Kaiming) and B (out × r, zero), in fp32; W gets no gradient.
Stacked experts get one pair for each expert; peft adds B A to their weights before the product, without dropout.
Should improve: memory of gradients and optimizer states, and the time their updates take.
Costs: two small matrix products per layer, forward and backward; the backward pass through W stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effbench.modules.adapters import Adapter
from effbench.schema import Spec
from effbench.technique import Paper


class LoRA(Adapter):
    """Low-rank adapters on every linear layer."""

    name = "lora"
    summary = "low-rank adapters on linear layers, base weights frozen"
    paper = Paper(
        title="LoRA: Low-Rank Adaptation of Large Language Models", arxiv="2106.09685", where="section 4.1", year=2021
    )

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return "full", {}
