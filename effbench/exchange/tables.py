"""The tables of an opened bundle to records. What can be said of one record by itself is checked here: types, forms of ids,
finite numbers, JSON that says one thing only, and traces whose columns and marks agree. Whether the records belong together
and are true is `evidence.py`'s.

Every text of a record may still be anything: HTML, control characters, a thousand lines. Show it as text only.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from effbench.errors import BundleError
from effbench.exchange import limits
from effbench.exchange.contents import Contents
from effbench.exchange.manifest import is_plain_id
from effbench.exchange.opening import LAUNCHES, RUNS, Opened, trace_member
from effbench.exchange.parquet_guard import read_table
from effbench.rows import column_values, floats, metrics_of, present
from effbench.schema import SCHEMA_VERSION, STATUSES, CaseRecord, Launch, Reading, Series, Spec, Trace, Window, canonical_json
from effbench.store import SERIES_KEY, case_records

if TYPE_CHECKING:
    import pyarrow

MAY_BE_NULL = frozenset(
    {"baseline_case_id", "provenance", "value", "lower", "upper", "ratio", "ratio_lower", "ratio_upper"}
)  # columns and fields; every other one has a value
NUMBERS = ("value", "lower", "upper", "ratio", "ratio_lower", "ratio_upper")
TEXT_COLUMNS = ("series", "unit", "scope", "source")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def contents(opened: Opened) -> Contents:
    """The records of a bundle. Raises BundleError."""
    cases, launches = _cases(opened), _launches(opened)
    claimed = opened.manifest.counts
    traced = opened.launch_ids
    if odd := sorted(set(traced) ^ launches.keys()):
        absent = "there is no trace of this launch" if odd[0] in launches else "there is no launch of this trace"
        raise BundleError("trace", f"{absent}.", trace_member(odd[0]))
    traces, samples = {}, 0
    for launch_id in traced:
        member = trace_member(launch_id)
        table = read_table(opened.read(member), "traces", member, rows=limits.SAMPLES_COUNT - samples)
        traces[launch_id] = _trace(table, member)
        samples += table.num_rows
    for what, found, count in (
        ("rows", len(cases), claimed.rows),
        ("launches", len(launches), claimed.launches),
        ("samples", samples, claimed.samples),
    ):
        if found != count:
            raise BundleError("manifest", f"it says {count:,} {what}; the bundle has {found:,}.", "manifest.json")
    return Contents(manifest=opened.manifest.model_dump(), cases=cases, launches=launches, traces=traces)


def _cases(opened: Opened) -> tuple[CaseRecord, ...]:
    table = read_table(opened.read(RUNS), "runs", RUNS, rows=limits.ROWS_COUNT)
    if not table.num_rows:
        raise BundleError("schema", "it has no rows.", RUNS)
    _check_cells(table, RUNS)
    _check_ids(table, RUNS, "run_id", digests=("case_id", "env_id"))
    rows = case_records(table)
    for row in rows:
        if row.baseline_case_id is not None and not _DIGEST.fullmatch(row.baseline_case_id):
            raise BundleError("schema", "its baseline_case_id is no SHA-256.", row.run_id)
        _spec(row.spec, row.run_id)
        _check_metrics(row.metrics, row.run_id)
    return tuple(rows)


def _launches(opened: Opened) -> dict[str, Launch]:
    table = read_table(opened.read(LAUNCHES), "launches", LAUNCHES, rows=limits.LAUNCHES_COUNT)
    _check_cells(table, LAUNCHES)
    _check_ids(table, LAUNCHES, "launch_id", digests=("env_id",))
    data = {f.name: column_values(table[f.name]) for f in fields(Launch) if f.name != "metrics"}
    data["metrics"] = metrics_of(table["metrics"], Reading, None)
    spec_ids, found = table["spec_id"].to_pylist(), {}
    specs: dict[str, tuple[Spec, str]] = {}  # launches of a case share theirs
    for spec_id, values in zip(spec_ids, zip(*data.values(), strict=True), strict=True):
        row = dict(zip(data, values, strict=True))
        where = row["launch_id"]
        if row["spec"] not in specs:
            spec = _spec(row["spec"], where)
            specs[row["spec"]] = spec, spec.spec_id
        row["spec"], own_id = specs[row["spec"]]
        if own_id != spec_id:
            raise BundleError("schema", "its spec_id is not that of its spec.", where)
        if row["block"] < 0 or row["position"] < 0:
            raise BundleError("schema", "its block or position is negative.", where)
        row["windows"] = _windows(row["windows"], where)
        row["facts"] = _object(row["facts"], "facts", where)
        row["provenance"] = present(row["provenance"])
        _check_metrics(row["metrics"], where)
        found[where] = Launch(**row)
    return found


def _trace(table: pyarrow.Table, member: str) -> Trace:
    """The series that the marks name, once the columns say the same: other readers look at the columns."""
    marks = _json((table.schema.metadata or {}).get(SERIES_KEY, b"").decode("utf-8", "replace"), "series", member)
    if not isinstance(marks, list) or len(marks) > limits.SERIES_COUNT or not all(_is_mark(mark) for mark in marks):
        raise BundleError("trace", f"its marks are no list of at most {limits.SERIES_COUNT} series.", member)
    lengths = [mark[4] for mark in marks]
    if sum(lengths) != table.num_rows:
        raise BundleError("trace", f"its series have {sum(lengths):,} samples, its columns {table.num_rows:,}.", member)
    if len({mark[0] for mark in marks}) != len(marks):
        raise BundleError("trace", "two of its series have one name.", member)
    if any(table[name].null_count for name in table.column_names):
        raise BundleError("trace", "it has samples without a value.", member)
    owner = np.repeat(np.arange(len(marks)), lengths)
    for index, name in enumerate(TEXT_COLUMNS):
        if not _names_match(table[name], [mark[index] for mark in marks], owner):
            raise BundleError("trace", f"its column {name} says something else than its marks.", member)
    t_s, values = floats(table["t_s"]), floats(table["value"])
    ends = np.cumsum([0, *lengths])
    parts = [slice(start, end) for start, end in pairwise(ends)]
    return Trace(
        series=tuple(
            Series(name=name, unit=unit, scope=scope, source=source, t_s=t_s[part], values=values[part])
            for (name, unit, scope, source, _), part in zip(marks, parts, strict=True)
        )
    )


def _is_mark(mark: Any) -> bool:
    texts = isinstance(mark, list) and len(mark) == 5 and all(isinstance(text, str) for text in mark[:4])
    return texts and type(mark[4]) is int and 0 <= mark[4] <= limits.SAMPLES_COUNT


def _names_match(column: pyarrow.ChunkedArray, texts: list[str], owner: np.ndarray) -> bool:
    """Whether row i of a dictionary column says texts[owner[i]]."""
    start = 0
    for chunk in filter(len, column.chunks):
        own = {text: number for number, text in enumerate(chunk.dictionary.to_pylist())}
        expected = np.array([own.get(text, -1) for text in texts], dtype=np.int32)
        rows = owner[start : start + len(chunk)]
        indices = np.frombuffer(chunk.indices.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk)]
        if len(own) != len(chunk.dictionary) or not np.array_equal(indices, expected[rows]):
            return False
        start += len(chunk)
    return True


def _check_cells(table: pyarrow.Table, member: str) -> None:
    """No null where every record has a value, no text too long, and schema versions that we know."""
    for name in table.column_names:
        for chunk in table[name].chunks:
            _check_array(chunk, name, member)
    versions = table["schema_version"].to_pylist()
    if not all(1 <= version <= SCHEMA_VERSION for version in versions):
        raise BundleError("schema", f"a row has a schema version other than 1 to {SCHEMA_VERSION}.", member)
    if odd := set(table["status"].to_pylist()) - set(STATUSES):
        raise BundleError("schema", f"a row has the status {min(odd)!r}; known: {', '.join(STATUSES)}.", member)


def _check_array(array: pyarrow.Array, name: str, member: str, *, optional: bool = False) -> None:
    import pyarrow.types as types

    optional = optional or name in MAY_BE_NULL
    if array.null_count and not optional:
        raise BundleError("schema", f"its column {name} has rows without a value.", member)
    if types.is_list(array.type):
        _check_array(array.flatten(), name, member, optional=optional)
    elif types.is_struct(array.type):
        inside = name == "provenance"
        for field, child in zip(array.type, array.flatten(), strict=True):
            _check_array(child, field.name, member, optional=optional and inside)
    elif types.is_string(array.type) and len(array):
        offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]
        if np.diff(offsets).max() > limits.CELL_BYTES:
            raise BundleError("size", f"its column {name} has a text of more than {limits.CELL_BYTES:,} bytes.", member)


def _check_ids(table: pyarrow.Table, member: str, identity: str, digests: tuple[str, ...]) -> None:
    ids = table[identity].to_pylist()
    if odd := next((text for text in ids if not is_plain_id(text)), None):
        raise BundleError("schema", f"{odd!r} is no {identity}: 1 to 150 letters, digits, '.', '_' and '-'.", member)
    if len({text.casefold() for text in ids}) != len(ids):
        raise BundleError("schema", f"two rows have one {identity}.", member)
    for name in digests:
        if not all(_DIGEST.fullmatch(text) for text in table[name].to_pylist()):
            raise BundleError("schema", f"a row has a {name} that is no SHA-256.", member)


def _check_metrics(metrics: Any, where: str) -> None:
    if len(metrics) > limits.METRICS_COUNT:
        raise BundleError("size", f"it has {len(metrics):,} metrics; at most {limits.METRICS_COUNT:,}.", where)
    if len({metric.name for metric in metrics}) != len(metrics):
        raise BundleError("schema", "two of its metrics have one name.", where)
    for metric in metrics:
        values = [getattr(metric, name, None) for name in NUMBERS]
        if not all(value is None or math.isfinite(value) for value in values):
            raise BundleError("schema", f"{metric.name[:100]!r} is not finite.", where)


def _spec(text: str, where: str) -> Spec:
    """The spec that a text says, with the types that its fields have, and nothing besides it."""
    value = _json(text, "spec", where)
    try:
        _adapter().validate_json(text, strict=True)
        spec = Spec.from_json(value)
        same = canonical_json(spec.to_json()) == text
    except ValidationError as fault:
        raise BundleError("schema", f"its spec is none: {_first(fault)}.", where) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as fault:
        raise BundleError("schema", f"its spec is none ({type(fault).__name__}: {fault}).", where) from None
    if not same:
        raise BundleError("schema", "its spec has fields that no spec has, or lacks some.", where)
    return spec


def _windows(text: str, where: str) -> dict[str, Window]:
    found = {}
    for name, value in _object(text, "windows", where).items():
        bounds: list[Any] = [value.get(key) for key in ("start_s", "end_s")] if isinstance(value, dict) else []
        if len(bounds) != 2 or not all(type(bound) in (int, float) and abs(bound) < 1e12 for bound in bounds):
            raise BundleError("schema", f"its window {name[:100]!r} has no start_s and end_s in seconds.", where)
        if value.keys() != {"start_s", "end_s", "ended_by"} or not isinstance(value["ended_by"], str):
            raise BundleError("schema", f"its window {name[:100]!r} has other fields than start_s, end_s, ended_by.", where)
        found[name] = Window(**value)
    return found


def _object(text: str, what: str, where: str) -> dict[str, Any]:
    value = _json(text, what, where)
    if not isinstance(value, dict):
        raise BundleError("schema", f"its {what} are no JSON object.", where)
    return value


def _json(text: str, what: str, where: str) -> Any:
    """A JSON value whose canonical text is `text`: nothing said twice, no NaN, no nesting that cannot be walked."""
    try:
        value = json.loads(text)
        same = canonical_json(value) == text
    except RecursionError:
        raise BundleError("schema", f"its {what} are nested too deeply.", where) from None
    except ValueError as fault:
        raise BundleError("schema", f"its {what} are no JSON ({fault}).", where) from None
    if not same:
        raise BundleError("schema", f"its {what} are not canonical JSON.", where)
    return value


def _first(fault: ValidationError) -> str:
    first = fault.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(part)[:100] for part in first['loc']) or 'it'}: {first['msg']}"


@cache
def _adapter() -> TypeAdapter[Spec]:
    return TypeAdapter(Spec)
