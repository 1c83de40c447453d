"""The released defect: a mixture whose experts are one and the same module, so that it is a single projector.

Paper: U-SAM (arXiv 2505.13880); `moe = [proj] * 3` in its released code, which the paper does not describe.
Changes: the projector of the workload usam: one Linear layer, run as often as the list is long, and a router that decides nothing.
Should improve: nothing: whatever the router says, the weights of the softmax sum to 1 and the result is that of `usam_single`.
Costs: the FLOPs of E experts with the weights of one, the prompt's way down and the router.
Deviation: the sum runs over the experts. The released one runs over time and yields E tokens for any duration.
"""

from __future__ import annotations

from pydantic import Field

from effbench.modules.usam_arms import UsamArm
from effbench.technique import Params


class UsamAliasedParams(Params):
    """Parameters of `usam_aliased`."""

    experts: int = Field(default=3, ge=1, le=64, description="how often the one module stands in the list")


class UsamAliased(UsamArm):
    """One module E times."""

    name = "usam_aliased"
    summary = "task-aware projector as released: one module three times, equal to a single projector"
    Params = UsamAliasedParams
    kind = "aliased"
