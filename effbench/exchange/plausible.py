"""Does this look measured? Drift, sample counts, digits, copies of each other, and spread between blocks. Statistics, not physics.

Each test says how unlikely an honest record is; those that honest machines fail now and then give remarks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from effbench.exchange.checking import Seen, launch_name, refused, remark, step_ticks
from effbench.exchange.known import Known, Shape, alike, chance_limit, fingerprint, levels
from effbench.exchange.report import Finding

DRIFT = 0.25  # relative, between the first and the last third of the window
SAMPLE_PERIOD_S = 0.1  # of process_memory
EXTRA_SAMPLES = 6  # readings asked for at borders
LONG_GAP_S = 1.0
ROUND_NS = 10_000  # digits of a step's time that somebody may have typed
COARSE_NS = 1_000  # no clock of a computer is coarser
QUIET_S = 2e-7  # reading a clock and waiting for a device jitter by more
SEGMENTS = 8
# Series that no two launches share, with the number of different values from which on that holds.
UNIQUE = {"process_memory": 8, "process_cpu_time": 2, "gpu_energy_counter": 3, "gpu_power_instant": 8, "rapl_energy": 3}
KNOWN_AT_ONCE = 5_000
UNLIKELY, IMPOSSIBLE = 1e-6, 1e-12  # for an honest record
EVEN = (0.2, 0.05)  # spread of blocks over what their noise gives: remarked on, refused


def steady(seen: Seen) -> Iterator[Finding]:
    """Steps do not get much slower or faster within the window."""
    third = len(seen.step_s) // 3
    if third < 4:
        return
    first, last = seen.step_s[:third], seen.step_s[-third:]
    drift = float(np.median(last) / np.median(first))
    noise = 1.2533 * math.hypot(float(np.std(np.log(first))), float(np.std(np.log(last)))) / math.sqrt(third)
    if abs(math.log(drift)) > max(math.log(1 + DRIFT), 3 * noise):
        both = f"{np.median(first):.6g} s at first, {np.median(last):.6g} s at last"
        yield remark("steady state", seen.where, f"steps took {both}; a factor below {1 + DRIFT:g} is usual")


def samples(seen: Seen) -> Iterator[Finding]:
    """Sensors gave about as many samples as their period asks for, never more; the sampler counted as many as there are."""
    memory = seen.series.get("process_memory")
    if memory is not None and len(memory.t_s) > 1:
        span_s = float(memory.t_s[-1] - memory.t_s[0])
        most, count = span_s / SAMPLE_PERIOD_S + 1 + EXTRA_SAMPLES, len(memory.t_s)
        asked = f"one every {SAMPLE_PERIOD_S:g} s gives {span_s / SAMPLE_PERIOD_S + 1:.0f}"
        if count > most:
            yield refused("samples", seen.where, f"process_memory has {count} samples in {span_s:.3f} s; {asked}")
        elif count < 0.6 * (most - EXTRA_SAMPLES):
            yield remark("samples", seen.where, f"process_memory has {count} samples in {span_s:.3f} s; {asked}")
    for name in ("process_memory", "gpu_energy_counter", "gpu_power_instant", "rapl_energy"):
        series = seen.series.get(name)
        if series is not None:
            inside = series.t_s[(series.t_s >= seen.window.start_s) & (series.t_s <= seen.window.end_s)]
            longest_s = float(np.diff(np.concatenate([[seen.window.start_s], inside, [seen.window.end_s]])).max())
            if longest_s > LONG_GAP_S:
                yield remark(
                    "samples", seen.where, f"{name} has a gap of {longest_s:.3f} s within the window; {LONG_GAP_S:g} s is usual"
                )
    counter, reads = seen.series.get("gpu_energy_counter"), seen.fact("gpu_sampler_reads")
    if counter is not None and reads is not None and "device_lost" not in seen.launch.reasons:
        failures = seen.launch.facts.get("gpu_failed_reads") or {}
        there = len(counter.t_s) + int(failures.get("gpu_energy_counter") or 0)
        if not 0.97 * reads - 2 <= there <= reads + 2:
            yield refused("samples", seen.where, f"gpu_energy_counter has {there} samples, its sampler made {reads:g} readings")


def digits(seen: Seen) -> Iterator[Finding]:
    """Times of steps have the noise and the digits of a clock."""
    ticks = step_ticks(seen.step_s)
    if len(ticks) < 5:
        return
    rounded = float(np.mean(ticks % ROUND_NS == 0))
    if rounded > 0.3:
        yield refused(
            "digits",
            seen.where,
            f"{100 * rounded:.0f} % of {len(ticks)} step times are whole multiples of {ROUND_NS} ns; by chance 0.01 % are",
        )
    common = int(np.gcd.reduce(np.abs(ticks - ticks[0])))
    if common >= COARSE_NS:
        yield refused(
            "digits", seen.where, f"all step times differ by multiples of {common} ns; clocks count in less than {COARSE_NS} ns"
        )
    if len(ticks) >= 8 and float(np.std(seen.step_s)) < QUIET_S:
        spread = f"a spread of {np.std(seen.step_s):.2g} s"
        yield refused(
            "digits",
            seen.where,
            f"{len(ticks)} step times have {spread}; reading the clock alone jitters by more than {QUIET_S:g} s",
        )
    repeated = len(ticks) - len(np.unique(ticks))
    by_chance = len(ticks) ** 2 * resolution_ns(ticks) / max(2.0 * middle_half_ns(ticks), 1.0)
    if repeated > 0.2 * len(ticks) and repeated > 10 * by_chance:
        count = f"{repeated} of {len(ticks)} step times repeat another one to the nanosecond"
        yield refused("digits", seen.where, f"{count}; by chance {by_chance:.2g} would")
    power = seen.inside("gpu_power_instant")
    if len(power) >= 40 and float(np.ptp(power)) == 0:
        yield remark("digits", seen.where, f"all {len(power)} samples of power are {power[0]:g} W")


def resolution_ns(ticks: npt.NDArray[np.int64]) -> float:
    """The finest difference between two step times; with many steps that is the clock's."""
    apart = np.diff(np.unique(ticks))
    return float(apart.min()) if len(apart) else 1.0


