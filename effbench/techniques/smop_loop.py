"""The joint mixture of projectors computed as in the released code: a Python loop over all experts.

Paper: Llama-SMoP (arXiv 2505.14336), its released code.
Changes: only how smop_jejr is computed: for each of the E experts its tokens are looked up, computed and added.
Should improve: nothing: it is what the shared kernels are held against.
Costs: the FLOPs of smop_jejr; time that grows with E, since each expert is several small operators and one wait for the device.
"""

from __future__ import annotations

from effbench.modules.projector_arms import MixtureParams, ProjectorArm


class SmopLoop(ProjectorArm):
    """One mixture for both streams, one expert after the other."""

    name = "smop_loop"
    summary = "mixture of projectors by the released loop over experts"
    Params = MixtureParams
    kind = "loop"
