"""Joint experts, joint router: the tokens of audio and video pass one sparse mixture of projectors.

Paper: Llama-SMoP (arXiv 2505.14336), the form that its code has.
Changes: the projector of the workload smop: k of E MLPs for each token, weighted by the router, on the expert kernels.
Should improve: quality at a cost that does not grow with E; nothing of speed is promised beyond that.
Costs: k times the dense projector's FLOPs and a router of D E weights; the weights of E experts.
"""

from __future__ import annotations

from effbench.modules.projector_arms import MixtureParams, ProjectorArm


class SmopJejr(ProjectorArm):
    """One mixture for both streams."""

    name = "smop_jejr"
    summary = "mixture of projectors: joint experts, joint router"
    Params = MixtureParams
    kind = "jejr"
