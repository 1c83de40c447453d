"""Expert parallelism that sends a token once to each device among its experts.

Paper: Occult (arXiv 2505.13345), the two-level re-index (BRIM) and the sum of local outputs before the return.
Changes: how rows travel: one for each token and device, the weights beside it, and one sum back. Experts stay in their order.
Should improve: bytes sent, C_T instead of k rows a token each way; C_T ≤ min(k, N) is the mean number of devices among its experts.
Costs: 2 C_T D elements sent a token, with k numbers and weights beside each row; two sorts of indices.
"""

from __future__ import annotations

from effbench.modules.parallel_arms import Arm, ParallelArm, occult


class EpDeduplicated(ParallelArm):
    """One copy for each device."""

    name = "ep_deduplicated"
    summary = "expert parallel: one copy of the token for each device, summed there"
    paper = occult("the re-index matrices BRIM 0 and 1")
    compared_with = "ep_naive"

    def arm(self) -> Arm:
        return Arm(deduplicate=True, placement="in_order")
