"""Disjoint experts, disjoint routers: a sparse mixture of projectors for audio and another for video.

Paper: Llama-SMoP (arXiv 2505.14336), the variant that it names DEDR.
Changes: the projector of the workload smop: two mixtures of E experts each, computed in one call with ids of their own.
Should improve: quality: experts are of one modality each. As many weights a token as smop_jejr.
Costs: twice the weights of smop_jejr, and up to twice the bytes that a step reads.
Deviation: whether the paper's 4 experts are for each modality or in all is not known; E is for each here.
"""

from __future__ import annotations

from effbench.modules.projector_arms import MixtureParams, ProjectorArm


class SmopDedr(ProjectorArm):
    """A mixture for each stream."""

    name = "smop_dedr"
    summary = "mixture of projectors: experts and router for each stream"
    Params = MixtureParams
    kind = "dedr"
