"""All results of some folders, ready for a question: read once, refreshed file by file, small in memory at a million rows.

    parquet files ── new or changed ──▶ ingest ──▶ Columns (on disk) ──(rows that count, filters, metrics)──▶ a frame (frame.py)
                                                                     └─(run ids)──▶ records, read from their own file

A file that went away takes its rows with it: they stay in the columns unused until they are most of them, and then everything
is read anew. One thread refreshes at a time; frames are made from a snapshot that a refresh never changes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from effbench.analysis.columns import Array, Columns, Positions
from effbench.analysis.frame import ROW_COLUMNS
from effbench.analysis.ingest import Dictionaries, ingest
from effbench.analysis.origins import NO_ORIGINS, Origins
from effbench.analysis.snapshot import File, Selection, Snapshot, Where, any_value, frame_at, positions_of, selected, texts_of
from effbench.errors import StoreError
from effbench.schema import CaseRecord
from effbench.store import Store, case_records, read_file

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow


class ResultIndex:
    """The rows of the results folders that count: each run once, without those that a later run of the case replaced."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = [Store(folder) for folder in folders]
        self._lock = threading.Lock()
        self._now = _empty()
        self.state = ""  # changes with the files
        self.warnings: tuple[str, ...] = ()
        self.loose_files = 0

    def refresh(self, origins: Origins = NO_ORIGINS) -> None:
        """Read what is new or changed. What cannot be read is a sentence in `warnings`; the rest is there.

        Which rows count follows `rank.latest`, with `origins`."""
        with self._lock:
            found: dict[Path, tuple[Store, str]] = {}
            warnings = []
            for store in self._folders:
                try:
                    found |= {path: (store, mark) for path, mark in store.files()}
                except StoreError as fault:
                    warnings.append(str(fault))
            marks = "\n".join([origins.state, *warnings, *(f"{path} {own}" for path, (_, own) in sorted(found.items()))])
            state = sha256(marks.encode()).hexdigest()
            if state == self.state:
                return
            now, faults = _refreshed(self._now, found, origins.bundles)
            self._now, self.state, self.warnings = now, state, (*warnings, *faults)
            self.loose_files = sum(not path.name.startswith(("merged-", "sealed-")) for path in found)

    @property
    def replaced(self) -> int:
        """Rows that a later row of the same case on the same machine stands for."""
        return self._now.replaced

    @property
    def units(self) -> Mapping[str, str]:
        """Every metric that some row has, with its unit."""
        return self._now.names

    def count(self, where: Where | None = None) -> int:
        """How many rows that count pass the filters."""
        return len(positions_of(self._now, where or {}))

    def distinct(self, name: str, where: Where | None = None) -> list[str]:
        """The values of a row column (of `techniques` each name) among the rows that count, sorted."""
        now = self._now
        if where:
            return texts_of(now, name, positions_of(now, where))
        if name not in now.texts_of:
            now.texts_of[name] = texts_of(now, name, now.kept)
        return now.texts_of[name]

    def frame(self, metrics: Sequence[str] = (), where: Where | None = None, *, spec: bool = False) -> pd.DataFrame:
        """The rows that count and pass the filters, oldest first, as `frame.frame_of` gives them.

        `where` maps row columns to the values wanted, none of them meaning all; rows pass `techniques` that have any of them.
        `spec` reads the specs of these rows from their files."""
        now = self._now
        rows = positions_of(now, where or {})
        found = frame_at(now, rows, metrics)
        if spec:
            found.insert(len(ROW_COLUMNS), "spec", self._read(now, rows, ["spec"])["spec"].to_pylist())
        return found

    def select(self, names: Sequence[str], where: Where | None = None) -> Selection:
        """These columns of the rows that count and pass the filters, oldest first: cheap where a frame of all would not be.

        `names` are row columns and columns of metrics (`frame.column`)."""
        now = self._now
        return selected(now, positions_of(now, where or {}), names)

    def measured(self, workload: str) -> list[str]:
        """The metrics that some row of this workload has a value of."""
        now = self._now
        if workload not in now.measured:
            rows = positions_of(now, {"workload": [workload]})
            now.measured[workload] = [name for name in now.names if any_value(now, name, rows)]
        return now.measured[workload]

    def record(self, run_id: str) -> CaseRecord | None:
        """One row in full, also one that was replaced; None where there is none."""
        return next(iter(self.records([run_id])), None)

    def records(self, run_ids: Iterable[str]) -> list[CaseRecord]:
        """These rows in full, in the order given; unknown ids are left out. Raises StoreError where a file went away."""
        now, wanted = self._now, list(run_ids)
        table = self._read(now, self._where_are(now, wanted), None)
        found = {record.run_id: record for record in case_records(table)}
        return [found[run_id] for run_id in wanted if run_id in found]

    def specs(self, run_ids: Iterable[str]) -> dict[str, str]:
        """The specifications of these rows by run id, as `records` has them and without reading the rest. Raises StoreError."""
        now = self._now
        table = self._read(now, self._where_are(now, list(run_ids)), ("run_id", "spec"))
        return dict(zip(table["run_id"].to_pylist(), table["spec"].to_pylist(), strict=True))

    def store_of(self, run_id: str) -> Store | None:
        """The results folder that holds a row, where its launches and traces are too."""
        now = self._now
        return next((_file_of(now, int(row)).store for row in self._where_are(now, [run_id])), None)

    @staticmethod
    def _where_are(now: Snapshot, run_ids: Sequence[str]) -> Positions:
        import pyarrow as pa
        import pyarrow.compute as pc

        if not run_ids:
            return np.empty(0, np.int64)
        hits = np.flatnonzero(pc.is_in(now.run_ids, pa.array(run_ids, pa.string())).to_numpy())
        live = [row for row in hits if any(file.start <= row < file.start + file.count for file in now.files)]
        return np.array(live, np.int64)

    @staticmethod
    def _read(now: Snapshot, rows: Positions, columns: Sequence[str] | None) -> pyarrow.Table:
        """These rows of their files, in the order of `rows`."""
        import pyarrow as pa

        parts, order = [], []
        for file in now.files:
            mine = np.flatnonzero((rows >= file.start) & (rows < file.start + file.count))
            if len(mine):
                try:
                    table = read_file(file.path, "runs", columns)
                except FileNotFoundError:
                    raise StoreError(f"{file.path} went away while it was read; it was merged or moved. Ask again.") from None
                parts.append(table.take(rows[mine] - file.start).replace_schema_metadata(None))
                order.append(mine)
        if not parts:
            return (
                pa.Table.from_batches([], schema=pa.schema([])) if columns is None else pa.table({name: [] for name in columns})
            )
        return pa.concat_tables(parts).take(np.argsort(np.concatenate(order), kind="stable"))


