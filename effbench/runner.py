"""One launch: in a fresh process, build one spec, warm up, measure one window, return a record and its raw trace.

    birth ── build ── check ── (quality: training) ─┬─ idle ── warm-up ──┤ window ├── idle ─┬─ (quality: inference) ── track
                      the correctness gate          probes open                             probes closed

Nothing here knows a technique or a workload by name: sessions, techniques and probes have contracts.
The process itself (fork, limits, death with its parent) is the executor's; `run` never raises, a failure is a record.
"""

from __future__ import annotations

import gc
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from effbench import ranks, registry
from effbench.errors import CorrectnessError, EffbenchError, LaunchError
from effbench.probe import Probe, ProbeContext, ProbeResult
from effbench.protocol import Protocol, protocol
from effbench.ranks import Place
from effbench.reasons import SPOILING
from effbench.recompute import launch_metrics
from effbench.schema import Launch, Series, Spec, Status, Trace, Window
from effbench.workload import BuildContext, Session

Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the scheduler asks a fresh process to do."""

    launch_id: str
    spec: Spec
    seed: int
    suite: str
    env_id: str
    block_id: str
    block: int
    position: int
    hardware: str
    time_limit_s: float = 300.0
    provenance: Mapping[str, Any] = field(default_factory=dict)
    peaks: Mapping[str, Any] = field(default_factory=dict)  # measured and datasheet rates, for MFU
    prepare_only: bool = False  # train and cache weights, measure nothing


def monotonic_clock() -> Clock:
    """Seconds since now, on a clock that is the same in every process of this host."""
    origin_ns = time.perf_counter_ns()
    return lambda: (time.perf_counter_ns() - origin_ns) * 1e-9


def record(request: Request, status: Status, reason: str = "", detail: str = "", **known: Any) -> Launch:
    """The record of a launch; `known` holds what it found out."""
    known.setdefault("started_at", datetime.now(UTC).isoformat(timespec="milliseconds"))
    return Launch(
        launch_id=request.launch_id, spec=request.spec, suite=request.suite, env_id=request.env_id,
        block_id=request.block_id, block=request.block, position=request.position, hardware=request.hardware,
        provenance=request.provenance, status=status, reason=reason, detail=detail, **known,
    )  # fmt: skip


def run(request: Request, clock: Clock | None = None, place: Place | None = None) -> tuple[Launch, Trace]:
    """Run one launch to its end, as rank 0 of several where there is a `place`.

    Never raises: what goes wrong is in the record's status, reason and detail.
    """
    clock = clock or monotonic_clock()
    started_at = datetime.now(UTC).isoformat(timespec="milliseconds")
    windows: dict[str, Window] = {}
    try:
        return _run(request, clock, windows, started_at, place)
    except Exception as error:
        known = {"windows": dict(windows), "started_at": started_at}
        return record(request, "failed", reason_of(error), traceback.format_exc(), **known), Trace()


def follow(request: Request, place: Place) -> None:
    """Be another rank of the launch: build the same and do what rank 0 does. Raises what goes wrong."""
    _set_threads(request.spec.threads)
    session = _built(request, monotonic_clock(), place)
    gc.collect()
    gc.freeze()
    ranks.follow(session)
    ranks.leave()


def prepare(request: Request) -> tuple[Launch, Trace]:
    """Train, or download, what this spec stands on, if it is not there yet. Never raises."""
    from effbench.models import weights

    try:
        _set_threads(request.spec.threads)
        weights.prepare(request.spec)
        registry.workload(request.spec.workload)(request.spec.params).prepare(request.spec)
    except Exception as error:
        return record(request, "failed", reason_of(error), traceback.format_exc()), Trace()
    return record(request, "ok"), Trace()


def _run(
    request: Request, clock: Clock, windows: dict[str, Window], started_at: str, place: Place | None
) -> tuple[Launch, Trace]:
    spec, rules = request.spec, protocol(request.spec.protocol)
    watching = [registry.probe(name) for name in registry.entries("probe")]
    watching = [probe for probe in watching if spec.device in probe.devices]
    for probe in watching:
        probe.at_birth()
    context = ProbeContext(device=spec.device, pid=os.getpid(), threads=spec.threads, clock=clock)
    probes = [probe(context) for probe in watching]
    with _phase(windows, "build", clock):
        _set_threads(spec.threads)
        session = _built(request, clock, place)
        if place:
            session = leader = ranks.Leader(session)
    with _phase(windows, "check", clock):
        session.check()
    if session.quality_first:
        with _phase(windows, "quality", clock):
            session.quality()
    gc.collect()
    gc.freeze()  # what was built is not walked again during the window
    warm_up, steps = _measure(session, probes, rules, clock, windows)
    if not session.quality_first:
        with _phase(windows, "quality", clock):
            session.quality()
    with _phase(windows, "collect", clock):
        results = [probe.result() for probe in probes]
        trace = _trace(warm_up, steps, session, results)
        facts = _facts(request, session, results, registry.workload(spec.workload).throughput)
        if place and ranks.oversubscribed(place, spec):
            facts["oversubscribed"] = True
    with _phase(windows, "track", clock):
        facts.update(_tensor_bytes(spec, session))
    if place and "tensors_not_tracked" not in facts:  # else the others wait in the middle of a step
        leader.end()
    reasons = tuple(dict.fromkeys(reason for result in results for reason in result.reasons))
    metrics = launch_metrics(spec=spec, windows=windows, facts=facts, trace=trace, reasons=reasons)
    spoilt = next((reason for reason in reasons if reason in SPOILING), "")
    status: Status = "invalid" if spoilt else "ok"
    launch = record(
        request, status, spoilt, started_at=started_at, windows=windows, facts=facts, reasons=reasons, metrics=metrics
    )
    return launch, trace


def _built(request: Request, clock: Clock, place: Place | None) -> Session:
    if place:
        ranks.join(place, request.spec.device, request.time_limit_s)
    workload = registry.workload(request.spec.workload)(request.spec.params)
    return workload.build(BuildContext(spec=request.spec, seed=request.seed, clock=clock))


def _measure(
    session: Session, probes: list[Probe], rules: Protocol, clock: Clock, windows: dict[str, Window]
) -> tuple[np.ndarray, np.ndarray]:
    """Open the probes, idle, warm up, run the window, idle. Returns start and duration of steps, (N, 2) each, in s."""
    with ExitStack() as stack:
        with _phase(windows, "open_probes", clock):
            for probe in probes:
                stack.enter_context(probe)
        idle = any(probe.wants_idle for probe in probes)
        if idle:
            with _phase(windows, "idle_before", clock):
                time.sleep(rules.idle_s)
        with _phase(windows, "warm_up", clock):
            warm_up = _steps(session, clock, rules.warm_up_s, rules.warm_up_steps, rules.window_limit_s)[0]
        session.begin()
        for probe in probes:
            probe.window_begins()
        start_s = clock()
        steps, ended_by = _steps(session, clock, rules.window_s, rules.window_steps, rules.window_limit_s)
        windows["window"] = Window(start_s=start_s, end_s=clock(), ended_by=ended_by)
        for probe in reversed(probes):
            probe.window_ended()
        if idle:
            with _phase(windows, "idle_after", clock):
                time.sleep(rules.idle_s)
        closing_s = clock()
    windows["close_probes"] = Window(start_s=closing_s, end_s=clock())
    return warm_up, steps


def _steps(session: Session, clock: Clock, least_s: float, least_steps: int, limit_s: float) -> tuple[np.ndarray, str]:
    """Step until both minima are met or the limit is reached; (N, 2) of start and duration in s, and which it was."""
    stamps = [clock()]
    rule_s, limit_s = stamps[0] + least_s, stamps[0] + limit_s
    ended_by = "rule"
    while len(stamps) <= least_steps or stamps[-1] < rule_s:
        if stamps[-1] >= limit_s and len(stamps) > 1:
            ended_by = "limit"
            break
        session.step()
        stamps.append(clock())
    times = np.asarray(stamps)
    return np.column_stack([times[:-1], np.diff(times)]), ended_by


def _trace(warm_up: np.ndarray, steps: np.ndarray, session: Session, results: list[ProbeResult]) -> Trace:
    own = [
        Series(name=name, unit="s", scope="process", source="perf_counter", t_s=part[:, 0], values=part[:, 1])
        for name, part in (("warm_up_step", warm_up), ("step", steps))
    ]
    return Trace(series=(*own, *session.series(), *(s for result in results for s in result.series)))


def _facts(request: Request, session: Session, results: list[ProbeResult], throughput: str) -> dict[str, Any]:
    work = session.step_work
    facts: dict[str, Any] = {
        "step_tokens": work.tokens,
        "step_samples": work.samples,
        "step_flops": work.model_flops,
        "step_bytes": work.model_bytes,
        "throughput": throughput,
        "seed": request.seed,
        "peaks": dict(request.peaks),
        **session.facts(),
    }
    for result in results:
        facts.update(result.facts)
    return facts


def _tensor_bytes(spec: Spec, session: Session) -> dict[str, Any]:
    """Peak of tensor bytes of one more step, measured, and as it was expected; without either where it cannot be had.

    The last thing that is done with a session: a step that fails here costs these figures and nothing else.
    """
    from effbench.models.memory import expected_memory
    from effbench.tensors import step_peak_bytes

    found: dict[str, Any] = {}
    with suppress(Exception):
        expected = expected_memory(spec)
        if expected is not None:
            found["expected_tensor_peak_bytes"] = expected.peak_bytes
    if spec.device == "cpu":  # a GPU's allocator has kept the peak of the window
        try:
            found["tensor_peak_bytes"] = step_peak_bytes(session.step)
        except Exception as error:
            found["tensors_not_tracked"] = reason_of(error)
    return found


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


@contextmanager
def _phase(windows: dict[str, Window], name: str, clock: Clock) -> Iterator[None]:
    start_s = clock()
    try:
        yield
    finally:
        windows[name] = Window(start_s=start_s, end_s=clock())


def reason_of(error: BaseException) -> str:
    """A short code for the record; the full story is in `detail`."""
    text = str(error)
    if isinstance(error, LaunchError):
        return error.reason
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        return "out_of_memory"
    if isinstance(error, CorrectnessError):
        return f"incorrect: {text}"
    if isinstance(error, EffbenchError):
        return text
    return f"raised: {type(error).__name__}: {text.splitlines()[0] if text else ''}".rstrip(": ")
