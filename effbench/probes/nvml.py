"""NVIDIA GPUs through NVML: the only file that imports pynvml (distribution nvidia-ml-py), and the GPU probe itself.

Every NVML error becomes a reason code in one table here; nothing above sees a vendor error, and a sensor that fails is a
missing series, never an exception. Watching happens in a process of its own (`sampling`), the only one that keeps NVML
open. Calls, field ids and scopes were read in nvidia-ml-py 13.615.71. What the vendor does not say is not assumed: the
counter's period is looked at, and the share of the time that the power sensor sees stays `sensor_duty_unknown`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Self

import pynvml

from effbench.errors import ProbeError
from effbench.probe import Capability, Probe, ProbeContext, ProbeResult
from effbench.probes.gpu.processes import GpuProcess
from effbench.probes.gpu.result import capabilities, probe_result
from effbench.probes.gpu.select import DeviceInfo, Selection, select
from effbench.probes.gpu.sensors import GPM_S, SLOW_S, Field, gpu_source
from effbench.probes.gpu.source import GpuSource
from effbench.probes.sampling import Clock, Sampler
from effbench.reasons import REASONS

LINGER_S = 0.3  # after the window, so that the counter updates once more

_REASONS = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "nvml_missing",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "nvml_missing",
    pynvml.NVML_ERROR_UNINITIALIZED: "device_lost",  # we initialised it, so the driver was reloaded
    pynvml.NVML_ERROR_GPU_IS_LOST: "device_lost",
    pynvml.NVML_ERROR_RESET_REQUIRED: "device_lost",
    pynvml.NVML_ERROR_GPU_NOT_FOUND: "no_device",
    pynvml.NVML_ERROR_NOT_FOUND: "no_device",
    pynvml.NVML_ERROR_NOT_SUPPORTED: "not_supported",
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: "not_supported",
    pynvml.NVML_ERROR_INVALID_ARGUMENT: "not_supported",  # a field, scope or metric that this driver does not know
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH: "not_supported",
    pynvml.NVML_ERROR_DEPRECATED: "not_supported",
    pynvml.NVML_ERROR_NO_PERMISSION: "no_permission",
}

_FACTS: dict[str, Callable[[Any], Any]] = {
    "driver": lambda handle: pynvml.nvmlSystemGetDriverVersion(),
    "cuda_driver": lambda handle: _version(pynvml.nvmlSystemGetCudaDriverVersion()),
    "vbios": pynvml.nvmlDeviceGetVbiosVersion,
    "power_limit_w": lambda handle: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
    "ecc": lambda handle: bool(pynvml.nvmlDeviceGetEccMode(handle)[0]),
    "persistence_mode": lambda handle: bool(pynvml.nvmlDeviceGetPersistenceMode(handle)),
    "application_clock_sm_mhz": lambda handle: pynvml.nvmlDeviceGetApplicationsClock(handle, pynvml.NVML_CLOCK_SM),
    "application_clock_memory_mhz": lambda handle: pynvml.nvmlDeviceGetApplicationsClock(handle, pynvml.NVML_CLOCK_MEM),
    "max_clock_sm_mhz": lambda handle: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
    "max_clock_memory_mhz": lambda handle: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM),
    "mig_mode": lambda handle: bool(pynvml.nvmlDeviceGetMigMode(handle)[0]),
}


def _ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call NVML. The border: its errors become ProbeError with our reason code."""
    try:
        return function(*arguments)
    except pynvml.NVMLError as error:
        reason = _reason(error.value)
        raise ProbeError(reason, f"{REASONS[reason]} (NVML: {error})") from None


def _reason(code: int) -> str:
    return "" if code == pynvml.NVML_SUCCESS else _REASONS.get(code, "nvml_error")


