"""The sensors of one GPU: which call of the driver feeds which series, in which scope and how often. Knows no pynvml."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from effbench.errors import ProbeError
from effbench.probes.gpu.processes import GpuProcess, ProcessWatch
from effbench.probes.gpu.result import COUNTER, POWER, THERMAL, THROTTLE
from effbench.probes.gpu.select import Selection
from effbench.probes.gpu.source import GpuSource, Meta, Sensor
from effbench.probes.sampling import Clock

FIELD_INSTANT, FIELD_AVERAGE = 186, 185
SCOPES = ("gpu", "module")  # the driver's scope numbers 0 and 1, in the order we ask for them
STALE_S = 1.0  # a power field whose timestamp stands still for longer is not a measurement of now
SLOW_S, PROCESSES_S, GPM_S = 0.1, 0.5, 0.2
GPM_METRICS = {2: "gpu_sm_activity", 3: "gpu_sm_occupancy", 5: "gpu_tensor_activity", 10: "gpu_dram_activity"}
SHARES_A_MODULE = ("GH200", "GB200", "GB300")  # there the counter covers CPU, GPU and memory together (zeus issue 172)

Field = tuple[str, int, float]  # reason code or "", timestamp of the driver in µs, value in W


class GpuDriver(Protocol):
    """What one opened GPU must answer. Every call may raise ProbeError with a reason code."""

    def energy_j(self) -> float: ...
    def power_fields(self, fields: Sequence[int], scope: int) -> list[Field]: ...
    def busy_share(self) -> float: ...
    def memory_used_bytes(self) -> float: ...
    def processes(self) -> list[GpuProcess]: ...
    def clock_mhz(self, memory: bool) -> float: ...
    def temperature_c(self) -> float: ...
    def throttle_bits(self) -> float: ...
    def thermal_violation_s(self) -> float: ...
    def activity_sample(self) -> None: ...
    def activity(self, metrics: Iterable[int]) -> list[float | str]: ...
    def provenance(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


def gpu_source(gpu: GpuDriver, selection: Selection, *, pid: int, clock: Clock) -> GpuSource:
    """The source that reads every sensor of `gpu`, the first selected device, and closes it in the end."""
    device = selection.devices[0]
    scope = 0 if device.mig else _power_scope(gpu)
    shared = SCOPES[scope] == "module" or any(name in device.name for name in SHARES_A_MODULE)
    watch = ProcessWatch(pid, gpu.processes)
    sensors = [
        *_whole_gpu(gpu, device.mig, scope, "module" if shared else "gpu", clock),
        _one("gpu_memory_used", "B", "memory_info_v2", gpu.memory_used_bytes),
        _one("gpu_memory_process", "B", "running_processes", watch.own_bytes, "process", PROCESSES_S),
        _one("gpu_clock_sm", "MHz", "clock_info", lambda: gpu.clock_mhz(memory=False)),
        _one("gpu_clock_memory", "MHz", "clock_info", lambda: gpu.clock_mhz(memory=True)),
        _one("gpu_temperature", "°C", "temperature", gpu.temperature_c),
        _one(THROTTLE, "bits", "clocks_event_reasons", gpu.throttle_bits),
        _one(THERMAL, "s", "violation_status:thermal", gpu.thermal_violation_s),
        _activity(gpu, clock),
    ]
    facts = {
        **{f"gpu_{name}": value for name, value in gpu.provenance().items()},
        "gpu_visible_count": len(selection.devices),
        "gpu_power_scope": SCOPES[scope],
        "series": {m.name: {"unit": m.unit, "scope": m.scope, "source": m.source} for s in sensors for m in s.series},
    }
    flags = [*selection.reasons, *(["module_scope"] if shared else [])]

    def on_close() -> tuple[dict[str, Any], list[str]]:
        gpu.close()
        return {**facts, "gpu_foreign_pids": sorted(watch.others)}, [*flags, *watch.reasons()]

    return GpuSource(sensors, counter=COUNTER, clock=clock, on_close=on_close)


def _one(name: str, unit: str, source: str, read: Callable[[], float], scope: str = "gpu", every_s: float = SLOW_S) -> Sensor:
    return Sensor(series=(Meta(name, unit, f"nvml:{source}", scope),), read=lambda: [read()], every_s=every_s)


def _whole_gpu(gpu: GpuDriver, split: bool, scope: int, counter_scope: str, clock: Clock) -> list[Sensor]:
    """The sensors that mean nothing for a slice: energy, power, busy share."""
    power = tuple(
        Meta(name, "W", f"nvml:field{field}:scope{scope}", SCOPES[scope])
        for name, field in ((POWER, FIELD_INSTANT), ("gpu_power_average", FIELD_AVERAGE))
    )
    sensors = [
        _one(COUNTER, "J", "total_energy_consumption", gpu.energy_j, counter_scope, 0.0),
        Sensor(series=power, read=_PowerReader(gpu, scope, clock).read),
        _one("gpu_busy", "ratio", "utilization_rates", gpu.busy_share),
    ]
    return [Sensor(series=sensor.series, read=_refuse("mig", sensor.series)) for sensor in sensors] if split else sensors


def _refuse(reason: str, series: Sequence[Meta]) -> Callable[[], list[float | str]]:
    return lambda: [reason] * len(series)


def _power_scope(gpu: GpuDriver) -> int:
    """The first scope that gives instant power, the whole GPU before the whole module; the GPU where none does."""
    for scope in range(len(SCOPES)):
        with suppress(ProbeError):
            if not gpu.power_fields([FIELD_INSTANT], scope)[0][0]:
                return scope
    return 0


class _PowerReader:
    """Instant and average power in one call; a value whose timestamp stands still is refused as stale.

    The driver stamps with wall time, which may jump: only whether a stamp moves is used, never its value.
    """

    def __init__(self, gpu: GpuDriver, scope: int, clock: Clock):
        self._gpu, self._scope, self._clock = gpu, scope, clock
        self._moved: dict[int, tuple[int, float]] = {}

    def read(self) -> list[float | str]:
        fields = (FIELD_INSTANT, FIELD_AVERAGE)
        return [
            self._checked(number, *field)
            for number, field in zip(fields, self._gpu.power_fields(fields, self._scope), strict=True)
        ]

    def _checked(self, number: int, reason: str, stamp_us: int, power_w: float) -> float | str:
        now_s = self._clock()
        last_us, moved_s = self._moved.get(number, (None, now_s))
        if stamp_us != last_us or stamp_us == 0:  # a driver that does not stamp cannot be judged
            self._moved[number] = (stamp_us, now_s)
        elif now_s - moved_s > STALE_S:
            return reason or "stale_samples"
        return reason or power_w


def _activity(gpu: GpuDriver, clock: Clock) -> Sensor:
    """Hopper's activity counters: shares of the time between two samples, the first of which is taken here."""
    series = tuple(Meta(name, "ratio", f"nvml:gpm{number}") for number, name in GPM_METRICS.items())
    try:
        gpu.activity_sample()
    except ProbeError as error:
        return Sensor(series=series, read=_refuse(error.reason, series))
    taken_s = clock()

    def read() -> list[float | str]:
        nonlocal taken_s
        if clock() - taken_s < GPM_S / 2:  # too short a stretch to divide by; its shortest useful length is not published
            return []
        values = gpu.activity(GPM_METRICS)
        taken_s = clock()
        return values

    return Sensor(series=series, read=read, every_s=GPM_S)
