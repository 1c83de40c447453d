"""What the pages show, read once for each state of the files and shared by all viewers.

    EFFBENCH_RESULTS or results/local, results/reference ── Store ──▶ Results ──(filters, a metric)──▶ DataFrames

Records are frozen, so the cache hands the same objects to every viewer instead of a copy each.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import streamlit as st

from effbench.analysis.rank import Ranked, find, is_host_bound, is_screening, latest, question, ratio_verdict
from effbench.analysis.table import explain, interval, settings_labels
from effbench.errors import StoreError
from effbench.metrics import Metric, metric
from effbench.schema import CaseRecord, MetricValue
from effbench.store import Store

DEFAULT_FOLDERS = ("results/local", "results/reference")
ARROWS = {"lower": "lower is better", "higher": "higher is better", "none": "no direction"}


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that could be read, and a sentence for each thing that could not."""

    records: tuple[CaseRecord, ...]
    replaced: int  # rows that a later row of the same case on the same machine stands for
    warnings: tuple[str, ...]
    loose_files: int


def folders() -> tuple[Path, ...]:
    """The results directories: EFFBENCH_RESULTS, separated as in PATH, else the usual two."""
    named = os.environ.get("EFFBENCH_RESULTS", "")
    return tuple(Path(name) for name in (named.split(os.pathsep) if named else DEFAULT_FOLDERS) if name)


def results() -> Results:
    """The rows of all results directories, read again only when a file has changed."""
    state, unreadable = [], []
    for folder in folders():
        try:
            state.append((str(folder), Store(folder).fingerprint()))
        except StoreError as fault:
            unreadable.append(str(fault))
    found = _read(tuple(state))
    return found if not unreadable else _with_warnings(found, unreadable)


@st.cache_resource(max_entries=4, show_spinner="Reading results …")  # type: ignore[untyped-decorator]  # streamlit is not followed
def _read(state: tuple[tuple[str, str], ...]) -> Results:
    """`state` holds each folder with the digest of its files' names, sizes and times."""
    records: dict[str, CaseRecord] = {}
    warnings: list[str] = []
    loose = 0
    for folder, _ in state:
        store = Store(folder)
        try:
            found = store.cases()
        except StoreError as fault:
            warnings.append(str(fault))
            continue
        records.update((record.run_id, record) for record in found)
        warnings += found.warnings
        loose += store.loose_files
    kept, replaced = latest(records.values())
    return Results(records=tuple(kept), replaced=len(replaced), warnings=tuple(warnings), loose_files=loose)


def _with_warnings(found: Results, more: Sequence[str]) -> Results:
    return Results(
        records=found.records, replaced=found.replaced, warnings=(*found.warnings, *more), loose_files=found.loose_files
    )


def stack(record: CaseRecord) -> str:
    """The techniques of a row as one text."""
    return record.label


def describe(row: Metric) -> str:
    """Help of a column: formula, source and direction."""
    return f"{row.formula}. Source: {row.source}. {ARROWS[row.better].capitalize()}."


def ranking_frame(ranked: Sequence[Ranked], name: str, others: Mapping[str, float], factor: float) -> pd.DataFrame:
    """One line a ranked row: where it stands, the ranking metric times `factor` with its interval, its ratio and verdict,
    and each metric of `others` times its own factor. Columns of metrics are named after them; run_id is the index."""
    records = [row.record for row in ranked]
    labels, names_of = settings_labels(records), {record.case_id: stack(record) for record in records}
    lines = []
    for row in ranked:
        record, value = row.record, row.value
        assert value is not None, "a ranked row has a value"
        said = ratio_verdict(record, value, host_bound=is_host_bound(record))
        lines.append(
            {
                "run_id": record.run_id,
                "hardware": record.hardware,
                "model": record.model,
                "setting": labels[question(record)],
                "rank": row.rank,
                "place": f"{row.rank}{'=' if row.shared else ''}",
                "techniques": stack(record),
                "protocol": f"{record.protocol} · screening" if is_screening(record) else record.protocol,
                "screening": is_screening(record),
                name: _scaled(value.value, factor),
                "lower": _scaled(value.lower, factor),
                "upper": _scaled(value.upper, factor),
                "shown": interval(value, factor),
                "range": f"{_scaled(value.lower, factor):.4g} – {_scaled(value.upper, factor):.4g}",
                "n": value.n,
                "baseline": names_of.get(record.baseline_case_id or "", (record.baseline_case_id or "–")[:8]),
                "ratio": value.ratio,
                "verdict": said or "–",
                **{other: _number(find(record, other), scale) for other, scale in others.items() if other != name},
            }
        )
    frame = pd.DataFrame(lines).set_index("run_id") if lines else pd.DataFrame()
    return frame.sort_values(["hardware", "model", "setting", "rank"], kind="stable") if lines else frame


def unranked_frame(ranked: Sequence[Ranked]) -> pd.DataFrame:
    """One line for each row that is shown apart: what it is and why it has no rank."""
    return pd.DataFrame(
        [
            {
                "hardware": row.record.hardware,
                "model": row.record.model,
                "techniques": stack(row.record),
                "status": row.record.status,
                "why": explain(row.reason),
                "value": interval(row.value) + f" {row.value.unit}" if row.value and row.value.value is not None else "–",
                "started": row.record.started_at,
            }
            for row in ranked
        ]
    )


def unit_of(records: Sequence[CaseRecord], name: str) -> str:
    """The unit of a metric, from the table or, for a plugin's, from its rows."""
    value = next((found for record in records if (found := find(record, name))), None)
    return value.unit if value else metric(name).unit


def _scaled(number: float | None, factor: float) -> float | None:
    return None if number is None else number * factor


def _number(value: MetricValue | None, factor: float) -> float | None:
    return None if value is None or not value.valid else _scaled(value.value, factor)