def middle_half_ns(ticks: npt.NDArray[np.int64]) -> float:
    """The spread of the middle half."""
    return float(np.subtract(*np.percentile(ticks, [75, 25])))


def copies(launches: Sequence[Seen]) -> Iterator[Finding]:
    """No two launches of a bundle have the same trace, nor one that is the other with its times scaled or noise added."""
    prints = [fingerprint(seen.trace) for seen in launches]
    first: dict[str, Seen] = {}
    for seen, own in zip(launches, prints, strict=True):
        if own is None:
            continue
        other = first.setdefault(own.exact, seen)
        if other is not seen:
            yield refused(
                "copies", seen.where, f"its {len(seen.step_s)} step times are those of {other.where}, to the nanosecond"
            )
    told: set[tuple[int, int]] = set()
    for i, j, r, n in alike(
        [levels(p.shape) if p and s.own_workload else _none() for p, s in zip(prints, launches, strict=True)]
    ):
        told.add((i, j))
        if prints[i] != prints[j]:
            yield refused(
                "copies", launches[j].where, f"its steps go up and down as those of {launches[i].where}: {_agreement(r, n)}"
            )
    for (i, j), count in _shared(launches).items():
        least = 0.3 * min(len(launches[i].step_s), len(launches[j].step_s))
        if (i, j) not in told and count >= max(4.0, least) and prints[i] != prints[j]:
            yield refused(
                "copies", launches[j].where, f"{count} of its step times are those of {launches[i].where}, to the nanosecond"
            )
    first_of: dict[tuple[str, bytes], Seen] = {}
    for seen in launches:
        for name, fewest in UNIQUE.items():
            series = seen.series.get(name)
            if series is not None and len(np.unique(series.values)) >= fewest:
                other = first_of.setdefault((name, series.values.tobytes()), seen)
                if other is not seen:
                    yield refused(
                        "copies",
                        seen.where,
                        f"its {len(series.values)} samples of {name} are those of {other.where}, to the last digit",
                    )


def _none() -> Shape:
    return np.zeros(0, np.int8)


def _agreement(r: float, n: int) -> str:
    return f"correlation {r:.2f} over {n} changes; independent launches stay below {chance_limit(n):.2f}"


