"""What a board shows of many rows: those that meet the limits, ranked within their question, a page at a time.

    selection ── limits ──▶ Outline: which rows take part, question by question ── one page ──▶ frame with rank and shared

Ranking compares every two rows of a question, so only the questions of the page are ranked, however many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from effbench.analysis.frame import column
from effbench.analysis.rank import has_sources, num_better
from effbench.metrics import metric

if TYPE_CHECKING:
    import pandas as pd

    from effbench.analysis.snapshot import Selection

QUESTION = ("hardware", "model", "question")
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A limit on the first of `metrics` that a row has a usable value of, in the metric's unit."""

    metrics: tuple[str, ...]
    value: float
    at_most: bool

    def met(self, rows: pd.DataFrame) -> tuple[Mask, Mask]:
        """(which rows meet it, which have no such value and so do not)."""
        values = first_usable(rows, self.metrics)
        with np.errstate(invalid="ignore"):
            return (values <= self.value) if self.at_most else (values >= self.value), np.isnan(values)


@dataclass(frozen=True, kw_only=True)
class Outline:
    """The rows that take part, sorted by machine, model, setting and age, and how many others there are."""

    rows: pd.DataFrame  # of the selection, QUESTION only
    starts: npt.NDArray[np.int64]  # the first row of each question, then the number of rows
    apart: pd.DataFrame  # rows that cannot be ranked, with the reason only
    passed: int  # rows of the selection
    beyond: int  # rows that do not meet the limits
    unknown: int  # of these, rows without a value that is limited

    @property
    def num_questions(self) -> int:
        return len(self.starts) - 1

    def questions(self, first: int, last: int) -> pd.DataFrame:
        """The rows of the questions from `first` up to, not with, `last`."""
        return self.rows.iloc[self.starts[first] : self.starts[min(last, self.num_questions)]]


def first_usable(rows: pd.DataFrame, metrics: Sequence[str]) -> npt.NDArray[np.float64]:
    """Each row's value of the first metric that it has measured, else NaN; an estimate or an invalid value is none."""
    found = np.full(len(rows), np.nan)
    for name in metrics:
        usable = rows[f"{name}__why"].isin(["", "one_block"]).to_numpy()
        found = np.where(np.isnan(found) & usable, rows[name].to_numpy(float), found)
    return found


def outline(selection: Selection, by: str, bounds: Sequence[Bound] = ()) -> Outline:
    """The rows that have a value of `by` to be ranked by and meet all `bounds`.

    The selection needs QUESTION, `by`, `by__why`, and value and why of each metric in `bounds`."""
    rows = selection.rows
    fit = (rows[f"{by}__why"] == "").to_numpy()
    met, unknown = np.ones(len(rows), bool), np.zeros(len(rows), bool)
    for bound in bounds:
        meets, missing = bound.met(rows)
        met &= meets
        unknown |= missing
    mine = rows[fit & met]
    keys = mine[list(QUESTION)].drop_duplicates().astype(str)
    keys["setting"] = [selection.settings.get(asked, "") for asked in keys["question"]]
    keys = keys.sort_values(["hardware", "model", "setting", "question"], kind="stable").reset_index(drop=True)
    place = dict(zip(keys["question"], range(len(keys)), strict=True))
    categories = mine["question"].cat.categories
    of_code = np.array([place.get(asked, -1) for asked in categories], np.int64) if len(categories) else np.empty(0, np.int64)
    places = of_code[mine["question"].cat.codes.to_numpy()]
    order = np.argsort(places, kind="stable")
    starts = np.searchsorted(places[order], np.arange(len(keys) + 1))
    return Outline(
        rows=mine[list(QUESTION)].iloc[order], starts=starts, apart=rows.loc[~fit, [f"{by}__why"]], passed=len(rows),
        beyond=int((fit & ~met).sum()), unknown=int((fit & unknown).sum()),
    )  # fmt: skip


def ranked(frame: pd.DataFrame, by: str) -> pd.DataFrame:
    """The rows of `frame` (`frame.frame_of`) that may be ranked by `by`, with `rank` and `shared`, best first in each question.

    The rule is that of `analysis.rank`. Questions come in the order of `frame`."""
    frame = frame[(frame[column(by, "why")] == "").to_numpy()]
    own, ratio = (frame[[column(by, part) for part in parts]].to_numpy(float) for parts in _BOUNDS)
    source = frame[column(by, "source")].factorize()[0] if has_sources(metric(by)) else np.zeros(len(frame), np.int64)
    case = [f"{own}@{env}" for own, env in zip(frame["case_id"], frame["env_id"], strict=True)]
    base = [f"{of}@{env}" if of else "" for of, env in zip(frame["baseline_case_id"].fillna(""), frame["env_id"], strict=True)]
    protocol, higher = frame["protocol"].tolist(), np.array([metric(by).better == "higher"])
    rank, shared = np.zeros(len(frame), np.int64), np.zeros(len(frame), bool)
    groups = frame.groupby("question", sort=False).indices
    for mine in groups.values():
        better = num_better(
            own=own[None, mine], ratio=ratio[None, mine], sensor=source[None, mine], higher=higher,
            base=[base[i] for i in mine], case=[case[i] for i in mine], protocol=[protocol[i] for i in mine],
        )  # fmt: skip
        rank[mine] = 1 + better[0]
        _, group, sizes = np.unique(np.stack([rank[mine], source[mine]]), axis=1, return_inverse=True, return_counts=True)
        shared[mine] = sizes[group] > 1
    place = {asked: number for number, asked in enumerate(groups)}
    sign = -1.0 if metric(by).better == "higher" else 1.0
    order = np.lexsort(
        (sign * frame[by].to_numpy(float), rank, np.array([place[asked] for asked in frame["question"]], np.int64))
    )
    return frame.assign(rank=rank, shared=shared).iloc[order]


_BOUNDS = (("lower", "upper"), ("ratio_lower", "ratio_upper"))
