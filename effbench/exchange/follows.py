"""Does every row say what its launches say, and do they say what their traces say?

Identity first: ids are digests of what they name, launches belong to their row, blocks are whole and paired. Then the numbers: every
metric of every launch and row is computed again by the code that the runner uses (`effbench/proof.py`).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from effbench import proof
from effbench.exchange.checking import launch_name, read_spec, refused, remark, row_name, shown, text_number
from effbench.exchange.report import Finding
from effbench.exchange.timing import started
from effbench.metrics import METRICS, metric
from effbench.protocol import PROTOCOLS
from effbench.schema import SCHEMA_VERSION, STATUSES, CaseRecord, Launch, MetricValue, Reading, Spec, canonical_json, digest

ENVIRONMENT = ("source_digest", "python", "packages", "device_name", "driver", "power_limit_w", "cpu", "cores")


def identity(row: CaseRecord, launches: Mapping[str, Launch]) -> Iterator[Finding]:
    """Columns are those of the spec, ids are digests of what they name, every launch is there and belongs to the row."""
    where = row_name(row)
    if row.schema_version != SCHEMA_VERSION:
        yield refused("identity", where, f"schema version {shown(row.schema_version)}; this effbench reads {SCHEMA_VERSION}")
    if row.status not in STATUSES:
        yield refused("identity", where, f"status {shown(row.status)} is none of {', '.join(STATUSES)}")
    spec = read_spec(row.spec)
    if spec is None:
        yield refused("identity", where, "its spec cannot be read, so it is not known what ran")
        return
    columns = {
        "workload": (row.workload, spec.workload), "model": (row.model, spec.model.name), "protocol": (row.protocol, spec.protocol),
        "techniques": (tuple(row.techniques), spec.stack),
    }  # fmt: skip
    for name, (given, right) in columns.items():
        if given != right:
            yield refused("identity", where, f"{name} is {shown(given)} in the row and {shown(right)} in its spec")
    if row.protocol not in PROTOCOLS:
        yield refused("protocol", where, f"protocol {shown(row.protocol)} is none of {', '.join(PROTOCOLS)}")
    ids = (*row.launch_ids, *row.baseline_launch_ids)
    lost = [launch_id for launch_id in ids if launch_id not in launches]
    if lost:
        yield refused(
            "launches",
            where,
            f"{len(lost)} of its {len(ids)} launches are not in the bundle: {', '.join(shown(i, 12) for i in lost[:3])}",
        )
    if len(set(ids)) < len(ids):
        yield refused("launches", where, f"{len(ids) - len(set(ids))} launches are named twice")
    own, base = ([launches[i] for i in side if i in launches] for side in (row.launch_ids, row.baseline_launch_ids))
    for launch in (*own, *base):
        for name, given, right in (("env_id", launch.env_id, row.env_id), ("hardware", launch.hardware, row.hardware)):
            if given != right:
                yield refused(
                    "launches", where, f"{name} of {launch_name(launch.launch_id)} is {shown(given)}, of the row {shown(right)}"
                )
    for launch in own:
        if launch.spec.spec_id != spec.spec_id:
            yield refused("launches", where, f"{launch_name(launch.launch_id)} ran another spec than the row's")
    if row.status == "ok":
        yield from _case_id(row, spec, base)
        yield from _blocks(row, own, base)


def _case_id(row: CaseRecord, spec: Spec, base: Sequence[Launch]) -> Iterator[Finding]:
    where = row_name(row)
    compared = {launch.spec.spec_id for launch in base}
    if len(compared) > 1:
        yield refused("identity", where, f"its baseline's launches ran {len(compared)} specs")
    elif bool(compared) != (row.baseline_case_id is not None):
        yield refused(
            "identity", where, f"it names {'a' if row.baseline_case_id else 'no'} baseline and has {len(base)} launches of one"
        )
    elif row.case_id != digest({"spec": spec.spec_id, "baseline": next(iter(compared), None)}):
        yield refused("identity", where, f"case_id {shown(row.case_id, 12)} is not the digest of its spec and its baseline's")


def _blocks(row: CaseRecord, own: Sequence[Launch], base: Sequence[Launch]) -> Iterator[Finding]:
    """As many blocks as the protocol asks for, each with one launch and one of the baseline."""
    where, rules = row_name(row), PROTOCOLS.get(row.protocol)
    failures = [launch for launch in own if launch.status != "ok"]
    if failures:
        yield refused("blocks", where, f"its status is ok, {launch_name(failures[0].launch_id)} is {shown(failures[0].status)}")
    for side, what in ((own, "launches"), (base, "launches of the baseline")):
        if len({launch.block_id for launch in side}) < len(side):
            yield refused("blocks", where, f"two of its {len(side)} {what} are in one block")
    numbers = sorted(launch.block for launch in own)
    if rules and len(own) < rules.blocks:
        yield refused("blocks", where, f"{len(own)} blocks; {row.protocol} asks for {rules.blocks}")
    elif numbers != list(range(len(own))):
        yield refused("blocks", where, f"its blocks have the numbers {shown(numbers)}; 0 to {len(own) - 1} they have")
    if row.baseline_case_id is not None:
        paired = {launch.block_id: launch for launch in base}
        alone = [launch for launch in own if launch.block_id not in paired]
        if alone:
            failed = any(launch.status != "ok" for launch in base)
            make = remark if failed else refused
            yield make(
                "blocks",
                where,
                f"{len(alone)} of {len(own)} blocks have no launch of the baseline{', which failed' if failed else ''}",
            )


def metrics(row: CaseRecord) -> Iterator[Finding]:
    """Units are those of the metric table, names are known or a plugin's."""
    where = row_name(row)
    names = [m.name for m in row.metrics]
    if len(set(names)) < len(names):
        yield refused("metrics", where, f"{len(names) - len(set(names))} metrics are there twice")
    for each in row.metrics:
        known = metric(each.name, each.unit)
        if known.source == "plugin" and each.name not in METRICS:
            yield remark("metrics", where, f"{shown(each.name)} is in no table of effbench: a plugin's")
        elif each.unit != known.unit:
            yield refused("metrics", where, f"{each.name} is in {shown(each.unit)}; its unit is {known.unit}")


