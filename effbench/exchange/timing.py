"""Is the time of a launch what one process on one clock writes down?

    build ─ check ─ … ─ warm-up ──┤ window: step step step … ├── … ─ collect        stretches follow each other
                                  └ one clock in whole ns, read once between two steps: they leave no gap

The runner reads its clock once between two steps and ends a window by the protocol's rule, so a window's steps fill it from its start
to the first moment at which the rule is met. What was cut, put in, stretched or moved breaks that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import pairwise

import numpy as np

from effbench.exchange.checking import SENSORS_OF_STEPS, Array, Seen, launch_name, number, refused, remark, shown
from effbench.exchange.report import Finding
from effbench.protocol import PROTOCOLS
from effbench.schema import Launch

EXACT_S = 1e-9  # sums of times, rounded
PAUSE_S, LONG_PAUSE_S = 0.1, 0.5  # between two readings of the clock with nothing in between
OVERLAP_S = 2.0  # wall clocks are set now and then
NEEDED = ("build", "warm_up", "window")
# Series whose times are readings of the launch's clock, in ns. A GPU's are the middle of two readings.
CLOCKED = (*SENSORS_OF_STEPS, "process_memory", "process_cpu_time", "host_stolen_time", "host_pressure_some", "rapl_energy")
TICK_SHARE = 0.02  # of a tick; what the sum of two doubles loses


def sound(seen: Seen) -> Iterator[Finding]:
    """Series and stretches can be looked at at all; without this no other check of a launch means anything."""
    names = [s.name for s in seen.trace.series]
    if len(set(names)) < len(names):
        yield refused("series", seen.where, "two series of the trace have the same name")
    for series in seen.trace.series:
        t_s, values = series.t_s, series.values
        what = f"series {shown(series.name)}"
        if t_s.ndim != 1 or t_s.shape != values.shape:
            yield refused("series", seen.where, f"{what} has {values.shape} values for {t_s.shape} times")
        elif not (np.isfinite(t_s).all() and np.isfinite(values).all()):
            bad = int(np.count_nonzero(~(np.isfinite(t_s) & np.isfinite(values))))
            yield refused("series", seen.where, f"{bad} of {len(t_s)} samples of {what} are no finite numbers")
        elif len(t_s) > 1 and float(np.diff(t_s).min()) < 0:
            yield refused("series", seen.where, f"times of {what} go back by {-np.diff(t_s).min():.3g} s")
    for name, window in seen.launch.windows.items():
        start_s, end_s = number(window.start_s), number(window.end_s)
        if start_s is None or end_s is None or end_s < start_s or start_s < 0:
            given = f"{shown(window.start_s)} to {shown(window.end_s)} s"
            yield refused(
                "windows", seen.where, f"stretch {shown(name)} is {given}; it begins at 0 s or later and ends after that"
            )
    lost = [name for name in NEEDED if name not in seen.launch.windows]
    if lost:
        yield refused("windows", seen.where, f"no stretch {', '.join(lost)} is recorded")
    if not len(seen.step_s):
        yield refused("windows", seen.where, "no step is recorded")


def stretches(seen: Seen) -> Iterator[Finding]:
    """Stretches of a launch follow each other, and every sample lies between birth and end."""
    ordered = sorted(seen.launch.windows.items(), key=lambda item: (item[1].start_s, item[1].end_s))
    for (name, window), (later, following) in pairwise(ordered):
        if following.start_s < window.end_s - EXACT_S:
            both = f"{shown(name)} ends at {window.end_s:.6f} s, {shown(later)} begins at {following.start_s:.6f} s"
            yield refused("windows", seen.where, f"stretches overlap: {both}")
    if seen.launch.windows["warm_up"].end_s > seen.window.start_s + EXACT_S:
        yield refused("windows", seen.where, "the warm-up ends after the window begins")
    for series in seen.series.values():
        if series.t_s[0] < 0 or series.t_s[-1] > seen.end_s + LONG_PAUSE_S:
            span = f"{series.t_s[0]:.3f} to {series.t_s[-1]:.3f} s"
            yield refused(
                "series", seen.where, f"series {shown(series.name)} runs from {span}, the launch to {seen.end_s:.3f} s"
            )


def steps(seen: Seen) -> Iterator[Finding]:
    """Steps leave no gap, fill the window, and the window ended where the protocol's rule ends one."""
    rules = PROTOCOLS[seen.launch.spec.protocol]
    window = seen.window
    if window.ended_by not in ("rule", "limit"):
        yield refused("steps", seen.where, f"the window was ended by {shown(window.ended_by)}; by rule or limit it can be")
    minima = (rules.window_s, rules.window_steps, rules.window_limit_s)
    yield from _filled(seen, "step", "window", (window.start_s, window.end_s))
    yield from _ended(seen, "step", "window", minima, window.ended_by)
    if "warm_up_step" not in seen.series:
        yield refused("steps", seen.where, "no step of the warm-up is recorded")
        return
    warm_up = seen.launch.windows["warm_up"]
    yield from _filled(seen, "warm_up_step", "warm-up", (warm_up.start_s, warm_up.end_s))
    yield from _ended(seen, "warm_up_step", "warm-up", (rules.warm_up_s, rules.warm_up_steps, rules.window_limit_s), "")
    if "token" in seen.series:
        yield from _tokens(seen)


