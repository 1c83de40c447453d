"""The inside of a `Machine`: runs in a process whose libnvidia-ml is the stub. Started as `python -m tests.fake_nvml.worker`."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import pickle
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effbench.probe import Capability, ProbeContext, ProbeResult
from effbench.probes import nvml
from effbench.probes.gpu.select import DeviceInfo
from effbench.probes.gpu.source import GpuSource
from effbench.probes.sampling import Recording, SamplingLoop, launch_clock
from tests.fake_nvml import World


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A probe's result, and whether NVML was left as it was found."""

    result: ProbeResult
    left_open: int
    samples_left: int


class SimulatedClock:
    """The time in the file that the stub reads."""

    def __init__(self, path: Path):
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 8)

    def __call__(self) -> float:
        return float(struct.unpack("d", self._memory[:8])[0])

    def set(self, now_s: float) -> None:
        self._memory[:8] = struct.pack("d", now_s)


class InlineSampler:
    """The sampling process without the process: the same loop, moved along by `advance`."""

    def __init__(self, open_source: Callable[[], GpuSource], *, period_s: float, clock: SimulatedClock):
        self._open_source, self._period_s, self._clock = open_source, period_s, clock

    def prepare(self) -> None:
        """There is no process to fork."""

    def start(self) -> None:
        source = self._open_source()
        source.cpu_share = math.inf  # simulated seconds are short: no reading is too dear
        self._loop = SamplingLoop(source, period_s=self._period_s, clock=self._clock)
        while not source.ready:
            self.advance(self._loop.due_s)

    def advance(self, until_s: float) -> None:
        while self._loop.due_s <= until_s:
            self._clock.set(max(self._clock(), self._loop.due_s))
            self._loop.tick()
        self._clock.set(max(self._clock(), until_s))

    def skip(self, until_s: float) -> None:
        """Let time pass without a reading, as a machine that stalls does."""
        self._clock.set(until_s)

    def mark(self) -> None:
        self._loop.mark()

    def stop(self) -> Recording:
        return self._loop.finish()


@contextmanager
def inside(world: World, *, real: bool = False) -> Iterator[Path]:
    """This process in `world`; yields the path of the simulated clock."""
    with tempfile.TemporaryDirectory(prefix="fake_nvml_") as folder:
        clock, description = Path(folder) / "now", Path(folder) / "world"
        clock.write_bytes(struct.pack("d", 0.0))
        description.write_text(world.text(f"real {time.perf_counter()!r}" if real else str(clock)))
        before = dict(os.environ)
        os.environ.update({"FAKE_NVML": str(description), **world.environment})
        try:
            yield clock
        finally:
            os.environ.clear()
            os.environ.update(before)


def observe(world: World, *, window: tuple[float, float], start_s: float = 0.0, end_s: float | None = None,
            pid: int | None = None, stall: tuple[float, float] | None = None) -> Seen:  # fmt: skip
    """What the probe sees from `start_s` to `end_s` (0.5 s after the window) of simulated time."""
    with inside(world) as path:
        clock = SimulatedClock(path)
        clock.set(start_s)
        made: list[InlineSampler] = []

        def make_sampler(*arguments: Any, **named: Any) -> Any:
            made.append(InlineSampler(*arguments, **named))
            return made[0]

        context = ProbeContext(device="cuda", pid=os.getpid() if pid is None else pid, threads=1, clock=clock)
        probe = nvml.NvmlProbe(context, make_sampler)
        with probe:
            (sampler,) = made
            sampler.advance(window[0])
            probe.window_begins()
            if stall:
                sampler.advance(stall[0])
                sampler.skip(stall[1])
            sampler.advance(window[1])
            probe.window_ended()
            sampler.advance(window[1] + 0.5 if end_s is None else end_s)
        return _seen(probe)


def observe_really(world: World, *, idle_s: float, window_s: float) -> tuple[Seen, tuple[float, float]]:
    """The same with the real sampling process on the machine's clock; returns the window too."""
    with inside(world, real=True):
        clock = launch_clock()
        probe = nvml.NvmlProbe(ProbeContext(device="cuda", pid=os.getpid(), threads=1, clock=clock))
        with probe:
            time.sleep(idle_s)
            probe.window_begins()
            begin_s = clock()
            time.sleep(window_s)
            window = (begin_s, clock())
            probe.window_ended()
            time.sleep(idle_s)
        return _seen(probe), window


def visible_devices(world: World) -> list[DeviceInfo]:
    with inside(world):
        return nvml.visible_devices()


def why_no_device(world: World) -> str:
    with inside(world):
        return nvml.why_no_device()


def provenance(world: World) -> dict[str, Any]:
    with inside(world):
        return nvml.provenance(nvml.visible_devices()[0])


def capabilities(world: World) -> list[Capability]:
    with inside(world, real=True):
        return nvml.NvmlProbe.capabilities()


def _seen(probe: nvml.NvmlProbe) -> Seen:
    stub = ctypes.CDLL("libnvidia-ml.so.1")
    return Seen(result=probe.result(), left_open=stub.fake_nvml_open(), samples_left=stub.fake_nvml_samples())


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints does not disturb the answers
    while True:
        try:
            function, arguments, named = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = (globals()[function](*arguments, **named), "")
        except Exception:
            answer = (None, traceback.format_exc())
        answers.write(pickle.dumps(answer))
        answers.flush()


if __name__ == "__main__":
    # Under its real name, so that what it pickles can be read by the tests.
    from tests.fake_nvml import worker

    worker._serve()
