"""Blocks and pairs → launches → cases.

A group is every spec that is compared with another one, directly or through a chain. A block is one launch of each spec
of a group, in an order drawn from the seed, so that each ratio has both its sides within one block:

    group {mha, gqa, mqa}:   block 0: gqa mha mqa   block 1: mha mqa gqa   block 2: …   → three rows

A case is written when its group's blocks are done. A block cut off is run again whole. Complete blocks of an earlier,
interrupted run count, so that a long group does not start over. This module returns records; it writes nothing.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from effbench import registry
from effbench.pairing import case_metrics
from effbench.protocol import protocol
from effbench.runner import Request
from effbench.schema import Case, CaseRecord, Launch, Spec, Status, Trace, canonical_json, digest

WHAT_RAN = ("attention_backend", "decode_engine", "new_weights")  # facts of the launches that a row repeats
PREPARE_LIMIT_S = 1800.0  # training or downloading weights, which no protocol's limit is meant for


class Executor(Protocol):
    """Where launches run."""

    def launch(self, request: Request) -> tuple[Launch, Trace]: ...

    def renew(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where this runs: identity, device and provenance, the same for every launch of a run."""

    env_id: str
    hardware: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    peaks: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LaunchStarted:
    """A launch begins; nothing of ours may move until it is done."""

    spec: Spec
    block: int
    num_blocks: int
    preparing: bool = False


@dataclass(frozen=True, kw_only=True)
class LaunchDone:
    """A launch ended; keep it before asking for more."""

    launch: Launch
    trace: Trace
    wall_s: float


@dataclass(frozen=True, kw_only=True)
class CaseDone:
    """A row is complete."""

    record: CaseRecord


@dataclass(frozen=True, kw_only=True)
class BudgetSpent:
    """The next block would not fit; these cases are left for another run."""

    cases_left: int