def _filled(seen: Seen, name: str, what: str, border: tuple[float, float]) -> Iterator[Finding]:
    start_s, length_s = seen.series[name].t_s, seen.series[name].values
    if length_s.min() <= 0:
        yield refused("steps", seen.where, f"a step of the {what} takes {length_s.min():.3g} s")
        return
    gaps_s = start_s[1:] - (start_s[:-1] + length_s[:-1])
    if len(gaps_s) and np.abs(gaps_s).max() > EXACT_S:
        worst = int(np.abs(gaps_s).argmax())
        yield refused(
            "steps", seen.where,
            f"{int((np.abs(gaps_s) > EXACT_S).sum())} steps of the {what} do not begin where the one before ends: "
            f"between {worst} and {worst + 1} lie {gaps_s[worst]:.3g} s, 0 s is what one clock gives",
        )  # fmt: skip
    before_s, after_s = start_s[0] - border[0], border[1] - (start_s[-1] + length_s[-1])
    for pause_s, where in ((before_s, "before the first step"), (after_s, "after the last step")):
        if pause_s < -EXACT_S or pause_s > LONG_PAUSE_S:
            yield refused("steps", seen.where, f"the {what} has {pause_s:.6f} s {where}; 0 to {LONG_PAUSE_S} s can be")
        elif pause_s > PAUSE_S:
            yield remark("steps", seen.where, f"the {what} has {pause_s:.3f} s {where}, usually below {PAUSE_S} s")


def _ended(seen: Seen, name: str, what: str, minima: tuple[float, int, float], ended_by: str) -> Iterator[Finding]:
    """Whether the last step is the one with which the rule, or the limit, was met first."""
    least_s, least_steps, limit_s = minima
    start_s, length_s = seen.series[name].t_s, seen.series[name].values
    before_s, at_end_s = float(start_s[-1] - start_s[0]), float(start_s[-1] + length_s[-1] - start_s[0])
    count = len(start_s)
    by_rule = count >= least_steps and at_end_s >= least_s - EXACT_S
    late = count > least_steps and before_s > least_s + EXACT_S
    by_limit = at_end_s >= limit_s - EXACT_S and (count == 1 or before_s < limit_s + EXACT_S)
    asked = f"{seen.launch.spec.protocol} asks for {least_s:g} s and {least_steps} steps, or {limit_s:g} s"
    had = f"the {what} has {count} steps in {at_end_s:.6f} s"
    if ended_by == "rule" and not by_rule:
        yield refused("protocol", seen.where, f"{had}, ended by its rule; {asked}")
    elif ended_by == "limit" and (not by_limit or (by_rule and late)):
        yield refused("protocol", seen.where, f"{had}, ended by its limit; {asked}")
    elif not by_rule and not by_limit:
        yield refused("protocol", seen.where, f"{had}; {asked}")
    elif late and ended_by != "limit":
        over = f"but the rule was met {before_s - least_s:.6f} s before the last step began"
        yield refused("protocol", seen.where, f"{had}, {over}; {asked}")


