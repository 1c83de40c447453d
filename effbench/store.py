"""Records at rest: the only writer and the only reader of parquet.

    <results>/runs/       cases, one row each       } one file a record until `compact` merges them
    <results>/launches/   launches, one row each    }
    <results>/traces/     raw series, one file a launch, never merged

A file is there whole or not at all: it is written under a dot-name in its own folder, flushed to the disk, renamed,
and the folder flushed. The writer holds a lock on its temporary file, so that compaction can tell a dead writer's
leftover from a file in the making. Compaction writes the merged file first and then deletes exactly what it has read;
between the two a row exists twice, and readers drop the second. A reader that finds a file gone looks again.

Everything a plugin may invent is JSON text (spec, windows, facts), and provenance is text, so neither ever changes the
Arrow schema. A number that is not finite is stored as null with the reason `not_a_number`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from effbench.errors import DamagedFile, NewerSchema, StoreError
from effbench.files import damaged, explain, flush_folder, publish, remove_leftovers, unlink
from effbench.rows import (
    column_values,
    floats,
    has_broken_number,
    metric_row,
    metrics_of,
    plain,
    present,
    provenance_row,
    record_fields,
    storable,
    storing,
    with_reason,
)
from effbench.schema import (
    SCHEMA_VERSION,
    CaseRecord,
    Launch,
    MetricValue,
    Reading,
    Series,
    Spec,
    Trace,
    Window,
    arrow_schemas,
    canonical_json,
)

if TYPE_CHECKING:
    import pyarrow

IDENTITY = {"runs": "run_id", "launches": "launch_id"}  # the tables that compaction merges, and what names a row
FOLDERS = (*IDENTITY, "traces")
MERGED_ROWS = 10_000  # a merged file of this many rows is sealed: never merged again
MERGED, SEALED = "merged-", "sealed-"
VERSION_KEY, TABLE_KEY, SERIES_KEY = b"effbench_schema_version", b"effbench_table", b"effbench_series"
_UNREAD: dict[str, Any] = {"techniques": (), "launch_ids": (), "baseline_launch_ids": (), "metrics": (), "provenance": {}}
_UNREAD |= {"baseline_case_id": None, "schema_version": SCHEMA_VERSION}

Record = TypeVar("Record")


@dataclass(frozen=True)
class Rows(Generic[Record]):
    """What was read, and one sentence for each file or row that could not be."""

    rows: tuple[Record, ...]
    warnings: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Record]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, kw_only=True)
class Compaction:
    """What `compact` did: files merged away, rows in the files written, leftovers removed, and what it left alone."""

    files: int
    rows: int
    leftovers: int
    warnings: tuple[str, ...] = ()


class Store:
    """One results directory. Nothing is created before the first write or `check_writable`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def check_writable(self) -> None:
        """Create the folders and prove a write in each, before anything is measured. Raises StoreError."""
        for name in FOLDERS:
            publish(self.path / name, None, b"\0" * 4096)
        flush_folder(self.path)

    def write_case(self, record: CaseRecord) -> Path:
        """Write one row of the board; it is on the disk when this returns. Raises StoreError."""
        with storing(f"Row {record.run_id}"):
            nested = {"provenance": provenance_row(record.provenance), "metrics": [metric_row(m) for m in record.metrics]}
            return self._write_row("runs", record_fields(record) | nested)

    def write_launch(self, launch: Launch, trace: Trace) -> Path:
        """Write a launch and its raw series; the row comes last, so a launch that can be read has its trace.

        Raises StoreError."""
        with storing(f"Launch {launch.launch_id}"):
            self._write_trace(launch.launch_id, trace)
            row = record_fields(launch) | {
                "schema_version": SCHEMA_VERSION,
                "spec_id": launch.spec.spec_id,
                "spec": canonical_json(launch.spec.to_json()),
                "windows": canonical_json({name: plain(record_fields(w)) for name, w in launch.windows.items()}),
                "facts": canonical_json(plain(launch.facts)),
                "reasons": with_reason(launch.reasons) if has_broken_number(launch.facts) else launch.reasons,
                "provenance": provenance_row(launch.provenance),
                "metrics": [metric_row(m) for m in launch.metrics],
            }
            return self._write_row("launches", row)

    def cases(self, columns: Iterable[str] | None = None, metrics: Iterable[str] | None = None) -> Rows[CaseRecord]:
        """All rows, oldest first. `columns` reads only these fields (the others are empty), `metrics` only these metrics.

        Raises StoreError and NewerSchema."""
        table, warnings = self.table("runs", columns)
        rows = case_records(table, metrics)
        return Rows(tuple(sorted(rows, key=lambda r: (r.started_at or "", r.run_id))), warnings)

    def launches(self) -> Rows[Launch]:
        """All launches, oldest first. Raises StoreError and NewerSchema."""
        table, warnings = self.table("launches")
        data = {f.name: column_values(table[f.name]) for f in fields(Launch) if f.name != "metrics"}
        data["metrics"] = metrics_of(table["metrics"], Reading, None)
        rows, faults = [], []
        for values in zip(*data.values(), strict=True):
            row = dict(zip(data, values, strict=True))
            try:
                row["spec"] = Spec.from_json(json.loads(row["spec"]))
                row["windows"] = {k: Window(**w) for k, w in json.loads(row["windows"]).items()}
                row["facts"] = json.loads(row["facts"])
                row["provenance"] = present(row["provenance"])
                rows.append(Launch(**row))
            except (TypeError, ValueError, KeyError, AttributeError) as fault:
                faults.append(f"Skipped launch {row['launch_id']} in {self.path / 'launches'}: its row is damaged ({fault}).")
        return Rows(tuple(sorted(rows, key=lambda r: (r.started_at or "", r.launch_id))), (*warnings, *faults))

    def trace(self, launch_id: str) -> Trace:
        """The raw series of one launch. Raises DamagedFile, NewerSchema, and StoreError where there is none."""
        path = self.path / "traces" / _trace_name(launch_id)
        try:
            table = _read(path, "traces", arrow_schemas()["traces"])
            t_s, values = (floats(table[name]) for name in ("t_s", "value"))
            start, series = 0, []
            for name, unit, scope, source, length in json.loads(table.schema.metadata[SERIES_KEY]):
                part = slice(start, start := start + length)
                series.append(Series(name=name, unit=unit, scope=scope, source=source, t_s=t_s[part], values=values[part]))
            if start != len(t_s):
                raise ValueError(f"{len(t_s)} samples, {start} expected")
        except FileNotFoundError:
            raise StoreError(f"There is no trace of launch {launch_id} in {path.parent}.") from None
        except (KeyError, TypeError, ValueError) as fault:
            raise damaged(path, fault) from None
        return Trace(series=tuple(series))

    def table(self, name: str, columns: Iterable[str] | None = None) -> tuple[pyarrow.Table, tuple[str, ...]]:
        """The Arrow table `runs` or `launches`, each identity once, and a warning for each file that was skipped.

        `columns` projects; identity and schema_version always come along. Raises StoreError and NewerSchema."""
        schema = _projected(name, columns)
        parts, warnings = self._read_all(name, schema)
        return _once(parts.values(), schema, IDENTITY[name]), warnings

    def files(self, name: str = "runs") -> list[tuple[Path, str]]:
        """The files of a table, each with a mark that changes when it is rewritten. Raises StoreError."""
        found = []
        for path in self._files(name):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                found.append((path, f"{stat.st_mtime_ns}:{stat.st_size}"))
        return found

    @property
    def loose_files(self) -> int:
        """Files that `compact` would merge; reading thousands of them takes seconds."""
        return sum(_is_loose(path) for name in IDENTITY for path in self._files(name))

    def fingerprint(self, name: str = "runs") -> str:
        """Changes when a file of the table is added, removed or rewritten; costs one listing of the folder."""
        return sha256("\n".join(f"{path.name}:{mark}" for path, mark in self.files(name)).encode()).hexdigest()

    def compact(self) -> Compaction:
        """Merge the loose files of runs and launches and remove dead writers' leftovers; safe beside writers and readers.

        Damaged files stay where they are and are named. Raises StoreError and NewerSchema."""
        files = rows = 0
        warnings: list[str] = []
        for name in IDENTITY:
            parts, faults = self._read_all(name, _projected(name, None), to_merge=True)
            warnings += faults
            if any(_is_loose(path) for path in parts) or len(parts) > 1:
                table = _once(parts.values(), _projected(name, None), IDENTITY[name])
                for start in range(0, table.num_rows, MERGED_ROWS):
                    part = table.slice(start, MERGED_ROWS)
                    self._write_table(name, part, MERGED if part.num_rows < MERGED_ROWS else SEALED)
                for path in parts:
                    unlink(path)
                files, rows = files + len(parts), rows + table.num_rows
        leftovers = sum(remove_leftovers(self.path / name) for name in FOLDERS)
        return Compaction(files=files, rows=rows, leftovers=leftovers, warnings=tuple(warnings))

    def _files(self, name: str) -> list[Path]:
        folder = self.path / name
        try:
            found = [entry.path for entry in os.scandir(folder) if _is_result(entry.name)]
        except FileNotFoundError:
            if self.path.exists() and not self.path.is_dir():
                raise explain(OSError(errno.ENOTDIR, "not a directory"), self.path, "read") from None
            return []
        except OSError as fault:
            raise explain(fault, folder, "read") from None
        return [Path(path) for path in sorted(found)]

    def _read_all(
        self, name: str, schema: pyarrow.Schema, *, to_merge: bool = False
    ) -> tuple[dict[Path, pyarrow.Table], tuple[str, ...]]:
        """Every readable file of a table. A file that vanished was merged meanwhile: look for the one that holds its rows."""
        parts: dict[Path, pyarrow.Table] = {}
        warnings: dict[Path, str] = {}
        vanished = True
        while vanished:
            vanished = False
            for path in self._files(name):
                if path in parts or path in warnings or (to_merge and path.name.startswith(SEALED)):
                    continue
                try:
                    parts[path] = _read(path, name, schema, whole=to_merge)
                except FileNotFoundError:
                    vanished = True
                except DamagedFile as fault:
                    warnings[path] = f"Skipped: {fault}"
        return parts, tuple(warnings.values())

    def _write_row(self, name: str, row: Mapping[str, Any]) -> Path:
        import pyarrow as pa

        schema = arrow_schemas()[name]
        return self._write_table(name, pa.Table.from_pylist([storable({f: row[f] for f in schema.names})], schema=schema), "")

    def _write_table(self, name: str, table: pyarrow.Table, prefix: str) -> Path:
        file_name = f"{prefix}{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{secrets.token_hex(4)}.parquet"
        return publish(self.path / name, file_name, _encode(table, name))

    def _write_trace(self, launch_id: str, trace: Trace) -> Path:
        import pyarrow as pa

        lengths = [len(s.t_s) for s in trace.series]
        assert lengths == [len(s.values) for s in trace.series], "a series has as many values as times"
        columns: list[Any] = []
        for field in ("name", "unit", "scope", "source"):
            texts = storable([getattr(s, field) for s in trace.series])
            # Each text once: for one that is repeated pyarrow writes whatever lay in memory behind the dictionary.
            codes = {text: code for code, text in enumerate(dict.fromkeys(texts))}
            index = np.repeat(np.array([codes[text] for text in texts], np.int32), lengths)
            columns.append(pa.DictionaryArray.from_arrays(pa.array(index), pa.array(list(codes), pa.string())))
        for field in ("t_s", "values"):
            parts = [np.asarray(getattr(s, field), np.float64) for s in trace.series]
            columns.append(pa.array(np.concatenate(parts) if parts else np.empty(0)))
        table = pa.Table.from_arrays(columns, schema=arrow_schemas()["traces"])
        names = [[s.name, s.unit, s.scope, s.source, len(s.t_s)] for s in trace.series]
        extra = {SERIES_KEY: canonical_json(storable(names)).encode()}
        return publish(self.path / "traces", _trace_name(launch_id), _encode(table, "traces", extra))


