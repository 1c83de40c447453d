"""Finding a few rows among many: narrow, search, and offer a list that a browser can hold.

A list of a million entries cannot be offered, so the newest MOST_OFFERED of those that pass are, and the page says how many more
there are. What is chosen is kept as run ids in a text of its own, which is what the URL holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import streamlit as st

from effbench.analysis.index import ResultIndex
from effbench.errors import StoreError
from effbench.schema import CaseRecord

MOST_OFFERED = 500
MOST_SEARCHED = 100_000  # rows looked through for a word or the beginning of an id
MOST_NAMED = 50  # ids of one text that are looked up
FILTERS = {"workload": "Workload", "hardware": "Hardware", "model": "Model"}
_LONGEST = 160


@dataclass(frozen=True, kw_only=True)
class Offered:
    """Rows to choose from, as text by run id, and how many more passed the filters."""

    labels: Mapping[str, str]
    left_out: int


def offered(index: ResultIndex) -> Offered:
    """The filters, and what they leave."""
    columns = st.columns(4)
    where = {}
    for place, (name, title) in zip(columns, FILTERS.items(), strict=False):
        options = index.distinct(name)
        where[name] = place.multiselect(
            title,
            options,
            key=name,
            bind="query-params",
            placeholder="all",
            help="Only rows of these; it narrows what is offered.",
        )
    words = columns[3].text_input(
        "Search", key="search", bind="query-params", max_chars=100,
        help="Words that techniques, model, suite, setting or run id must all contain.",
    )  # fmt: skip
    passing = index.count(where)
    if passing > MOST_SEARCHED:
        st.info(f"{passing:,} rows pass. Choose workload, hardware or model until at most {MOST_SEARCHED:,} do.")
        return Offered(labels={}, left_out=0)
    frame = index.frame(metrics=(), where=where)
    found = matching(frame, words)
    shown = found.sort_values("started_at", ascending=False, kind="stable").head(MOST_OFFERED)
    if found.empty:
        st.caption("No row passes the filters.")
    return Offered(labels={str(run_id): describe(row) for run_id, row in rows_of(shown)}, left_out=len(found) - len(shown))


def rows_of(frame: pd.DataFrame) -> Iterable[tuple[Any, Mapping[str, Any]]]:
    return zip(frame.index, frame.to_dict("records"), strict=True)


def matching(frame: pd.DataFrame, words: str) -> pd.DataFrame:
    """The rows of which every word is part of a text, in any case of letters."""
    for word in words.casefold().split()[:8]:
        texts = [frame.index.to_series(), *(frame[name] for name in ("label", "model", "suite", "setting"))]
        hit = pd.Series(False, index=frame.index)
        for text in texts:
            hit |= text.astype("str").str.casefold().str.contains(word, regex=False).to_numpy(bool)
        frame = frame[hit.to_numpy()]
    return frame


def describe(row: Mapping[str, Any]) -> str:
    """A row as one line of a list, without its run id."""
    parts = (row["label"], row["workload"], row["model"], row["setting"], row["hardware"], row["protocol"], row["status"])
    return " · ".join(str(part) for part in parts if part and part != "ok")[:_LONGEST]


def describe_record(record: CaseRecord) -> str:
    """The same of a record, which has no setting."""
    names = ("label", "workload", "model", "hardware", "protocol", "status")
    return describe({name: getattr(record, name) for name in names} | {"setting": ""})


def named(text: str) -> list[str]:
    """The run ids, or beginnings of them, that a text names: apart by commas or spaces, each once."""
    return list(dict.fromkeys(part for part in re.split(r"[,\s]+", text) if part))[:MOST_NAMED]


def resolve(index: ResultIndex, names: Sequence[str]) -> tuple[list[CaseRecord], list[str]]:
    """The rows that full ids or unique beginnings name, each once, and a sentence for each name that is none."""
    found: dict[str, CaseRecord] = {}
    problems = []
    try:
        whole = {record.run_id: record for record in index.records(names)}
    except StoreError as fault:
        return [], [str(fault)]
    ids: pd.Index | None = None
    for name in names:
        record = whole.get(name)
        if record is None and ids is None and index.count() <= MOST_SEARCHED:
            ids = index.frame(metrics=()).index
        beginning = [] if record or ids is None else list(ids[ids.astype("str").str.startswith(name)])
        if len(beginning) == 1:
            record = index.record(str(beginning[0]))
        if record is not None:
            found[record.run_id] = record
        elif beginning:
            problems.append(f"{len(beginning)} rows begin with {name!r}: name more of the id.")
        else:
            hint = " Among so many rows a beginning is not looked for: give the whole id." if ids is None else ""
            problems.append(f"No row has the run id {name!r}.{hint}")
    return list(found.values()), problems
