"""Rows to one file, and the proof that every number follows from its raw trace."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from effbench import proof
from effbench.errors import StoreError, UsageError
from effbench.schema import CaseRecord, Launch, MetricValue
from effbench.store import Store


@dataclass(frozen=True, kw_only=True)
class Recomputation:
    """What recomputing found; `lines` names each row that differs or cannot be recomputed, and why."""

    rows: int
    same: int
    differing: int
    lines: tuple[str, ...]
    younger: tuple[str, ...] = ()  # metrics that the traces give and some rows, being older, do not have


def recompute(store: Store) -> Recomputation:
    """Compute every metric of every row from the traces and compare. Raises StoreError when the store is unreadable."""
    launches: dict[str, Launch] = {launch.launch_id: launch for launch in store.launches()}
    again: dict[str, Launch | str] = {}
    rows = list(store.cases())
    lines, same, younger = [], 0, set[str]()
    for row in rows:
        faults = list(_faults(store, row, launches, again, younger))
        same += not faults
        lines += [f"{row.run_id[:12]} {row.workload}/{row.model}/{'+'.join(row.techniques)}: {fault}" for fault in faults]
    return Recomputation(
        rows=len(rows), same=same, differing=len(rows) - same, lines=tuple(lines), younger=tuple(sorted(younger))
    )


def _faults(
    store: Store, row: CaseRecord, launches: dict[str, Launch], again: dict[str, Launch | str], younger: set[str]
) -> Iterable[str]:
    sides: list[list[Launch]] = []
    for ids in (row.launch_ids, row.baseline_launch_ids):
        side = []
        for launch_id in ids:
            if launch_id not in again:
                again[launch_id] = _again(store, launches.get(launch_id))
            found = again[launch_id]
            if isinstance(found, str):
                yield f"launch {launch_id[:12]}: {found}"
                return
            side.append(found)
        sides.append(side)
    for difference in proof.differences(row.metrics, proof.row_metrics(row, *sides)):
        if difference.kept is None:
            younger.add(difference.name)
        else:
            yield difference.told("row")


def _again(store: Store, launch: Launch | None) -> Launch | str:
    """The launch with its metrics computed from its trace, or why that cannot be."""
    if launch is None:
        return "its row is missing"
    if launch.status != "ok":
        return launch
    try:
        trace = store.trace(launch.launch_id)
    except StoreError as error:
        return str(error)
    return proof.recomputed(launch, trace)


def write(rows: Sequence[CaseRecord], out: Path) -> int:
    """Write rows as .csv or .parquet (one line per row and metric) or .json (one document). Raises UsageError, StoreError."""
    kinds = {".csv": _write_csv, ".parquet": _write_parquet, ".json": _write_json}
    if out.suffix not in kinds:
        raise UsageError(f"{out}: unknown format {out.suffix!r}. Known: {', '.join(kinds)}.")
    try:
        kinds[out.suffix](rows, out)
    except OSError as error:
        raise StoreError(f"{out} cannot be written: {error.strerror or error}.") from None
    return len(rows)


_COLUMNS = tuple(field.name for field in fields(MetricValue))


def _long(rows: Iterable[CaseRecord]) -> list[dict[str, Any]]:
    """One flat object per row and metric."""
    flat = []
    for row in rows:
        shared = {
            "run_id": row.run_id, "case_id": row.case_id, "baseline_case_id": row.baseline_case_id, "status": row.status,
            "reason": row.reason, "suite": row.suite, "workload": row.workload, "model": row.model,
            "techniques": "+".join(row.techniques), "hardware": row.hardware, "protocol": row.protocol,
            "started_at": row.started_at, "schema_version": row.schema_version,
        }  # fmt: skip
        metrics: Sequence[MetricValue | None] = row.metrics or (None,)
        for metric in metrics:
            own = dict.fromkeys(_COLUMNS) if metric is None else {**vars(metric), "reasons": " ".join(metric.reasons)}
            flat.append({**shared, **{("metric" if key == "name" else key): value for key, value in own.items()}})
    return flat


def _table(rows: Sequence[CaseRecord]) -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist(_long(rows))


def _write_csv(rows: Sequence[CaseRecord], out: Path) -> None:
    import pyarrow.csv

    pyarrow.csv.write_csv(_table(rows), out)


def _write_parquet(rows: Sequence[CaseRecord], out: Path) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(_table(rows), out, compression="zstd")


def _write_json(rows: Sequence[CaseRecord], out: Path) -> None:
    document = [{**vars(row), "provenance": dict(row.provenance), "metrics": [vars(m) for m in row.metrics]} for row in rows]
    out.write_text(json.dumps(document, indent=1))
