"""One projector: a Linear layer from the Q-Former's width to the language model's, without a router.

Paper: SALMONN (arXiv 2310.13289), section 3.1, whose window Q-Former and projector U-SAM (2505.13880) starts from.
Changes: the projector of the workload usam.
Should improve: nothing: it is the reference of these arms.
Costs: 2 D O FLOPs a token (D width of the Q-Former, O of the language model) and (D + 1) O weights.
"""

from __future__ import annotations

from effbench.modules.usam_arms import UsamArm
from effbench.technique import Params


class UsamSingleParams(Params):
    """The single projector has no parameters of its own; its widths are the workload's."""


class UsamSingle(UsamArm):
    """One Linear layer."""

    name = "usam_single"
    summary = "a single linear projector, no router"
    Params = UsamSingleParams
    kind = "single"
