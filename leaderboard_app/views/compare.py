"""Two to six rows side by side: every metric against the first row, and in what the rows differ."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from effbench.analysis.compare import (
    BASES,
    MOST_ROWS,
    NOT_COMPARABLE,
    Compared,
    compare,
    differences,
    explain_why,
    metric_names,
    question_differences,
    ratio_words,
)
from effbench.analysis.index import ResultIndex
from effbench.analysis.rank import find, is_host_bound, is_screening
from effbench.analysis.table import MARKS, column_names, heading, interval, scale
from effbench.metrics import metric
from effbench.schema import CaseRecord
from effbench.stats import SCREENING_FLOOR
from leaderboard_app import chooser, opening
from leaderboard_app.downloads import chart, table_downloads
from leaderboard_app.figures.comparison import ratio_forest

_BETTER, _WORSE, _CHANGED = "#009E7340", "#D55E0040", "#E69F0040"  # of the palette, clear enough for dark and light


def page() -> None:
    st.title("Compare")
    st.caption(f"Two to {MOST_ROWS} rows side by side. Every ratio is to the first row.")
    index = opening.results()
    if index is None:
        return
    records = choose(index)
    if len(records) < 2:
        st.info("Choose two rows or more.", icon=":material/compare_arrows:")
        return
    the_rows(records)
    the_metrics(records)
    the_differences(records)
    table_downloads("compare", [record.run_id for record in records], "effbench-compare")


def choose(index: ResultIndex) -> list[CaseRecord]:
    """The rows, in the order chosen: as ids in a text, which the URL holds, or from a list, which fills the text."""
    text = st.text_input(
        "Rows",
        key="rows",
        bind="query-params",
        help="Run ids, or beginnings of them, apart by commas. The first is what the others are compared with.",
        placeholder="choose below, or paste run ids",
    )
    records, problems = chooser.resolve(index, chooser.named(text))
    for problem in problems:
        st.text(problem)
    if len(records) > MOST_ROWS:
        st.text(f"{len(records)} rows are named; the first {MOST_ROWS} are shown.")
    records = records[:MOST_ROWS]
    first_open = st.session_state.setdefault("find_first", len(records) < 2)  # it must not close under the hand that chooses
    box = st.expander("Find rows", expanded=first_open, key="find", on_change="rerun", icon=":material/search:")
    if box.open:
        with box:
            offer(index, records)
    return records


def offer(index: ResultIndex, records: Sequence[CaseRecord]) -> None:
    """The list to choose from; what is chosen already stands in it whatever the filters."""
    found = chooser.offered(index)
    labels = {record.run_id: chooser.describe_record(record) for record in records} | dict(found.labels)
    st.session_state["picked"] = [record.run_id for record in records]
    st.multiselect(
        "Rows to compare",
        list(labels),
        key="picked",
        format_func=lambda run_id: f"{run_id[:8]} · {labels[run_id]}",
        max_selections=MOST_ROWS,
        on_change=_keep_picked,
        placeholder="type to search",
        help="The newest rows that pass the filters. The order of choice counts: the first is the reference.",
    )
    if found.left_out:
        st.caption(f"{found.left_out:,} more rows pass: narrow the filters to have them offered.")


def _keep_picked() -> None:
    st.session_state["rows"] = ",".join(st.session_state["picked"])


def name_of(records: Sequence[CaseRecord], number: int) -> str:
    """A row's column title: its place and stack."""
    return f"{number + 1}: {records[number].label[:60]}"


def the_rows(records: Sequence[CaseRecord]) -> None:
    first = records[0]
    lines = []
    for number, record in enumerate(records):
        differing = question_differences(first, record)
        answer = "the reference" if number == 0 else "yes" if not differing else f"no: {', '.join(differing)}"
        lines.append(
            {
                "row": name_of(records, number),
                "model": record.model,
                "workload": record.workload,
                "hardware": record.hardware,
                "protocol": f"{record.protocol} · screening" if is_screening(record) else record.protocol,
                "status": f"{record.status}: {record.reason}" if record.reason else record.status,
                "comparable": answer,
                "started": record.started_at,
                "run_id": record.run_id,
                "link": f"run?run={record.run_id}" if record.run_id.isalnum() else None,
            }
        )
    text = st.column_config.TextColumn
    st.dataframe(
        pd.DataFrame(lines),
        hide_index=True,
        key="the_rows",
        alt="The rows that are compared, and whether each answers the question of the first.",
        column_config={
            "row": text("Row", pinned=True),
            "model": text("Model"),
            "workload": text("Workload"),
            "hardware": text("Hardware"),
            "protocol": text("Protocol"),
            "status": text("Status"),
            "comparable": text(
                "Same question as the first", width="large", help="If not: what differs, by its path in the spec."
            ),
            "started": text("Started"),
            "run_id": text("Run id"),
            "link": st.column_config.LinkColumn("Record", display_text="open", help="The whole record of this row."),
        },
    )
    if any(is_screening(record) for record in records):
        st.caption(f"Screening rows claim no difference below {100 * SCREENING_FLOOR:.0f} %; smoke rows claim none.")


