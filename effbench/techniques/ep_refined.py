"""Expert parallelism with a placement that is searched on the number of copies itself.

Paper: Occult (arXiv 2505.13345) gives the greedy start; the exchanges are this project's, on the connectivity metric λ − 1 of
hypergraph partitioning (Karypis and others, hMETIS, 1999), which C_T − 1 is.
Changes: as ep_placed, and then pairs of experts change places while that lowers C_T of the calibration routing.
Should improve: C_T: greedy works on pairs, a proxy. Never worse on the calibration routing.
Costs: 2 C_T D elements sent a token; once, a search whose time grows with E² and the tokens of calibration.
"""

from __future__ import annotations

from pydantic import Field

from effbench.modules.parallel_arms import Arm, ParallelArm, occult
from effbench.technique import Params


class EpRefinedParams(Params):
    """Parameters of `ep_refined`."""

    max_sweeps: int = Field(default=8, ge=1, le=64, description="limit of each descent, in sweeps of E exchanges")


class EpRefined(ParallelArm):
    """Greedy, then exchanges on C_T."""

    name = "ep_refined"
    summary = "expert parallel: placed, then experts exchanged while that lowers C_T"
    paper = occult("expert placement, refined here")
    Params = EpRefinedParams
    compared_with = "ep_placed"

    def arm(self) -> Arm:
        return Arm(deduplicate=True, placement="refined", max_sweeps=self.params.max_sweeps)