def launch_metrics(launch: Launch, again: Launch) -> Iterator[Finding]:
    """Every metric of a launch is what its trace gives."""
    yield from _compared(launch_name(launch.launch_id), "launch", launch.metrics, again.metrics)


def row_metrics(row: CaseRecord, again: Mapping[str, Launch]) -> Iterator[Finding]:
    """Every metric of a row is what its launches' traces give. `again`: launches with their metrics computed again."""
    own, base = ([again[i] for i in side if i in again] for side in (row.launch_ids, row.baseline_launch_ids))
    if len(own) + len(base) == len(row.launch_ids) + len(row.baseline_launch_ids):  # else `identity` says which are lost
        yield from _compared(row_name(row), "row", row.metrics, proof.row_metrics(row, own, base))


_Metrics = Sequence[MetricValue] | Sequence[Reading]


def _compared(where: str, what: str, kept: _Metrics, fresh: _Metrics) -> Iterator[Finding]:
    for each in proof.differences(kept, fresh):
        message = f"{each.told(what)} {each.unit}".rstrip()
        if each.kept is not None or each.fresh is None:
            yield refused("recomputed", where, message)
        elif each.fresh.value is not None:  # a metric that is younger than the row is absent there
            yield remark("recomputed", where, message)
    right = {m.name: m for m in fresh}
    for m in kept:
        other = right.get(m.name)
        if other is None or m.value is None:
            continue
        if tuple(m.reasons) != other.reasons:
            given = f"{shown(', '.join(map(str, m.reasons)) or 'none')} in the {what} and {', '.join(other.reasons) or 'none'} from the traces"
            yield refused("recomputed", where, f"reasons beside {shown(m.name)} are {given}")
        if m.source != other.source:
            yield remark(
                "recomputed",
                where,
                f"the source of {shown(m.name)} is {shown(m.source)} in the {what} and {other.source} from the traces",
            )


