"""What the GPU sampler brought home → the probe's result, and → what `doctor` says. Pure; knows no NVML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from effbench.probe import Capability, ProbeResult
from effbench.probes.sampling import Recording
from effbench.reasons import REASONS
from effbench.schema import Series

COUNTER, POWER = "gpu_energy_counter", "gpu_power_instant"
THROTTLE, THERMAL = "gpu_throttle", "gpu_thermal_violation"
# NVML's clock event bits. A fault: software thermal, hardware thermal, hardware power brake. Remarks: the power cap under
# which a busy GPU lives; application clocks, sync boost, display, board limit, reliability. An idle GPU (0x1) is nothing.
HW_SLOWDOWN, HEAT_OR_BRAKE, POWER_CAP = 0x8, 0x20 | 0x40 | 0x80, 0x4
SETTING_OR_BOARD = 0x2 | 0x10 | 0x100 | 0x200 | 0x400
# From this share of the window under a thermal limit on it was throttled (ours; less is the driver's rounding).
THERMAL_SHARE = 0.01

REMEDIES = {
    "nvml_missing": "install the NVIDIA driver; start a container with its GPUs (docker run --gpus all)",
    "no_device": "let CUDA_VISIBLE_DEVICES name a GPU that `nvidia-smi -L` lists",
    "mig": "measure energy on a GPU that is not split (nvidia-smi -mig 0)",
    "no_permission": "ask the administrator for access to the GPU's performance counters",
    "device_lost": "reset the GPU or reboot; the kernel log has Xid messages",
    "foreign_process_undecidable": "share the host's PID namespace (docker run --pid=host)",
}

WHAT = {
    COUNTER: "GPU energy by counter",
    POWER: "GPU instant power",
    "gpu_power_average": "GPU average power",
    "gpu_memory_used": "GPU memory in use",
    "gpu_memory_process": "GPU memory of our processes",
    "gpu_busy": "GPU busy share",
    "gpu_clock_sm": "SM clock",
    "gpu_clock_memory": "memory clock",
    "gpu_temperature": "GPU temperature",
    THROTTLE: "GPU throttle reasons",
    THERMAL: "time under a thermal limit",
    "gpu_sm_activity": "SM activity (GPM)",
    "gpu_sm_occupancy": "SM occupancy (GPM)",
    "gpu_tensor_activity": "tensor core activity (GPM)",
    "gpu_dram_activity": "DRAM activity (GPM)",
}

# What every sampler says of itself, under names that no other probe's sampler uses.
_OWN_FACTS = {"reads": "gpu_sampler_reads", "cpu_share": "gpu_sampler_cpu_share", "detail": "gpu_sampler_detail"}


def probe_result(recording: Recording, window: tuple[float, float] | None) -> ProbeResult:
    """Series with unit, scope and source; facts; and flags on the launch, the throttling of the window among them."""
    facts = {_OWN_FACTS.get(name, name): value for name, value in recording.facts.items()}
    meta: Mapping[str, Mapping[str, str]] = facts.pop("series", {})
    series = {  # a source that broke down did not say what its series are
        name: Series(name=name, **meta[name], t_s=t_s, values=values)
        for name, (t_s, values) in recording.series.items()
        if name in meta
    }
    reasons = dict.fromkeys(recording.reasons)
    if window is not None:
        reasons.update(dict.fromkeys(_throttled(series, *window)))
    if COUNTER not in series and POWER not in series:
        missing = facts.get("gpu_missing") or {}
        why = [missing[name] for name in (COUNTER, POWER) if name in missing] or list(recording.reasons) or ["energy_missing"]
        facts["energy_reasons"] = list(dict.fromkeys(why))
    facts.setdefault("counter_period_s", None)
    return ProbeResult(series=tuple(series.values()), facts=facts, reasons=tuple(reasons))


def _throttled(series: Mapping[str, Series], start_s: float, end_s: float) -> list[str]:
    """Reason codes for what held the clocks down inside the window."""
    found: dict[str, bool] = {}
    if THROTTLE in series:
        t_s, bits = series[THROTTLE].t_s, series[THROTTLE].values.astype(np.int64)
        inside = bits[(t_s >= start_s) & (t_s <= end_s)]
        # HW slowdown alone also shows for a moment when a clock changes, says the vendor: it counts when it stays.
        slowed = (inside & HW_SLOWDOWN) != 0
        found["throttled"] = bool((inside & HEAT_OR_BRAKE).any() or (slowed[1:] & slowed[:-1]).any())
        found["power_capped"] = bool((inside & POWER_CAP).any())
        found["clocks_limited"] = bool((inside & SETTING_OR_BOARD).any())
    if THERMAL in series:
        before_s, after_s = np.interp([start_s, end_s], series[THERMAL].t_s, series[THERMAL].values)
        found["throttled"] = found.get("throttled", False) or bool(after_s - before_s > THERMAL_SHARE * (end_s - start_s))
    return [code for code, is_so in found.items() if is_so]


def capabilities(facts: Mapping[str, Any], reason: str = "") -> list[Capability]:
    """One line per sensor, from a source's facts: there, or missing with its reason and what would change that.

    `reason`: why there is no source at all.
    """
    device = f"{facts.get('gpu_name')}, {facts.get('gpu_power_scope')} scope"
    missing: Mapping[str, str] = facts.get("gpu_missing", {})
    found = []
    for name, what in WHAT.items():
        why = reason or missing.get(name, "")
        detail = f"{why}: {REASONS[why]}" if why else device
        found.append(Capability(what=what, available=not why, detail=detail, remedy=REMEDIES.get(why, "")))
    return found
