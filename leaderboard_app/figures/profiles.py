"""A few rows in many metrics at once: parallel coordinates and a radar, normalised as EfficientLLM does it.

    0.1 + 0.9 · (x − worst) / (best − worst)      worst and best of the rows that are shown (`analysis.paper_view`)

The scale is relative: another choice of rows moves every point, and distances between metrics mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from effbench.analysis.paper_view import FLOOR, normalised
from effbench.analysis.rank import has_sources
from effbench.metrics import metric
from leaderboard_app.figures.style import PALETTE, label

MAX_ROWS = 8
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid", "dash")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "triangle-down")


def scores(frame: pd.DataFrame, names: Sequence[str]) -> tuple[pd.DataFrame, dict[str, str]]:
    """The normalised values of each metric (columns) for the rows of `frame`; and the metrics left out, with the reason:
    fewer than two rows have a usable value, or their sensors differ. A row without a usable value has NaN."""
    columns: dict[str, pd.Series] = {}
    left_out: dict[str, str] = {}
    for name in names:
        usable = (frame[f"{name}__why"] == "").to_numpy(bool)
        if usable.sum() < 2:
            left_out[name] = "fewer than two rows have a usable value"
        elif has_sources(metric(name)) and frame.loc[usable, f"{name}__source"].nunique() > 1:
            left_out[name] = "the rows' values come from different sources"
        else:
            columns[name] = normalised(frame[name].where(usable), lower=metric(name).better == "lower")
    return pd.DataFrame(columns, index=frame.index), left_out


def parallel(
    table: pd.DataFrame, names_of: Mapping[str, str], headings: Mapping[str, str], ends: Mapping[str, tuple[str, str]]
) -> go.Figure:
    """One line a row of `scores` over its metrics. `names_of` maps run_id to what the row is called, `headings` a metric to
    its title, `ends` a metric to the raw values of the worst and best row, written below and above its axis."""
    rows = table.head(MAX_ROWS)
    ticks = [label(headings[name]) for name in rows.columns]
    figure = go.Figure()
    for index, (run_id, line) in enumerate(rows.iterrows()):
        figure.add_scatter(x=list(range(len(ticks))), y=line.tolist(), **_row(index, str(run_id), names_of), customdata=ticks,
                           hovertemplate="%{fullData.name}<br>%{customdata}: %{y:.3f}<extra></extra>", connectgaps=False)  # fmt: skip
    for place, name in enumerate(rows.columns):
        worst, best = ends[name]
        figure.add_vline(x=place, line={"color": "rgba(128,128,128,0.4)", "width": 1}, layer="below")
        for at, text, anchor in ((FLOOR, worst, "top"), (1.0, best, "bottom")):
            figure.add_annotation(x=place, y=at, text=label(text), showarrow=False, yanchor=anchor, font={"size": 11})
    figure.update_xaxes(tickvals=list(range(len(ticks))), ticktext=ticks, automargin=True, showgrid=False, zeroline=False)
    figure.update_yaxes(range=[0, 1.1], tickvals=[FLOOR, 1], ticktext=["worst", "best"], showgrid=False, zeroline=False)
    return _dressed(figure)


def radar(table: pd.DataFrame, names_of: Mapping[str, str], headings: Mapping[str, str]) -> go.Figure:
    """One closed polygon a row of `scores`, over the metrics that all rows have."""
    rows = table.head(MAX_ROWS)
    rows = rows[[name for name in rows.columns if rows[name].notna().all()]]
    around = [label(headings[name]) for name in rows.columns]
    figure = go.Figure()
    for index, (run_id, line) in enumerate(rows.iterrows()):
        figure.add_scatterpolar(r=[*line, *line[:1]], theta=[*around, *around[:1]], **_row(index, str(run_id), names_of),
                                hovertemplate="%{fullData.name}<br>%{theta}: %{r:.3f}<extra></extra>")  # fmt: skip
    grid = {"gridcolor": "rgba(128,128,128,0.35)", "linecolor": "rgba(128,128,128,0.35)"}
    figure.update_layout(
        polar={"bgcolor": "rgba(0,0,0,0)", "radialaxis": {"range": [0, 1], "tickvals": [FLOOR, 0.5, 1], **grid},
               "angularaxis": grid},
    )  # fmt: skip
    return _dressed(figure)


def _row(index: int, run_id: str, names_of: Mapping[str, str]) -> dict[str, Any]:
    """Colour, dash and marker of a row by its place: rows of one stack would have one colour, and must be told apart here."""
    place = index % MAX_ROWS
    return {
        "name": label(names_of.get(run_id, run_id)),
        "mode": "lines+markers",
        "line": {"color": PALETTE[place % len(PALETTE)], "dash": _DASHES[place], "width": 2},
        "marker": {"symbol": _SYMBOLS[place], "size": 8},
    }


def _dressed(figure: go.Figure) -> go.Figure:
    figure.update_layout(
        height=520, showlegend=True, margin={"l": 40, "r": 40, "t": 40, "b": 40}, legend={"orientation": "h", "y": -0.15},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
    )  # fmt: skip
    return figure