def _tokens(seen: Seen) -> Iterator[Finding]:
    """Every token was there within a step; CUDA's events may be a little off the host's clock."""
    token = seen.series["token"]
    slack_s = 1e-3 if seen.gpu else EXACT_S
    first_s, last_s = seen.step_start_s[0], seen.step_start_s[-1] + seen.step_s[-1]
    if token.t_s[0] < first_s - slack_s or token.t_s[-1] > last_s + slack_s:
        span = f"{token.t_s[0]:.6f} to {token.t_s[-1]:.6f} s"
        yield refused("steps", seen.where, f"tokens came from {span}, the steps run from {first_s:.6f} to {last_s:.6f} s")


def ticks(seen: Seen) -> Iterator[Finding]:
    """Times are readings of a clock that counts whole nanoseconds."""
    for name, series in seen.series.items():
        if name in CLOCKED or name.startswith("gpu_"):
            tick_s = 0.5e-9 if name.startswith("gpu_") else 1e-9
            off = float(off_grid(series.t_s, tick_s).mean())
            if off > 0.1 and len(series.t_s) > 1:
                share = f"{100 * off:.0f} % of {len(series.t_s)} times"
                yield refused(
                    "clock", seen.where, f"{share} of {name} lie between the ticks of {tick_s * 1e9:g} ns of its clock"
                )
    borders_s = np.array([t for w in seen.launch.windows.values() for t in (w.start_s, w.end_s)])
    off = float(off_grid(borders_s, 1e-9).mean())
    if off > 0:
        yield refused("clock", seen.where, f"{100 * off:.0f} % of the stretches' borders lie between ticks of 1 ns")


def off_grid(values: Array, quantum: float) -> np.ndarray:
    """Which values are no whole multiple of a quantum, beyond what doubles of this size lose."""
    counts = np.asarray(values, np.float64) / quantum
    slack = np.maximum(TICK_SHARE, 4e-16 * np.abs(counts))
    return np.asarray(np.abs(counts - np.rint(counts)) > slack)


def started(launch: Launch) -> float | None:
    """When a launch began, in s since 1970; None where the text is no time with its zone."""
    try:
        moment = datetime.fromisoformat(launch.started_at)
        return moment.timestamp() if moment.tzinfo else None
    except (TypeError, ValueError, OverflowError):
        return None


def in_turn(check: str, where: str, launches: Sequence[Seen]) -> Iterator[Finding]:
    """Launches of one sweep run one after the other, by the wall clock."""
    begun = [(started(seen.launch), seen) for seen in launches]
    for at, seen in begun:
        if at is None:
            given = shown(seen.launch.started_at)
            yield refused(check, seen.where, f"started_at {given} is no time with a zone, such as 2026-11-24T01:29:30+00:00")
    dated = sorted(((at, seen.launch.launch_id, seen) for at, seen in begun if at is not None), key=lambda item: item[:2])
    for (at, _, seen), (later, launch_id, _) in pairwise(dated):
        over_s = at + seen.end_s - later
        both = f"{seen.where} took {seen.end_s:.3f} s, but {launch_name(launch_id)} began {later - at:.3f} s after it"
        if over_s > OVERLAP_S:
            yield refused(check, where, f"{both}; launches run one after the other")
        elif over_s > 0.05:
            yield remark(check, where, both)