def _shared(launches: Sequence[Seen]) -> Counter[tuple[int, int]]:
    """How many step times two launches share to the ns, of launches whose times spread too far for that to be chance."""
    values, owners = [], []
    for index, seen in enumerate(launches):
        ticks = np.unique(step_ticks(seen.step_s[:200]))
        if len(ticks) >= 5 and middle_half_ns(ticks) > 100 * len(ticks) * resolution_ns(ticks):
            values.append(ticks)
            owners.append(np.full(len(ticks), index))
    found: Counter[tuple[int, int]] = Counter()
    if values:
        ticks, owner = np.concatenate(values), np.concatenate(owners)
        order = np.lexsort((owner, ticks))
        ticks, owner = ticks[order], owner[order]
        same = np.flatnonzero(ticks[1:] == ticks[:-1])
        found.update((int(owner[k]), int(owner[k + 1])) for k in same)
    return found


def spread(groups: Mapping[str, Sequence[Seen]]) -> Iterator[Finding]:
    """Blocks differ at least as much as the noise within them makes them differ. Groups: launches of one spec, by its rows' names.

    Noise of a mean: from neighbouring eighths of a launch, so that a common drift does not count. Launch-to-launch noise only adds.
    """
    total, degrees = 0.0, 0
    for where, launches in groups.items():
        scaled = [np.log(seen.step_s) for seen in launches if len(seen.step_s) >= 2 * SEGMENTS]
        if len(scaled) < 3:
            continue
        parts = [np.array([part.mean() for part in np.array_split(steps, SEGMENTS)]) for steps in scaled]
        noise = float(np.median(np.concatenate([np.diff(part) ** 2 for part in parts]))) / (2 * 0.455 * SEGMENTS)
        if noise <= 0:
            continue
        found = float(np.var([steps.mean() for steps in scaled], ddof=1))
        statistic = (len(parts) - 1) * found / noise
        total, degrees = total + statistic, degrees + len(parts) - 1
        yield from _too_even(where, statistic, len(parts) - 1, found, noise)
    if degrees > 4:
        yield from _too_even("bundle", total, degrees, total / degrees, 1.0)


def _too_even(where: str, statistic: float, degrees: int, found: float, expected: float) -> Iterator[Finding]:
    """Both unlikely and small: noise that swings back within a launch makes means a little more even than it says."""
    chance, share = chi_square_below(2 * statistic, degrees), math.sqrt(found / expected)  # twice: the noise is estimated too
    if chance < UNLIKELY and share < EVEN[0]:
        make = refused if chance < IMPOSSIBLE and share < EVEN[1] else remark
        given = f"mean step times of {degrees + 1} launches spread by {share:.2g} of what the noise within them gives"
        yield make("spread", where, f"{given}; above {EVEN[0]:g} is usual")


def chi_square_below(value: float, degrees: int) -> float:
    """P(χ² of so many degrees < value): the series of the lower incomplete gamma function (Abramowitz and Stegun 6.5.29)."""
    a, x = degrees / 2, value / 2
    if x <= 0:
        return 0.0
    term = total = 1.0
    for k in range(1, 10_000):
        term *= x / (a + k)
        total += term
        if term < 1e-12 * total:
            break
    return min(1.0, math.exp(a * math.log(x) - x - math.lgamma(a + 1) + math.log(total)))


def known_already(launches: Sequence[Seen], known: Known) -> Iterator[Finding]:
    """No launch is one that is here under another name; one that is here under its own name is the same."""
    by_exact = {print_.exact: name for name, print_ in known.launches.items()}
    names = list(known.launches)
    new: list[tuple[Seen, Shape]] = []
    for seen in launches:
        own, launch_id = fingerprint(seen.trace), seen.launch.launch_id
        if own is None:
            continue
        if launch_id in known.launches:
            if known.launches[launch_id].exact != own.exact:
                yield refused("known", seen.where, "a launch of this id is here, with other step times")
        elif own.exact in by_exact:
            yield refused(
                "known",
                seen.where,
                f"its step times are those of {launch_name(by_exact[own.exact])}, which is here, to the nanosecond",
            )
        elif seen.own_workload:
            new.append((seen, levels(own.shape)))
    if not new or not names:
        return
    for start in range(0, len(names), KNOWN_AT_ONCE):
        part = names[start : start + KNOWN_AT_ONCE]
        for i, j, r, n in alike([shape for _, shape in new], [levels(known.launches[name].shape) for name in part]):
            yield refused(
                "known",
                new[i][0].where,
                f"its steps go up and down as those of {launch_name(part[j])}, which is here: {_agreement(r, n)}",
            )
