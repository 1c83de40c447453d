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
import fcntl
import gc
import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from effbench.errors import DamagedFile, NewerSchema, StoreError
from effbench.schema import (
    PROVENANCE_FIELDS,
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
_NUMBERS = ("value", "lower", "upper", "ratio", "ratio_lower", "ratio_upper")
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
            _publish(self.path / name, None, b"\0" * 4096)
        _flush_folder(self.path)

    def write_case(self, record: CaseRecord) -> Path:
        """Write one row of the board; it is on the disk when this returns. Raises StoreError."""
        with _storing(f"Row {record.run_id}"):
            nested = {"provenance": _provenance_row(record.provenance), "metrics": [_metric_row(m) for m in record.metrics]}
            return self._write_row("runs", _fields(record) | nested)

    def write_launch(self, launch: Launch, trace: Trace) -> Path:
        """Write a launch and its raw series; the row comes last, so a launch that can be read has its trace.

        Raises StoreError."""
        with _storing(f"Launch {launch.launch_id}"):
            self._write_trace(launch.launch_id, trace)
            row = _fields(launch) | {
                "schema_version": SCHEMA_VERSION,
                "spec_id": launch.spec.spec_id,
                "spec": canonical_json(launch.spec.to_json()),
                "windows": canonical_json({name: _plain(_fields(w)) for name, w in launch.windows.items()}),
                "facts": canonical_json(_plain(launch.facts)),
                "reasons": _with_reason(launch.reasons) if _has_broken_number(launch.facts) else launch.reasons,
                "provenance": _provenance_row(launch.provenance),
                "metrics": [_metric_row(m) for m in launch.metrics],
            }
            return self._write_row("launches", row)

    def cases(self, columns: Iterable[str] | None = None, metrics: Iterable[str] | None = None) -> Rows[CaseRecord]:
        """All rows, oldest first. `columns` reads only these fields (the others are empty), `metrics` only these metrics.

        Raises StoreError and NewerSchema."""
        table, warnings = self.table("runs", columns)
        wanted = None if metrics is None else frozenset(metrics)
        data = {name: _column(table[name]) for name in table.column_names if name != "metrics"}
        if "metrics" in table.column_names:
            data["metrics"] = _metrics(table["metrics"], MetricValue, wanted)
        if "provenance" in data:
            data["provenance"] = [_present(p) for p in data["provenance"]]
        unread = {f.name: _UNREAD.get(f.name, "") for f in fields(CaseRecord) if f.name not in data}
        rows = [CaseRecord(**dict(zip(data, values, strict=True)), **unread) for values in zip(*data.values(), strict=True)]
        return Rows(tuple(sorted(rows, key=lambda r: (r.started_at or "", r.run_id))), warnings)

    def launches(self) -> Rows[Launch]:
        """All launches, oldest first. Raises StoreError and NewerSchema."""
        table, warnings = self.table("launches")
        data = {f.name: _column(table[f.name]) for f in fields(Launch) if f.name != "metrics"}
        data["metrics"] = _metrics(table["metrics"], Reading, None)
        rows, faults = [], []
        for values in zip(*data.values(), strict=True):
            row = dict(zip(data, values, strict=True))
            try:
                row["spec"] = Spec.from_json(json.loads(row["spec"]))
                row["windows"] = {k: Window(**w) for k, w in json.loads(row["windows"]).items()}
                row["facts"] = json.loads(row["facts"])
                row["provenance"] = _present(row["provenance"])
                rows.append(Launch(**row))
            except (TypeError, ValueError, KeyError, AttributeError) as fault:
                faults.append(f"Skipped launch {row['launch_id']} in {self.path / 'launches'}: its row is damaged ({fault}).")
        return Rows(tuple(sorted(rows, key=lambda r: (r.started_at or "", r.launch_id))), (*warnings, *faults))

    def trace(self, launch_id: str) -> Trace:
        """The raw series of one launch. Raises DamagedFile, NewerSchema, and StoreError where there is none."""
        path = self.path / "traces" / _trace_name(launch_id)
        try:
            table = _read(path, "traces", arrow_schemas()["traces"])
            t_s, values = (_floats(table[name]) for name in ("t_s", "value"))
            start, series = 0, []
            for name, unit, scope, source, length in json.loads(table.schema.metadata[SERIES_KEY]):
                part = slice(start, start := start + length)
                series.append(Series(name=name, unit=unit, scope=scope, source=source, t_s=t_s[part], values=values[part]))
            if start != len(t_s):
                raise ValueError(f"{len(t_s)} samples, {start} expected")
        except FileNotFoundError:
            raise StoreError(f"There is no trace of launch {launch_id} in {path.parent}.") from None
        except (KeyError, TypeError, ValueError) as fault:
            raise _damaged(path, fault) from None
        return Trace(series=tuple(series))

    def table(self, name: str, columns: Iterable[str] | None = None) -> tuple[pyarrow.Table, tuple[str, ...]]:
        """The Arrow table `runs` or `launches`, each identity once, and a warning for each file that was skipped.

        `columns` projects; identity and schema_version always come along. Raises StoreError and NewerSchema."""
        schema = _projected(name, columns)
        parts, warnings = self._read_all(name, schema)
        return _once(parts.values(), schema, IDENTITY[name]), warnings

    @property
    def loose_files(self) -> int:
        """Files that `compact` would merge; reading thousands of them takes seconds."""
        return sum(_is_loose(path) for name in IDENTITY for path in self._files(name))

    def fingerprint(self, name: str = "runs") -> str:
        """Changes when a file of the table is added, removed or rewritten; costs one listing of the folder."""
        parts = []
        for path in self._files(name):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                parts.append(f"{path.name}:{stat.st_mtime_ns}:{stat.st_size}")
        return sha256("\n".join(parts).encode()).hexdigest()

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
                    _unlink(path)
                files, rows = files + len(parts), rows + table.num_rows
        leftovers = sum(_remove_leftovers(self.path / name) for name in FOLDERS)
        return Compaction(files=files, rows=rows, leftovers=leftovers, warnings=tuple(warnings))

    def _files(self, name: str) -> list[Path]:
        folder = self.path / name
        try:
            found = [entry.path for entry in os.scandir(folder) if _is_result(entry.name)]
        except FileNotFoundError:
            if self.path.exists() and not self.path.is_dir():
                raise _explain(OSError(errno.ENOTDIR, "not a directory"), self.path, "read") from None
            return []
        except OSError as fault:
            raise _explain(fault, folder, "read") from None
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
        return self._write_table(name, pa.Table.from_pylist([_storable({f: row[f] for f in schema.names})], schema=schema), "")

    def _write_table(self, name: str, table: pyarrow.Table, prefix: str) -> Path:
        file_name = f"{prefix}{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{secrets.token_hex(4)}.parquet"
        return _publish(self.path / name, file_name, _encode(table, name))

    def _write_trace(self, launch_id: str, trace: Trace) -> Path:
        import pyarrow as pa

        lengths = [len(s.t_s) for s in trace.series]
        assert lengths == [len(s.values) for s in trace.series], "a series has as many values as times"
        index = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        columns: list[Any] = []
        for field in ("name", "unit", "scope", "source"):
            texts = pa.array(_storable([getattr(s, field) for s in trace.series]), pa.string())
            columns.append(pa.DictionaryArray.from_arrays(pa.array(index), texts))
        for field in ("t_s", "values"):
            parts = [np.asarray(getattr(s, field), np.float64) for s in trace.series]
            columns.append(pa.array(np.concatenate(parts) if parts else np.empty(0)))
        table = pa.Table.from_arrays(columns, schema=arrow_schemas()["traces"])
        names = [[s.name, s.unit, s.scope, s.source, len(s.t_s)] for s in trace.series]
        extra = {SERIES_KEY: canonical_json(_storable(names)).encode()}
        return _publish(self.path / "traces", _trace_name(launch_id), _encode(table, "traces", extra))


# Records → rows.


@contextlib.contextmanager
def _storing(what: str) -> Iterator[None]:
    """A value that no column can hold (a plugin's) is explained, not traced back."""
    try:
        yield
    except (TypeError, ValueError, OverflowError, AssertionError) as fault:
        raise StoreError(f"{what} cannot be stored: {' '.join(str(fault).split())}.") from fault


def _fields(record: Any) -> dict[str, Any]:
    return {f.name: getattr(record, f.name) for f in fields(record)}


def _metric_row(metric: MetricValue | Reading) -> dict[str, Any]:
    """The struct of one metric: every number is finite or null, and a null that was no number says so."""
    row = _fields(metric)
    broken = [name for name in _NUMBERS if row.get(name) is not None and not math.isfinite(row[name])]
    if broken:
        row |= dict.fromkeys(broken) | {"reasons": _with_reason(metric.reasons)}
        row["valid"] = metric.valid and "value" not in broken
    return row


def _with_reason(reasons: Sequence[str], reason: str = "not_a_number") -> list[str]:
    return [*reasons, *([] if reason in reasons else [reason])]


def _provenance_row(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Provenance is text: other values become JSON text, and what has no column of its own is kept inside `details`."""
    row = {k: v if isinstance(v, str) else canonical_json(_plain(v)) for k, v in provenance.items() if v is not None}
    other = {k: v for k, v in row.items() if k not in PROVENANCE_FIELDS}
    if other:
        row["details"] = canonical_json({"details": row.get("details"), **other})
    return {k: v for k, v in row.items() if k in PROVENANCE_FIELDS}


def _plain(value: Any) -> Any:
    """`value` as JSON can carry it: what is no finite number becomes null, a foreign object its text."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _has_broken_number(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_broken_number(v) for v in value.values())
    if isinstance(value, list | tuple | np.ndarray):
        return any(_has_broken_number(v) for v in value)
    return isinstance(value, float | np.floating) and not math.isfinite(value)


def _storable(value: Any) -> Any:
    """UTF-8 cannot carry a lone surrogate (a file name in a traceback): it becomes its escape. Walks rows."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {k: _storable(v) for k, v in value.items()}
    return [_storable(v) for v in value] if isinstance(value, list | tuple) else value


# Rows → records, by whole columns: a row at a time is several times slower.


def _column(column: pyarrow.ChunkedArray) -> list[Any]:
    """Python values of a column: tuples for lists, None for null. (`to_numpy` would import pandas, half a second.)"""
    import pyarrow.types as types

    values: list[Any] = column.to_pylist()
    return [tuple(v or ()) for v in values] if types.is_list(column.type) else values


def _floats(column: pyarrow.ChunkedArray) -> np.ndarray:
    """A copy of a column of doubles. Raises ValueError on null."""
    if column.null_count:
        raise ValueError(f"{column.null_count} samples are null")
    parts = [np.frombuffer(c.buffers()[1], np.float64)[c.offset : c.offset + len(c)] for c in column.chunks if len(c)]
    return np.concatenate(parts) if parts else np.empty(0)


def _present(row: Mapping[str, Any] | None) -> dict[str, Any]:
    return {k: v for k, v in (row or {}).items() if v is not None}


def _metrics(column: pyarrow.ChunkedArray, cls: type[Any], wanted: frozenset[str] | None) -> list[tuple[Any, ...]]:
    """The metrics of each row as `cls`, all of them or those named in `wanted`."""
    import pyarrow as pa

    if not len(column):
        return []
    array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
    columns = {f.name: array.values.field(i).to_pylist() for i, f in enumerate(array.values.type)}
    ends = array.offsets.to_pylist()
    if wanted is not None:
        keep = [i for i, name in enumerate(columns["name"]) if name in wanted]
        columns = {name: [values[i] for i in keep] for name, values in columns.items()}
        ends = np.searchsorted(keep, ends).tolist()
    columns["reasons"] = [tuple(r) if r else () for r in columns["reasons"]]
    for name in columns.keys() & set(_NUMBERS):  # a foreign writer may have stored NaN
        columns[name] = [None if v != v else v for v in columns[name]]
    with _no_collection():
        found = [_make(cls, columns, values) for values in zip(*columns.values(), strict=True)]
    return [tuple(found[start:end]) for start, end in pairwise(ends)]


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Making 50,000 objects that all stay alive takes twice as long when the collector looks at them again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _make(cls: type[Any], names: Iterable[str], values: Iterable[Any]) -> Any:
    """A frozen dataclass from all of its fields; its own __init__ takes three times as long, and a board has 50,000."""
    record = object.__new__(cls)
    object.__setattr__(record, "__dict__", dict(zip(names, values, strict=False)))
    return record


# Files.


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
        raise _damaged(path, fault) from None


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


def _publish(folder: Path, name: str | None, data: Any) -> Path:
    """Write `data` as folder/name so that it is there whole or not at all; with no name, only prove that it could be."""
    target = folder / name if name else folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary, handle = _open_locked(folder)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(handle, rest) :]
            os.fsync(handle)
            if name:
                temporary.rename(target)
        finally:
            os.close(handle)
            _unlink(temporary)
        if name:
            _flush_folder(folder)
    except OSError as fault:
        raise _explain(fault, target, "write") from None
    return target


def _open_locked(folder: Path) -> tuple[Path, int]:
    """A new temporary file and a handle that holds its lock until closed, which is how others know that we live."""
    while True:
        path = folder / f".{secrets.token_hex(8)}.tmp"
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with contextlib.suppress(OSError):  # a file system without locks; compaction then leaves temporaries alone
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return path, handle
        os.close(handle)  # taken for a leftover between open and lock


def _remove_leftovers(folder: Path) -> int:
    """Remove temporaries whose lock nobody holds. Returns how many."""
    removed = 0
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed += 1
            finally:
                os.close(handle)
    return removed


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _is_result(name: str) -> bool:
    return name.endswith(".parquet") and not name.startswith(".")


def _is_loose(path: Path) -> bool:
    return not path.name.startswith((MERGED, SEALED))


def _trace_name(launch_id: str) -> str:
    """The file of a launch. An id that is no plain name (a foreign record) is replaced by its digest."""
    plain = re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,150}", launch_id)
    return f"{launch_id if plain else sha256(launch_id.encode('utf-8', 'backslashreplace')).hexdigest()}.parquet"


def _damaged(path: Path, fault: BaseException) -> DamagedFile:
    cause = " ".join(str(fault).split())[:200] or type(fault).__name__
    return DamagedFile(
        f"{path} cannot be read ({cause}). Restore it from a copy or delete it; the other files are not affected."
    )


def _explain(fault: OSError, path: Path, verb: str) -> StoreError:
    """One sentence for what the operating system refused."""
    if fault.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreError(
            f"Cannot {verb} {path}: the disk or quota is full. Free some space or name another folder with --results."
        )
    if fault.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StoreError(f"Cannot {verb} {path}: permission denied or read-only. Name a folder of yours with --results.")
    if fault.errno in (errno.ENOTDIR, errno.EEXIST):
        return StoreError(f"Cannot {verb} {path}: a part of this path is a file, not a folder. Name a folder with --results.")
    return StoreError(f"Cannot {verb} {path}: {fault.strerror or fault}. Name another folder with --results.")
