"""A launch whose steps have a bare loop beside them: what the harness adds to a step, in one process.

    runner.run, unchanged ── build, check, probes, phases, windows
        └─ session.step ── in an order drawn anew: the workload's own step · the bare loop's call · the bare call again

All three share memory, caches, pace of the processor and the samplers that run beside them, which two processes do not.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from effbench import registry
from effbench.runner import Request, run
from effbench.schema import Series, Spec
from effbench.workload import BuildContext, Session

ARMS = ("ours", "bare", "again")


class Beside(Session):
    """The session of a workload and a bare call, one after the other in each step. `times_s` holds the steps of the window."""

    def __init__(self, inner: Session, call: Callable[[int], object], seed: int):
        self._inner, self._call, self._random, self._count = inner, call, random.Random(seed), 0
        self.step_work, self.quality_first = inner.step_work, inner.quality_first
        self.times_s: list[dict[str, float]] = []

    def check(self) -> None:
        self._inner.check()

    def begin(self) -> None:
        self._inner.begin()
        self.times_s.clear()

    def step(self) -> None:
        times_s = {}
        for arm in self._random.sample(ARMS, len(ARMS)):
            began_s = time.perf_counter()
            if arm == "ours":
                self._inner.step()
            else:
                self._call(self._count)
                self._count += 1
            times_s[arm] = time.perf_counter() - began_s
        self.times_s.append(times_s)

    def quality(self) -> None:
        self._inner.quality()

    def facts(self) -> dict[str, Any]:
        return self._inner.facts()

    def series(self) -> list[Series]:
        return self._inner.series()


def measure(call_of: Callable[[], Callable[[int], object]], order: Mapping[str, Any], seed: int) -> dict[str, list[float]]:
    """Run a launch of `order["spec"]` in this process, once: the bare times and the ratios of each step of its window.

    The bare loop is made after the workload, with the threads of the launch. Raises RuntimeError when the launch fails."""
    spec = Spec.from_json(order["spec"])
    workload, sessions = registry.workload(spec.workload), list[Beside]()
    build = workload.build

    def both(self: Any, context: BuildContext) -> Session:
        sessions.append(Beside(build(self, context), call_of(), seed))
        return sessions[-1]

    workload.build = both  # type: ignore[method-assign]  # this process ends with the launch
    launch, _ = run(
        Request(
            launch_id=uuid.uuid4().hex, spec=spec, seed=spec.seed, suite="bench", env_id="bench", block_id=uuid.uuid4().hex,
            block=0, position=0, hardware="bench",
        )
    )  # fmt: skip
    if launch.status != "ok":
        raise RuntimeError(f"the launch failed ({launch.reason}):\n{launch.detail}")
    return ratios(sessions[0].times_s, spec.workload)


def ratios(times_s: list[dict[str, float]], work: str) -> dict[str, list[float]]:
    """Of each step: bare, again / bare, and ours over the geometric mean of both."""
    return {
        f"{work}_s": [each["bare"] for each in times_s],
        f"again_{work}_ratio": [each["again"] / each["bare"] for each in times_s],
        f"ours_{work}_ratio": [each["ours"] / (each["bare"] * each["again"]) ** 0.5 for each in times_s],
    }
