"""DoRA: the direction of each row of a weight is adapted by LoRA, its length by a trained number.

Paper: DoRA: Weight-Decomposed Low-Rank Adaptation (arXiv 2402.09353), equation 5: W' = m ⊙ V / ‖V‖, V = W + (α / r) B A, the norm
of each output row, no gradient through it (section 4.3); m starts as ‖W‖.
Changes: LoRA's A and B, and a vector m of as many numbers as the layer has outputs.
Should improve: quality over LoRA at equal rank.
Costs: every forward pass in training makes B A at the size of W and takes its norms, whatever the number of tokens, so a step
over few tokens pays most. Not for stacked experts, nor for 8-bit weights, which cannot be read back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from effbench.modules.adapters import Adapter
from effbench.technique import Paper


class DoRA(Adapter):
    """Weight-decomposed low-rank adapters."""

    name = "dora"
    summary = "LoRA on the direction of weights, a trained length for each output"
    paper = Paper(title="DoRA: Weight-Decomposed Low-Rank Adaptation", arxiv="2402.09353", where="equation 5", year=2024)
    reads_weights: ClassVar[Literal["never", "initial", "always"]] = "always"
    vectors: ClassVar[int] = 1

    def options(self) -> Mapping[str, Any]:
        return {"use_dora": True}
