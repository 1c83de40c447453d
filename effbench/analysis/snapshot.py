"""The rows of all files at one moment, as columns: filters, a few columns of many rows, frames of a few.

positions ── the rows that count and pass the filters
Selection ── some columns of them, texts as categories: cheap at a million rows
a frame   ── all that figures and pages are computed from, as analysis/frame.py gives it
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from effbench.analysis.columns import Array, Codes, Columns, Positions
from effbench.analysis.frame import NUMBERS, ROW_COLUMNS, column
from effbench.analysis.ingest import Dictionaries, shared_columns
from effbench.analysis.rank import NO_CLAIM, SCREENING
from effbench.analysis.table import difference_labels
from effbench.store import Store

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow

Where = Mapping[str, Iterable[str]]


@dataclass(frozen=True)
class File:
    store: Store
    path: Path
    mark: str
    start: int  # its first row in the columns
    count: int


@dataclass(frozen=True)
class Snapshot:
    """What the files held at one moment."""

    columns: Columns
    texts: Dictionaries
    run_ids: pyarrow.ChunkedArray
    kept: Positions  # the rows that count, oldest first
    files: tuple[File, ...] = ()
    replaced: int = 0
    names: Mapping[str, str] = field(default_factory=dict)  # metric → unit
    measured: dict[str, list[str]] = field(default_factory=dict)  # workload → its metrics, found when asked for
    texts_of: dict[str, list[str]] = field(default_factory=dict)  # column → its texts among the rows that count, likewise


@dataclass(frozen=True)
class Selection:
    """Some columns of many rows, as they were at one moment."""

    rows: pd.DataFrame  # a line each: texts are categories, numbers doubles; the index is for `frame`
    _now: Snapshot

    def frame(self, positions: Positions, metrics: Sequence[str]) -> pd.DataFrame:
        """Some of these rows, in this order, as `ResultIndex.frame` gives them; `setting` is as in `settings`."""
        return frame_at(self._now, positions, metrics, self.settings)

    @cached_property
    def settings(self) -> dict[str, str]:
        """For each question among the rows, what it differs in from the others of its model."""
        pairs = self.rows[["model", "question"]].drop_duplicates()
        return _settings(pairs["model"], pairs["question"], self._now.texts["settings"])


def positions_of(now: Snapshot, where: Where) -> Positions:
    rows = now.kept
    for name, wanted in where.items():
        values = set(wanted)
        if not values:
            continue
        known: Codes = now.texts[shared_columns(name)]
        if name == "techniques":
            hits = [code for code, value in enumerate(known.values) if values & set(value)]
        else:
            hits = [known.find(value) for value in values]
        codes = now.columns.take(name, rows)
        rows = rows[:0] if codes is None else rows[np.isin(codes, hits)]
    return rows


def texts_of(now: Snapshot, name: str, rows: Positions) -> list[str]:
    codes = now.columns.take(name, rows)
    if codes is None:
        return []
    values = [now.texts[shared_columns(name)].values[code] for code in np.flatnonzero(np.bincount(codes[codes >= 0]))]
    return sorted({one for value in values for one in value} if name == "techniques" else set(values))


def any_value(now: Snapshot, name: str, rows: Positions) -> bool:
    some = (now.columns.take(name, part) for part in (rows[:1_000], rows))
    return any(values is not None and bool(np.isfinite(values).any()) for values in some)


def selected(now: Snapshot, rows: Positions, names: Sequence[str]) -> Selection:
    import pandas as pd

    lines: dict[str, Any] = {}
    for name in names:
        values = now.columns.take(name, rows)
        if name in ROW_COLUMNS or name.endswith(("__why", "__source")):
            codes = np.full(len(rows), -1) if values is None else values
            if name.endswith("__why"):
                fallback = now.columns.take("fallback_why", rows)
                codes = codes if fallback is None else np.where(codes < 0, fallback, codes)
            texts = now.texts[shared_columns(name)]
            few = len(codes) < len(texts.values)  # then no categories are made of texts that no row has
            lines[name] = pd.Categorical(texts.decode(codes) if few else pd.Categorical.from_codes(codes, texts.values))
        else:
            lines[name] = np.full(len(rows), np.nan) if values is None else values
    return Selection(pd.DataFrame(lines, index=pd.Index(rows)), now)


def frame_at(now: Snapshot, rows: Positions, metrics: Sequence[str], settings: Mapping[str, str] | None = None) -> pd.DataFrame:
    """`ResultIndex.frame`; `settings` by question, where others than those among `rows` decide what differs."""
    import pandas as pd

    lines: dict[str, Any] = {name: _decoded(now, name, rows) for name in ROW_COLUMNS if name not in ("setting", "screening")}
    lines["host_bound"] = lines["host_bound"].astype(bool)
    labels = _settings(lines["model"], lines["question"], now.texts["settings"]) if settings is None else settings
    lines["setting"] = np.array([labels.get(asked, "") for asked in lines["question"]], object)
    lines["screening"] = np.isin(lines["protocol"], (SCREENING, NO_CLAIM))
    lines = {name: lines[name] for name in ROW_COLUMNS}
    fallback = _decoded(now, "fallback_why", rows)
    for name in metrics:
        for part in NUMBERS:
            values = now.columns.take(column(name, part), rows)
            lines[column(name, part)] = np.full(len(rows), np.nan) if values is None else values
        lines[column(name, "source")] = _decoded(now, column(name, "source"), rows, "")
        own = now.columns.take(column(name, "why"), rows)
        lines[column(name, "why")] = fallback if own is None else np.where(own < 0, fallback, now.texts["why"].decode(own))
    ids = now.run_ids.take(rows).to_pylist()
    return pd.DataFrame(lines, index=pd.Index(ids, name="run_id", dtype="str"))


def _decoded(now: Snapshot, name: str, rows: Positions, missing: str | None = None) -> Array:
    codes = now.columns.take(name, rows)
    texts = now.texts[shared_columns(name)]
    return texts.decode(np.full(len(rows), -1) if codes is None else codes, missing)


def _settings(models: Any, questions: Any, settings: Codes) -> dict[str, str]:
    """The labels of the questions among these rows."""
    wanted = set(questions)
    of: dict[str, dict[str, Mapping[str, Any]]] = {}
    known = {asked: found for asked, found in (value for value in settings.values) if asked in wanted}
    for model, asked in set(zip(models, questions, strict=True)):
        of.setdefault(model, {})[asked] = dict(known.get(asked, ()))
    return difference_labels(of)
