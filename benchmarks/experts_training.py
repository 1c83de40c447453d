"""The expert layer against the fastest of transformers' implementations at scaled published shapes, on a CPU: training.

    point     ours · the fastest of eager, grouped_mm and batched_mm · that again (the A/A)

A call is the forward and the backward pass of one layer with the gradients of inputs, weights and routing weights, sorting
included, at 1 to 4096 tokens in float32 and bfloat16. How a point is measured and judged is said in `expert_race`; a target is met
by the geometric mean over all points, and only if no point is shown to be slower.
"""

from __future__ import annotations

from benchmarks.common import Options, Report
from benchmarks.expert_race import race


def run(options: Options) -> Report:
    """See `expert_race`."""
    return race(options, name="experts_training", train=True)
