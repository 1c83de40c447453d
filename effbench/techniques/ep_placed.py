"""Expert parallelism with experts that are often chosen together on one device.

Paper: Occult (arXiv 2505.13345), its placement: greedy, on the matrix of how often two experts are chosen by one token.
Changes: which device holds which experts, equal numbers on each; found on calibration routing. Results are the same.
Should improve: C_T, and so bytes sent; the paper says about 20 % (OLMoE on 4 devices).
Costs: 2 C_T D elements sent a token; once, a matrix E × E and a search on it. Nothing where routing has no structure.
"""

from __future__ import annotations

from effbench.modules.parallel_arms import Arm, ParallelArm, occult


class EpPlaced(ParallelArm):
    """The paper's greedy placement."""

    name = "ep_placed"
    summary = "expert parallel: deduplicated, experts placed by co-activation (greedy)"
    paper = occult("expert placement")
    compared_with = "ep_deduplicated"

    def arm(self) -> Arm:
        return Arm(deduplicate=True, placement="greedy")
