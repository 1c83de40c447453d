"""Trace → every metric: the one code path that runner, analysis, export, verify and app all use. numpy only.

`launch_metrics` turns what one launch recorded into one reading per row of the metric table; missing is None with a reason.
`pairing.py` goes on from there to the blocks of a case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from effbench import integrate, stats
from effbench.errors import MetricError
from effbench.metrics import METRICS, WEIGHT_KINDS, check_quality_figure, metric, table_order
from effbench.protocol import Protocol, protocol
from effbench.reasons import FAULTS, HOST, REMARKS
from effbench.schema import Reading, Series, Spec, Trace, Window

GB = 1e9
HOST_BOUND_IDLE_SHARE = 0.2
COMPARED = ("mcr", "mcr_nominal", "quality_change")  # what a case has and a launch by itself has not


class _Launch:
    """What the metric functions read: facts, windows, trace of one launch."""

    def __init__(self, spec: Spec, windows: Mapping[str, Window], facts: Mapping[str, Any], trace: Trace):
        self.spec, self.facts, self.trace, self.windows = spec, facts, trace, windows
        self.rules: Protocol = protocol(spec.protocol)
        self.window = windows["window"]
        steps = trace.get("step")
        self.step_start_s = steps.t_s if steps else np.empty(0)
        self.step_s = steps.values if steps else np.empty(0)
        self.total_s = float(self.step_s.sum())
        self.num_steps = len(self.step_s)
        self.tokens = self.num_steps * float(facts.get("step_tokens") or 0)
        self.samples = self.num_steps * float(facts.get("step_samples") or 0)
        self.idle = [windows[name] for name in ("idle_before", "idle_after") if name in windows]

    def series(self, *names: str) -> Series | None:
        return next((s for name in names if (s := self.trace.get(name)) is not None and len(s.t_s)), None)


def launch_metrics(
    *, spec: Spec, windows: Mapping[str, Window], facts: Mapping[str, Any], trace: Trace, reasons: Sequence[str] = ()
) -> tuple[Reading, ...]:
    """One reading per row of the metric table, from what one launch recorded. `reasons` are the probes' flags."""
    launch = _Launch(spec, windows, facts, trace)
    found = {r.name: r for r in _own(launch)}  # first, so that no workload can give a metric that all rows have
    groups: tuple[Callable[[_Launch], list[Reading]], ...] = (_speed, _tokens, _compute, _memory, _host, _quality)
    for group in groups:
        found.update((r.name, r) for r in group(launch))
    found.update((r.name, r) for r in _energy(launch, reasons))
    host = tuple(flag for flag in reasons if flag in HOST)  # stolen time or a busy neighbour: said beside the step time
    found["al_s"] = replace(found["al_s"], reasons=(*found["al_s"].reasons, *host))
    if facts.get("oversubscribed"):  # the numbers stay in the launch's row, and enter no interval
        timed = {r.name for group in (_speed, _compute) for r in group(launch)}
        for name in timed & set(found):
            if found[name].value is not None:
                found[name] = replace(found[name], valid=False, reasons=(*found[name].reasons, "oversubscribed"))
    for name in METRICS:
        if name not in COMPARED and name not in found and "own" not in METRICS[name].tags:
            found[name] = Reading.missing(name, METRICS[name].unit, "not_this_workload")
    return tuple(_finite(found[name]) for name in sorted(found, key=table_order))


def _reading(name: str, value: float | None, source: str, reason: str, **more: Any) -> Reading:
    unit = metric(name).unit
    if value is None:
        return Reading.missing(name, unit, reason, source=source)
    return Reading(name=name, value=float(value), unit=unit, source=source, **more)


def _finite(reading: Reading) -> Reading:
    if reading.value is None or math.isfinite(reading.value):
        return reading
    return Reading.missing(reading.name, reading.unit, *reading.reasons, "not_a_number", source=reading.source)


def _speed(launch: _Launch) -> list[Reading]:
    """AL, throughputs and step percentiles, from the step times."""
    step_s, total_s, facts = launch.step_s, launch.total_s, launch.facts
    ran = launch.num_steps > 0 and total_s > 0
    params, clock = facts.get("params_total"), "host clock"
    rates = {
        "al_s": total_s / launch.num_steps if ran else None,
        "tokens_per_s": launch.tokens / total_s if ran else None,
        "samples_per_s": launch.samples / total_s if ran else None,
        **{f"step_p{q}_s": stats.percentile(step_s, q) if ran else None for q in (50, 95, 99)},
    }
    kind = facts.get("throughput")
    if kind == "it":
        rates["it_tokens_per_s"] = rates["tokens_per_s"]
    elif kind in ("tt", "st") and params:
        unit = "tokens" if kind == "tt" else "samples"
        rate = rates[f"{unit}_per_s"]
        rates[f"{kind}_{unit}_per_param_s"] = None if rate is None else rate / params
    return [_reading(name, value, clock, "no_steps") for name, value in rates.items()]