def read_file(path: Path, name: str = "runs", columns: Iterable[str] | None = None) -> pyarrow.Table:
    """The rows of one file of a table. Raises FileNotFoundError, DamagedFile and NewerSchema."""
    return _read(path, name, _projected(name, columns))


def case_records(table: pyarrow.Table, metrics: Iterable[str] | None = None) -> list[CaseRecord]:
    """The rows of a table `runs` as records, in its order; columns that were not read are empty."""
    wanted = None if metrics is None else frozenset(metrics)
    data = {name: column_values(table[name]) for name in table.column_names if name != "metrics"}
    if "metrics" in table.column_names:
        data["metrics"] = metrics_of(table["metrics"], MetricValue, wanted)
    if "provenance" in data:
        data["provenance"] = [present(p) for p in data["provenance"]]
    unread = {f.name: _UNREAD.get(f.name, "") for f in fields(CaseRecord) if f.name not in data}
    return [CaseRecord(**dict(zip(data, values, strict=True)), **unread) for values in zip(*data.values(), strict=True)]


def _encode(table: pyarrow.Table, name: str, extra: Mapping[bytes, bytes] | None = None) -> pyarrow.Buffer:
    import pyarrow as pa
    import pyarrow.parquet as pq

    marks = {VERSION_KEY: str(SCHEMA_VERSION).encode(), TABLE_KEY: name.encode(), **(extra or {})}
    sink = pa.BufferOutputStream()
    many = table.num_rows > 1  # dictionaries and statistics of a single row double the time to read it
    options = {"compression": "zstd", "write_page_checksum": True, "use_dictionary": many, "write_statistics": many}
    pq.write_table(table.replace_schema_metadata(marks), sink, **options)
    return sink.getvalue()


