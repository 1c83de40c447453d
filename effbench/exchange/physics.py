"""Can a device do this? Limits of sensors, counters, power and memory, each with its number; rates are in `roofline.py`.

Limits are those of the device's datasheet row (`hardware.py`) and of the machine as the record's provenance names it. What an
honest machine can show now and then is a remark; what none can show is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np

from effbench.exchange.checking import Seen, number, refused, remark, shown
from effbench.exchange.report import Finding
from effbench.exchange.timing import off_grid, started
from effbench.hardware import device
from effbench.schema import Reading

# Series → (unit, smallest step of its values): NVML counts in mJ, mW, percent, MHz, °C and B, /proc in pages, ticks and µs.
SENSORS: Mapping[str, tuple[str, float | None]] = {
    "step": ("s", 1e-9), "warm_up_step": ("s", 1e-9), "token": ("tokens", 1.0), "process_memory": ("B", 4096.0),
    "process_cpu_time": ("s", 1e-9), "host_stolen_time": ("s", 1e-3), "host_pressure_some": ("s", 1e-6),
    "rapl_energy": ("J", 1e-6), "host_rapl_energy": ("J", 1e-6), "gpu_energy_counter": ("J", 1e-3),
    "gpu_power_instant": ("W", 1e-3), "gpu_power_average": ("W", 1e-3), "gpu_busy": ("ratio", 1e-2),
    "gpu_memory_used": ("B", 1.0), "gpu_memory_process": ("B", 1.0), "gpu_clock_sm": ("MHz", 1.0),
    "gpu_clock_memory": ("MHz", 1.0), "gpu_temperature": ("°C", 1.0), "gpu_throttle": ("bits", 1.0),
    "gpu_thermal_violation": ("s", 1e-9), "gpu_sm_activity": ("ratio", None), "gpu_sm_occupancy": ("ratio", None),
    "gpu_tensor_activity": ("ratio", None), "gpu_dram_activity": ("ratio", None),
}  # fmt: skip
CUMULATIVE = (
    "process_cpu_time",
    "host_stolen_time",
    "host_pressure_some",
    "rapl_energy",
    "host_rapl_energy",
    "gpu_thermal_violation",
)
RANGES = {"ratio": (0.0, 1.05), "°C": (-30.0, 130.0), "MHz": (0.0, 5_000.0), "B": (None, None), "W": (0.0, None)}
PROCESSOR_W = 1_500.0  # of one CPU package, a generous bound
DRIVER_CAPACITY = 0.1  # relative; a driver keeps some of a datasheet's memory for itself
FASTER = 1.1  # a rate or power of a device over the datasheet's: boost clocks, sensors' tolerance
DISAGREE = (0.05, 0.4)  # counter and integral of power: remarked on; refused, since a sensor of 10 Hz may beat with the steps
KERNELS_WORD = ("host_stolen_time", "host_pressure_some")  # read in turn with the clock, and set back by some hypervisors


def sensors(seen: Seen) -> Iterator[Finding]:
    """Values have their sensor's unit, its step and its range; counters only grow."""
    for name, series in seen.series.items():
        if name not in SENSORS:
            continue
        unit, quantum = SENSORS[name]
        values = series.values
        if series.unit != unit:
            yield refused("sensors", seen.where, f"{name} is in {shown(series.unit)}, its sensor gives {unit}")
            continue
        if quantum is not None and off_grid(values, quantum).any():
            off = int(off_grid(values, quantum).sum())
            yield refused(
                "sensors",
                seen.where,
                f"{off} of {len(values)} values of {name} are no multiples of {quantum:g} {unit}, its sensor's step",
            )
        low, high = RANGES.get(unit, (None, None))
        if (low is not None and values.min() < low) or (high is not None and values.max() > high):
            span = f"{values.min():.6g} to {values.max():.6g} {unit}"
            yield refused(
                "sensors", seen.where, f"{name} runs from {span}; from {low:g} {f'to {high:g} ' if high else ''}{unit} can be"
            )
        top_mhz = seen.fact(name.replace("gpu_clock", "gpu_max_clock") + "_mhz") if unit == "MHz" else None
        if top_mhz and values.max() > 1.01 * top_mhz:
            yield refused(
                "clocks", seen.where, f"{name} reaches {values.max():g} MHz; the device's highest clock is {top_mhz:g} MHz"
            )
        if name in CUMULATIVE and len(values) > 1 and np.diff(values).min() < 0:
            make = remark if name in KERNELS_WORD else refused
            yield make("sensors", seen.where, f"{name} falls by {-np.diff(values).min():.6g} {unit}; it counts up")