def _tokens(launch: _Launch) -> list[Reading]:
    """TTFT, TPOT and inter-token gaps, from the times at which tokens were there; N·(T−1) gaps, none between requests."""
    token = launch.series("token")
    if token is None:
        return []
    # A token belongs to the step it ended no later than; 1 ns forgives the rounding of sums of times.
    requests = np.searchsorted(launch.step_start_s + launch.step_s, token.t_s - 1e-9)
    first, gaps, per_token = [], [], []
    for index in range(launch.num_steps):
        times = token.t_s[requests == index]
        if not len(times):
            continue
        first.append(times[0] - launch.step_start_s[index])
        if len(times) > 1:
            gaps.append(np.diff(times))
            per_token.append((times[-1] - times[0]) / (len(times) - 1))
    all_gaps = np.concatenate(gaps) if gaps else np.empty(0)
    return [
        _reading("ttft_s", stats.percentile(np.asarray(first), 50) if first else None, token.source, "no_steps"),
        _reading("tpot_s", stats.percentile(np.asarray(per_token), 50) if per_token else None, token.source, "no_steps"),
        _reading("itl_p99_s", stats.percentile(all_gaps, 99) if len(all_gaps) else None, token.source, "no_steps"),
    ]


def _compute(launch: _Launch) -> list[Reading]:
    """PCU, MFU against measured and datasheet peaks, share of bandwidth, and the activity counters."""
    facts, peaks, found = launch.facts, launch.facts.get("peaks") or {}, []
    flops, moved = facts.get("step_flops"), facts.get("step_bytes")
    dtype = facts.get("compute_dtype", "")
    shares = (
        ("mfu", flops, (peaks.get("matrix_flops_per_s") or {}).get(dtype), "not_calibrated"),
        ("mfu_datasheet", flops, (peaks.get("datasheet_flops_per_s") or {}).get(dtype), "no_datasheet"),
        ("bandwidth_share", moved, peaks.get("copy_bytes_per_s"), "not_calibrated"),
    )
    for name, work, peak, reason in shares:
        reason = "no_flop_model" if not work else reason
        value = work * launch.num_steps / (launch.total_s * peak) if work and peak and launch.total_s > 0 else None
        found.append(_reading(name, value, f"analytic work, peak of {dtype}", reason))
    gpu = launch.spec.device == "cuda"
    for name in ("sm_activity", "tensor_activity", "dram_activity"):
        found.append(_mean(launch, name, f"gpu_{name}", "not_sampled" if gpu else "no_gpu"))
    if gpu:
        found.append(_mean(launch, "pcu", "gpu_busy", "not_sampled"))
    else:
        spent = _difference(launch, "process_cpu_time")
        value = None if spent is None else spent / (launch.window.length_s * launch.spec.threads)
        found.append(_reading("pcu", value, "process CPU time", "not_sampled"))
    busy = found[-1].value if gpu else None
    idle_share = None if busy is None else 1.0 - busy
    reasons = ("host_bound",) if idle_share is not None and idle_share > HOST_BOUND_IDLE_SHARE else ()
    found.append(_reading("gpu_idle_share", idle_share, "NVML busy share", "not_sampled" if gpu else "no_gpu", reasons=reasons))
    return found


def _memory(launch: _Launch) -> list[Reading]:
    facts, gpu = launch.facts, launch.spec.device == "cuda"
    in_use = "gpu_memory_used" if gpu else "process_memory"
    amu = _mean(launch, "amu_gb", in_use, "not_sampled", scale=1 / GB)
    device = launch.series("gpu_memory_used")
    inside = _inside(device, launch.window) if device is not None else np.empty(0)
    absent = "not_sampled" if gpu else "no_gpu"
    found = [amu, _reading("device_memory_peak_bytes", inside.max() if len(inside) else None, "NVML", absent)]
    for name in ("allocated_peak_bytes", "reserved_peak_bytes"):
        found.append(_reading(name, facts.get(name), "torch CUDA allocator", absent))
    found += _tensors(facts, gpu)
    for name in ("host_memory_peak_bytes", "host_private_bytes"):
        found.append(_reading(name, facts.get(name), "/proc", "not_sampled"))
    cache, cached = facts.get("kv_cache_bytes"), facts.get("kv_cached_tokens")
    found.append(_reading("kv_cache_bytes", cache, "storages", "not_this_workload"))
    per_token = cache / cached if cache is not None and cached else None
    found.append(_reading("kv_cache_bytes_per_token", per_token, "storages", "not_this_workload"))
    new = ("new_weights",) if facts.get("new_weights") else ()
    by_kind = facts.get("weight_bytes_by_kind")
    for kind in WEIGHT_KINDS:
        part = by_kind.get(kind) or None if by_kind else None
        found.append(_reading(f"weight_bytes_{kind}", part, "storages", "no_such_part" if by_kind else "not_taken"))
    for name in ("weight_bytes", "bits_per_weight", "params_total", "params_active", "params_trainable"):
        found.append(_reading(name, facts.get(name), "the model", "not_taken", reasons=new if name == "params_total" else ()))
    expected = facts.get("expected") or {}
    for name in ("expected_kv_cache_bytes_per_token", "expected_decode_flops", "expected_decode_bytes"):
        value = expected.get(name.removeprefix("expected_"))
        found.append(_reading(name, value, "analytic", "not_this_workload", reasons=("estimate",)))
    found.append(_reading("decode_flops", facts.get("decode_flops"), "counted", "not_this_workload"))
    return found


