"""Traces of a row's launches: sensors and step times over the launch's time, with what was warm-up shaded."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go

from effbench.analysis.table import scale
from leaderboard_app.figures.style import PALETTE, label

MAX_POINTS = 5_000  # of one figure
MAX_LINES = 60  # of one figure; more cannot be told apart
WARM_UP, STEP = "warm_up_step", "step"
_TIME_TITLE = "time since the window began (s)"
_DASHES = {"p50": "solid", "p95": "dash", "p99": "dot"}
_GREY = "#808080"


def keep_peaks(values: npt.NDArray[np.float64], most: int) -> npt.NDArray[np.intp]:
    """Indices, ascending, of at most `most` of the values, shape (N,): the least and the greatest of each of most / 2 equal
    stretches, so that no peak is lost. All finite values where they are few enough; what is not finite is left out.

    Raises ValueError when `most` is below 2."""
    if most < 2:
        raise ValueError(f"a line of {most} points shows no peaks")
    finite = np.flatnonzero(np.isfinite(values))
    if len(finite) <= most:
        return finite
    edges = np.linspace(0, len(finite), most // 2 + 1).astype(np.intp)
    kept = [finite[a:b][[np.argmin(values[finite[a:b]]), np.argmax(values[finite[a:b]])]] for a, b in pairwise(edges)]
    return np.unique(np.concatenate(kept))


def sensor_lines(frame: pd.DataFrame, title: str, warm_up_s: float = 0.0, window_s: float | None = None) -> go.Figure:
    """Lines of every series and launch of `frame`, which has the columns of `launches.trace_frame` and one unit.

    A series has one colour; a baseline's launch is dotted. Warm-up is shaded from -`warm_up_s` to 0, the window ends at `window_s`."""
    figure = go.Figure()
    factor, unit = scale(frame["value"], str(frame["unit"].iloc[0])) if len(frame) else (1.0, "")
    groups = list(frame.groupby(["series", "launch"], sort=False))[:MAX_LINES] if len(frame) else []
    names = list(dict.fromkeys(series for (series, _), _ in groups))
    shown = 0
    for (series, launch), samples in groups:
        values = samples["value"].to_numpy(np.float64)
        kept = keep_peaks(values, MAX_POINTS // len(groups))
        shown += len(kept)
        first = not any(trace.legendgroup == series for trace in figure.data)
        figure.add_scatter(
            x=samples["since_s"].to_numpy()[kept],
            y=values[kept] * factor,
            mode="lines" if len(kept) > 2 else "lines+markers",
            line={
                "color": PALETTE[names.index(series) % len(PALETTE)],
                "width": 1.2,
                "dash": "dot" if samples["side"].iloc[0] == "baseline" else "solid",
            },
            name=label(str(series)),
            legendgroup=series,
            showlegend=first,
            hovertemplate=f"{label(str(series), str(launch))}<br>%{{x:.3f}} s: %{{y:.5g}} {escape(unit)}<extra></extra>",
        )
    _shade(figure, warm_up_s, window_s)
    return _laid_out(figure, f"{title} ({unit})" if unit else title, len(frame), shown)


def step_times(
    frame: pd.DataFrame, percentiles: Mapping[str, float], warm_up_s: float = 0.0, window_s: float | None = None
) -> go.Figure:
    """Each step of `frame` (series `warm_up_step` and `step`, value in s) as a point at its start.

    `percentiles` are horizontal lines by name (p50, p95, p99), in s. A launch has one colour; warm-up steps are hollow."""
    figure = go.Figure()
    steps = frame[frame["series"].isin((WARM_UP, STEP))]
    factor, unit = scale(steps["value"], "s")
    groups = list(steps.groupby(["launch", "series"], sort=False))[:MAX_LINES]
    names = list(dict.fromkeys(launch for (launch, _), _ in groups))
    shown = 0
    for (launch, series), samples in groups:
        values = samples["value"].to_numpy(np.float64)
        kept = keep_peaks(values, MAX_POINTS // len(groups))
        shown += len(kept)
        colour = PALETTE[names.index(launch) % len(PALETTE)]
        what = "warm-up step" if series == WARM_UP else "step"
        figure.add_scatter(
            x=samples["since_s"].to_numpy()[kept],
            y=values[kept] * factor,
            mode="markers",
            marker={
                "color": colour,
                "size": 6,
                "symbol": "square" if samples["side"].iloc[0] == "baseline" else "circle",
                "line": {"color": colour, "width": 1},
            }
            | ({"symbol": "circle-open"} if series == WARM_UP else {}),
            name=label(str(launch)),
            legendgroup=launch,
            showlegend=series == STEP,
            hovertemplate=f"{label(str(launch))}, {what}<br>%{{x:.3f}} s: %{{y:.5g}} {unit}<extra></extra>",
        )
    for name, value_s in percentiles.items():
        figure.add_hline(
            y=value_s * factor,
            line={"color": _GREY, "width": 1, "dash": _DASHES.get(name, "solid")},
            annotation={"text": f"{escape(name)} {value_s * factor:.4g} {unit}", "font": {"size": 11}},
            annotation_position="top right",
        )
    _shade(figure, warm_up_s, window_s)
    return _laid_out(figure, f"step time ({unit})", len(steps), shown)


def points_note(figure: go.Figure) -> str:
    """What the figure's caption must say of points that it leaves out; empty where it shows all."""
    given, shown = (figure.layout.meta or {}).get("points", (0, 0))
    if shown == given:
        return ""
    return (
        f"{shown:,} of {given:,} points are drawn: of each short stretch of a line the least and the greatest, so that no peak is "
        f"lost, and at most {MAX_LINES} lines. The downloads have all."
    )


def _shade(figure: go.Figure, warm_up_s: float, window_s: float | None) -> None:
    if warm_up_s > 0:
        figure.add_vrect(
            x0=-warm_up_s,
            x1=0,
            fillcolor=_GREY,
            opacity=0.15,
            line_width=0,
            annotation_text="warm-up",
            annotation_position="top left",
        )
    if window_s is not None:
        figure.add_vline(
            x=window_s, line={"color": _GREY, "dash": "dot"}, annotation_text="window ends", annotation_position="bottom left"
        )


def _laid_out(figure: go.Figure, title: str, given: int, shown: int) -> go.Figure:
    figure.update_layout(
        height=340,
        margin={"l": 0, "r": 10, "t": 20, "b": 40},
        meta={"points": (given, shown)},
        legend={"orientation": "h", "y": -0.2},
        xaxis={"title": {"text": _TIME_TITLE}},
        yaxis={"title": {"text": escape(title)}, "automargin": True, "rangemode": "tozero"},
    )
    return figure