def _or_none(read: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return _ask(read, *arguments)
    except ProbeError:
        return None


@contextmanager
def _session() -> Iterator[None]:
    _ask(pynvml.nvmlInit)
    try:
        yield
    finally:
        _or_none(pynvml.nvmlShutdown)


def look() -> Selection:
    """The devices that CUDA will see here, in its order, and the reason where there are none. Quick; never raises."""
    try:
        with _session():
            return select(*_inventory())
    except ProbeError as error:
        return Selection(devices=(), reasons=(error.reason,))


def visible_devices() -> list[DeviceInfo]:
    """The devices that CUDA will see here; `why_no_device` says why where there are none. Never raises."""
    return list(look().devices)


def why_no_device() -> str:
    """One sentence, empty where there is a device. Never raises."""
    found = look()
    return "" if found.devices else "; ".join(REASONS[reason] for reason in found.reasons)


def provenance(device: DeviceInfo) -> dict[str, Any]:
    """What a record must say of a device: name, driver, power_limit_w, clocks … What NVML refuses is None. Never raises."""
    try:
        with _session():
            return _known(device, _ask(pynvml.nvmlDeviceGetHandleByUUID, device.gpu_uuid))
    except ProbeError:
        return _known(device)


def _known(device: DeviceInfo, handle: Any = None) -> dict[str, Any]:
    known = {
        "name": device.name,
        "uuid": device.uuid,
        "pci_bus_id": device.pci_bus_id,
        "memory_total_bytes": device.memory_bytes,
    }
    return {**known, **{name: handle and _or_none(read, handle) for name, read in _FACTS.items()}}


def _inventory() -> tuple[list[DeviceInfo], list[DeviceInfo]]:
    """Every GPU and every MIG slice that NVML lists. One that fell off the bus does not hide the others."""
    gpus, slices = [], []
    for index in range(_ask(pynvml.nvmlDeviceGetCount)):
        with suppress(ProbeError):
            handle = _ask(pynvml.nvmlDeviceGetHandleByIndex, index)
            mode = _or_none(pynvml.nvmlDeviceGetMigMode, handle)  # None: a GPU that cannot be split
            gpus.append(_describe(index, handle, split=bool(mode and mode[0])))
            for number in range(_ask(pynvml.nvmlDeviceGetMaxMigDeviceCount, handle) if gpus[-1].mig else 0):
                part = _or_none(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number)
                slices += [_describe(index, part, whole=gpus[-1])] if part else []
    return gpus, slices


def _describe(index: int, handle: Any, *, split: bool = False, whole: DeviceInfo | None = None) -> DeviceInfo:
    uuid, memory = _ask(pynvml.nvmlDeviceGetUUID, handle), _or_none(_memory, handle)
    return DeviceInfo(
        index=index, uuid=uuid, name=_ask(pynvml.nvmlDeviceGetName, handle),
        pci_bus_id=whole.pci_bus_id if whole else str(_ask(pynvml.nvmlDeviceGetPciInfo, handle).busId),
        memory_bytes=memory.total if memory else None, mig=split or whole is not None,
        gpu_uuid=whole.uuid if whole else uuid,
        gpu_instance=_ask(pynvml.nvmlDeviceGetGpuInstanceId, handle) if whole else None,
    )  # fmt: skip


def _memory(handle: Any) -> Any:
    return pynvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2)  # version 1 counts the driver's own reserve as used


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


