"""How much the probes disturb what they watch: the same steps of about 1 ms with probes on and with probes off.

One block is one child forked from a process that has the libraries loaded, the form every launch has. In it the same
session is measured again and again in short windows: off, off again (the A/A) and on, in an order drawn anew each round.
`on` opens, marks and closes the probes as the runner does, so their sampling processes live and work beside the window.
A window gives its mean step time (a median would not see a sampler that delays one step in a hundred), a round gives
the ratios of on to the mean of both off, and of off to off, a child the median over its rounds (a neighbour's burst falls
into one window of three), and the interval stands on the children. Windows are short, so that those of a round lie close.

All cores are used: then nothing is idle for a sampler to run on.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from benchmarks import common
from benchmarks.common import Figure, Options, Report, Samples, Target

Result = TypeVar("Result")

STEP_S = 1e-3
TARGET = Target(text="< 1 % slower", upper=1.01)
ARMS = ("off", "off_again", "on")


def run(options: Options) -> Report:
    """Up to 60 children of about 10 s each, as many as fit."""
    _load()
    threads = len(os.sched_getaffinity(0))
    rounds = 2 if options.tiny else 20
    window_s = 0.1
    arm = _arm(threads, rounds, window_s, options.seed)
    samples = common.run_blocks(
        {"child": arm}, blocks=options.plan(60), seed=options.seed, limit_s=options.limit_s, say=common.say
    )
    return Report(
        name="probe_overhead",
        compares=f"the same steps with probes on and off, {rounds} rounds of {window_s} s windows in each forked child",
        pairs=len(samples.blocks),
        figures=_figures(samples, threads),
        notes=(
            "The probes are those that watch a launch on this device: " + ", ".join(probe.name for probe in _probes()) + ".",
        ),
    )


def _figures(samples: Samples, threads: int) -> list[Figure]:
    control, ratio = samples.interval("child", "again_ratio"), samples.interval("child", "on_ratio")
    median = samples.interval("child", "on_median_ratio")
    return [
        Figure(key="step_s", title=f"step, {threads} threads, probes off", interval=samples.interval("child", "step_s")),
        Figure(key="aa_ratio", title="A/A: off again / off", interval=control),
        Figure(
            key="probes_ratio", title="mean step: on / off", interval=ratio, target=TARGET.text,
            verdict=common.judge_beside(ratio, TARGET, control),
        ),
        Figure(key="probes_median_ratio", title="median step: on / off", interval=median),
    ]  # fmt: skip


def _arm(threads: int, rounds: int, window_s: float, seed: int) -> common.Arm:
    count = iter(range(10**9))
    return lambda: in_fork(lambda: _child(threads, rounds, window_s, f"{seed}:{next(count)}"))


def _child(threads: int, rounds: int, window_s: float, seed: str) -> Mapping[str, float | None]:
    """All rounds of one child: three windows each, in an order drawn from the seed."""
    import random

    import torch

    from effbench import runner

    for probe in _probes():
        probe.at_birth()
    torch.set_num_threads(threads)
    clock, session = runner.monotonic_clock(), _session()
    order = random.Random(seed)
    windows: list[dict[str, np.ndarray]] = []
    for _ in range(rounds):
        arms = list(ARMS)
        order.shuffle(arms)
        windows.append({arm: _window(session, arm == "on", threads, window_s, clock) for arm in arms})
    mean, middle = ({arm: np.array([reduce(w[arm]) for w in windows]) for arm in ARMS} for reduce in (np.mean, np.median))
    base, middle_base = (np.sqrt(found["off"] * found["off_again"]) for found in (mean, middle))
    return {
        "step_s": float(np.median(mean["off"])),
        "again_ratio": float(np.median(mean["off_again"] / mean["off"])),
        "on_ratio": float(np.median(mean["on"] / base)),
        "on_median_ratio": float(np.median(middle["on"] / middle_base)),
    }


def _window(session: Any, probes_on: bool, threads: int, window_s: float, clock: Callable[[], float]) -> np.ndarray:
    """Step times of one window, shape (N,), measured by the runner's own code with its probes or with none."""
    from effbench import runner
    from effbench.probe import ProbeContext
    from effbench.protocol import protocol

    context = ProbeContext(device="cpu", pid=os.getpid(), threads=threads, clock=clock)
    probes = [probe(context) for probe in _probes()] if probes_on else []
    rules = replace(protocol("smoke"), window_s=window_s, warm_up_s=window_s / 6, idle_s=0.0)
    _, steps = runner._measure(session, probes, rules, clock, {})
    return steps[:, 1]


def _probes() -> list[Any]:
    """The probe classes that watch a launch on a CPU, as the runner picks them."""
    from effbench import registry

    return [probe for probe in map(registry.probe, registry.entries("probe")) if "cpu" in probe.devices]


def _session() -> Any:
    """Layers of a small network called one after another, as many as take about 1 ms here."""
    import torch

    from effbench.workload import Session, Step

    class Layers(Session):
        step_work = Step(tokens=1, samples=1)

        def __init__(self) -> None:
            torch.manual_seed(0)
            self.weight = torch.randn(256, 256) / 16
            self.hidden, self.layers = torch.randn(32, 256), 1
            taken = sorted(self._time() for _ in range(200))[100]
            self.layers = max(1, round(STEP_S / taken))

        def check(self) -> None:
            """Nothing can be wrong here."""

        def step(self) -> None:
            hidden = self.hidden
            for _ in range(self.layers):
                hidden = torch.tanh(hidden @ self.weight)

        def facts(self) -> dict[str, Any]:
            return {}

        def _time(self) -> float:
            began_s = time.perf_counter()
            self.step()
            return time.perf_counter() - began_s

    return Layers()


def _load() -> None:
    """What the fork server does before it forks: one-thread pools, libraries, and nothing for the collector to walk."""
    import gc

    from effbench.executors.local import SERVER_ENVIRONMENT

    os.environ.update(SERVER_ENVIRONMENT)
    import torch

    import effbench.runner  # noqa: F401  (imported for its side effect: it is loaded before the fork)

    torch.set_num_threads(1)
    _probes()
    gc.collect()
    gc.freeze()


def in_fork(work: Callable[[], Result]) -> Result:
    """Do `work` in a forked child and return what it returns; the parent blocks on a pipe. Raises RuntimeError."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read_end)
            with os.fdopen(write_end, "wb") as pipe:
                pickle.dump(work(), pipe)
            code = 0
        finally:
            if code:
                import traceback

                traceback.print_exc()
            os._exit(code)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        payload = pipe.read()
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise RuntimeError("the forked child failed; its traceback is above")
    result: Result = pickle.loads(payload)
    return result
