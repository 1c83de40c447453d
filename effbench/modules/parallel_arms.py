"""What the arms of the workload `expert_parallel` share: how rows travel, where experts live, and how many devices a token may use.

Torch-free. An arm writes its choice into the configuration, where the workload reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from effbench import surgery
from effbench.costs import num_experts
from effbench.schema import Spec
from effbench.technique import YES, Context, Paper, Support, Technique, no

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KEY = "expert_parallel"  # of the configuration
OCCULT = "Occult: Optimizing Collaborative Communication across Experts for Accelerated Parallel MoE Training and Inference"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One choice. `devices`: that a token may use after pruning, None: all."""

    deduplicate: bool
    placement: str  # "in_order", "greedy" or "refined"
    max_sweeps: int = 0
    devices: int | None = None
    policy: str = "score"


class ParallelArm(Technique):
    """Base of the arms."""

    axis = "parallel"
    workloads = ("expert_parallel",)
    compared_with: ClassVar[str] = ""  # the arm that is its baseline; "": it is the reference

    def supports(self, context: Context) -> Support:
        if num_experts(context.config) or surgery.stacked_weights(context):
            return YES
        return no("the model has no experts that could live on several devices; choose a mixture of experts, or add moe")

    def configure(self, config: PretrainedConfig) -> None:
        setattr(config, KEY, self.arm())

    def arm(self) -> Arm:
        """What the workload is to do."""
        raise NotImplementedError

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return (self.compared_with, {}) if self.compared_with else None

    @property
    def is_reference(self) -> bool:
        return not self.compared_with


def occult(where: str) -> Paper:
    """The paper of all arms but the naive one."""
    return Paper(title=OCCULT, arxiv="2505.13345", where=where, year=2025)
