"""The board: what was measured, ranked by what matters to you, with what could not be told apart left together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import streamlit as st

from effbench.analysis.rank import find, rank, rankable
from effbench.analysis.table import HEADLINE, column_names, heading, notes, scale
from effbench.metrics import METRICS, metric
from effbench.schema import STATUSES, CaseRecord
from effbench.stats import SCREENING_FLOOR
from leaderboard_app import data, figures

PAGE_ROWS = 25  # of the table before it scrolls
_ROW_PX = 35


def page() -> None:
    st.title("Leaderboard")
    found = data.results()
    for warning in found.warnings:
        st.warning(_plain(warning), icon=":material/broken_image:")
    if not found.records:
        empty()
        return
    workload, by, rows, left_out = choose(found.records)
    board(rows, workload, by, figures.colours(data.stack(record) for record in found.records))
    hidden = [f"{left_out} by the filters"] if left_out else []
    hidden += [f"{found.replaced} that a later run of the same case replaced"] if found.replaced else []
    st.caption(f"Hidden rows: {', '.join(hidden) or 'none'}.")
    if found.loose_files > 100:
        st.caption(f"{found.loose_files} loose files make reading slow. `effbench compact` merges them.")


def empty() -> None:
    """No results: say how to get some."""
    st.info("There are no results to show yet.", icon=":material/inbox:")
    st.markdown("Measure the quick suite on this machine; it takes about four minutes:")
    st.code("make run", language="bash")
    st.markdown("Or show results that are elsewhere:")
    st.code("effbench board --results path/to/results", language="bash")
    st.text("Looked in: " + ", ".join(str(folder) for folder in data.folders()))


def choose(records: Sequence[CaseRecord]) -> tuple[str, str, list[CaseRecord], int]:
    """The widgets. Returns workload, ranking metric, the rows that pass, and how many do not."""
    first, second, third = st.columns([1, 1.4, 1.6])
    workloads = _distinct(record.workload for record in records)
    workload = first.selectbox("Workload", workloads, key="workload", bind="query-params")
    of_workload = [record for record in records if record.workload == workload]
    metrics = ranking_metrics(of_workload)
    by = second.selectbox(
        "Ranked by",
        metrics,
        index=metrics.index(HEADLINE) if HEADLINE in metrics else 0,
        format_func=lambda name: f"{metric(name).title} · {data.ARROWS[metric(name).better]}",
        key="by",
        bind="query-params",
        help="The six metrics of the paper and the figures beside them.",
    )
    techniques = _distinct(name for record in records for name in record.techniques)
    chosen = third.multiselect(
        "Techniques", techniques, key="technique", bind="query-params", placeholder="all", help="Rows with any of these."
    )
    columns = st.columns(4)
    fields = {
        "hardware": columns[0].multiselect("Hardware", _distinct(r.hardware for r in records), **_bound("hardware")),
        "model": columns[1].multiselect("Model", _distinct(r.model for r in records), **_bound("model")),
        "protocol": columns[2].multiselect("Protocol", _distinct(r.protocol for r in records), **_bound("protocol")),
        "status": columns[3].multiselect("Status", STATUSES, **_bound("status")),
    }
    rows = [
        record
        for record in of_workload
        if all(not wanted or getattr(record, field) in wanted for field, wanted in fields.items())
        and (not chosen or set(chosen) & set(record.techniques))
    ]
    return str(workload), str(by), rows, len(of_workload) - len(rows)


def ranking_metrics(records: Sequence[CaseRecord]) -> list[str]:
    """The metrics that some row can be ranked by; the headline alone where there is none."""
    present = {value.name for record in records for value in record.metrics if value.value is not None}
    return [name for name, row in METRICS.items() if name in present and rankable(row)] or [HEADLINE]


def board(rows: Sequence[CaseRecord], workload: str, by: str, colour_of: Mapping[str, str]) -> None:
    """Figure, table and what stands apart, for the rows that passed the filters."""
    ranking = rank(rows, by)
    ranked, apart = [row for row in ranking if row.rank is not None], [row for row in ranking if row.rank is None]
    more = st.toggle("All metrics", key="all", bind="query-params", help="Every figure of each row instead of the main ones.")
    names = [name for name in column_names(workload, "all" if more else "default") if name != by and _any_value(ranked, name)]
    factor, unit = scale([row.value.value for row in ranked if row.value], data.unit_of(rows, by))
    scales = {name: scale([_value(row, name) for row in ranked], data.unit_of(rows, name)) for name in names}
    frame = data.ranking_frame(ranked, by, {name: scales[name][0] for name in names}, factor)
    if ranked:
        title = f"{heading(by, unit)}, {data.ARROWS[metric(by).better]}; line: 95 % interval over blocks"
        figure = figures.ranking_bars(frame, by, title, colour_of)
        st.plotly_chart(figure, key="ranking", config={"displaylogo": False})
        if len(frame) > figures.MAX_BARS:
            st.caption(f"The figure shows the first {figures.MAX_BARS} of {len(frame)} rows.")
        headings = {by: heading(by, unit), **{name: heading(name, scales[name][1]) for name in names}}
        st.dataframe(
            frame,
            hide_index=True,
            column_order=_order(frame, by, names),
            column_config=_columns(headings),
            placeholder="–",
            height=_ROW_PX * (min(len(frame), PAGE_ROWS) + 1) + 3,
            key="board",
        )
        st.caption(
            "Rows share a rank (=) when the difference between them is not shown. Ranks are within one machine, model and setting."
        )
    else:
        st.info("No row can be ranked by this metric with these filters.")
    if any(frame["screening"]) if ranked else False:
        st.caption(f"Hatched rows are screening: they claim no difference below {100 * SCREENING_FLOOR:.0f} %.")
    if apart:
        st.subheader(f"Not ranked: {len(apart)} rows")
        st.caption("Failed, skipped, invalid, estimated, host-bound, or without a value of this metric.")
        st.dataframe(data.unranked_frame(apart), hide_index=True, column_config=_columns({}), key="apart")
    missing = list(notes([row.record for row in ranked], [by, *column_names(workload)]))
    if missing:
        with st.expander("What is missing (–) or flagged (*), and why"):
            for note in missing:
                st.text(note)


def _columns(headings: Mapping[str, str]) -> dict[str, Any]:
    column = st.column_config
    found: dict[str, Any] = {
        "place": column.TextColumn("#", help="1 + the number of rows shown to be better; = is shared.", pinned=True, width=45),
        "hardware": column.TextColumn("Hardware"),
        "model": column.TextColumn("Model"),
        "setting": column.TextColumn("Setting", help="What differs between otherwise equal rows."),
        "techniques": column.TextColumn("Techniques", pinned=True),
        "protocol": column.TextColumn("Protocol", help="How long and how often was measured."),
        "range": column.TextColumn("95 % interval", help="Student t over blocks, on logarithms."),
        "n": column.NumberColumn("n", help="Blocks: a block is one fresh process of each side.", width=40),
        "baseline": column.TextColumn("Baseline", help="What the ratio compares with, in the same blocks."),
        "ratio": column.NumberColumn("× baseline", format="%.3f", help="Paired ratio of the ranking metric."),
        "verdict": column.TextColumn("Verdict", width=150, help="Shown when the ratio's interval leaves out 1."),
        "status": column.TextColumn("Status"),
        "why": column.TextColumn("Why", width="large"),
        "value": column.TextColumn("Value"),
        "started": column.TextColumn("Started"),
    }
    for name, text in headings.items():
        found[name] = column.NumberColumn(text, format="%.4g", help=data.describe(metric(name)))
    return found


def _order(frame: Any, by: str, names: Sequence[str]) -> list[str]:
    """Columns from left to right; those that say the same in every row are left out."""
    where = [name for name in ("hardware", "model", "setting") if frame[name].nunique() > 1 or name == "model"]
    return ["place", "techniques", *where, by, "range", "n", "baseline", "ratio", "verdict", "protocol", *names]


def _bound(key: str) -> dict[str, Any]:
    return {"key": key, "bind": "query-params", "placeholder": "all"}


def _any_value(ranked: Sequence[Any], name: str) -> bool:
    return any(_value(row, name) is not None for row in ranked)


def _value(row: Any, name: str) -> float | None:
    found = find(row.record, name)
    return found.value if found else None


def _distinct(values: Iterable[str]) -> list[str]:
    return sorted(set(values))


def _plain(text: str) -> str:
    """Text with everything that Markdown would read as markup escaped."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>()#+!|~$:" else letter for letter in text)


page()