def processor(seen: Seen) -> Iterator[Finding]:
    """CPU time is at most cores × wall time, and its readings embrace the window."""
    cores = seen.fact("cores") or seen.provenance("cores")
    for name, most in (("process_cpu_time", cores), ("host_stolen_time", cores), ("host_pressure_some", 1.0)):
        grown = seen.grown(name)
        if grown is None or most is None:
            continue
        spent_s, wall_s = grown
        most_s = most * wall_s * 1.02 + (0.5 if name in KERNELS_WORD else 0.05)
        if spent_s > most_s:  # time of children is added when they end, all at once
            make = refused if spent_s > 1.5 * most_s else remark
            limit = f"{most:g} × {wall_s:.3f} s can be"
            yield make("cpu time", seen.where, f"{name} grew by {spent_s:.3f} s within {wall_s:.3f} s; {limit}")
        t_s, window = seen.series[name].t_s, seen.window
        if t_s[0] > window.start_s or t_s[-1] < window.end_s:
            span = f"{t_s[0]:.6f} to {t_s[-1]:.6f} s"
            yield refused(
                "cpu time",
                seen.where,
                f"{name} was read from {span}, the window is {window.start_s:.6f} to {window.end_s:.6f} s",
            )
        elif window.start_s - t_s[0] > 0.05 or t_s[-1] - window.end_s > 0.05:
            yield remark(
                "cpu time",
                seen.where,
                f"{name} was read {window.start_s - t_s[0]:.3f} s before the window, {t_s[-1] - window.end_s:.3f} s after it",
            )


