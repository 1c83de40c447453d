"""Taking rows and figures home: files made when a button is clicked, never before.

    run ids ── index.records, a thousand at a time ──┬── csv_bytes       one line a row, neutral in a spreadsheet
                                                     └── parquet_bytes   the raw schema; a results folder takes the file as it is
    figure ──┬── html_bytes       one page with plotly.js in it, for any browser without a network
             └── figure_config    PNG or SVG by the button in the figure's own bar: drawn by the browser, so no other program

A server makes a file in the thread of the click. A table of more rows than MAX_ROWS is cut, and the page says so.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import streamlit as st

from effbench.rows import metric_row, provenance_row, record_fields, storable
from effbench.schema import SCHEMA_VERSION, CaseRecord, arrow_schemas
from effbench.store import TABLE_KEY, VERSION_KEY
from leaderboard_app import data

MAX_ROWS = 5_000  # of one file: with all their metrics about 25 MB of CSV
CHUNK_ROWS = 1_000  # records held at a time
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
ImageFormat = Literal["png", "svg"]
Records = Callable[[Sequence[str]], Sequence[CaseRecord]]


def table_downloads(key: str, rows: pd.DataFrame | Sequence[Hashable], name: str = "effbench") -> None:
    """Two buttons: the rows of a table with all their raw fields, as CSV and as parquet.

    `rows` are run ids, or a frame that has them as its index; `name` is the file's name without its ending."""
    ids = rows.index if isinstance(rows, pd.DataFrame) else rows
    count = len(ids)
    if not count:
        return
    read = data.index().records
    with st.container(horizontal=True, vertical_alignment="center"):
        for kind, make, mime in (("CSV", csv_bytes, "text/csv"), ("parquet", parquet_bytes, "application/vnd.apache.parquet")):
            st.download_button(
                f"Rows as {kind}",
                data=partial(_made, make, read, ids[:MAX_ROWS]),
                file_name=f"{file_name(name)}.{kind.lower()}",
                mime=mime,
                key=f"{key}_{kind.lower()}",
                on_click="ignore",
                icon=":material/download:",
                help=_HELP[kind],
            )
        if count > MAX_ROWS:
            st.caption(
                f"A file holds the first {MAX_ROWS:,} of {count:,} rows. Filters make them fewer; `effbench export` writes all."
            )


def frame_downloads(key: str, frame: pd.DataFrame, name: str) -> None:
    """Two buttons for a table whose lines are no rows of results: what it shows, as CSV and as parquet. The index is left out."""
    with st.container(horizontal=True):
        for kind, make, mime in (("CSV", frame_csv, "text/csv"), ("parquet", frame_parquet, "application/vnd.apache.parquet")):
            st.download_button(
                f"Table as {kind}", data=partial(make, frame), file_name=f"{file_name(name)}.{kind.lower()}", mime=mime,
                key=f"{key}_{kind.lower()}", on_click="ignore", icon=":material/download:",
            )  # fmt: skip


_HELP = {
    "CSV": "One line a row, with every field and metric. A text that a spreadsheet would run as a formula gets an apostrophe.",
    "parquet": "The rows as they are stored. In the folder `runs` of a results directory the file is read like any other.",
}


def _made(make: Callable[[Iterable[CaseRecord]], bytes], read: Records, ids: Sequence[Hashable]) -> bytes:
    return make(_in_chunks(read, ids))


def _in_chunks(read: Records, ids: Sequence[Hashable]) -> Iterator[CaseRecord]:
    for start in range(0, len(ids), CHUNK_ROWS):
        yield from read([str(run_id) for run_id in ids[start : start + CHUNK_ROWS]])


def csv_bytes(records: Iterable[CaseRecord]) -> bytes:
    """UTF-8 CSV, one line a record: every field, `provenance.*`, and for each metric M the columns M, M__lower, M__upper, M__n,
    M__ratio, M__ratio_lower, M__ratio_upper, M__unit, M__source, M__valid and M__reasons (names as in the app's frames).

    Missing is an empty cell and an empty text is "". `spec` and other nested values are JSON, lists are joined by "+" or " "."""
    parts = [pa.Table.from_pylist(lines) for lines in _flat_chunks(records)]
    return _csv(
        pa.concat_tables(parts, promote_options="permissive") if parts else pa.table({"run_id": pa.array([], pa.string())})
    )


def frame_csv(frame: pd.DataFrame) -> bytes:
    """The columns of a frame as UTF-8 CSV, neutral in a spreadsheet."""
    return _csv(pa.Table.from_pandas(frame, preserve_index=False))


