"""A parquet table of rows → the columns of the index: what a board asks of every row, computed once."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from effbench.analysis.columns import Array, Codes, Columns
from effbench.analysis.frame import NUMBERS, column
from effbench.analysis.rank import ESTIMATE, HOST_BOUND, question_of
from effbench.analysis.table import setting
from effbench.schema import Spec, canonical_json

if TYPE_CHECKING:
    import pyarrow

PLAIN = ("env_id", "status", "reason", "suite", "workload", "model", "hardware", "protocol", "started_at")
MAX_METRICS = 1_000  # names of metrics in one index; plugins may invent names, and each is a set of files
_ANSWERS = ("techniques", "protocol")  # of a spec; rows of one question differ in little else


class Dictionaries(defaultdict[str, Codes]):
    """The texts of each column."""

    def __init__(self) -> None:
        super().__init__(Codes)


def shared_columns(name: str) -> str:
    """Which dictionary a column's codes are of: a baseline is a case, and all reasons are one kind of text."""
    if name == "baseline_case_id":
        return "case_id"
    tail = name.rsplit("__", 1)[-1]
    return tail if tail in ("source", "why") else "why" if name == "fallback_why" else name


def ingest(table: pyarrow.Table, columns: Columns, texts: Dictionaries, units: dict[str, str], start: int) -> None:
    """Append the rows of a table `runs` to `columns` from row `start` on; `units` learns new metrics."""
    if not table.num_rows:
        return
    of = {name: table[name].combine_chunks() for name in table.column_names}
    rows = {name: texts[name].encode_texts(of[name].fill_null("")) for name in PLAIN}
    rows |= {name: texts["case_id"].encode_texts(of[name]) for name in ("case_id", "baseline_case_id")}
    stacks = [tuple(value or ()) for value in of["techniques"].to_pylist()]
    rows["techniques"] = texts["techniques"].encode(stacks)
    rows |= _of_specs(of["spec"].fill_null(""), stacks, rows, texts)
    rows |= _ingest_metrics(of["metrics"], rows, columns, texts, units, start)
    for name, codes in rows.items():
        columns.append(name, codes, start)


def _of_specs(
    column: pyarrow.Array, stacks: Sequence[tuple[str, ...]], rows: dict[str, Array], texts: Dictionaries
) -> dict[str, Array]:
    """Label and question of each row, and each question's setting into its dictionary; equal specs are read once."""
    local = Codes()
    codes = local.encode_texts(column)
    specs = [_read_spec(text) for text in local.values]
    labels = [specs[code][0] or " + ".join(stack) or "as published" for code, stack in zip(codes.tolist(), stacks, strict=True)]
    places = (texts[name].decode(rows[name]) for name in ("hardware", "workload", "model"))
    asked = [question_of(*place, specs[code][1]) for *place, code in zip(*places, codes.tolist(), strict=True)]
    for question, code in dict.fromkeys(zip(asked, codes.tolist(), strict=True)):
        texts["settings"].code((question, specs[code][2]))
    return {"label": texts["label"].encode(labels), "question": texts["question"].encode(asked)}


