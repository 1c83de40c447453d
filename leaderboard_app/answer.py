"""What the board answers, worked out once for each state of the files and remembered for all viewers.

    filters ── selection ──┬── steps of the sliders
                           └── bounds ── outline ── one page ── Answer: table, figure, what is missing

What is remembered is shared, so nobody changes it. A few selections are kept, which are large, and many answers, which are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from effbench.analysis.board import QUESTION, Bound, Outline, outline, ranked
from effbench.analysis.columns import Positions
from effbench.analysis.frame import column
from effbench.analysis.index import ResultIndex
from effbench.analysis.snapshot import Selection
from effbench.analysis.table import ARROWS, column_names, heading
from effbench.metrics import metric
from leaderboard_app import data, limits, ranking_table
from leaderboard_app.figures import ranking

CEILING = ("mfu", "bandwidth_share")  # share of what the machine can do


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of the rows; `state` is that of the index, so that another state of the files is another question."""

    state: str
    by: str
    where: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def workload(self) -> str:
        return dict(self.where)["workload"][0]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One page of ranked rows."""

    frame: pd.DataFrame  # ranking_table.ranking_frame
    order: Sequence[str]
    headings: Mapping[str, str]
    figure: go.Figure
    title: str  # of the figure
    missing: Sequence[str]  # why values are missing


def asked(index: ResultIndex, by: str, where: Mapping[str, Sequence[str]]) -> Question:
    """The question that these choices make."""
    return Question(state=index.state, by=by, where=tuple((name, tuple(values)) for name, values in where.items()))


@st.cache_resource(max_entries=3, show_spinner=False)  # type: ignore[untyped-decorator]  # streamlit is not followed
def selection(_index: ResultIndex, question: Question) -> Selection:
    """The rows that pass the filters, with what ranking and limits need."""
    of_limits = [name for limit in limits.offered(_index.measured(question.workload)) for name in limit.metrics]
    needed = dict.fromkeys([question.by, *of_limits])
    return _index.select((*QUESTION, *needed, *(column(name, "why") for name in needed)), dict(question.where))


@st.cache_resource(max_entries=64, show_spinner=False)  # type: ignore[untyped-decorator]
def steps(_index: ResultIndex, question: Question) -> list[tuple[limits.Limit, list[float]]]:
    """The limits that can be set, with the steps of their sliders."""
    return limits.with_steps(limits.offered(_index.measured(question.workload)), selection(_index, question).rows)


@st.cache_resource(max_entries=16, show_spinner=False)  # type: ignore[untyped-decorator]
def outlined(_index: ResultIndex, question: Question, bounds: Sequence[Bound]) -> Outline:
    """The rows that take part and how many others there are."""
    return outline(selection(_index, question), question.by, bounds)


@st.cache_resource(max_entries=64, show_spinner=False)  # type: ignore[untyped-decorator]
def answer(
    _index: ResultIndex, question: Question, bounds: Sequence[Bound], part: tuple[int, int], *, best: bool, everything: bool
) -> Answer:
    """The ranked rows of the questions from the first up to, not with, the last of `part`; the best of each only, if so asked."""
    by, names = question.by, names_of(question.workload, question.by, everything=everything)
    rows = outlined(_index, question, bounds).questions(*part).index.to_numpy()
    found = _ranked(selection(_index, question), rows, by, names, best=best)
    scaled = ranking_table.scales(found, [by, *names], _index.units)
    names = [name for name in names if found[name].notna().any()]
    factors = {name: factor for name, (factor, _) in scaled.items()}
    frame = ranking_table.ranking_frame(found, by, names, factors, labels(_index, found), data.origins())
    title = f"{heading(by, scaled[by][1])}, {ARROWS[metric(by).better]}; line: 95 % interval over blocks"
    wanted = [by, *dict.fromkeys((*names, *column_names(question.workload)))]
    return Answer(
        frame=frame,
        order=ranking_table.order(frame, by, names),
        headings=ranking_table.headings({name: scaled[name] for name in (by, *names)}),
        figure=ranking.ranking_bars(frame, by, title, data.colours()),
        title=title,
        missing=[] if everything else ranking_table.missing_notes(found, wanted),
    )


def _ranked(rows: Selection, positions: Positions, by: str, names: Sequence[str], *, best: bool) -> pd.DataFrame:
    """`board.ranked` of these rows, or the best of them; what is beside `by` is read of those that are left only."""
    narrow = rows.frame(positions, [by])
    found = ranked(narrow.assign(position=positions), by)
    found = found[found["rank"] == 1] if best else found
    wide = rows.frame(found["position"].to_numpy(), [by, *names])
    return wide.assign(rank=found["rank"].to_numpy(), shared=found["shared"].to_numpy())


def names_of(workload: str, by: str, *, everything: bool) -> list[str]:
    """The metrics beside the one that is ranked by: those of the workload's table and the share of the ceiling, or all."""
    wanted = column_names(workload, "all") if everything else (*column_names(workload), *CEILING)
    return [name for name in dict.fromkeys(wanted) if name != by]


def labels(index: ResultIndex, rows: pd.DataFrame) -> dict[str, str]:
    """The techniques of each baseline of these rows, by case."""
    cases = list(rows["baseline_case_id"].dropna().unique())
    found = index.select(("case_id", "label"), {"case_id": cases}).rows if cases else pd.DataFrame({"case_id": [], "label": []})
    return dict(zip(found["case_id"].astype(str), found["label"].astype(str), strict=True))
