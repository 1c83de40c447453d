"""How far each way of measuring GPU energy is from the truth, on a simulated GPU whose true joules are known.

The simulation, the loads and the methods are those of tests/probes/test_energy_truth.py: the real NVML bindings load a
stub library that plays a GPU on a clock of its own, with a counter that ticks every 100 ms and a power sensor that sees a
quarter of the time. Each load is one window of 5 to 8 s with its own shape, phases and edges, drawn from its number; all
methods see the same samples. A figure is the 95th percentile of the size of the relative error over the loads, with the
interval that order statistics give for it.

For a counter that integrates true power there is a target. For one that itself sees a quarter of the time no accuracy is
claimed (its readings say `sensor_duty_unknown`), and the error is printed all the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.common import Figure, Options, Report, Target
from effbench.stats import Interval

WITHIN = Target(text="at most 2 %", upper=0.02)
KEYS = {
    "ours": "ours",
    "counter difference": "plain_counter",
    "polled 1 s, held": "polled_held",
    "polled 1 s, trapezoid": "polled_trapezoid",
    "averaged power × time": "averaged_power",
}
COUNTERS: dict[str, dict[str, Any]] = {"true": {}, "partial": {"counter_of_sensor": 1}}


def run(options: Options) -> Report:
    """Two hundred loads for each kind of counter; nothing here is timed, so a busy machine does not matter."""
    from tests.fake_nvml import Machine
    from tests.probes import test_energy_truth

    loads = options.plan(200, tiny=10)
    machine = Machine()
    try:
        trials = {
            kind: [test_energy_truth.seeded(machine, seed, **sensor) for seed in range(loads)]
            for kind, sensor in COUNTERS.items()
        }
    finally:
        machine.close()
    flagged = sum("sensor_duty_unknown" in t.energy.reasons for found in trials.values() for t in found)
    return Report(
        name="energy_truth",
        compares=f"size of the energy error of five methods on the same {loads} simulated loads (95th percentile)",
        pairs=loads,
        figures=[figure for kind, found in trials.items() for figure in _figures(kind, found)],
        notes=(f"{flagged} of {2 * loads} of our readings say sensor_duty_unknown.", "Simulated: no A/A, no noise."),
    )


def _figures(kind: str, trials: list[Any]) -> list[Figure]:
    counter = "counter of true power" if kind == "true" else "counter that sees a quarter"
    found = []
    for way, key in KEYS.items():
        errors = np.array([abs(trial.errors[way]) for trial in trials])
        interval = percentile_interval(errors, 0.95)
        judged = kind == "true" and way == "ours"
        verdict = common.judge(interval, WITHIN) if judged else None
        target = WITHIN.text if judged else ""
        title = f"{way}, {counter}"
        found.append(Figure(key=f"{key}_{kind}_p95_share", title=title, interval=interval, target=target, verdict=verdict))
    return found


def percentile_interval(values: np.ndarray, share: float, level: float = 0.95) -> Interval:
    """A percentile with its distribution-free interval: ranks between which it lies with this probability (binomial)."""
    from scipy.stats import binom

    ordered, n = np.sort(values), len(values)
    low, high = (int(binom.ppf(q, n, share)) for q in ((1 - level) / 2, (1 + level) / 2))
    if high >= n:  # too few values to bound it from above
        return Interval(float(np.quantile(ordered, share)), None, None, n, ("too_few_values",))
    return Interval(float(np.quantile(ordered, share)), float(ordered[max(low - 1, 0)]), float(ordered[high]), n)
