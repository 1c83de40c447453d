"""A workload inside effbench and a bare loop of the same steps in one process: what the harness adds to a step.

    one round   a window of the runner, its probes on, around the workload's steps
                a window of bare calls with no probe anywhere · another one (the A/A)      in an order drawn anew

All three share the threads, the memory and the pace of the processor, which two processes do not. A window gives its mean step
(a median would not see a sampler that delays one step in a hundred); windows are short, so that those of a round lie close.
"""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from effbench import registry, runner
from effbench.probe import Probe, ProbeContext
from effbench.protocol import Protocol, protocol
from effbench.schema import Spec
from effbench.workload import BuildContext, Session

ARMS = ("ours", "bare", "again")
WINDOW_S, WARM_UP_S, LEAST_STEPS = 0.5, 0.1, 5

Call = Callable[[int], object]


def measure(call_of: Callable[[], Call], order: Mapping[str, Any], seed: int) -> dict[str, list[float]]:
    """What `order["rounds"]` rounds of `order["spec"]` in this process give (`ratios`); the bare loop is made second."""
    spec = Spec.from_json(order["spec"])
    classes = [probe for probe in map(registry.probe, registry.entries("probe")) if spec.device in probe.devices]
    for each in classes:
        each.at_birth()
    runner._set_threads(spec.threads)
    clock = runner.monotonic_clock()
    context = ProbeContext(device=spec.device, pid=os.getpid(), threads=spec.threads, clock=clock)
    session = registry.workload(spec.workload)(spec.params).build(BuildContext(spec=spec, seed=spec.seed, clock=clock))
    session.check()
    call = call_of()
    gc.collect()
    gc.freeze()  # as the runner does, for both
    rules = replace(
        protocol(spec.protocol), window_s=WINDOW_S, window_steps=LEAST_STEPS, warm_up_s=WARM_UP_S, warm_up_steps=1, idle_s=0.0
    )
    rounds = measured(session, call, lambda: [each(context) for each in classes], rules, order["rounds"], seed)
    return ratios(rounds, spec.workload)


def measured(
    session: Session, call: Call, probes: Callable[[], list[Probe]], rules: Protocol, rounds: int, seed: int
) -> list[dict[str, float]]:
    """The mean step of each arm in each round, in s; the probes of every window of ours are new ones."""
    clock, drawn = runner.monotonic_clock(), random.Random(seed)

    def ours() -> float:
        return float(runner._measure(session, probes(), rules, clock, {})[1][:, 1].mean())

    def bare() -> float:
        _mean_s(call, rules.warm_up_s, rules.warm_up_steps)
        return _mean_s(call, rules.window_s, rules.window_steps)

    works = {"ours": ours, "bare": bare, "again": bare}
    return [{arm: works[arm]() for arm in drawn.sample(ARMS, len(ARMS))} for _ in range(rounds)]


def _mean_s(call: Call, least_s: float, least_calls: int) -> float:
    """What a call takes, over at least this long and this many."""
    began_s = time.perf_counter()
    count, past_s = 0, 0.0
    while count < least_calls or past_s < least_s:
        call(count)
        count += 1
        past_s = time.perf_counter() - began_s
    return past_s / count


def ratios(rounds: list[dict[str, float]], work: str) -> dict[str, list[float]]:
    """Of each round: bare, again / bare, and ours over the geometric mean of both."""
    return {
        f"{work}_s": [each["bare"] for each in rounds],
        f"again_{work}_ratio": [each["again"] / each["bare"] for each in rounds],
        f"ours_{work}_ratio": [each["ours"] / (each["bare"] * each["again"]) ** 0.5 for each in rounds],
    }
