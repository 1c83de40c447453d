"""CPU time of the launch, how much of the host others took, and the energy of the CPU package where it can be read.

    __enter__ ── idle ── warm-up ──┤ point ── window ── point ├── idle ── __exit__
                 RAPL alone is sampled over time, 10 Hz, in a process of its own

Time is cumulative in kernel counters, so two points tell all. CPU time is that of this process and of children it has
reaped; samplers are reaped after the window and therefore not in it. Host figures are over the cores this process may
run on. Sources: proc(5) (stat), the kernel's accounting/psi and power/powercap documents, cgroup-v2 (cpu.stat).
"""

from __future__ import annotations

import os
import re
import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from effbench.errors import ProbeError
from effbench.hardware import cpu_model, num_cores
from effbench.probe import Capability, Probe, ProbeContext, ProbeResult
from effbench.probes.sampling import Clock, Sample, Sampler, Source
from effbench.reasons import REASONS
from effbench.schema import Series

PERIOD_S = 0.1
STOLEN_SHARE = 0.05  # of the window × cores; more is flagged
OTHERS_SHARE = 0.10  # likewise, CPU time of other processes
QUOTA_SHARE = 0.05  # of the window, time in which the control group's quota kept us waiting
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class RaplZone:
    """One CPU package as powercap shows it; `range_uj` is where its counter starts again from 0."""

    name: str
    energy_uj: Path
    range_uj: int


def rapl_zones(root: Path = Path("/")) -> list[RaplZone]:
    """The readable package zones. Raises ProbeError with rapl_missing or rapl_not_permitted."""
    zones = []
    for zone in sorted((root / "sys/class/powercap").glob("*-rapl:*")):
        # Subzones (intel-rapl:0:1: cores, memory) are parts of a package or of the platform: adding them counts twice.
        if zone.name.count(":") != 1 or not _text(zone / "name").startswith("package"):
            continue
        try:
            int((zone / "energy_uj").read_text())
        except PermissionError:
            raise ProbeError("rapl_not_permitted") from None
        except (OSError, ValueError):
            continue
        span = _text(zone / "max_energy_range_uj") or "0"
        zones.append(RaplZone(name=_text(zone / "name"), energy_uj=zone / "energy_uj", range_uj=int(span)))
    if not zones:
        raise ProbeError("rapl_missing")
    return zones


class RaplSource(Source):
    """Energy of all packages since the source was opened, in J, with wraparound added back (at most one a reading)."""

    def __init__(self, zones: list[RaplZone], clock: Clock):
        self._zones, self._clock, self._total_uj = zones, clock, 0
        self._last_uj = [self._energy_uj(zone) for zone in zones]

    def read(self) -> Iterable[Sample]:
        for index, zone in enumerate(self._zones):
            now_uj = self._energy_uj(zone)
            grown = now_uj - self._last_uj[index]
            self._total_uj += grown if grown >= 0 else grown + zone.range_uj
            self._last_uj[index] = now_uj
        return [("rapl_energy", self._clock(), self._total_uj * 1e-6)]

    @staticmethod
    def _energy_uj(zone: RaplZone) -> int:
        try:
            return int(zone.energy_uj.read_text())
        except (OSError, ValueError):
            raise ProbeError("rapl_lost") from None


_Point = dict[str, float]  # t_s and cumulative seconds by name, of what this host tells


