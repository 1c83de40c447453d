"""All checks of a bundle's records, in order: identity, numbers, time, physics, statistics, copies.

    contents ──▶ follows  (ids, blocks, every metric again from its trace)
             ──▶ timing · physics · roofline · facts · plausible  (each launch by itself)
             ──▶ blocks, copies, spread, what is here already  (launches beside each other)

Finding nothing shows that rows follow from traces and that both could be; not that they are true.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from effbench import checks, proof
from effbench.exchange import facts, follows, physics, plausible, roofline, timing
from effbench.exchange.checking import Seen, guarded, refused, remark, row_name
from effbench.exchange.contents import Contents
from effbench.exchange.known import Known
from effbench.exchange.report import Finding
from effbench.schema import CaseRecord, Launch, Trace

MOST_OF_ONE = 5  # findings of one check about one row or launch that are shown
LAUNCH_CHECKS: tuple[tuple[str, Callable[[Seen], Iterable[Finding]]], ...] = (
    ("windows", timing.stretches), ("steps", timing.steps), ("clock", timing.ticks), ("sensors", physics.sensors),
    ("cpu time", physics.processor), ("memory", physics.memory), ("roofline", roofline.rates), ("facts", facts.of_spec),
    ("facts", facts.training), ("quality", facts.quality), ("sizes", facts.sizes), ("flags", facts.flags),
    ("steady state", plausible.steady), ("samples", plausible.samples), ("digits", plausible.digits),
)  # fmt: skip
# Checks of `effbench/checks.py` that honest noise can fail: calibration and window are measurements both.
NOISY = ("shares", "memory")


def findings(contents: Contents, known: Known) -> list[Finding]:
    """What the checks found, refusals first. Never raises: a record that cannot be checked is refused."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = guarded("evidence", "bundle", _all, contents, known)
    return _shortened(found)


def _all(contents: Contents, known: Known) -> Iterator[Finding]:
    rows, launches = contents.cases, contents.launches
    yield from guarded("identity", "bundle", follows.structure, rows, launches)
    yield from guarded("environment", "bundle", follows.environments, rows, launches)
    again: dict[str, Launch] = {}
    seen: dict[str, Seen] = {}
    for name, launch in launches.items():
        if launch.status != "ok":
            again[name] = launch
            continue
        yield from _launch(Seen(launch, contents.traces.get(name) or Trace()), name in contents.traces, again, seen)
    for row in rows:
        yield from _row(row, launches, again, known)
    yield from guarded("facts", "bundle", facts.same, list(seen.values()))
    yield from guarded("blocks", "bundle", _blocks, rows, seen)
    yield from guarded("copies", "bundle", plausible.copies, list(seen.values()))
    yield from guarded("spread", "bundle", plausible.spread, _groups(rows, seen))
    yield from guarded("known", "bundle", plausible.known_already, list(seen.values()), known)


def _launch(one: Seen, has_trace: bool, again: dict[str, Launch], sane: dict[str, Seen]) -> Iterator[Finding]:
    """Checks of one launch; it joins `again` with its metrics computed from its trace, and `sane` where series can be compared."""
    if not has_trace:
        yield refused("launches", one.where, "its trace is not in the bundle")
        return
    sound = guarded("series", one.where, timing.sound, one)
    yield from sound
    if any(finding.severity == "refused" for finding in sound):
        return

    def recomputed() -> Iterator[Finding]:
        fresh = again[one.launch.launch_id] = proof.recomputed(one.launch, one.trace)
        yield from follows.launch_metrics(one.launch, fresh)
        yield from physics.energy(one, {reading.name: reading for reading in fresh.metrics})

    yield from guarded("recomputed", one.where, recomputed)
    for check, run in LAUNCH_CHECKS:
        yield from guarded(check, one.where, run, one)
    sane[one.launch.launch_id] = one


def _row(row: CaseRecord, launches: Mapping[str, Launch], again: Mapping[str, Launch], known: Known) -> Iterator[Finding]:
    where = row_name(row)
    yield from guarded("identity", where, follows.identity, row, launches)
    yield from guarded("metrics", where, follows.metrics, row)
    yield from guarded("recomputed", where, follows.row_metrics, row, again)
    yield from guarded("plausible", where, _checks, row)
    if row.run_id in known.runs:
        yield refused("known", where, "this row is here already")


def _checks(row: CaseRecord) -> Iterator[Finding]:
    """What `effbench/checks.py` says of a measured row."""
    if row.status == "ok":
        for check in checks.failed(row):
            make = refused if check.severity == "error" and check.name not in NOISY else remark
            yield make(check.name, row_name(row), check.message)


def _blocks(rows: Sequence[CaseRecord], seen: Mapping[str, Seen]) -> Iterator[Finding]:
    """Order of the launches of each sweep, and counters of the machine over the launches of each block."""
    for first, members in _sweeps(rows, seen):
        yield from timing.in_turn("order", first, members)
    blocks: dict[str, list[Seen]] = defaultdict(list)
    for one in seen.values():
        blocks[one.launch.block_id].append(one)
    for block_id, members in blocks.items():
        if block_id:
            yield from physics.between("counters", members)


def _sweeps(rows: Sequence[CaseRecord], seen: Mapping[str, Seen]) -> list[tuple[str, list[Seen]]]:
    """Launches that rows or blocks tie together, with the name of a row: one process ran them, one at a time."""
    sweeps: list[tuple[str, set[str], set[str]]] = []  # name, blocks, launches
    for row in rows:
        name, members = row_name(row), {i for i in (*row.launch_ids, *row.baseline_launch_ids) if i in seen}
        blocks = {seen[i].launch.block_id or i for i in members}
        apart = []
        for sweep in sweeps:
            if sweep[1] & blocks:
                name, blocks, members = sweep[0], sweep[1] | blocks, sweep[2] | members
            else:
                apart.append(sweep)
        sweeps = [*apart, (name, blocks, members)]
    return [(name, [seen[i] for i in sorted(members)]) for name, _, members in sweeps]


def _groups(rows: Sequence[CaseRecord], seen: Mapping[str, Seen]) -> dict[str, list[Seen]]:
    """Launches of each spec and machine, under the name of the first row that has them."""
    groups: dict[str, list[Seen]] = {}
    told: set[frozenset[str]] = set()
    for row in rows:
        for side, ids in (("", row.launch_ids), (", baseline", row.baseline_launch_ids)):
            members = frozenset(ids)
            if members and members not in told:
                told.add(members)
                groups[f"{row_name(row)}{side}"] = [seen[i] for i in ids if i in seen]
    return groups


def _shortened(found: Sequence[Finding]) -> list[Finding]:
    """Refusals first; of one check about one thing a few, and how many more there were."""
    kept: list[Finding] = []
    told: set[Finding] = set()
    counts: Counter[tuple[str, str, str]] = Counter()
    for finding in sorted(found, key=lambda f: f.severity == "remark"):
        key = (finding.check, finding.where, finding.severity)
        if finding not in told:
            told.add(finding)
            counts[key] += 1
            if counts[key] <= MOST_OF_ONE:
                kept.append(finding)
    for (check, where, severity), count in counts.items():
        if count > MOST_OF_ONE:
            more = f"{count - MOST_OF_ONE} more of this kind"
            kept.append(refused(check, where, more) if severity == "refused" else remark(check, where, more))
    kept.sort(key=lambda f: f.severity == "remark")
    return kept