def _tensors(facts: Mapping[str, Any], gpu: bool) -> list[Reading]:
    """Peak of tensor bytes, measured and expected."""
    measured = facts.get("allocated_peak_bytes" if gpu else "tensor_peak_bytes")
    expected = facts.get("expected_tensor_peak_bytes")
    source = "torch CUDA allocator" if gpu else "tensor tracker"
    ratio = measured / expected if measured is not None and expected else None
    absent = "not_sampled" if gpu else "tensors_not_tracked"
    return [
        _reading("tensor_peak_bytes", measured, source, absent),
        _reading("expected_tensor_peak_bytes", expected, "analytic", "no_memory_model", reasons=("estimate",)),
        _reading("tensor_peak_ratio", ratio, source, absent if measured is None else "no_memory_model"),
    ]


def _host(launch: _Launch) -> list[Reading]:
    length_s = launch.window.length_s
    spent = _difference(launch, "process_cpu_time")
    stolen = _difference(launch, "host_stolen_time")
    waited = _difference(launch, "host_pressure_some")
    cores = launch.facts.get("cores")
    return [
        _reading("host_cpu_s_per_step", spent / launch.num_steps if spent is not None and launch.num_steps else None, "getrusage", "not_sampled"),
        _reading("host_stolen_share", stolen / (length_s * cores) if stolen is not None and cores else None, "/proc/stat", "not_sampled"),
        _reading("host_pressure_share", waited / length_s if waited is not None else None, "/proc/pressure/cpu", "not_sampled"),
    ]  # fmt: skip


def _quality(launch: _Launch) -> list[Reading]:
    """Quality figures the workload took; `quality` itself names in its source which figure it is."""
    taken = launch.facts.get("quality") or {}
    names = ("train_loss", "validation_loss", "validation_loss_before", "base_loss_before", "base_loss_after", "bits_per_byte",
             "perplexity", "next_token_accuracy")  # fmt: skip
    found = [_reading(name, taken.get(name), "held-out text", "not_taken") for name in names]
    found.append(_reading("task_accuracy", taken.get("task_accuracy"), "lm-evaluation-harness", "not_taken"))
    for task, figures in (taken.get("tasks") or {}).items():
        what = f"{figures['figure']} on {figures['documents']} documents"
        found.append(_reading(f"task_accuracy.{task}", figures["accuracy"], what, "not_taken"))
    figure, value = taken.get("figure", ""), taken.get("quality")
    try:
        check_quality_figure(figure)
        found.append(_reading("quality", value, figure, "not_taken"))
    except MetricError:
        reason = "not_taken" if value is None else "quality_not_higher_is_better"
        found.append(Reading.missing("quality", METRICS["quality"].unit, reason, source=figure))
    return found


def _own(launch: _Launch) -> list[Reading]:
    """What only this workload gives: the numbers in its fact `figures` (a text there is why there is none), and its timed parts."""
    found = []
    for name, value in (launch.facts.get("figures") or {}).items():
        missing = isinstance(value, str)
        counted = metric(name).unit == "count"  # what must come out is no estimate of it
        reasons = ("estimate",) if name.startswith("expected_") and not missing and not counted else ()
        found.append(
            _reading(name, None if missing else value, "the workload", value if missing else "not_taken", reasons=reasons)
        )
    for series in launch.trace.series:
        if series.name in METRICS and "own" in METRICS[series.name].tags:
            inside = _inside(series, launch.window)
            shared = bool(launch.facts.get("oversubscribed"))
            value = float(np.median(inside)) if len(inside) and not shared else None
            found.append(_reading(series.name, value, series.source, "oversubscribed" if shared else "no_steps"))
    return found + _expected_projector(launch)