def energy(seen: Seen, readings: Mapping[str, Reading]) -> Iterator[Finding]:
    """Mean power lies within the device's limit, and both ways of measuring energy agree. `readings` as recomputed."""
    mean_w, idle_w = (_valid(readings, name) for name in ("aec_w", "idle_power_w"))
    limit_w, what = _power_limit(seen)
    if limit_w is not None:
        peak_w = float(seen.inside("gpu_power_instant").max(initial=0.0))
        if mean_w is not None and mean_w > FASTER * limit_w:
            yield refused("power", seen.where, f"mean power {mean_w:.1f} W is above {what}, {limit_w:g} W, by more than 10 %")
        elif mean_w is not None and mean_w > 1.03 * limit_w:
            yield remark("power", seen.where, f"mean power {mean_w:.1f} W is above {what}, {limit_w:g} W")
        if peak_w > 2 * limit_w:
            yield refused("power", seen.where, f"a sample of {peak_w:.1f} W is above twice {what}, {limit_w:g} W")
    if mean_w is not None and mean_w < 0.2:
        yield refused("power", seen.where, f"mean power {mean_w:.3g} W is below 0.2 W, which no device at work draws")
    if mean_w is not None and idle_w is not None and mean_w < 0.8 * idle_w:
        yield remark("power", seen.where, f"mean power {mean_w:.1f} W is below idle power, {idle_w:.1f} W")
    counter_j, integral_j = (_valid(readings, name) for name in ("energy_counter_j", "energy_integral_j"))
    counter, power = (seen.series.get(name) for name in ("gpu_energy_counter", "gpu_power_instant"))
    if counter_j and integral_j and counter is not None and power is not None and counter.scope == power.scope:
        apart = abs(integral_j / counter_j - 1)
        if apart > DISAGREE[0]:
            both = f"{counter_j:.1f} J by counter, {integral_j:.1f} J by integral of power, {100 * apart:.0f} % apart"
            make = refused if apart > DISAGREE[1] else remark
            yield make(
                "energy",
                seen.where,
                f"{both}; up to {100 * DISAGREE[0]:.0f} % is usual, {100 * DISAGREE[1]:.0f} % is the limit",
            )
    average, instant = seen.inside("gpu_power_average"), seen.inside("gpu_power_instant")
    if seen.window.length_s > 3 and len(average) > 10 and len(instant) > 10:
        apart = abs(float(average[len(average) // 3 :].mean() / instant.mean()) - 1)
        if apart > DISAGREE[1]:
            both = f"{instant.mean():.1f} W instant, {average[len(average) // 3 :].mean():.1f} W averaged by the device"
            yield refused("energy", seen.where, f"mean power is {both}; {100 * DISAGREE[1]:.0f} % apart is the limit")


def _valid(readings: Mapping[str, Reading], name: str) -> float | None:
    reading = readings.get(name)
    return number(reading.value) if reading is not None and reading.valid else None


def _power_limit(seen: Seen) -> tuple[float | None, str]:
    """The limit of what the energy sensor covers, in W, and what to call it; None where nobody says."""
    if not seen.gpu:
        return PROCESSOR_W * 8, "what eight CPU packages draw"
    row = device(str(seen.launch.hardware))
    covered = {seen.series[name].scope for name in ("gpu_energy_counter", "gpu_power_instant") if name in seen.series}
    if covered - {"gpu"}:
        return (row.power_w, "the module's limit") if row and row.power_scope == "module" else (None, "")
    stated = seen.provenance("power_limit_w") or seen.fact("gpu_power_limit_w")
    limits = [limit for limit in (stated, row.power_w if row else None) if limit is not None]
    return (min(limits), "the device's limit") if limits else (None, "")


def memory(seen: Seen) -> Iterator[Finding]:
    """What was in use fits the device and the machine; weights fit what was allocated; sizes fit the number of weights."""
    row = device(str(seen.launch.hardware)) if seen.gpu else None
    machine = seen.provenance("memory_gb")
    checked: list[tuple[str, float | None, float | None, str]] = []
    if machine:
        held = float(seen.series["process_memory"].values.max()) if "process_memory" in seen.series else None
        checked.append(("process_memory", held, machine * 1e9, "the machine's memory"))
        for name in ("host_memory_peak_bytes", "host_private_bytes"):
            checked.append((name, seen.fact(name), machine * 1e9, "the machine's memory"))
    if seen.gpu:
        stated = seen.fact("gpu_memory_total_bytes")
        total = stated or (row.memory_bytes if row else None)
        split = "mig" in seen.launch.reasons
        if stated and row and not split and abs(stated / row.memory_bytes - 1) > DRIVER_CAPACITY:
            yield refused("memory", seen.where, f"the device has {stated:.4g} B, {row.name} has {row.memory_bytes:.4g} B")
        used = float(seen.series["gpu_memory_used"].values.max()) if "gpu_memory_used" in seen.series else None
        reserved, allocated = seen.fact("reserved_peak_bytes"), seen.fact("allocated_peak_bytes")
        checked += [
            (name, value, total, "the device's memory")
            for name, value in (("gpu_memory_used", used), ("reserved_peak_bytes", reserved))
        ]
        checked.append(("allocated_peak_bytes", allocated, reserved, "what the allocator reserved"))
        checked.append(("weight_bytes", seen.fact("weight_bytes"), allocated and allocated * 1.05, "what was allocated"))
    for name, value, limit, what in checked:
        if value is not None and limit is not None and value > limit * 1.01:
            yield refused("memory", seen.where, f"{name} = {value:.4g} B is above {what}, {limit:.4g} B")
    ratio = (seen.fact("tensor_peak_bytes") or 0.0) / (seen.fact("expected_tensor_peak_bytes") or np.inf)
    if ratio and not 0.5 < ratio < 2:
        yield remark("memory", seen.where, f"the peak of tensors is {ratio:.2f} times what is expected; 0.5 to 2 is usual")


def between(check: str, launches: Sequence[Seen]) -> Iterator[Finding]:
    """Counters of a machine go on from one launch of a block to the next, no faster than they can."""
    dated = sorted((s for s in launches if started(s.launch) is not None), key=lambda s: started(s.launch) or 0.0)
    for before, after in pairwise(dated):
        wall_s = (started(after.launch) or 0.0) - (started(before.launch) or 0.0)
        cores = before.fact("cores") or before.provenance("cores") or 1.0
        for name, most in (
            ("host_stolen_time", cores),
            ("host_pressure_some", 1.0),
            ("gpu_energy_counter", _power_limit(after)[0]),
        ):
            one, two = before.series.get(name), after.series.get(name)
            if one is None or two is None or one.unit != two.unit:
                continue
            passed_s = wall_s + float(two.t_s[0] - one.t_s[-1])
            grown, reset = float(two.values[0] - one.values[-1]), name.startswith("gpu_")  # a driver may start again at 0
            if (grown < -1e-6 and not reset) or (most is not None and grown > 1.3 * most * max(passed_s, 0.0) + 2 * most):
                change = f"{name} changed by {grown:.6g} {one.unit} in the {passed_s:.3f} s since {before.where}"
                make = remark if name == "host_stolen_time" and grown < 0 else refused  # hypervisors set it back
                yield make(
                    check, after.where, f"{change}; 0 to {most if most is not None else np.inf:g} {one.unit} a second can be"
                )
