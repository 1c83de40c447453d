"""Expert parallelism in which a token may use a few devices only.

Paper: Occult (arXiv 2505.13345), its pruning, by router score or by similarity of experts.
Changes: the routing: a token's experts are walked until so many devices are fixed, and experts on others are replaced by unused
ones on these. On the placement of ep_refined. Another function than the model's, which the paper fine-tunes afterwards.
Should improve: C_T, to at most the devices allowed; the paper has 1.98 and 1.0 for two and one (OLMoE on 4 devices).
Costs: quality, which this workload cannot measure (the share of routes kept stands beside); k passes over the scores a step.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from effbench.modules.parallel_arms import Arm, ParallelArm, occult
from effbench.technique import Params


class EpPrunedParams(Params):
    """Parameters of `ep_pruned`."""

    devices: int = Field(default=2, ge=1, le=4096, description="devices that a token may use")
    policy: Literal["score", "similarity"] = Field(
        default="similarity", description="what replaces an expert: the best router score, or the expert most alike"
    )
    max_sweeps: int = Field(default=8, ge=1, le=64, description="as in ep_refined")


class EpPruned(ParallelArm):
    """At most so many devices a token."""

    name = "ep_pruned"
    summary = "expert parallel: refined placement, each token on a few devices only (approximate)"
    paper = occult("pruning")
    Params = EpPrunedParams
    compared_with = "ep_deduplicated"

    def arm(self) -> Arm:
        return Arm(
            deduplicate=True, placement="refined", max_sweeps=self.params.max_sweeps, devices=self.params.devices,
            policy=self.params.policy,
        )  # fmt: skip
