"""Expert parallelism that sends a copy of a token to each of its experts.

Paper: GShard (arXiv 2006.16668), section 3.2: experts on several devices, all-to-all before and after them.
Changes: where experts live and how their inputs and outputs travel: k rows there and k back for each token, summed at the source.
Should improve: memory of a device, which holds E / N experts. It is the reference of its axis.
Costs: 2 k D elements sent a token (k experts a token, D hidden size), whatever the placement.
"""

from __future__ import annotations

from effbench.modules.parallel_arms import Arm, ParallelArm
from effbench.technique import Paper


class EpNaive(ParallelArm):
    """k copies of each token."""

    name = "ep_naive"
    summary = "expert parallel: a copy of the token for each of its experts"
    paper = Paper(
        title="GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding", arxiv="2006.16668",
        where="section 3.2", year=2020,
    )  # fmt: skip

    def arm(self) -> Arm:
        return Arm(deduplicate=False, placement="in_order")
