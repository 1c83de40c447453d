"""Power and energy samples → the energy of a window, pure and numpy only: one code path for runner, verifier and app.

    counter   ▁▁▁▁▂▂▂▂▃▃▃▃▄▄▄▄▅▅▅▅▆▆▆▆      a hardware counter shows E(t) exactly, but only when it updates
    window         ├──────────────┤          its borders fall between updates: there E is filled in,
                   └ edge    edge ┘          evenly or in the shape of the power samples

The counter decides; the integral of instant power checks it. Either alone is marked. A reading that cannot be trusted is
None with a fault, never 0; a remark leaves it valid. E(t) depends on the series alone, never on the window asked for,
so the parts of a split window add up. Sources: the sampling rules of docs/methodology.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from effbench.reasons import is_fault

Array = npt.NDArray[np.float64]

AGREEMENT = 0.05  # largest relative gap between counter and integral that is not remarked on
FROZEN_PERIODS = 10  # a counter that skips this many updates, and FROZEN_S, stands still
FROZEN_S = 1.0
IDLE_UPDATES = 3  # fewer in all idle stretches together give no idle power


@dataclass(frozen=True, kw_only=True)
class EnergyResult:
    """Energy of one window. `gross_j` is by `method`; both methods are kept, also where the reading is invalid."""

    gross_j: float | None
    net_j: float | None  # gross_j − idle_power_w × length
    counter_j: float | None
    integral_j: float | None
    idle_power_w: float | None
    method: Literal["counter", "integral", ""]
    num_updates: int  # of the counter inside the window; of power samples where there is no counter
    counter_period_s: float | None
    valid: bool
    reasons: tuple[str, ...]


def window_energy(
    *,
    counter: tuple[Array, Array] | None,
    power: tuple[Array, Array] | None,
    start_s: float,
    end_s: float,
    idle: Sequence[tuple[float, float]] = (),
    min_updates: int,
    max_gap_s: float,
    sensor_duty: float | None = None,
) -> EnergyResult:
    """Energy of one device over [start_s, end_s] in J, by counter difference and by integral of power.

    counter: times in s and cumulative energy in J, each (N,); power: times in s and instant power in W, each (M,);
    both ascend in time and must bracket the window. idle: stretches with nothing of ours running. sensor_duty: the
    calibrated share of the time that the power sensor sees, None where it is not known.
    """
    assert end_s > start_s, f"a window ends after it starts: {start_s} to {end_s}"
    found: list[str] = []
    track = Counter(*counter, power) if counter and len(counter[0]) else None
    has_power = power is not None and len(power[0]) > 0
    counter_j = integral_j = None
    num_updates = 0
    if power is not None and has_power:
        found += _uncovered(power[0], start_s, end_s, max_gap_s)
        if not found:
            integral_j = _integral(*power, start_s, end_s)
        num_updates = int(np.count_nonzero((power[0] > start_s) & (power[0] <= end_s)))
    if track is not None:
        found += _uncovered(track.t_s, start_s, end_s, max_gap_s) or track.faults(start_s, end_s)
        counter_j = track.energy(start_s, end_s) if "not_covered" not in found and "counter_reset" not in found else None
        num_updates = track.num_updates(start_s, end_s)
    method: Literal["counter", "integral", ""] = "counter" if track else "integral" if has_power else ""
    gross_j = {"counter": counter_j, "integral": integral_j, "": None}[method]
    if not method:
        found.append("energy_missing")
    elif num_updates < min_updates and "counter_frozen" not in found:
        found.append("window_too_short")
    found += ["counter_missing"] * (track is None) + ["power_missing"] * (not has_power)
    if gross_j is None and method and not any(map(is_fault, found)):
        found.append("window_too_short")  # not one update on either side of a border
    if counter_j is not None and integral_j is not None and abs(counter_j - integral_j) > AGREEMENT * abs(counter_j):
        found.append("methods_disagree")
    valid = not any(map(is_fault, found))
    gross_j = gross_j if valid else None
    idle_power_w = _idle_power(track, power, idle, max_gap_s)
    if idle_power_w is None:
        found.append("idle_missing")
    if sensor_duty is None:
        found.append("sensor_duty_unknown")
    return EnergyResult(
        gross_j=gross_j,
        net_j=gross_j - idle_power_w * (end_s - start_s) if gross_j is not None and idle_power_w is not None else None,
        counter_j=counter_j, integral_j=integral_j, idle_power_w=idle_power_w, method=method, num_updates=num_updates,
        counter_period_s=track.period_s if track else None, valid=valid, reasons=tuple(dict.fromkeys(found)),
    )  # fmt: skip


def mean_over(t_s: Array, values: Array, start_s: float, end_s: float, max_gap_s: float | None = None) -> float | None:
    """Time average of a series over [start_s, end_s], borders interpolated. None where the samples do not bracket it."""
    if not len(t_s) or end_s <= start_s or _uncovered(t_s, start_s, end_s, np.inf if max_gap_s is None else max_gap_s):
        return None
    return _integral(t_s, values, start_s, end_s) / (end_s - start_s)


class Counter:
    """A cumulative energy counter that was sampled, and E(t) between its updates.

    A sampled counter tells between which two samples it updated. Updates come at an even beat, so a line through all of
    them puts each within about a millisecond, inside its two samples. E is exact at updates; between two of them it grows
    evenly, or in the shape of the power samples where those are finer. One more update on either side is taken from the beat, so that a window may end
    within a period of the last sample's update.
    """

    def __init__(self, t_s: Array, energy_j: Array, power: tuple[Array, Array] | None = None):
        self.t_s, self._power = t_s, power
        change = np.diff(energy_j)
        self._resets_s = t_s[1:][change < 0]
        updates = np.flatnonzero(change > 0)
        self._after_s, self._by_s = t_s[updates], t_s[updates + 1]
        self._times, self.period_s = _update_times(self._after_s, self._by_s, num_intervals=len(change))
        self._levels = energy_j[updates + 1]
        self._knots_s, self._knots_j = self._times, self._levels
        if self.period_s is not None:
            before_s = min(self._times[0] - self.period_s, t_s[0])
            after_s = self._times[-1] + self.period_s
            grown_j = self._levels[-1] - self._levels[-2]
            if power is not None and not _uncovered(power[0], self._times[-1], after_s, self.period_s):
                grown_j = _integral(*power, self._times[-1], after_s)
            self._knots_s = np.concatenate([[before_s], self._times, [after_s]])
            self._knots_j = np.concatenate([[energy_j[0]], self._levels, [self._levels[-1] + grown_j]])

    def faults(self, start_s: float, end_s: float) -> list[str]:
        """What is wrong with the counter between the samples that bracket the window."""
        # As far as E is filled in from: the last update before the window and the first one after it.
        first_s = self._times[self._times <= start_s][-1:]
        last_s = self._times[self._times >= end_s][:1]
        touched = (self._resets_s > (first_s[0] if len(first_s) else self.t_s[0])) & (
            self._resets_s <= (last_s[0] if len(last_s) else self.t_s[-1])
        )
        if touched.any():
            return ["counter_reset"]
        beats = np.concatenate([[self.t_s[0]], self._times, [self.t_s[-1]]])
        pauses = np.diff(beats)[(beats[1:] > start_s) & (beats[:-1] < end_s)]
        longest_s = max(FROZEN_S, FROZEN_PERIODS * (self.period_s or 0.0))
        return ["counter_frozen"] if len(pauses) and pauses.max() > longest_s else []

    def num_updates(self, start_s: float, end_s: float) -> int:
        return int(np.count_nonzero((self._times > start_s) & (self._times <= end_s)))

    def energy(self, start_s: float, end_s: float) -> float | None:
        """Energy in J over [start_s, end_s], or None where no updates bracket it."""
        start_j, end_j = self._at(start_s), self._at(end_s)
        return None if start_j is None or end_j is None else end_j - start_j

    def _at(self, t_s: float) -> float | None:
        index = int(np.searchsorted(self._knots_s, t_s, side="right")) - 1
        if index < 0 or index + 1 >= len(self._knots_s):
            return float(self._knots_j[-1]) if len(self._knots_s) and t_s == self._knots_s[-1] else None
        left_s, right_s = float(self._knots_s[index]), float(self._knots_s[index + 1])
        share = (t_s - left_s) / (right_s - left_s)
        if self._power is not None and _resolves(self._power, left_s, right_s):
            whole_j = _integral(*self._power, left_s, right_s)
            share = _integral(*self._power, left_s, t_s) / whole_j if whole_j > 0 else share
        left_j, right_j = float(self._knots_j[index]), float(self._knots_j[index + 1])
        return left_j + share * (right_j - left_j)


def _resolves(power: tuple[Array, Array], start_s: float, end_s: float) -> bool:
    """Whether power samples tell more of [start_s, end_s] than its mean.

    A sensor no faster than the counter shows one change in there, at a moment that is its own and not the load's: over
    200 simulated loads the straight line was nearer to the truth (95th percentile 0.28 % against 0.32 %).
    """
    if _uncovered(power[0], start_s, end_s, end_s - start_s):
        return False
    inside = power[1][(power[0] >= start_s) & (power[0] <= end_s)]
    return bool(np.count_nonzero(np.diff(inside)) >= 2)


def counter_period(t_s: Array, energy_j: Array) -> float | None:
    """The update period of a sampled counter in s, None from fewer than three updates. Shapes (N,)."""
    return Counter(t_s, energy_j).period_s


def _update_times(after_s: Array, by_s: Array, *, num_intervals: int) -> tuple[Array, float | None]:
    """When a counter updated, given that update k happened in (after_s[k], by_s[k]]; and its period, both in s."""
    if len(by_s) < 3:
        return (after_s + by_s) / 2, None
    if len(by_s) >= 0.9 * num_intervals:  # it updates faster than it is sampled: what was read was fresh
        return by_s, float(np.median(np.diff(by_s)))
    middle_s = (after_s + by_s) / 2
    steps_s = np.diff(middle_s)
    period_s = float(steps_s[steps_s < 1.5 * np.median(steps_s)].mean())  # longer ones skip updates that were not seen
    beat = np.concatenate([[0.0], np.cumsum(np.maximum(1.0, np.round(steps_s / period_s)))])
    slope, origin = np.polyfit(beat, middle_s, 1)
    fitted_s = origin + slope * beat
    slack_s = (by_s - after_s) / 4
    off_beat = np.mean((fitted_s < after_s - slack_s) | (fitted_s > by_s + slack_s))
    times_s = middle_s if off_beat > 0.1 else np.clip(fitted_s, after_s, by_s)
    return times_s, float(slope)


def _uncovered(t_s: Array, start_s: float, end_s: float, max_gap_s: float) -> list[str]:
    """Why samples at `t_s` do not cover [start_s, end_s]: not_covered, sampling_gap, or nothing."""
    if not len(t_s) or t_s[0] > start_s or t_s[-1] < end_s:
        return ["not_covered"]
    first, last = np.searchsorted(t_s, start_s, side="right") - 1, np.searchsorted(t_s, end_s)
    bracket_s = t_s[first : last + 1]
    return ["sampling_gap"] if len(bracket_s) > 1 and np.diff(bracket_s).max() > max_gap_s else []


def _integral(t_s: Array, values: Array, start_s: float, end_s: float) -> float:
    """∫ values dt over [start_s, end_s] by the trapezoid rule with interpolated borders; samples must bracket it."""
    inside = (t_s > start_s) & (t_s < end_s)
    borders = np.interp([start_s, end_s], t_s, values)
    times = np.concatenate([[start_s], t_s[inside], [end_s]])
    return float(np.trapezoid(np.concatenate([borders[:1], values[inside], borders[1:]]), times))


def _idle_power(
    track: Counter | None, power: tuple[Array, Array] | None, idle: Sequence[tuple[float, float]], max_gap_s: float
) -> float | None:
    """Mean power in W over the idle stretches, by the method that gives the gross energy, so that its bias cancels."""
    energy_j = length_s = 0.0
    num_updates = 0
    for start_s, end_s in idle:
        if track is not None:
            covered = not _uncovered(track.t_s, start_s, end_s, max_gap_s) and not track.faults(start_s, end_s)
            stretch_j = track.energy(start_s, end_s) if covered else None
            num_updates += track.num_updates(start_s, end_s)
        elif power is not None and not _uncovered(power[0], start_s, end_s, max_gap_s):
            stretch_j = _integral(*power, start_s, end_s)
            num_updates += int(np.count_nonzero((power[0] > start_s) & (power[0] <= end_s)))
        else:
            stretch_j = None
        if stretch_j is not None:
            energy_j, length_s = energy_j + stretch_j, length_s + end_s - start_s
    return energy_j / length_s if length_s > 0 and num_updates >= IDLE_UPDATES else None