def frame_parquet(frame: pd.DataFrame) -> bytes:
    """The columns of a frame as a parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), sink)
    return bytes(sink.getvalue())


def _csv(table: pa.Table) -> bytes:
    columns = [_neutral_column(column) for column in table.columns]
    table = pa.Table.from_arrays(columns, names=[neutral(name) for name in table.column_names])
    sink = pa.BufferOutputStream()
    pyarrow.csv.write_csv(table, sink)
    return bytes(sink.getvalue())


def _flat_chunks(records: Iterable[CaseRecord]) -> Iterator[list[dict[str, Any]]]:
    """Flat records, CHUNK_ROWS at a time, each chunk with the same keys in all of its lines."""
    lines: list[dict[str, Any]] = []
    for record in records:
        lines.append(_flat(record))
        if len(lines) == CHUNK_ROWS:
            yield _even(lines)
            lines = []
    if lines:
        yield _even(lines)


def _even(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arrow takes the columns of a list from its first line, so that one gets every key."""
    keys = dict.fromkeys(key for line in lines for key in line)
    return [dict.fromkeys(keys) | lines[0], *lines[1:]]


def _flat(record: CaseRecord) -> dict[str, Any]:
    own = {name: value for name, value in record_fields(record).items() if name not in ("provenance", "metrics")}
    line: dict[str, Any] = {name: " ".join(value) if isinstance(value, tuple) else value for name, value in own.items()}
    line["techniques"] = "+".join(record.techniques)
    line |= {f"provenance.{name}": value for name, value in provenance_row(record.provenance).items()}
    for metric in record.metrics:
        row = metric_row(metric)
        name = str(row.pop("name"))
        if name in line:  # a plugin's, named like a field of the record
            name = f"metric.{name}"
        line[name] = row.pop("value")
        line |= {f"{name}__{part}": " ".join(value) if part == "reasons" else value for part, value in row.items()}
    flat: dict[str, Any] = storable(line)
    return flat


def neutral(text: str) -> str:
    """A text as a spreadsheet shows it instead of running it: with an apostrophe before what starts a formula."""
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text


def _neutral_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers and flags stay what they are; a text is made neutral."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        texts = [None if text is None else neutral(text) for text in column.to_pylist()]
        return pa.chunked_array([pa.array(texts, pa.string())])
    return column


def parquet_bytes(records: Iterable[CaseRecord]) -> bytes:
    """The records as one file of the table `runs`, with its schema and marks: `Store` reads it in a folder `runs`."""
    marks = {VERSION_KEY: str(SCHEMA_VERSION).encode(), TABLE_KEY: b"runs"}
    schema = arrow_schemas()["runs"].with_metadata(marks)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
        rows: list[dict[str, Any]] = []
        for record in records:
            rows.append(_raw(record))
            if len(rows) == CHUNK_ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows = []
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return bytes(sink.getvalue())


def _raw(record: CaseRecord) -> dict[str, Any]:
    nested = {"provenance": provenance_row(record.provenance), "metrics": [metric_row(metric) for metric in record.metrics]}
    row: dict[str, Any] = storable(record_fields(record) | nested)
    return row


def chart(key: str, figure: go.Figure, name: str, alt: str, **options: Any) -> Any:
    """A figure with its downloads below it; returns what `st.plotly_chart` returns. `alt` says what it shows to who cannot see it.

    `options` go to `st.plotly_chart`."""
    place = st.container()
    config = figure_downloads(f"{key}_figure", figure, name)
    return place.plotly_chart(figure, key=key, alt=alt, config=config, **options)


def figure_downloads(key: str, figure: go.Figure, name: str) -> dict[str, Any]:
    """The button for HTML and the choice of the picture's format. Returns the config that the figure must be drawn with, so
    call it before `st.plotly_chart`, which then goes into a container above (`chart` does both)."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.download_button(
            "Figure as HTML",
            data=partial(html_bytes, figure, name),
            file_name=f"{file_name(name)}.html",
            mime="text/html",
            key=f"{key}_html",
            on_click="ignore",
            icon=":material/download:",
            help="One file of about 5 MB that any browser opens without a network.",
        )
        chosen = st.segmented_control(
            "Picture format of the camera button",
            ["png", "svg"],
            default="png",
            required=True,
            key=f"{key}_format",
            bind="query-params",
            label_visibility="collapsed",
            help="The camera in the figure's bar saves a picture in this format.",
        )
        st.caption("The camera in the figure's bar saves the picture.")
    return figure_config(name, "svg" if chosen == "svg" else "png")


def figure_config(name: str, image: ImageFormat = "png") -> dict[str, Any]:
    """Plotly's config: the bar is always there (a keyboard or a finger cannot hover), its camera saves `image` at twice the size."""
    picture = {"format": image, "filename": file_name(name), "scale": 2}
    return {"displaylogo": False, "displayModeBar": True, "toImageButtonOptions": picture}


def html_bytes(figure: go.Figure, name: str) -> bytes:
    """The figure as a page of its own with plotly.js in it; nothing is loaded from anywhere."""
    page = io.StringIO()
    figure.write_html(page, include_plotlyjs=True, full_html=True, config=figure_config(name))
    return page.getvalue().encode("utf-8", "backslashreplace")


def file_name(name: str) -> str:
    """`name` as a file may be called on any system; a record's text may be part of it."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")[:80] or "effbench"