def the_metrics(records: Sequence[CaseRecord]) -> None:
    st.subheader("Metrics")
    every = st.toggle("All metrics", key="all", bind="query-params", help="Every figure of the rows instead of the main ones.")
    present = metric_names(records)
    wanted = dict.fromkeys(name for record in records for name in column_names(record.workload))
    names = [name for name in present if every or name in wanted]
    if not names:
        st.info("None of these rows has a value.")
        return
    against = [compare(records[0], record, names) for record in records[1:]]
    table = metrics_table(records, names, against)
    st.dataframe(
        table.style.map(_tint),
        hide_index=True,
        key="metrics",
        placeholder="–",
        alt="Metrics of each row with their interval, and for each row after the first its ratio, interval and verdict.",
        column_config={
            "metric": st.column_config.TextColumn("Metric", pinned=True, help="With the unit of all values beside it.")
        }
        | {title: st.column_config.TextColumn(title, help=_help(title, records)) for title in table.columns[1:]},
    )
    st.caption(
        f"±: 95 % interval over blocks. ×: ratio to the first row with its interval; {', '.join(f'{m} {v}' for v, m in MARKS.items())}. "
        "Nothing is claimed where an interval leaves the question open."
    )
    for note in verdict_notes(against):
        st.text(note)
    lines = [
        {
            "metric": metric(line.name, line.unit).title,
            "row": name_of(records, number),
            "ratio": line.ratio,
            "lower": line.lower,
        }
        | {"upper": line.upper, "verdict": line.verdict or ""}
        for number, found in enumerate(against, 1)
        for line in found
    ]
    frame = pd.DataFrame(lines).astype({"ratio": float, "lower": float, "upper": float})
    if (frame["ratio"] > 0).any():
        figure = ratio_forest(frame)
        chart("ratios", figure, "effbench-ratios", "Ratio of each metric to the first row, with its 95 % interval.")
        given, shown = figure.layout.meta["points"]
        st.caption(
            "A filled mark is a difference that is shown." + (f" {shown} of {given} ratios are drawn." if shown < given else "")
        )


def metrics_table(records: Sequence[CaseRecord], names: Sequence[str], against: Sequence[Sequence[Compared]]) -> pd.DataFrame:
    """One line a metric: its title with unit, each row's value, and after each row but the first its ratio and verdict, as text."""
    lines = []
    for at, name in enumerate(names):
        values = [find(record, name) for record in records]
        unit = next((value.unit for value in values if value), metric(name).unit)
        factor, unit = scale([value.value for value in values if value], unit)
        line: dict[str, str | None] = {"metric": heading(name, unit) or metric(name).title}
        for number, value in enumerate(values):
            shown = None if value is None or value.value is None else interval(value, factor) + ("*" if value.reasons else "")
            line[name_of(records, number)] = shown
            if number:
                line[f"{number + 1} / 1"] = ratio_text(against[number - 1][at])
        lines.append(line)
    return pd.DataFrame(lines)


def ratio_text(line: Compared) -> str:
    """'×0.833 (0.817–0.850) ▼ worse', or why there is no more to say."""
    ratio = ratio_words(line.ratio, line.lower, line.upper)
    if line.verdict is None or line.verdict == NOT_COMPARABLE:
        return " ".join(filter(None, (ratio, line.verdict or "no verdict"))) + f": {line.why}"
    return f"{ratio} {MARKS[line.verdict]} {line.verdict}".strip()


def verdict_notes(against: Sequence[Sequence[Compared]]) -> list[str]:
    """A sentence for each code that keeps a verdict away, and for how ratios were made."""
    titles: dict[str, dict[str, None]] = {}
    bases: dict[str, None] = {}
    for line in (line for found in against for line in found):
        bases |= {BASES[line.basis]: None} if line.basis else {}
        if line.why:
            titles.setdefault(line.why, {})[metric(line.name, line.unit).title] = None
    notes = [f"{why} ({', '.join(named)}): {explain_why(why)}." for why, named in titles.items()]
    return [f"Ratios here are {' or '.join(bases)}.", *notes] if bases else notes


def the_differences(records: Sequence[CaseRecord]) -> None:
    st.subheader("Specs and provenance")
    every = st.toggle("All fields", key="fields", bind="query-params", help="Also those that are the same in all rows.")
    found = differences(records)
    lines = [line for line in found if every or line.differs]
    st.caption(
        f"{sum(line.differs for line in found)} of {len(found)} fields differ; what differs from the first row is marked ≠."
    )
    if not lines:
        st.info("The rows do not differ in any field.")
        return
    titles = [name_of(records, number) for number in range(len(records))]
    table = pd.DataFrame([{"field": line.path, **dict(zip(titles, _marked(line.values), strict=True))} for line in lines])
    st.dataframe(
        table.style.map(_tint),
        hide_index=True,
        key="differences",
        placeholder="–",
        alt="Fields of the specs and provenance by dotted path, those that differ first.",
        column_config={"field": st.column_config.TextColumn("Field", pinned=True)}
        | {title: st.column_config.TextColumn(title, help="≠: not as in the first row.") for title in titles},
    )


def _marked(values: Sequence[str | None]) -> list[str]:
    first, *others = values
    texts = ["–" if value is None else value for value in values]
    return [texts[0], *(text if value == first else f"≠ {text}" for text, value in zip(texts[1:], others, strict=True))]


def _tint(cell: object) -> str:
    """Colour that repeats what the text says, never says it alone."""
    text = str(cell)
    colour = {"▲": _BETTER, "▼": _WORSE}.get(next((mark for mark in "▲▼" if f" {mark} " in text), ""), "")
    colour = _CHANGED if text.startswith("≠ ") else colour
    return f"background-color: {colour}" if colour else ""


def _help(title: str, records: Sequence[CaseRecord]) -> str:
    if " / " in title and title.split(" / ")[0].isdigit():
        return "Ratio to the first row, its 95 % interval, and what it shows."
    number = int(title.split(":")[0]) - 1
    return "Value with its 95 % interval. *: flagged." + (" Host-bound." if is_host_bound(records[number]) else "")


page()