def _empty() -> Snapshot:
    import pyarrow as pa

    return Snapshot(Columns(), Dictionaries(), pa.chunked_array([], pa.string()), np.empty(0, np.int64))


def _refreshed(
    old: Snapshot, found: Mapping[Path, tuple[Store, str]], origins: Mapping[str, str]
) -> tuple[Snapshot, list[str]]:
    """The snapshot of these files, and a sentence for each that could not be read. Raises nothing for a bad file."""
    import pyarrow as pa

    files = [file for file in old.files if file.path in found and found[file.path][1] == file.mark]
    if sum(file.count for file in files) < len(old.run_ids) / 2:
        old, files = _empty(), []
    known, faults = {file.path for file in files}, []
    chunks, names = list(old.run_ids.chunks), dict(old.names)
    start = len(old.run_ids)
    for path, (store, mark) in sorted(found.items()):
        if path in known:
            continue
        try:
            table = read_file(path)
        except FileNotFoundError:
            continue
        except StoreError as fault:
            faults.append(f"Skipped: {fault}")
            continue
        ingest(table, old.columns, old.texts, names, start)
        files.append(File(store, path, mark, start, table.num_rows))
        chunks += table["run_id"].chunks
        start += table.num_rows
    run_ids = pa.chunked_array(chunks, pa.string())
    kept, replaced = _latest(old.columns, old.texts, files, run_ids, origins)
    return Snapshot(old.columns, old.texts, run_ids, kept, tuple(files), replaced, names), faults


def _latest(
    columns: Columns,
    texts: Dictionaries,
    files: Sequence[File],
    run_ids: pyarrow.ChunkedArray,
    origins: Mapping[str, str],
) -> tuple[Positions, int]:
    """The rows that count by the rule of `rank.latest`, oldest first, and how many others there are."""
    import pandas as pd

    if not files:
        return np.empty(0, np.int64), 0
    rows = np.concatenate([np.arange(file.start, file.start + file.count) for file in files])
    keys = {name: columns.take(name, rows) for name in ("case_id", "hardware", "status")}
    keys["started_at"] = texts["started_at"].decode(columns.take("started_at", rows))  # type: ignore[arg-type]
    ids = run_ids.take(rows)
    keys["run_id"], keys["origin"] = ids.to_numpy(), _origins(ids, origins)
    frame = pd.DataFrame(keys, index=rows).drop_duplicates("run_id").sort_values(["started_at", "run_id"], kind="stable")
    same = ["case_id", "hardware", "origin"]
    newest = ~frame.duplicated(same, keep="last")
    ok = frame[frame["status"] == texts["status"].code("ok")]
    newest_ok = ok.index[~ok.duplicated(same, keep="last")]
    kept = newest | frame.index.isin(newest_ok)
    return frame.index[kept].to_numpy(np.int64), int((~kept).sum())


def _origins(run_ids: pyarrow.ChunkedArray, origins: Mapping[str, str]) -> Array:
    """A number for the origin of each row, 0 where it was measured here."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.compute as pc

    if not origins:
        return np.zeros(len(run_ids), np.int64)
    numbers = pd.factorize(np.array(["", *origins.values()], object))[0]
    places = pc.index_in(run_ids, pa.array(list(origins), pa.string())).fill_null(-1).to_numpy()
    found: Array = numbers[places + 1]
    return found


def _file_of(now: Snapshot, row: int) -> File:
    return next(file for file in now.files if file.start <= row < file.start + file.count)
