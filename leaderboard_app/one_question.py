"""Rows that all answer one question: choosing it, the metrics they have, and the table that pages show of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st

from effbench.analysis.frame import column
from effbench.analysis.index import ResultIndex
from effbench.analysis.rank import rankable
from effbench.analysis.table import ARROWS, interval_text
from effbench.metrics import metric, table_order
from leaderboard_app.downloads import table_downloads
from leaderboard_app.ranking_table import link_of

MOST_LINES = 200  # of a table
Where = Mapping[str, Sequence[str]]


def one_question(index: ResultIndex) -> Where:
    """The widgets that choose it; rows that all answer the same question."""
    where: dict[str, list[str]] = {}
    places = st.columns([1, 1.3, 1.3, 2.4])
    for place, name in zip(places, ("workload", "hardware", "model"), strict=False):
        where[name] = [str(place.selectbox(name.capitalize(), index.distinct(name, where), key=name, bind="query-params"))]
    chosen = index.select(("model", "question"), where)
    counts = chosen.rows["question"].value_counts()
    sizes = {str(asked): int(count) for asked, count in counts.items() if count}
    options = sorted(sizes, key=lambda asked: (-sizes[asked], chosen.settings.get(asked, ""), asked))
    linked = st.query_params.get("question", "")
    question = places[3].selectbox(
        "Setting",
        options,
        index=options.index(linked) if linked in options else 0,
        format_func=lambda asked: f"{chosen.settings.get(asked) or 'the only one'} · {sizes[asked]} rows · {asked[:8]}",
        key="setting",
        help="Batch, lengths and all else that rows must share to be compared; the setting with most rows comes first.",
    )
    if question == options[0]:
        st.query_params.pop("question", None)
    else:
        st.query_params["question"] = question  # not bound: a bound text would change with the rows that are there
    return where | {"question": [question]}


def usable_metrics(index: ResultIndex, where: Where) -> list[str]:
    """The metrics with a direction that some of these rows have measured, in the order of the metric table."""
    names = [name for name in index.measured(where["workload"][0]) if rankable(metric(name))]
    rows = index.select([column(name, "why") for name in names], where).rows
    return sorted((name for name in names if (rows[column(name, "why")] == "").any()), key=table_order)


def choose_metric(place: Any, title: str, key: str, names: Sequence[str], wanted: Iterable[str]) -> str:
    """A list of metrics, with the first of `wanted` that there is chosen."""
    first = next((name for name in wanted if name in names), names[0])
    chosen = place.selectbox(title, names, index=names.index(first), format_func=titled, key=key, bind="query-params")
    return str(chosen)


def titled(name: str) -> str:
    return f"{metric(name).title} · {ARROWS[metric(name).better]}"


def told_left_out(left_out: Mapping[str, int]) -> None:
    for reason, count in left_out.items():
        st.text(f"{count:,} row{'s' * (count > 1)} left out. {reason}.")


def texts(rows: pd.DataFrame, name: str, factor: float) -> list[str]:
    """Each value with its interval; empty where it cannot be used."""
    numbers = (rows[column(name, part)].to_numpy(float) * factor for part in ("value", "lower", "upper"))
    why = rows[column(name, "why")]
    return ["" if reason else interval_text(*found) for reason, *found in zip(why, *numbers, strict=True)]


def show_table(key: str, rows: pd.DataFrame, lines: Mapping[str, Any], titles: Mapping[str, str], name: str) -> None:
    """The first MOST_LINES rows, each with a link to its record, and the downloads of all of them."""
    table = pd.DataFrame({**lines, "protocol": rows["protocol"]}, index=rows.index).head(MOST_LINES)
    table["link"] = [link_of(str(run_id)) for run_id in table.index]
    columns = {title: st.column_config.Column(titles.get(title, title.capitalize())) for title in table}
    columns["link"] = st.column_config.LinkColumn("Record", display_text="open", help="The whole record of this row.")
    st.dataframe(table, hide_index=True, column_config=columns, placeholder="–", key=key, alt="The rows of the figure.")
    if len(rows) > MOST_LINES:
        st.caption(f"The table has the first {MOST_LINES} of {len(rows):,} rows; the files below have more.")
    table_downloads(f"{key}_files", rows, name)
