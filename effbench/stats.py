"""Intervals over blocks. The block is the unit of replication; a step never is.

    steps of one launch ──per_launch──▶ one number ──┐
    steps of one launch ──per_launch──▶ one number ──┼─ block_interval ──▶ value, lower, upper, n
    ...                                              ┘

Steps inside a launch share its memory layout, clocks and neighbours, so they are correlated: counted as replicas they
make nearly every A/A comparison "significant" (tests/test_stats.py prints the rate). Hence every function here that
returns an interval takes exactly one number per block and refuses anything else, and the way from steps to that one
number is a function of its own, `per_launch`.

Student's t is applied to logarithms: launch-to-launch noise of times, rates and energies is multiplicative, and the
interval of a ratio and of its inverse then say the same. Why the outermost repetition is the replica: Kalibera and Jones,
"Rigorous benchmarking in reasonable time", ISMM 2013; Georges, Buytaert and Eeckhout, OOPSLA 2007.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

Verdict = Literal["better", "worse", "no difference shown"]
Statistic = Literal["median", "mean", "p95", "p99"]
Values = Sequence[float | None] | npt.NDArray[np.float64]

LEVEL = 0.95
SCREENING_FLOOR = 0.10  # relative; `quick` claims nothing smaller than this
_FLOORS = {"smoke": math.inf, "quick": SCREENING_FLOOR}  # every other protocol: 0


@dataclass(frozen=True)
class Interval:
    """A value with its two-sided interval over `n` blocks. What is missing is None, and `reasons` says why.

    Reasons: `no_blocks` (no value), `one_block` (no interval), `not_finite` (a block gave NaN or infinity and was left
    out), `not_all_positive` (arithmetic mean and t on the plain scale), `baseline_not_positive` (no ratio exists).
    """

    value: float | None
    lower: float | None
    upper: float | None
    n: int
    reasons: tuple[str, ...] = ()


def per_launch(step_values: npt.ArrayLike, statistic: Statistic = "median") -> float | None:
    """Reduce the steps of one launch, shape (N,), to the one number that stands for its block; None without steps."""
    steps = np.asarray(step_values, dtype=np.float64)
    if statistic == "mean":
        return float(np.mean(steps)) if steps.size else None
    return percentile(steps, {"median": 50.0, "p95": 95.0, "p99": 99.0}[statistic])


def percentile(step_values: npt.ArrayLike, percent: float) -> float | None:
    """A percentile of shape (N,), linear between order statistics (Hyndman and Fan type 7); None when there is no step."""
    steps = np.asarray(step_values, dtype=np.float64)
    return float(np.percentile(steps, percent)) if steps.size else None


def tail_is_resolved(num_steps: int, percent: float) -> bool:
    """Whether at least one of `num_steps` steps is expected beyond the percentile: p99 of 20 steps is only their maximum."""
    return num_steps * (100.0 - percent) >= 100.0 - 1e-9


def block_interval(values_per_block: Values, level: float = LEVEL, *, plain: bool = False) -> Interval:
    """Mean of one number per block with its t interval: geometric on logarithms, arithmetic where a value is not positive.

    `values_per_block`: shape (blocks,), None where a block gave nothing (it is dropped and does not count in n). `plain` is for
    differences: always arithmetic, since on logarithms an interval of positive ones could never reach 0.
    Raises ValueError when a block brings more than one number.
    """
    values, reasons = _present(_one_per_block(values_per_block))
    return _interval(values, level, reasons, plain=plain)


def paired_ratio(values: Values, baseline_values: Values, level: float = LEVEL) -> Interval:
    """Ratio of values to baseline values of the same blocks, with its t interval on the log of the per-block ratios.

    Both have shape (blocks,) in the same order; a block with a missing side is dropped. A zero or negative baseline
    leaves no ratio. Raises ValueError for unequal lengths or more than one number per block.
    """
    ratios, reasons = _ratios(values, baseline_values)
    return Interval(None, None, None, 0, reasons) if ratios is None else _interval(ratios, level, reasons)


def paired_p_value(values: Values, baseline_values: Values) -> float | None:
    """Two-sided p-value of no difference: Student's t on the logs of the per-block ratios, with blocks − 1 degrees of freedom.

    Shapes and dropped blocks as in `paired_ratio`, to which it belongs: below 1 − level where the interval of that level
    leaves out 1. Ratios that agree exactly have no spread: 1.0 where they are 1, else 0.0. None with fewer than two blocks or
    a value that is not positive. Raises ValueError as `paired_ratio` does.
    """
    ratios, _ = _ratios(values, baseline_values)
    if ratios is None or len(ratios) < 2 or not np.all(ratios > 0):
        return None
    if np.ptp(ratios) == 0:
        return float(ratios[0] == 1.0)
    scaled, degrees = np.log(ratios), len(ratios) - 1
    # t over the root of the degrees, as an angle: what `t_quantile` inverts.
    angle = math.atan2(abs(float(np.mean(scaled))) * math.sqrt(len(ratios) / degrees), float(np.std(scaled, ddof=1)))
    return min(1.0, max(0.0, 1.0 - _central_probability(angle, degrees)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given: those up to α are rejected with a family-wise error of at most α.

    The k-th smallest of m is multiplied by m − k + 1, never less than the one before it, at most 1. Holds however the tests
    depend on each other. Source: Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979).
    Raises ValueError for what is no probability.
    """
    wrong = [p for p in p_values if not 0.0 <= p <= 1.0]
    if wrong:
        raise ValueError(f"{wrong[0]} is no p-value; leave out comparisons that have none")
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = least
    return adjusted


