"""Soft mixture of projectors: every expert runs on every token, and a softmax that reads the prompt too weights them.

Paper: U-SAM (arXiv 2505.13880), the task-aware projector; three distinct experts, as the paper describes and its code does not have.
Changes: the projector of the workload usam: E Linear layers from the Q-Former's width to the language model's, their weighted sum.
Should improve: quality over tasks that need different projections; nothing of speed.
Costs: E times the FLOPs and weights of one projector, the prompt's way down and a router; with `contrastive` a loss in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from effbench.modules.usam_arms import UsamArm
from effbench.schema import Spec
from effbench.technique import Params


class UsamSoftParams(Params):
    """Parameters of `usam_soft`; the default is the paper's number of experts."""

    experts: int = Field(default=3, ge=1, le=64, description="E, experts, all of which run")
    contrastive: bool = Field(
        default=False, description="the semantic-aware contrastive loss (mode train); nothing in other modes"
    )


class UsamSoft(UsamArm):
    """All experts, on the expert kernels with K = E."""

    name = "usam_soft"
    summary = "task-aware projector: all experts run, a softmax weights them"
    Params = UsamSoftParams
    kind = "soft"

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        """With the contrastive loss the same arm without it, else the single projector."""
        if self.params.contrastive:
            return "usam_soft", self.params.model_dump(exclude_defaults=True, exclude={"contrastive"})
        return super().baseline(spec)
