"""The expert layer forward and backward, against the fastest of transformers' implementations, at scaled published shapes, on a CPU."""

from __future__ import annotations

from benchmarks.common import Options, Report
from benchmarks.expert_race import race


def run(options: Options) -> Report:
    """See `expert_race`."""
    return race(options, name="experts_training", train=True)