def verdict(lower: float | None, upper: float | None, better: Literal["lower", "higher"], protocol: str) -> Verdict:
    """What the interval [lower, upper] of a paired ratio lets one say of the technique against its baseline.

    A difference is shown when the interval leaves out 1. Under `quick` its middle must also be at least SCREENING_FLOOR
    from 1 (a ratio of at most 0.90, or at least 1 / 0.90, so that swapping the two sides swaps the verdict);
    `smoke` never shows one. Raises ValueError for a metric without direction.
    """
    if better not in ("lower", "higher"):
        raise ValueError(f"a metric whose better direction is {better!r} has no verdict")
    if lower is None or upper is None or lower <= 1.0 <= upper:
        return "no difference shown"
    middle = math.sqrt(lower * upper) if lower > 0 else (lower + upper) / 2
    floor = _FLOORS.get(protocol, 0.0)
    if floor >= 1.0 or (middle > 1.0 - floor + 1e-12 and middle < 1.0 / (1.0 - floor) - 1e-12):
        return "no difference shown"
    return "better" if (upper < 1.0) == (better == "lower") else "worse"


@cache
def t_quantile(level: float, degrees: int) -> float:
    """Two-sided Student t quantile: |T| stays below it with probability `level`, for whole `degrees` of freedom >= 1.

    Finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4, inverted by bisection in the angle arctan(t / sqrt(degrees));
    importing scipy.special for one number costs 0.2 to 0.4 s.
    """
    if not (0.0 < level < 1.0 and degrees >= 1):
        raise ValueError(f"no t quantile at level {level} with {degrees} degrees of freedom")
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        if _central_probability(middle, degrees) < level:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _central_probability(angle: float, degrees: int) -> float:
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2 == 1
    term = total = cosine if odd else 1.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if odd:
        return 2 / math.pi * (angle + (sine * total if degrees > 1 else 0.0))
    return sine * total


def _interval(values: npt.NDArray[np.float64], level: float, reasons: tuple[str, ...], *, plain: bool = False) -> Interval:
    n = len(values)
    if n == 0:
        return Interval(None, None, None, 0, (*reasons, "no_blocks"))
    logarithmic = not plain and bool(np.all(values > 0))
    scaled = np.sort(np.log(values) if logarithmic else values)  # sorted: sums do not depend on the order of blocks
    if not (plain or logarithmic):
        reasons = (*reasons, "not_all_positive")
    back = _exp if logarithmic else float
    # Blocks that agree exactly (a parameter count) have no spread; the sum of rounded logarithms must not invent one.
    centre = float(np.mean(scaled)) if scaled[0] < scaled[-1] else float(scaled[0])
    value = back(centre) if scaled[0] < scaled[-1] else float(values[0])
    if n == 1:
        return Interval(value, None, None, 1, (*reasons, "one_block"))
    if scaled[0] == scaled[-1]:
        return Interval(value, value, value, n, reasons)
    half = t_quantile(level, n - 1) * float(np.std(scaled, ddof=1)) / math.sqrt(n)
    return Interval(value, back(centre - half), back(centre + half), n, reasons)


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))  # a bound beyond 1e304 is as good as none, and infinity has no JSON


def _ratios(values: Values, baseline_values: Values) -> tuple[npt.NDArray[np.float64] | None, tuple[str, ...]]:
    """The ratio of every block that has both sides, and what was wrong; None where a baseline is not positive."""
    above, below = _one_per_block(values), _one_per_block(baseline_values)
    if len(above) != len(below):
        raise ValueError(f"{len(above)} blocks cannot be paired with {len(below)} blocks of the baseline")
    pairs = [(a, b) for a, b in zip(above, below, strict=True) if a is not None and b is not None]
    finite = [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
    reasons = ("not_finite",) if len(finite) < len(pairs) else ()
    if any(b <= 0 for _, b in finite):
        return None, (*reasons, "baseline_not_positive")
    return np.array([a / b for a, b in finite]), reasons


def _present(values: Sequence[float | None]) -> tuple[npt.NDArray[np.float64], tuple[str, ...]]:
    given = np.array([v for v in values if v is not None], dtype=np.float64)
    finite = given[np.isfinite(given)]
    return finite, (("not_finite",) if finite.size < given.size else ())


def _one_per_block(values: Values) -> list[float | None]:
    numbers = list(values)
    if any(v is not None and np.ndim(v) > 0 for v in numbers):
        raise ValueError("an interval takes one number per block; reduce the steps of a launch with per_launch first")
    return [None if v is None else float(v) for v in numbers]