Event = LaunchStarted | LaunchDone | CaseDone | BudgetSpent


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is to be run, and what of it is there already."""

    suite: str
    seed: int
    cases: Sequence[Case]
    environment: Environment
    earlier: Sequence[Launch] = ()  # launches of this environment, from which complete blocks are taken
    deadline_s: float | None = None  # on `clock`
    clock: Callable[[], float] = time.monotonic


def groups(cases: Iterable[Case]) -> list[list[Case]]:
    """Cases that share a spec with each other, directly or through a chain, in the order of their first case."""
    found: list[tuple[set[str], list[Case]]] = []
    for case in cases:
        specs = {s.spec_id for s in (case.spec, case.baseline) if s}
        merged, members, rest = specs, [case], []
        for other_specs, other_cases in found:
            if other_specs & specs:
                merged, members = merged | other_specs, other_cases + members
            else:
                rest.append((other_specs, other_cases))
        found = [*rest, (merged, members)]
    first = {id(case): index for index, case in enumerate(cases)} if isinstance(cases, Sequence) else {}
    return sorted((members for _, members in found), key=lambda members: first.get(id(members[0]), 0))


def run(sweep: Sweep, executor: Executor) -> Iterator[Event]:
    """Run a sweep; yields events in order. The caller keeps what it is given before it asks for the next one."""
    skipped = [case for case in sweep.cases if case.skip_reason]
    for case in skipped:
        yield CaseDone(record=_row(sweep, case, "skipped", case.skip_reason or "", [], None))
    waiting = groups([case for case in sweep.cases if not case.skip_reason])
    pace = _Pace()
    for number, group in enumerate(waiting):
        launches: list[Launch] = []
        for event in _run_group(sweep, group, executor, pace, launches):
            if isinstance(event, BudgetSpent):
                yield BudgetSpent(cases_left=sum(map(len, waiting[number:])))
                return
            yield event
        for case in group:
            yield CaseDone(record=_case_record(sweep, case, launches))


@dataclass
class _Pace:
    """How long launches have taken so far, to tell whether another block fits a budget."""

    launches: int = 0
    total_s: float = 0.0

    def expected_s(self, num_launches: int) -> float:
        return num_launches * self.total_s / self.launches if self.launches else 0.0


def _run_group(sweep: Sweep, group: Sequence[Case], executor: Executor, pace: _Pace, launches: list[Launch]) -> Iterator[Event]:
    specs = {s.spec_id: s for case in group for s in (case.spec, case.baseline) if s}
    rules = protocol(group[0].spec.protocol)
    dead: set[str] = set()
    for event in _prepare(sweep, specs, executor):
        if isinstance(event, LaunchDone):
            dead.add(event.launch.spec.spec_id)
            launches.append(event.launch)
        yield event
    for block in range(rules.blocks):
        alive = [spec_id for spec_id in sorted(specs) if spec_id not in dead]
        reused = _complete_block(sweep.earlier, block, set(specs))
        if reused or not alive:
            launches.extend(reused)
            continue
        if sweep.deadline_s is not None and sweep.clock() + pace.expected_s(len(alive)) > sweep.deadline_s:
            yield BudgetSpent(cases_left=0)
            return
        if rules.fresh_server:
            executor.renew()
        block_id = uuid.uuid4().hex
        random.Random(digest([sweep.seed, block, sorted(specs)])).shuffle(alive)
        for position, spec_id in enumerate(alive):
            yield LaunchStarted(spec=specs[spec_id], block=block, num_blocks=rules.blocks)
            done = _launch(sweep, executor, specs[spec_id], block, block_id, position)
            pace.launches, pace.total_s = pace.launches + 1, pace.total_s + done.wall_s
            launches.append(done.launch)
            if done.launch.status != "ok":
                dead.add(spec_id)  # what failed once is not tried again in this run
            yield done


def _prepare(sweep: Sweep, specs: Mapping[str, Spec], executor: Executor) -> Iterator[Event]:
    """Train or download the weights that specs stand on, and what their workloads ask for, each once, outside every measured launch.

    Yields a failed launch for every spec that has nothing to stand on.
    """
    prepared: set[str] = set()
    for spec in specs.values():
        needed = _stands_on(spec)
        if not needed or needed in prepared:
            continue
        prepared.add(needed)
        yield LaunchStarted(spec=spec, block=0, num_blocks=0, preparing=True)
        done = _launch(sweep, executor, spec, 0, "", 0, prepare_only=True)
        if done.launch.status == "ok":
            continue
        for other in specs.values():
            if _stands_on(other) == needed:
                yield replace(done, launch=replace(done.launch, spec=other, launch_id=uuid.uuid4().hex))


def _stands_on(spec: Spec) -> str:
    """Names what must be made before a spec can run, the same for all specs that share it; "" for nothing."""
    weights = spec.model.digest if spec.model.weights in ("trained", "hub") else ""
    return weights + registry.workload(spec.workload)(spec.params).stands_on(spec)


def _launch(
    sweep: Sweep, executor: Executor, spec: Spec, block: int, block_id: str, position: int, *, prepare_only: bool = False
) -> LaunchDone:
    where = sweep.environment
    request = Request(
        launch_id=uuid.uuid4().hex, spec=spec, seed=spec.seed + block, time_limit_s=PREPARE_LIMIT_S if prepare_only else spec.time_limit_s, suite=sweep.suite, env_id=where.env_id,
        block_id=block_id, block=block, position=position, hardware=where.hardware, provenance=where.provenance,
        peaks=where.peaks, prepare_only=prepare_only,
    )  # fmt: skip
    started_s = time.perf_counter()
    launch, trace = executor.launch(request)
    return LaunchDone(launch=launch, trace=trace, wall_s=time.perf_counter() - started_s)


def _complete_block(earlier: Sequence[Launch], block: int, spec_ids: set[str]) -> list[Launch]:
    """The launches of an earlier block of this number in which every one of these specs succeeded, or none."""
    by_block: dict[str, dict[str, Launch]] = {}
    for launch in earlier:
        if launch.block == block and launch.status == "ok" and launch.block_id:
            by_block.setdefault(launch.block_id, {})[launch.spec.spec_id] = launch
    for found in by_block.values():
        if spec_ids <= set(found):
            return [found[spec_id] for spec_id in spec_ids]
    return []


def _case_record(sweep: Sweep, case: Case, launches: Sequence[Launch]) -> CaseRecord:
    own = [launch for launch in launches if launch.spec.spec_id == case.spec.spec_id]
    baselines = None
    if case.baseline:
        baselines = [launch for launch in launches if launch.spec.spec_id == case.baseline.spec_id]
    failure = next((launch for launch in own if launch.status != "ok"), None)
    if failure:
        return _row(sweep, case, failure.status, failure.reason, own, baselines)
    return _row(sweep, case, "ok", "", own, baselines)


def _row(
    sweep: Sweep, case: Case, status: Status, reason: str, own: Sequence[Launch], baselines: Sequence[Launch] | None
) -> CaseRecord:
    where, spec = sweep.environment, case.spec
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    ran = {
        name: ", ".join(sorted({str(launch.facts[name]) for launch in own if launch.facts.get(name)})) or None
        for name in WHAT_RAN
    }
    provenance = {**where.provenance, **ran, "baseline": case.baseline.label if case.baseline else None}
    return CaseRecord(
        run_id=uuid.uuid4().hex, case_id=case.case_id, env_id=where.env_id, status=status, reason=reason,
        suite=sweep.suite, workload=spec.workload, model=spec.model.name, techniques=spec.stack,
        baseline_case_id=case.baseline_case_id, hardware=where.hardware, protocol=spec.protocol,
        launch_ids=tuple(launch.launch_id for launch in own),
        baseline_launch_ids=tuple(launch.launch_id for launch in baselines or ()),
        started_at=min((launch.started_at for launch in own), default=now), spec=canonical_json(spec.to_json()),
        provenance=provenance, metrics=case_metrics(own, baselines) if own else (),
    )  # fmt: skip
