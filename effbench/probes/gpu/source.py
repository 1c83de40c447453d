"""The sampling side of the GPU probe: which sensor is read when, and what becomes of one that fails. Knows no NVML.

    first reading ── burst ───────────────────── steady ──────────────────────────▶
    every sensor     the counter alone, every    counter and power at the counter's pace,
                     2 ms, until 3 updates or    slow sensors at theirs; slower when that
                     0.4 s: its period           takes more than 1 % of a core

A sensor that the device does not have is asked once. One that fails now and then leaves a gap that is counted. A series
without any sample is missing with its reason; the loss of the device ends reading, not the work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from effbench.errors import ProbeError
from effbench.probes.sampling import Clock, Sample, Source

BURST_PERIOD_S, BURST_S, BURST_UPDATES = 0.002, 0.4, 3
# Readings per update of the counter. Not a whole number: so they fall on ever other phases of it, and a line through
# many updates finds each to within a millisecond.
READINGS_PER_UPDATE = 4.236
FASTEST_S, SLOWEST_S = 0.02, 0.1  # the slowest is the 10 Hz that an integral of power needs
FEWEST_PER_UPDATE = 1.618  # nearer to one reading per update, the moments of the updates are no longer seen
USUAL_COUNTER_PERIOD_S = 0.1  # where there is no counter to look at
FOREVER = ("not_supported", "no_permission", "mig")  # asking again would not help


@dataclass(frozen=True)
class Meta:
    """What a series is: the fields of schema.Series beside its samples."""

    name: str
    unit: str
    source: str
    scope: str = "gpu"


@dataclass(frozen=True, kw_only=True)
class Sensor:
    """One call to the driver and the series it feeds: for each a value, or the reason code why there is none.

    No values at all: nothing new yet.
    """

    series: tuple[Meta, ...]
    read: Callable[[], Sequence[float | str]]
    every_s: float = 0.0  # 0: at every reading


class GpuSource(Source):
    """Reads sensors until closed. `counter` is the series whose beat sets the pace; `on_close` gives facts and reasons."""

    cpu_share = 0.01  # of a core: what reading may take

    def __init__(
        self,
        sensors: Sequence[Sensor],
        *,
        counter: str,
        clock: Clock,
        on_close: Callable[[], tuple[Mapping[str, Any], Iterable[str]]],
        cpu_time: Callable[[], float] = time.process_time,
    ):
        self._sensors, self._counter, self._clock, self._on_close, self._cpu_time = sensors, counter, clock, on_close, cpu_time
        self._due_s = [-math.inf] * len(sensors)
        self._counts = {meta.name: 0 for sensor in sensors for meta in sensor.series}
        self._of_counter = [index for index, sensor in enumerate(sensors) if sensor.series[0].name == counter]
        self._failures: dict[str, int] = {}
        self._last_reason: dict[str, str] = {}
        self._lost = ""
        self._updates_s: list[float] = []
        self._last_counter: float | None = None
        self._burst_end_s: float | None = None
        self._checked_s, self._checked_cpu_s = 0.0, 0.0
        self._slowest_s = SLOWEST_S
        self.counter_period_s: float | None = None
        self.ready = False

    def read(self) -> list[Sample]:
        if self._lost:
            return []
        if self._burst_end_s is None:
            return self._begin()
        if not self.ready:
            samples = self._take(self._of_counter)
            self._watch_burst(samples)
        else:
            now_s = self._clock()
            samples = self._take(index for index, due_s in enumerate(self._due_s) if due_s <= now_s)
            self._spare_the_core(now_s)
        return samples

    def mark(self) -> list[Sample]:
        """Everything at once, whatever is due."""
        return [] if self._lost else self._take(range(len(self._sensors)))

    def close(self) -> tuple[dict[str, Any], list[str]]:
        facts, reasons = self._on_close()
        failed = {name: count for name, count in self._failures.items() if self._counts[name]}
        missing = {name: reason for name, reason in self._last_reason.items() if not self._counts[name]}
        flags = [self._lost] * bool(self._lost) + ["samples_lost"] * bool(failed) + self._stale()
        known = {
            "counter_period_s": self.counter_period_s,
            "sample_period_s": self.period_s,
            "gpu_failed_reads": failed,
            "gpu_missing": missing,
        }
        return {**facts, **known}, [*dict.fromkeys([*reasons, *flags])]

    def _begin(self) -> list[Sample]:
        """Read everything once, then look at the counter alone if there is one."""
        samples = self._take(range(len(self._sensors)))
        self._burst_end_s = self._clock() + BURST_S
        if self._counts.get(self._counter, 0):
            self.period_s = BURST_PERIOD_S
            self._last_counter = next(value for name, _, value in samples if name == self._counter)
        else:
            self._settle()
        return samples

    def _watch_burst(self, samples: Sequence[Sample]) -> None:
        for name, t_s, value in samples:
            if name == self._counter and value != self._last_counter:
                self._updates_s.append(t_s)
                self._last_counter = value
        if len(self._updates_s) >= BURST_UPDATES:
            self.counter_period_s = (self._updates_s[-1] - self._updates_s[0]) / (len(self._updates_s) - 1)
        if self.counter_period_s or self._lost or (self._burst_end_s is not None and self._clock() >= self._burst_end_s):
            self._settle()

    def _settle(self) -> None:
        """End of the burst: take up the pace that the counter needs."""
        beat_s = self.counter_period_s or USUAL_COUNTER_PERIOD_S
        self.period_s = min(max(beat_s / READINGS_PER_UPDATE, FASTEST_S), SLOWEST_S)
        if beat_s / FEWEST_PER_UPDATE > FASTEST_S:
            self._slowest_s = min(SLOWEST_S, beat_s / FEWEST_PER_UPDATE)
        self.ready = True
        self._checked_s, self._checked_cpu_s = self._clock(), self._cpu_time()

    def _spare_the_core(self, now_s: float) -> None:
        """Once a second: read less often while reading takes more than its share of a core."""
        if now_s - self._checked_s < 1.0:
            return
        cpu_s = self._cpu_time()
        if cpu_s - self._checked_cpu_s > self.cpu_share * (now_s - self._checked_s) and self.period_s is not None:
            self.period_s = min(self.period_s * 1.5, self._slowest_s)
        self._checked_s, self._checked_cpu_s = now_s, cpu_s

    def _take(self, indices: Iterable[int]) -> list[Sample]:
        samples: list[Sample] = []
        for index in indices:
            if not self._lost:
                samples += self._ask(index, self._sensors[index])
        return samples

    def _ask(self, index: int, sensor: Sensor) -> list[Sample]:
        before_s = self._clock()
        try:
            values = sensor.read()
        except ProbeError as error:
            values = [error.reason] * len(sensor.series)
        t_s = (before_s + self._clock()) / 2
        self._due_s[index] = before_s + sensor.every_s
        samples, reasons = [], []
        for meta, value in zip(sensor.series, values, strict=True) if values else ():
            if not isinstance(value, str) and math.isfinite(value):
                self._counts[meta.name] += 1
                samples.append((meta.name, t_s, value))
            else:
                reasons.append(value if isinstance(value, str) else "nvml_error")
                self._failed(meta.name, reasons[-1])
        if len(reasons) == len(sensor.series) and all(reason in FOREVER for reason in reasons):
            self._due_s[index] = math.inf
        return samples

    def _failed(self, name: str, reason: str) -> None:
        self._failures[name] = self._failures.get(name, 0) + 1
        self._last_reason[name] = reason
        if reason == "device_lost":
            self._lost = reason

    def _stale(self) -> list[str]:
        return ["stale_samples"] if "stale_samples" in self._last_reason.values() else []
