"""The ranking as bars."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import pandas as pd
import plotly.graph_objects as go

from leaderboard_app.figures.style import PALETTE, label

MAX_BARS = 60
_BAR_PX = 28
_GROUP = ["hardware", "model", "setting"]


def ranking_bars(frame: pd.DataFrame, value: str, title: str, colour_of: Mapping[str, str]) -> go.Figure:
    """Horizontal bars of `frame[value]` with the interval from `lower` to `upper`, in the order given, at most MAX_BARS.

    Needs the columns of `ranking_table.ranking_frame`; rows of one machine, model and setting stand together below its name.
    `title` names the metric with its unit. Screening rows are hatched."""
    rows = frame.head(MAX_BARS)
    groups = [tuple(str(part) for part in key) for key in rows[_GROUP].itertuples(index=False)]
    several = len(set(groups)) > 1
    places: list[float] = []
    headers: dict[float, str] = {}
    for index, group in enumerate(groups):
        below = places[-1] + 1 if places else 0.0
        if several and (index == 0 or group != groups[index - 1]):
            headers[below] = label(*group)
            below += 1
        places.append(below)
    hover = [label(*group, stack) for group, stack in zip(groups, rows["techniques"], strict=True)]
    figure = go.Figure(
        go.Bar(
            x=rows[value],
            y=places,
            orientation="h",
            width=0.65,
            marker={
                "color": [colour_of.get(stack, PALETTE[0]) for stack in rows["techniques"]],
                "pattern": {
                    "shape": ["/" if screening else "" for screening in rows["screening"]],
                    "fillmode": "overlay",
                    "fgcolor": "rgba(255,255,255,0.6)",
                    "size": 6,
                }
                if rows["screening"].any()
                else None,
            },
            error_x={
                "type": "data",
                "symmetric": False,
                "array": rows["upper"] - rows[value],
                "arrayminus": rows[value] - rows["lower"],
                "thickness": 1.5,
                "color": "#808080",
            },
            customdata=list(zip(rows.index, hover, rows["place"], rows["shown"], rows["n"], strict=True)),
            hovertemplate="%{customdata[1]}<br>rank %{customdata[2]}<br>%{customdata[3]}, %{customdata[4]} blocks<extra></extra>",
        )
    )
    last = places[-1] if places else 0.0
    figure.update_layout(
        height=round(80 + _BAR_PX * (last + 1)),
        margin={"l": 0, "r": 10, "t": 30, "b": 40},
        showlegend=False,
        annotations=[  # all at once: plotly checks all of them again for each that is added
            {"x": 0, "xref": "paper", "y": place + 0.1, "text": f"<b>{text}</b>", "showarrow": False, "xanchor": "left"}
            for place, text in headers.items()
        ],
        xaxis={"title": {"text": escape(title)}, "rangemode": "tozero", "automargin": True},
        yaxis={
            "tickvals": places,
            "ticktext": [label(stack) for stack in rows["techniques"]],
            "range": [last + 0.6, -0.6],
            "automargin": True,
            "showgrid": False,
            "zeroline": False,
        },
    )
    return figure