class CpuProbe(Probe):
    """Series of two points each: process_cpu_time, host_stolen_time, host_pressure_some (s); sampled: rapl_energy (J).

    Facts: threads, cores, cpu_model, load_average (1 min, at the start), other_cpu_share (of window × cores), and on a CPU
    launch without RAPL `energy_reasons`. Beside a GPU the series is called host_rapl_energy: it is no energy of the GPU.
    """

    name = "cpu"
    root: ClassVar[Path] = Path("/")

    def __init__(self, context: ProbeContext):
        super().__init__(context)
        self._facts: dict[str, Any] = {"threads": context.threads, "cores": num_cores(), "cpu_model": cpu_model()}
        self._points: list[_Point] = []
        self._reasons: list[str] = []
        self._energy: tuple[Series, ...] = ()
        self._sampler: Sampler | None = None
        try:
            self._zones = rapl_zones(self.root)
        except ProbeError as error:
            self._zones = []
            self._no_energy(error.reason)
        else:
            zones, clock = self._zones, context.clock
            self._sampler = Sampler(lambda: RaplSource(zones, clock), period_s=PERIOD_S, clock=clock)
            self._sampler.prepare()

    @classmethod
    def capabilities(cls) -> list[Capability]:
        """Which CPU figures this host and container let us see."""
        found = [Capability(what="process CPU time", available=True, detail="CLOCK_PROCESS_CPUTIME_ID and getrusage")]
        host = _host_point(cls.root)
        for what, key, detail, remedy in (
            ("stolen CPU time", "host_stolen_time", "/proc/stat", "mount /proc"),
            ("CPU pressure", "host_pressure_some", "/proc/pressure/cpu", "boot with psi=1, on a kernel built with CONFIG_PSI"),
        ):
            found.append(Capability(what=what, available=key in host, detail=detail, remedy="" if key in host else remedy))
        try:
            zones = rapl_zones(cls.root)
        except ProbeError as error:
            remedy = "run on bare metal with the intel_rapl kernel module"
            if error.reason == "rapl_not_permitted":
                remedy = "sudo chmod a+r /sys/class/powercap/*/energy_uj"
            detail = f"{error.reason}: {REASONS[error.reason]}"
            found.append(Capability(what="CPU package energy", available=False, detail=detail, remedy=remedy))
        else:
            found.append(Capability(what="CPU package energy", available=True, detail=", ".join(z.name for z in zones)))
        return found

    @property
    def wants_idle(self) -> bool:
        """Idle power can be had only where energy can be read."""
        return self._sampler is not None

    def __enter__(self) -> Self:
        self._facts["load_average"] = os.getloadavg()[0]
        if self._sampler:
            self._sampler.start()
        return self

    def window_begins(self) -> None:
        if self._sampler:
            self._sampler.mark()
        self._points = [{**_host_point(self.root), **self._own_point()}]  # our CPU time last, and at the end first,

    def window_ended(self) -> None:
        self._points.append({**self._own_point(), **_host_point(self.root)})  # so that reading the host is not in it
        if self._sampler:
            self._sampler.mark()

    def __exit__(self, *exc: object) -> None:
        if not self._sampler:
            return
        recording = self._sampler.stop()
        if self.context.device == "cpu":  # beside a GPU these codes would speak of the GPU's energy
            self._reasons += recording.reasons
        if "rapl_energy" not in recording.series:
            self._no_energy(*recording.reasons or ("rapl_lost",))
            return
        t_s, values = recording.series["rapl_energy"]
        name = "rapl_energy" if self.context.device == "cpu" else "host_rapl_energy"
        source = "powercap: " + " + ".join(zone.name for zone in self._zones)
        self._energy = (Series(name=name, unit="J", scope="package", source=source, t_s=t_s, values=values),)

    def result(self) -> ProbeResult:
        series = (
            *self._series("process_cpu_time", "process", "CLOCK_PROCESS_CPUTIME_ID, getrusage"),
            *self._series("host_stolen_time", "host", "/proc/stat", absent="stolen_not_readable"),
            *self._series("host_pressure_some", "host", "/proc/pressure/cpu", absent="pressure_missing"),
            *self._energy,
        )
        if len(self._points) == 2:
            self._flag(*self._points)
        return ProbeResult(series=series, facts=self._facts, reasons=tuple(dict.fromkeys(self._reasons)))

    def _series(self, name: str, scope: str, source: str, absent: str = "") -> tuple[Series, ...]:
        if len(self._points) < 2:  # the window did not come to its end
            return ()
        if not all(name in point for point in self._points):
            self._reasons.append(absent)
            return ()
        t_s, values = (np.array([point[key] for point in self._points]) for key in ("t_s", name))
        return (Series(name=name, unit="s", scope=scope, source=source, t_s=t_s, values=values),)

    def _flag(self, begin: _Point, end: _Point) -> None:
        """Say what else happened on the host's cores during the window."""
        grown = {name: end[name] - begin[name] for name in begin.keys() & end.keys()}
        available_s = grown["t_s"] * self._facts["cores"]
        if grown.get("host_stolen_time", 0.0) > STOLEN_SHARE * available_s:
            self._reasons.append("stolen_time")
        if grown.get("quota", 0.0) > QUOTA_SHARE * grown["t_s"]:
            self._reasons.append("cpu_quota")
        if "busy" in grown:
            # Busy time counts in ticks, so a short quiet window can come out a tick below zero.
            share = max(0.0, grown["busy"] - grown["process_cpu_time"]) / available_s
            self._facts["other_cpu_share"] = share
            if share > OTHERS_SHARE:
                self._reasons.append("cpu_contended")

    def _own_point(self) -> _Point:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent_s = time.process_time() + children.ru_utime + children.ru_stime
        return {"t_s": self.context.clock(), "process_cpu_time": spent_s}

    def _no_energy(self, *reasons: str) -> None:
        if self.context.device == "cpu":  # a GPU launch gets its energy, and its reasons, elsewhere
            self._facts["energy_reasons"] = list(reasons)


def _host_point(root: Path) -> _Point:
    """Seconds since boot, summed over the cores this process may run on: stolen, busy (both in ticks of 10 ms); of the
    host: pressure; of the control group: how long its quota kept tasks off the cores. Without what cannot be read."""
    point: _Point = {}
    cores = {f"cpu{index}" for index in os.sched_getaffinity(0)}
    rows = [line.split() for line in _text(root / "proc/stat").splitlines() if line.startswith("cpu")]
    ticks = [[int(field) for field in row[1:9]] for row in rows if row[0] in cores]
    if ticks:
        user, nice, system, _idle, _iowait, irq, softirq, stolen = (sum(column) for column in zip(*ticks, strict=True))
        point["host_stolen_time"], point["busy"] = stolen * _TICK_S, (user + nice + system + irq + softirq) * _TICK_S
    pressure = re.search(r"^some .*total=(\d+)", _text(root / "proc/pressure/cpu"), re.MULTILINE)
    if pressure:
        point["host_pressure_some"] = int(pressure.group(1)) * 1e-6
    quota = re.search(r"^throttled_usec (\d+)", _text(root / "sys/fs/cgroup/cpu.stat"), re.MULTILINE)
    if quota:
        point["quota"] = int(quota.group(1)) * 1e-6
    return point


def _text(path: Path) -> str:
    """A file of the kernel without its last newline, empty where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
