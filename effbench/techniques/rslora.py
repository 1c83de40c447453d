"""RSLoRA: LoRA with a scale of α / √r, under which activations and gradients keep their size whatever the rank.

Paper: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA (arXiv 2312.03732), theorem 3.2: h = W x + (α / √r) B A x.
Changes: one number. Graph, weights and FLOPs are LoRA's, so a difference of speed or memory between the two is noise.
Should improve: what a higher rank learns at one learning rate.
Costs: nothing beside LoRA's; at the same α the steps of the change are √r times as large.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effbench.modules.adapters import Adapter
from effbench.technique import Paper


class RSLoRA(Adapter):
    """Rank-stabilised LoRA."""

    name = "rslora"
    summary = "LoRA scaled by α / √r instead of α / r"
    paper = Paper(
        title="A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
        arxiv="2312.03732",
        where="theorem 3.2",
        year=2023,
    )

    def options(self) -> Mapping[str, Any]:
        return {"use_rslora": True}