def _read(path: Path, name: str, schema: pyarrow.Schema, *, whole: bool = False) -> pyarrow.Table:
    """The columns of `schema` in one file, null where an older file lacks them; `whole` refuses a file that has others.

    Raises FileNotFoundError, DamagedFile, NewerSchema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as file:
            found = file.schema_arrow
            marks = found.metadata or {}
            if marks.get(TABLE_KEY) != name.encode():
                raise ValueError(f"it is not marked as a table of {name}")
            if whole and (unknown := _unknown(schema, found)):
                raise DamagedFile(f"{path} has columns unknown here ({', '.join(unknown)}); it is read but never merged.")
            version = int(marks.get(VERSION_KEY, b""))
            if version <= SCHEMA_VERSION:
                table = file.read([f for f in schema.names if f in found.names], use_threads=False)
                if "schema_version" in table.column_names:
                    version = max([version, *(v for v in table["schema_version"].to_pylist() if v is not None)])
        if version > SCHEMA_VERSION:
            raise NewerSchema(
                f"{path} was written with schema version {version}; this effbench reads up to {SCHEMA_VERSION}. "
                "Update effbench to read it, or move the file away."
            )
        if table.schema.equals(schema):
            return table
        arrays = [table[f.name].cast(f.type) if f.name in found.names else pa.nulls(len(table), f.type) for f in schema]
        return pa.Table.from_arrays(arrays, schema=schema.with_metadata(marks))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as fault:
        if isinstance(fault, FileNotFoundError) and not path.is_symlink():
            raise
        raise damaged(path, fault) from None


def _unknown(ours: Iterable[pyarrow.Field], theirs: Iterable[pyarrow.Field]) -> list[str]:
    """Fields of `theirs`, at any depth, that `ours` does not have."""
    known = {field.name: _inner(field.type) for field in ours}
    return [f.name for f in theirs if f.name not in known or _unknown(known[f.name], _inner(f.type))]


def _inner(type_: pyarrow.DataType) -> list[pyarrow.Field]:
    import pyarrow.types as types

    if types.is_list(type_):
        return _inner(type_.value_type)
    return list(type_) if types.is_struct(type_) else []


def _projected(name: str, columns: Iterable[str] | None) -> pyarrow.Schema:
    import pyarrow as pa

    schema = arrow_schemas()[name]
    if columns is None:
        return schema
    wanted = {*columns, IDENTITY[name], "schema_version"}
    assert wanted <= set(schema.names), f"no such column in {name}: {sorted(wanted - set(schema.names))}"
    return pa.schema([f for f in schema if f.name in wanted])


def _once(parts: Iterable[pyarrow.Table], schema: pyarrow.Schema, identity: str) -> pyarrow.Table:
    """The parts as one table, without the second and later rows of an identity."""
    import pyarrow as pa

    tables = [part.replace_schema_metadata(None) for part in parts]
    table = pa.concat_tables(tables) if tables else pa.Table.from_batches([], schema=schema)  # empty_table() loads pandas
    ids = table[identity].to_pylist()
    first = {row if identity is None else identity: row for row, identity in reversed(list(enumerate(ids)))}
    return table if len(first) == len(ids) else table.take(sorted(first.values()))


def _is_result(name: str) -> bool:
    return name.endswith(".parquet") and not name.startswith(".")


def _is_loose(path: Path) -> bool:
    return not path.name.startswith((MERGED, SEALED))


def _trace_name(launch_id: str) -> str:
    """The file of a launch. An id that is no plain name (a foreign record) is replaced by its digest."""
    plain = re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,150}", launch_id)
    return f"{launch_id if plain else sha256(launch_id.encode('utf-8', 'backslashreplace')).hexdigest()}.parquet"