def environments(rows: Sequence[CaseRecord], launches: Mapping[str, Launch]) -> Iterator[Finding]:
    """env_id is the digest of what provenance says of the machine, the same in a row and its launches."""
    said = [(launch_name(launch.launch_id), launch.env_id, launch.hardware, launch.provenance) for launch in launches.values()]
    said += [(row_name(row), row.env_id, row.hardware, row.provenance) for row in rows]
    seen: set[str] = set()
    for where, env_id, hardware, provenance in said:
        known = {name: provenance.get(name) for name in ENVIRONMENT}
        key = canonical_json([env_id, hardware, known])
        if key in seen:
            continue
        seen.add(key)
        if hardware != known["device_name"]:
            yield refused(
                "environment", where, f"hardware is {shown(hardware)}, provenance names {shown(known['device_name'])}"
            )
        if env_id != environment_id(known):
            yield refused(
                "environment", where, f"env_id {shown(env_id, 12)} is not the digest of the machine that provenance describes"
            )
    for row in rows:
        own = next((launches[i] for i in row.launch_ids if i in launches), None)
        differing = [name for name in ENVIRONMENT if own and row.provenance.get(name) != own.provenance.get(name)]
        if differing:
            yield refused(
                "environment", row_name(row), f"provenance differs from its launches' in {shown(', '.join(differing))}"
            )


def environment_id(provenance: Mapping[str, Any]) -> str | None:
    """What `provenance.environment` makes of the same facts; None where one of them cannot be read."""
    try:
        identity = {
            "source": provenance["source_digest"], "python": provenance["python"], "packages": json.loads(provenance["packages"]),
            "device": provenance["device_name"], "driver": provenance["driver"], "power_limit_w": text_number(provenance["power_limit_w"]),
            "cpu": provenance["cpu"], "cores": int(provenance["cores"]),
        }  # fmt: skip
    except (KeyError, TypeError, ValueError):
        return None
    return digest(identity)


def structure(rows: Sequence[CaseRecord], launches: Mapping[str, Launch]) -> Iterator[Finding]:
    """Ids are there once; a block holds each spec and each position once, in the order in which they ran."""
    seen: dict[str, CaseRecord] = {}
    for row in rows:
        if seen.setdefault(row.run_id, row) is not row:
            yield refused("identity", row_name(row), "two rows have this run_id")
    for row in rows:
        base = next((other for other in rows if other.case_id == row.baseline_case_id), None) if row.baseline_case_id else None
        ran = next((launches[i].spec.spec_id for i in row.baseline_launch_ids if i in launches), None)
        spec = read_spec(base.spec) if base else None
        if spec and ran and spec.spec_id != ran:
            yield refused(
                "identity",
                row_name(row),
                f"its baseline's launches ran another spec than the baseline's {row_name(base or row)}",
            )
    blocks: dict[str, list[Launch]] = defaultdict(list)
    for key, launch in launches.items():
        if key != launch.launch_id:
            yield refused("launches", launch_name(launch.launch_id), f"it is kept under the id {shown(key, 12)}")
        if launch.block_id:
            blocks[launch.block_id].append(launch)
    for block_id, members in blocks.items():
        where, ran_ids = f"block {shown(block_id, 12)}", [m.spec.spec_id for m in members]
        if len({m.block for m in members}) > 1:
            yield refused("blocks", where, f"its launches have the block numbers {shown(sorted({m.block for m in members}))}")
        if len({m.position for m in members}) < len(members) or len(set(ran_ids)) < len(ran_ids):
            yield refused("blocks", where, f"two of its {len(members)} launches have one position or one spec")
        order = [m.position for m in sorted(members, key=lambda m: started(m) or 0.0)]
        if order != sorted(order):
            yield refused("blocks", where, f"its launches began in the order {shown(order)} of their positions")
    named = {i for row in rows for i in (*row.launch_ids, *row.baseline_launch_ids)}
    spare = [key for key in launches if key not in named]
    if spare:
        yield remark("launches", "bundle", f"{len(spare)} launches belong to no row, {launch_name(spare[0])} for one")
