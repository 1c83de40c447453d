"""Rows against the first: a forest of ratios."""

from __future__ import annotations

from html import escape

import pandas as pd
import plotly.graph_objects as go

from leaderboard_app.figures.style import PALETTE, label

MAX_RATIOS = 300  # marks of one figure; more are not told apart
_BAND_PX = 34
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross")


def ratio_forest(frame: pd.DataFrame) -> go.Figure:
    """Ratios to the first row with their 95 % intervals, one line a metric, on a log axis, at most MAX_RATIOS.

    Columns: metric (title), row (label), ratio, lower, upper, verdict. Ratios that are not positive are left out. A filled mark is a
    difference that is shown; each row keeps its colour and its symbol."""
    given = frame[frame["ratio"] > 0]
    rows = given.head(MAX_RATIOS)
    metrics, names = list(dict.fromkeys(rows["metric"])), list(dict.fromkeys(frame["row"]))
    figure = go.Figure()
    for number, name in enumerate(names):
        part = rows[rows["row"] == name]
        if part.empty:
            continue
        shift = (number - (len(names) - 1) / 2) * 0.7 / max(len(names), 1)
        shown = part["verdict"].isin(("better", "worse"))
        colour = PALETTE[number % len(PALETTE)]
        symbol = _SYMBOLS[number % len(_SYMBOLS)]
        figure.add_scatter(
            x=part["ratio"],
            y=[metrics.index(metric) + shift for metric in part["metric"]],
            mode="markers",
            name=label(str(name)),
            marker={
                "color": colour,
                "size": 9,
                "symbol": [symbol if claimed else f"{symbol}-open" for claimed in shown],
                "line": {"color": colour, "width": 1.5},
            },
            error_x={
                "type": "data",
                "symmetric": False,
                "array": (part["upper"] - part["ratio"]).fillna(0),
                "arrayminus": (part["ratio"] - part["lower"]).fillna(0),
                "color": colour,
                "thickness": 1.5,
            },
            customdata=[
                (label(str(metric)), escape(said or "no verdict"), _range(low, high))
                for metric, said, low, high in zip(part["metric"], part["verdict"], part["lower"], part["upper"], strict=True)
            ],
            hovertemplate="%{customdata[0]}<br>×%{x:.4g} %{customdata[2]}<br>%{customdata[1]}<extra>"
            + label(str(name))
            + "</extra>",
        )
    figure.add_vline(x=1, line={"color": "#808080", "width": 1})
    figure.update_layout(
        height=round(110 + _BAND_PX * max(len(metrics), 1)),
        margin={"l": 0, "r": 10, "t": 10, "b": 40},
        meta={"points": (len(given), len(rows))},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        xaxis={"title": {"text": "ratio to the first row; line: 95 % interval"}, "type": "log"},
        yaxis={
            "tickvals": list(range(len(metrics))),
            "ticktext": [label(str(metric)) for metric in metrics],
            "range": [max(len(metrics), 1) - 0.4, -0.6],
            "automargin": True,
            "zeroline": False,
        },
    )
    return figure


def _range(low: float, high: float) -> str:
    return "" if pd.isna(low) or pd.isna(high) else f"({low:.4g} – {high:.4g})"