def _expected_projector(launch: _Launch) -> list[Reading]:
    """max(FLOPs / matrix rate, bytes of touched experts / copy bandwidth), where a workload states the bytes."""
    facts, peaks, name = launch.facts, launch.facts.get("peaks") or {}, "expected_projector_s"
    flops, moved = (facts.get("figures") or {}).get("projector_flops"), facts.get("projector_bytes")
    if flops is None or moved is None:
        return []
    dtype = str(facts.get("compute_dtype", ""))
    flops_per_s, bytes_per_s = (peaks.get("matrix_flops_per_s") or {}).get(dtype), peaks.get("copy_bytes_per_s")
    value = max(flops / flops_per_s, moved / bytes_per_s) if flops_per_s and bytes_per_s else None
    return [_reading(name, value, f"analytic work, rates of {dtype}", "not_calibrated", reasons=("estimate",))]


def _energy(launch: _Launch, flags: Sequence[str]) -> list[Reading]:
    """Gross and net energy of the window and what follows from it, with the sensor's scope on every reading."""
    counter = launch.series("gpu_energy_counter", "rapl_energy")
    power = launch.series("gpu_power_instant")
    sensor = counter or power
    names = ("energy_counter_j", "energy_integral_j", "idle_power_w", "aec_w", "energy_wh", "energy_j_per_token",
             "energy_net_j_per_token", "energy_j_per_step", "energy_net_j_per_step")  # fmt: skip
    if sensor is None:
        absent = tuple(launch.facts.get("energy_reasons") or ("no_energy_sensor",))
        return [Reading.missing(name, METRICS[name].unit, *absent) for name in names]
    window = launch.window
    energy = integrate.window_energy(
        counter=(counter.t_s, counter.values) if counter else None,
        power=(power.t_s, power.values) if power else None,
        start_s=window.start_s,
        end_s=window.end_s,
        idle=[(w.start_s, w.end_s) for w in launch.idle],
        min_updates=launch.rules.counter_updates,
        max_gap_s=launch.rules.sampling_gap_s,
        sensor_duty=1.0 if sensor.name == "rapl_energy" else None,  # RAPL counts all of the time
    )
    reasons = tuple(dict.fromkeys((*energy.reasons, *(flag for flag in flags if flag in FAULTS or flag in REMARKS))))
    if _drifted(launch):
        reasons = (*reasons, "temperature_drift")
    valid = energy.valid and not any(reason in FAULTS for reason in reasons)
    gross, net, length_s, steps, tokens = energy.gross_j, energy.net_j, window.length_s, launch.num_steps, launch.tokens
    values = {
        "energy_counter_j": energy.counter_j,
        "energy_integral_j": energy.integral_j,
        "idle_power_w": energy.idle_power_w,
        "aec_w": _over(gross, length_s),
        "energy_wh": _over(gross, 3600.0),
        "energy_j_per_token": _over(gross, tokens),
        "energy_net_j_per_token": _over(net, tokens),
        "energy_j_per_step": _over(gross, steps),
        "energy_net_j_per_step": _over(net, steps),
    }
    return [
        Reading(name=name, value=value, unit=METRICS[name].unit, source=sensor.source, scope=sensor.scope,
                valid=valid and value is not None, reasons=reasons if value is not None else (*reasons, "not_sampled"))
        for name, value in values.items()
    ]  # fmt: skip


def _drifted(launch: _Launch) -> bool:
    """Whether the device's temperature left the protocol's band within the window."""
    temperature, band_c = launch.series("gpu_temperature"), launch.rules.temperature_band_c
    inside = _inside(temperature, launch.window) if temperature is not None else np.empty(0)
    return band_c is not None and len(inside) > 0 and float(np.ptp(inside)) > band_c


def _over(value: float | None, by: float) -> float | None:
    return None if value is None or not by else value / by


def _inside(series: Series, window: Window) -> np.ndarray:
    return series.values[(series.t_s >= window.start_s) & (series.t_s <= window.end_s)]


def _mean(launch: _Launch, name: str, series_name: str, absent: str, scale: float = 1.0) -> Reading:
    """Time average of a series over the window."""
    series, window = launch.series(series_name), launch.window
    if series is None:
        return Reading.missing(name, metric(name).unit, absent)
    value = integrate.mean_over(series.t_s, series.values, window.start_s, window.end_s)
    scaled = None if value is None else value * scale
    return _reading(name, scaled, series.source, "not_sampled", scope=series.scope if scaled is not None else "")


def _difference(launch: _Launch, series_name: str) -> float | None:
    """How much a cumulative series grew over the window."""
    series = launch.series(series_name)
    if series is None or len(series.t_s) < 2:
        return None
    start, end = np.interp([launch.window.start_s, launch.window.end_s], series.t_s, series.values)
    return float(end - start)
