"""Records ↔ rows: what the store writes of a record, and records from the columns it reads. Knows no files.

Everything a plugin may invent becomes JSON text; a number that is not finite becomes null with the reason `not_a_number`.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from effbench.errors import StoreError
from effbench.schema import PROVENANCE_FIELDS, MetricValue, Reading, canonical_json

if TYPE_CHECKING:
    import pyarrow

_NUMBERS = ("value", "lower", "upper", "ratio", "ratio_lower", "ratio_upper")

# Records → rows.


@contextlib.contextmanager
def storing(what: str) -> Iterator[None]:
    """A value that no column can hold (a plugin's) is explained, not traced back."""
    try:
        yield
    except (TypeError, ValueError, OverflowError, AssertionError) as fault:
        raise StoreError(f"{what} cannot be stored: {' '.join(str(fault).split())}.") from fault


def record_fields(record: Any) -> dict[str, Any]:
    return {f.name: getattr(record, f.name) for f in fields(record)}


def metric_row(metric: MetricValue | Reading) -> dict[str, Any]:
    """The struct of one metric: every number is finite or null, and a null that was no number says so."""
    row = record_fields(metric)
    broken = [name for name in _NUMBERS if row.get(name) is not None and not math.isfinite(row[name])]
    if broken:
        row |= dict.fromkeys(broken) | {"reasons": with_reason(metric.reasons)}
        row["valid"] = metric.valid and "value" not in broken
    return row


def with_reason(reasons: Sequence[str], reason: str = "not_a_number") -> list[str]:
    return [*reasons, *([] if reason in reasons else [reason])]


def provenance_row(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Provenance is text: other values become JSON text, and what has no column of its own is kept inside `details`."""
    row = {k: v if isinstance(v, str) else canonical_json(plain(v)) for k, v in provenance.items() if v is not None}
    other = {k: v for k, v in row.items() if k not in PROVENANCE_FIELDS}
    if other:
        row["details"] = canonical_json({"details": row.get("details"), **other})
    return {k: v for k, v in row.items() if k in PROVENANCE_FIELDS}


def plain(value: Any) -> Any:
    """`value` as JSON can carry it: what is no finite number becomes null, a foreign object its text."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def has_broken_number(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(has_broken_number(v) for v in value.values())
    if isinstance(value, list | tuple | np.ndarray):
        return any(has_broken_number(v) for v in value)
    return isinstance(value, float | np.floating) and not math.isfinite(value)


def storable(value: Any) -> Any:
    """UTF-8 cannot carry a lone surrogate (a file name in a traceback): it becomes its escape. Walks rows."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {k: storable(v) for k, v in value.items()}
    return [storable(v) for v in value] if isinstance(value, list | tuple) else value


# Rows → records, by whole columns: a row at a time is several times slower.


def column_values(column: pyarrow.ChunkedArray) -> list[Any]:
    """Python values of a column: tuples for lists, None for null. (`to_numpy` would import pandas, half a second.)"""
    import pyarrow.types as types

    values: list[Any] = column.to_pylist()
    return [tuple(v or ()) for v in values] if types.is_list(column.type) else values


def floats(column: pyarrow.ChunkedArray) -> np.ndarray:
    """A copy of a column of doubles. Raises ValueError on null."""
    if column.null_count:
        raise ValueError(f"{column.null_count} samples are null")
    parts = [np.frombuffer(c.buffers()[1], np.float64)[c.offset : c.offset + len(c)] for c in column.chunks if len(c)]
    return np.concatenate(parts) if parts else np.empty(0)


def present(row: Mapping[str, Any] | None) -> dict[str, Any]:
    return {k: v for k, v in (row or {}).items() if v is not None}


def metrics_of(column: pyarrow.ChunkedArray, cls: type[Any], wanted: frozenset[str] | None) -> list[tuple[Any, ...]]:
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
