"""Sparse mixture of projectors: the router of the task-aware projector gives each token its k best experts.

Paper: Outrageously Large Neural Networks (arXiv 1701.06538), section 2, on the projector of U-SAM (2505.13880), which is soft.
Changes: the projector of the workload usam: k of E Linear layers for each token, weighted by their share of the softmax.
Should improve: time and FLOPs of the projector against the soft mixture, by k / E.
Costs: the weights of all E experts, and sorting; a router that is trained like this needs losses, which are not part of this arm.
Deviation: this project's, not the paper's. The k weights are not divided by their sum, so that k = E is the soft mixture.
"""

from __future__ import annotations

from pydantic import Field

from effbench.modules.usam_arms import UsamArm
from effbench.technique import Params


class UsamTopParams(Params):
    """Parameters of `usam_top`."""

    experts: int = Field(default=3, ge=1, le=64, description="E, experts that the router chooses from")
    top_k: int = Field(default=1, ge=1, le=64, description="k, experts that a token uses")


class UsamTop(UsamArm):
    """The k best experts, on the expert kernels."""

    name = "usam_top"
    summary = "task-aware projector made sparse: the k best experts of a token run"
    Params = UsamTopParams
    kind = "top"
