"""A machine with simulated GPUs: a stub libnvidia-ml.so.1, built with gcc, that the real pynvml finds and loads.

    machine = Machine()                                     # a process with the stub on its LD_LIBRARY_PATH
    world = World(gpus=[Gpu(power=steady(300))])            # what is true
    seen = machine.observe(world, window=(2.0, 8.0))        # what NvmlProbe makes of it
    world.gpus[0].energy_j(2.0, 8.0)                        # what it should have been

Time is simulated: `observe` drives the probe's own reading code along a clock that jumps from one reading to the next, so
hours cost seconds. `observe_really` uses the real sampling process on the machine's clock.

The stub reads a world file: `clock real EPOCH | clock PATH`, then for each GPU a line `gpu` and lines
`set KEY VALUE` · `p T WATTS` (points of the true power, linear in between, two at one T make a jump) ·
`process PID BYTES FROM TO compute|graphics` · `slice UUID INSTANCE TOTAL USED` · `rule WHAT FROM TO CODE`, where WHAT is
`fail:<sensor>` (CODE is the NVML error; `fail:all` for every call), `freeze` or `reset` of the counter, `stale` power fields,
`throttle` (CODE is the bit mask), `violation` (of the thermal limit) or `wall` (CODE s are added to the driver's time stamps).
"""

from __future__ import annotations

import atexit
import functools
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FOREVER = (-math.inf, math.inf)
IDLE_W, PEAK_W = 75.0, 700.0

NOT_SUPPORTED, UNINITIALIZED, GPU_IS_LOST, UNKNOWN = 3, 1, 15, 999


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Something out of the ordinary between two times."""

    what: str
    start_s: float = -math.inf
    end_s: float = math.inf
    code: int = 0


@dataclass(frozen=True, kw_only=True)
class Process:
    pid: int | Literal["own"]  # "own": the machine's process
    memory_bytes: int = 1 << 30
    start_s: float = -math.inf
    end_s: float = math.inf
    kind: str = "compute"


@dataclass(frozen=True, kw_only=True)
class Slice:
    uuid: str
    instance: int = 1
    total_bytes: int = 20 << 30
    used_bytes: int = 5 << 30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One simulated GPU. `power`: points (t in s, W) of the truth; before the first and after the last it is constant."""

    power: Sequence[tuple[float, float]]
    name: str = "NVIDIA H200"
    uuid: str = "GPU-11111111-0000-0000-0000-000000000001"
    pci: str = "00000000:18:00.0"
    memory_total: int = 141 << 30
    memory_used: int = 3 << 30
    split: int = 0
    activity: int = 1
    base_j: float = 1_234_567.0
    idle_w: float = IDLE_W
    peak_w: float = PEAK_W
    counter_period: float = 0.1
    counter_phase: float = 0.03
    counter_jitter: float = 0.0
    counter_of_sensor: int = 0  # 1: the counter integrates only what the sensor saw
    sensor_period: float = 0.1
    sensor_phase: float = 0.0
    sensor_duty: float = 0.25
    rules: Sequence[Rule] = ()
    processes: Sequence[Process] = (Process(pid="own"),)
    slices: Sequence[Slice] = ()

    def energy_j(self, start_s: float, end_s: float) -> float:
        """True energy in J over [start_s, end_s], in closed form."""
        t, p = np.array(self.power, dtype=float).T
        inside = t[(t > start_s) & (t < end_s)]
        edges = np.unique(np.concatenate([[start_s], inside, [end_s]]))
        middles = (edges[1:] + edges[:-1]) / 2  # of a straight piece: its mean power; never on a jump
        return float(np.interp(middles, t, p) @ np.diff(edges))

    def lines(self) -> list[str]:
        lists = ("power", "rules", "processes", "slices")
        settings = [f"set {key} {value}" for key, value in vars(self).items() if key not in lists]
        return [
            "gpu",
            *settings,
            *(f"p {float(t)!r} {float(w)!r}" for t, w in self.power),
            *(f"rule {r.what} {r.start_s} {r.end_s} {r.code}" for r in self.rules),
            *(
                f"process {os.getpid() if p.pid == 'own' else p.pid} {p.memory_bytes} {p.start_s} {p.end_s} {p.kind}"
                for p in self.processes
            ),
            *(f"slice {s.uuid} {s.instance} {s.total_bytes} {s.used_bytes}" for s in self.slices),
        ]


def steady(watts: float) -> list[tuple[float, float]]:
    return [(0.0, watts), (1.0, watts)]


def stairs(*steps: tuple[float, float], idle_w: float = IDLE_W) -> list[tuple[float, float]]:
    """Power that jumps to W at t for each step (t, W), from idle before the first."""
    points, level = [(min(0.0, steps[0][0]) - 1.0, idle_w)], idle_w
    for t, watts in steps:
        points += [(t, level), (t, watts)]
        level = watts
    return [*points, (steps[-1][0] + 1.0, level)]


@dataclass(frozen=True, kw_only=True)
class World:
    gpus: Sequence[Gpu]
    environment: Mapping[str, str] = field(default_factory=dict)  # CUDA_VISIBLE_DEVICES, CUDA_DEVICE_ORDER

    def text(self, clock: str) -> str:
        return "\n".join([f"clock {clock}", *(line for gpu in self.gpus for line in gpu.lines()), ""])


def require_gcc() -> None:
    """Skip the test where there is no C compiler; under CI, where there has to be one, fail instead."""
    if shutil.which("gcc"):
        return
    if os.environ.get("CI"):
        pytest.fail("gcc is missing, and under CI the tests of the NVML path may not be skipped")
    pytest.skip("gcc is not installed: it builds the stub libnvidia-ml (apt-get install gcc libc6-dev)")


@functools.cache
def library() -> Path:
    """The folder of the built stub; built once."""
    require_gcc()
    folder = Path(tempfile.mkdtemp(prefix="fake_nvml_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sources = [str(HERE / name) for name in ("device.c", "interface.c")]
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-soname,libnvidia-ml.so.1"]
    subprocess.run(["gcc", *flags, "-o", str(folder / "libnvidia-ml.so.1"), *sources, "-lm"], check=True)
    return folder


class Machine:
    """A process in which the stub is the NVML of the machine. Calls run there, one at a time; results come back by pickle."""

    def __init__(self) -> None:
        folder = library()
        searched = os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fake_nvml.worker"], cwd=ROOT, env={**os.environ, "LD_LIBRARY_PATH": searched},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        return functools.partial(self.call, name)

    def call(self, function: str, *arguments: Any, **named: Any) -> Any:
        """Run a function of `worker` in the machine. Raises RuntimeError with its traceback when it raised."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((function, arguments, named), self._process.stdin)
        self._process.stdin.flush()
        value, trouble = pickle.load(self._process.stdout)
        if trouble:
            raise RuntimeError(trouble)
        return value

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=10)