def _read_spec(text: str) -> tuple[str, str, tuple[tuple[str, Any], ...]]:
    """(label, spec without answers, setting). A spec of another hand has no label and no setting; what is no JSON stays whole."""
    bare = text
    try:
        spec = json.loads(text)
        bare = canonical_json({key: value for key, value in spec.items() if key not in _ANSWERS})
        return Spec.from_json(spec).label, bare, tuple((key, str(value)) for key, value in setting(spec).items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", bare, ()


def _ingest_metrics(
    lists: Any, rows: dict[str, Array], columns: Columns, texts: Dictionaries, units: dict[str, str], start: int
) -> dict[str, Array]:
    """Append the columns of the metrics. Returns what follows of the rows: whether host-bound, and why without the metric."""
    import pyarrow.compute as pc

    flat, parents = lists.flatten(), np.asarray(pc.list_parent_indices(lists))
    why = texts["why"]
    first, estimated, bound = _reasons(flat.field("reasons"), why)
    host_bound = rows["reason"] == texts["reason"].find(HOST_BOUND)
    host_bound[parents[bound]] = True
    general = _why_of_rows(rows, host_bound, texts)

    numbers = {part: flat.field(part).cast("float64").to_numpy(zero_copy_only=False) for part in NUMBERS}
    fit, own = general == why.code(""), _why_of_values(numbers, flat.field("valid"), first, estimated, why)
    codes = {
        "source": texts["source"].encode_texts(flat.field("source").fill_null("")),
        "why": np.where(fit[parents], own, general[parents]),
    }
    names = flat.field("name").dictionary_encode()
    number_of = names.indices.fill_null(-1).to_numpy()
    order = np.argsort(number_of, kind="stable")
    ends = np.cumsum(np.bincount(number_of + 1, minlength=len(names.dictionary) + 1))
    for number, name in enumerate(names.dictionary.to_pylist()):
        mine = order[ends[number] : ends[number + 1]][::-1]  # backwards: of a metric that a row has twice the first counts
        if name not in units and len(units) >= MAX_METRICS:
            continue
        units.setdefault(name, flat.field("unit")[int(mine[-1])].as_py() or "")
        where = parents[mine]
        for part, values in numbers.items():
            picked = values[mine]
            if not np.isnan(picked).all():
                columns.append(column(name, part), _spread(picked, where, len(lists), np.nan), start)
        for part, values in codes.items():
            columns.append(column(name, part), _spread(values[mine], where, len(lists), -1), start)
    fallback = np.where(fit, np.int32(why.code("not_taken")), general)
    return {"host_bound": texts["host_bound"].encode(host_bound.tolist()), "fallback_why": fallback}


def _reasons(lists: Any, why: Codes) -> tuple[Array, Array, Array]:
    """Of each value the code of its first reason (−1: none), whether it is an estimate, and whether it is host-bound."""
    import pyarrow.compute as pc

    codes, of = why.encode_texts(lists.flatten()), np.asarray(pc.list_parent_indices(lists))
    begins = np.flatnonzero(np.diff(of, prepend=-1))
    first = np.full(len(lists), -1, np.int32)
    first[of[begins]] = codes[begins]
    flags = np.zeros((2, len(lists)), bool)
    for flag, reason in zip(flags, (ESTIMATE, HOST_BOUND), strict=True):
        flag[of[codes == why.find(reason)]] = True
    return first, flags[0], flags[1]


def _why_of_rows(rows: dict[str, Array], host_bound: Array, texts: Dictionaries) -> Array:
    """The code that keeps each row out of every ranking; that of the empty text where its values decide."""
    status, reason = (texts[name].decode(rows[name]) for name in ("status", "reason"))
    fit = np.where(host_bound, HOST_BOUND, "").astype(object)
    return texts["why"].encode(np.where(status != "ok", np.where(reason != "", reason, status), fit))


def _why_of_values(numbers: Mapping[str, Array], valid: Any, first: Array, estimated: Array, why: Codes) -> Array:
    """The rule of `rank.why_unranked` for values of rows that are fit."""
    estimate, invalid, one_block, nothing = why.encode([ESTIMATE, "invalid", "one_block", ""])
    absent = np.isnan(numbers["value"]) | ~np.asarray(valid.fill_null(False))
    unbounded = np.isnan(numbers["lower"]) | np.isnan(numbers["upper"])
    named = np.where((first < 0) | (first == nothing), invalid, first)
    return np.where(estimated, estimate, np.where(absent, named, np.where(unbounded, one_block, nothing)))


def _spread(values: Array, rows: Array, num_rows: int, filler: float) -> Array:
    found = np.full(num_rows, filler, values.dtype)
    found[rows] = values
    return found