class Gpu:
    """One GPU, or one MIG slice of it, with NVML open until `close`. Calls raise ProbeError. See gpu.sensors.GpuDriver."""

    def __init__(self, device: DeviceInfo):
        # By UUID: numbers may differ from one process to the next.
        self._device, self._handle = device, _ask(pynvml.nvmlDeviceGetHandleByUUID, device.gpu_uuid)
        self._part = _ask(pynvml.nvmlDeviceGetHandleByUUID, device.uuid)
        self._samples: list[Any] = []

    def energy_j(self) -> float:
        return float(_ask(pynvml.nvmlDeviceGetTotalEnergyConsumption, self._handle)) / 1000

    def power_fields(self, fields: Sequence[int], scope: int) -> list[Field]:
        values = _ask(pynvml.nvmlDeviceGetFieldValues, self._handle, [(field, scope) for field in fields])
        return [(_reason(v.nvmlReturn), v.timestamp, v.value.uiVal / 1000) for v in values]

    def busy_share(self) -> float:
        return float(_ask(pynvml.nvmlDeviceGetUtilizationRates, self._handle).gpu) / 100

    def memory_used_bytes(self) -> float:
        return float(_ask(_memory, self._part).used)

    def processes(self) -> list[GpuProcess]:
        """Compute and graphics processes."""
        lists = (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses)
        return [(process.pid, process.usedGpuMemory) for function in lists for process in _ask(function, self._part)]

    def clock_mhz(self, memory: bool) -> float:
        kind = pynvml.NVML_CLOCK_MEM if memory else pynvml.NVML_CLOCK_SM
        return float(_ask(pynvml.nvmlDeviceGetClockInfo, self._handle, kind))

    def temperature_c(self) -> float:
        sensor = pynvml.NVML_TEMPERATURE_GPU
        value = _or_none(pynvml.nvmlDeviceGetTemperatureV, self._handle, sensor)  # unknown to older drivers
        return float(_ask(pynvml.nvmlDeviceGetTemperature, self._handle, sensor) if value is None else value)

    def throttle_bits(self) -> float:
        return float(_ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, self._handle))

    def thermal_violation_s(self) -> float:
        status = _ask(pynvml.nvmlDeviceGetViolationStatus, self._handle, pynvml.NVML_PERF_POLICY_THERMAL)
        return float(status.violationTime) * 1e-9

    def activity_sample(self) -> None:
        """Take the sample from which the next `activity` counts."""
        if not self._samples:
            if not _ask(pynvml.nvmlGpmQueryDeviceSupport, self._handle).isSupportedDevice:
                raise ProbeError("not_supported")
            self._samples = [_ask(pynvml.nvmlGpmSampleAlloc) for _ in range(2)]
        self._samples.reverse()
        if self._device.gpu_instance is None:
            _ask(pynvml.nvmlGpmSampleGet, self._handle, self._samples[1])
        else:
            _ask(pynvml.nvmlGpmMigSampleGet, self._handle, self._device.gpu_instance, self._samples[1])

    def activity(self, metrics: Iterable[int]) -> list[float | str]:
        """Shares of the time since the last sample, one per metric number, or the reason code why not."""
        self.activity_sample()
        wanted = pynvml.c_nvmlGpmMetricsGet_t()
        wanted.version = pynvml.NVML_GPM_METRICS_GET_VERSION
        wanted.sample1, wanted.sample2 = self._samples
        for place, number in enumerate(metrics):
            wanted.metrics[place].metricId = number
            wanted.numMetrics = place + 1
        _ask(pynvml.nvmlGpmMetricsGet, wanted)
        answers = wanted.metrics[: wanted.numMetrics]
        return [_reason(answer.nvmlReturn) or answer.value / 100 for answer in answers]

    def provenance(self) -> dict[str, Any]:
        return _known(self._device, self._handle)

    def close(self) -> None:
        """Free what NVML allocated and shut it down."""
        for sample in self._samples:
            _or_none(pynvml.nvmlGpmSampleFree, sample)
        _or_none(pynvml.nvmlShutdown)


def open_source(pid: int, clock: Clock) -> GpuSource:
    """Open NVML for the first visible device. Runs in the sampling process; ProbeError where there is nothing to open."""
    _ask(pynvml.nvmlInit)
    try:
        selection = select(*_inventory())
        if not selection.devices:
            raise ProbeError("no_device")
        return gpu_source(Gpu(selection.devices[0]), selection, pid=pid, clock=clock)
    except ProbeError:  # else the source shuts NVML down when it closes
        _or_none(pynvml.nvmlShutdown)
        raise


class NvmlProbe(Probe):
    """Samples the first visible GPU around idle, window, idle."""

    name = "nvml"
    devices = ("cuda",)

    def __init__(self, context: ProbeContext, make_sampler: Callable[..., Sampler] = Sampler):
        super().__init__(context)
        pid, clock = context.pid, context.clock
        self._sampler = make_sampler(lambda: open_source(pid, clock), period_s=SLOW_S, clock=clock)
        self._sampler.prepare()  # forks now: before the build, and before CUDA is there
        self._begin_s: float | None = None
        self._window: tuple[float, float] | None = None
        self._result = ProbeResult()

    @classmethod
    def capabilities(cls) -> list[Capability]:
        try:
            source = open_source(os.getpid(), time.perf_counter)
        except ProbeError as error:
            return capabilities({}, error.reason)
        source.read()
        time.sleep(GPM_S)  # activity is a share of the time between two samples
        source.mark()
        return capabilities(source.close()[0])

    @property
    def wants_idle(self) -> bool:
        return True

    def __enter__(self) -> Self:
        self._sampler.start()
        return self

    def window_begins(self) -> None:
        self._begin_s = self.context.clock()
        self._sampler.mark()

    def window_ended(self) -> None:
        if self._begin_s is not None:
            self._window = (self._begin_s, self.context.clock())
        self._sampler.mark()

    def __exit__(self, *exc: object) -> None:
        if self._window is not None:
            time.sleep(max(0.0, self._window[1] + LINGER_S - self.context.clock()))
        self._result = probe_result(self._sampler.stop(), self._window)

    def result(self) -> ProbeResult:
        return self._result
