"""The board: what was measured, ranked by what matters to you, with what could not be told apart left together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import streamlit as st

from effbench.analysis.board import Bound, Outline
from effbench.analysis.frame import column
from effbench.analysis.index import ResultIndex
from effbench.analysis.rank import rankable
from effbench.analysis.snapshot import Selection
from effbench.analysis.table import ARROWS, HEADLINE, explain
from effbench.metrics import METRICS, metric
from effbench.schema import STATUSES
from effbench.stats import SCREENING_FLOOR
from leaderboard_app import answer, data, limits, opening, ranking_table
from leaderboard_app.answer import Question
from leaderboard_app.downloads import chart, table_downloads
from leaderboard_app.figures import ranking

BEST, ALL = "best of each model and setting", "all rows"
FIRST_WORKLOAD = "generate"  # whose time per token and memory most people ask about
PAGE_QUESTIONS = {BEST: 8, ALL: 4}
PAGE_ROWS = 15  # of the table before it scrolls
APART_ROWS = 200  # of the rows that are not ranked
WHAT_MATTERS = {  # a click instead of a search
    "tokens_per_s": "Throughput", "tpot_s": "Time per token", "step_p50_s": "Time per step",
    "device_memory_peak_bytes": "Device memory", "host_memory_peak_bytes": "Host memory", "energy_j_per_token": "Energy",
    "weight_bytes": "Size", "quality": "Quality",
}  # fmt: skip
_ROW_PX = 35


def page() -> None:
    st.title("Leaderboard")
    index = opening.results()
    if index is None:
        return
    workload, by = what_matters(index)
    where = filters(index, workload)
    question = answer.asked(index, by, where)
    bounds = limits.sliders(answer.steps(index, question), index.units)
    found = answer.outlined(index, question, bounds)
    ranking_of(index, question, bounds, found.num_questions)
    apart(index, answer.selection(index, question), found.apart, by)
    hidden(index, workload, found)


def what_matters(index: ResultIndex) -> tuple[str, str]:
    """The workload and the metric to rank by."""
    first, second = st.columns([1, 2])
    workloads = sorted(index.distinct("workload"), key=lambda name: name != FIRST_WORKLOAD)
    workload = str(first.selectbox("Workload", workloads, key="workload", bind="query-params"))
    measured = index.measured(workload)
    metrics = [name for name, row in METRICS.items() if name in measured and rankable(row)] or [HEADLINE]
    by = str(
        second.selectbox(
            "Ranked by",
            metrics,
            index=metrics.index(HEADLINE) if HEADLINE in metrics else 0,
            format_func=lambda name: f"{metric(name).title} · {ARROWS[metric(name).better]}",
            key="by",
            bind="query-params",
            help="The six metrics of the paper and the figures beside them.",
        )
    )
    st.session_state["matters"] = by if by in WHAT_MATTERS else None
    st.pills(
        "What matters",
        [name for name in WHAT_MATTERS if name in metrics],
        format_func=WHAT_MATTERS.__getitem__,
        key="matters",
        on_change=_rank_by_pill,
    )
    return workload, by


def _rank_by_pill() -> None:
    if st.session_state["matters"]:
        st.session_state["by"] = st.session_state["matters"]


def filters(index: ResultIndex, workload: str) -> dict[str, list[str]]:
    """The rows wanted, as `ResultIndex.select` takes them."""
    fields = {"model": "Model", "technique": "Techniques", "hardware": "Hardware", "protocol": "Protocol", "status": "Status"}
    where: dict[str, list[str]] = {"workload": [workload]}
    for place, (key, title) in zip(st.columns(len(fields)), fields.items(), strict=True):
        name = "techniques" if key == "technique" else key
        options = list(STATUSES) if key == "status" else index.distinct(name)
        where[name] = place.multiselect(title, options, key=key, bind="query-params", placeholder="all")
    return where


def ranking_of(index: ResultIndex, question: Question, bounds: Sequence[Bound], num_questions: int) -> None:
    """Figure and table of one page of the rows that take part."""
    if not num_questions:
        st.info("No row can be ranked by this metric with these filters and limits.")
        return
    left, middle, right = st.columns([2, 1, 1], vertical_alignment="bottom")
    several = num_questions > PAGE_QUESTIONS[ALL]
    show = str(left.radio("Show", (BEST, ALL), index=0 if several else 1, key="show", bind="query-params", horizontal=True))
    more = middle.toggle(
        "All metrics", key="all", bind="query-params", help="Every figure of each row instead of the main ones."
    )
    part = page_of(num_questions, PAGE_QUESTIONS[show], right)
    found = answer.answer(index, question, bounds, part, best=show == BEST, everything=more)
    frame = found.frame
    chart(
        "ranking", found.figure, "board", alt=f"Bars of the ranked rows: {found.title}. The table below has the same numbers."
    )
    if len(frame) > ranking.MAX_BARS:
        st.caption(f"The figure shows the first {ranking.MAX_BARS} of {len(frame)} rows.")
    st.dataframe(
        frame,
        hide_index=True,
        column_order=found.order,
        column_config=ranking_table.columns(found.headings),
        placeholder="–",
        height=_ROW_PX * (min(len(frame), PAGE_ROWS) + 1) + 3,
        key="board",
    )
    st.caption(
        "Rows share a rank (=) when the difference between them is not shown. Ranks are within one machine, model and setting."
    )
    if frame["screening"].any():
        st.caption(f"Hatched rows are screening: they claim no difference below {100 * SCREENING_FLOOR:.0f} %.")
    for note in data.origins().notes(map(str, frame.index)):
        st.caption(note)
    table_downloads("ranking_rows", frame, "board")
    if found.missing:
        with st.expander("What is missing (–), and why"):
            st.text("\n".join(found.missing))


def page_of(count: int, size: int, place: Any) -> tuple[int, int]:
    """The questions of the page that was chosen: from the first up to, not with, the last."""
    pages = -(-count // size)
    if pages == 1:
        return 0, size
    number = int(place.number_input(f"Page of {pages}", 1, pages, key="page", bind="query-params"))
    return (number - 1) * size, number * size


def apart(index: ResultIndex, selection: Selection, rows: pd.DataFrame, by: str) -> None:
    """The rows that cannot be ranked, by their reason, and the newest of them one by one."""
    if not len(rows):
        return
    st.subheader(f"Not ranked: {len(rows):,} rows")
    st.caption("Failed, skipped, invalid, estimated, host-bound, or without a value of this metric.")
    if len(rows) > APART_ROWS:
        counts = rows[column(by, "why")].value_counts()
        st.text("\n".join(f"{count:,} rows: {explain(str(code))}" for code, count in counts[counts > 0].items()))
        if not st.toggle(f"List the newest {APART_ROWS} of them", key="apart_listed", bind="query-params"):
            return
    newest = rows.index.to_numpy()[::-1][:APART_ROWS]
    unit = index.units.get(by) or metric(by).unit
    frame = ranking_table.apart_frame(selection.frame(newest, [by]), by, unit, data.origins())
    st.dataframe(frame, hide_index=True, column_config=ranking_table.columns({}), key="apart")
    table_downloads("apart_rows", frame, "board-not-ranked")


def hidden(index: ResultIndex, workload: str, found: Outline) -> None:
    """How many rows of the workload are not on the page's lists, and why."""
    reasons = [(index.count({"workload": [workload]}) - found.passed, "by the filters"), (found.beyond, "by the limits")]
    reasons.append((index.replaced, "that a later run of the same case replaced"))
    parts = [f"{count:,} {why}" for count, why in reasons if count]
    unknown = f" Of those by the limits, {found.unknown:,} have no measured value of what is limited." if found.unknown else ""
    st.caption(f"Hidden rows: {', '.join(parts) or 'none'}.{unknown}")
    if index.loose_files > 100:
        st.caption(f"{index.loose_files} loose files make reading slow. `effbench compact` merges them.")


page()
