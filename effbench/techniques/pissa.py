"""PiSSA: LoRA that starts from the r largest singular values of each weight, what is left of it frozen.

Paper: PiSSA: Principal Singular Values and Singular Vectors Adaptation (arXiv 2404.02948), equations 2 to 4:
A = √S Vᵀ and B = U √S of the first r (each over √(α / r)), W − (α / r) B A frozen.
Changes: the start of A and B, and the frozen weights; the graph is LoRA's.
Should improve: how fast the change is learned, since the largest directions learn.
Costs: a singular value decomposition of every adapted weight, once, in the build and not in the window (fact `decomposition_s`).
The split is exact in fp32; in bf16 the rounding of what is left changes the outputs by about 1 %. Only on plain weights.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from effbench.modules.adapters import Adapter, AdapterParams
from effbench.technique import Paper

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PiSSAParams(AdapterParams):
    """Parameters of `pissa`."""

    niter: int | None = Field(
        default=16, ge=1, le=1000, description="subspace iterations of a fast decomposition; null: the exact one"
    )


class PiSSA(Adapter):
    """LoRA from principal singular vectors."""

    name = "pissa"
    summary = "LoRA that starts from the largest singular vectors of each weight"
    paper = Paper(
        title="PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
        arxiv="2404.02948",
        where="equations 2 to 4",
        year=2024,
    )
    Params = PiSSAParams
    reads_weights: ClassVar[Literal["never", "initial", "always"]] = "initial"

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        started_s = time.perf_counter()
        adapted = super().apply(model)
        if next(adapted.parameters()).is_cuda:
            import torch

            torch.cuda.synchronize()
        adapted.decomposition_s = time.perf_counter() - started_s
        return adapted

    def options(self) -> Mapping[str, Any]:
        niter = self.params.niter
        return {"init_lora_weights": "pissa" if niter is None else f"pissa_niter_{niter}"}
