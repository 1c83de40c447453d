"""Joint experts, disjoint routers: audio and video share a bank of experts, and each has a router of its own.

Paper: Llama-SMoP (arXiv 2505.14336); read by analogy, since its code has the joint form alone.
Changes: the projector of the workload smop: as smop_jejr, with one router for each stream.
Should improve: routing that need not tell the streams apart by itself.
Costs: as smop_jejr, and a second router of D E weights, of which a token uses one.
"""

from __future__ import annotations

from effbench.modules.projector_arms import MixtureParams, ProjectorArm


class SmopJedr(ProjectorArm):
    """One bank of experts, a router for each stream."""

    name = "smop_jedr"
    summary = "mixture of projectors: joint experts, a router for each stream"
    Params = MixtureParams
    kind = "jedr"
