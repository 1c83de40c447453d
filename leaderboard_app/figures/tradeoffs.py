"""Two metrics against each other with the Pareto front and iso-efficiency lines, and the roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from effbench.analysis.pareto import Efficiency, Floats
from effbench.analysis.roofline import Roof
from effbench.analysis.table import scale
from leaderboard_app.figures.style import PALETTE, label

MAX_POINTS = 5_000  # of a figure, its lines included
MAX_ROWS = 2_400  # drawn twice where all of them are on a front: as marks and as its line
MAX_BARS = 300  # rows with error bars; of more only those on the front have them
MAX_ROOFS = 12
_LINE_POINTS, _MOST_LINES, _MOST_NAMED = 40, 5, 10
_GREY, _FAINT = "#808080", "rgba(128,128,128,0.55)"
_STEPS = (1.25, 1.5, 2, 5, 10, 100, 1000)  # between neighbouring iso-efficiency lines


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis: the metric's column, what its values are multiplied with, the title with unit, and the better side."""

    name: str
    factor: float
    title: str
    better: str  # "lower" or "higher"
    log: bool = False

    def of(self, rows: pd.DataFrame, part: str = "") -> Floats:
        """The values, or their part "__lower" or "__upper", as drawn."""
        values: Floats = rows[f"{self.name}{part}"].to_numpy(np.float64) * self.factor
        return values


def thin(points: pd.DataFrame, x: str, y: str, most: int = MAX_ROWS) -> pd.DataFrame:
    """At most `most` rows, in the order given: the front first, then the extremes of both metrics, then those that may be on
    the front, then the others. Within each, which rows stay depends on their run_id alone, so it is the same every time."""
    if len(points) <= most:
        return points
    turn = np.full(len(points), 3)
    turn[points["maybe"].to_numpy(bool)] = 2
    for name in (x, y):
        values = points[name].to_numpy(float)
        turn[[values.argmin(), values.argmax()]] = 1
    turn[points["front"].to_numpy(bool)] = 0
    drawn = pd.util.hash_array(points.index.to_numpy(object), categorize=False)
    return points.iloc[np.sort(np.lexsort((drawn, turn))[:most])]


def trade_off(
    points: pd.DataFrame,
    x: Axis,
    y: Axis,
    colour_of: Mapping[str, str],
    together: Efficiency | None = None,
    *,
    error_bars: bool = True,
) -> go.Figure:
    """Rows of `analysis.pareto.trade_off`, at most MAX_ROWS (see `thin`): filled where they may be on the front, hollow where
    another row is shown to beat them; a stair through the front of each group; `together` draws iso-efficiency lines."""
    assert len(points) <= MAX_ROWS, "thin the rows first"
    figure = go.Figure()
    if together is not None:
        _iso_lines(figure, x.of(points), y.of(points), x, y, together)
    fronts = points[points["front"].to_numpy(bool)]
    for _, stair in fronts.groupby("group"):
        ordered = stair.sort_values([x.name, y.name])
        figure.add_scatter(
            x=x.of(ordered), y=y.of(ordered), mode="lines", hoverinfo="skip", showlegend=False, name="front",
            line={"color": _GREY, "width": 1.5, "shape": "hv" if x.better == "lower" else "vh"},
        )  # fmt: skip
    barred = fronts.index if len(points) > MAX_BARS else points.index
    for name, rows in _kinds(points):
        bars = rows.index.isin(barred[:MAX_BARS]) & error_bars
        figure.add_scatter(
            **_marks(rows, x, y, colour_of), name=name, error_x=_bars(rows, x, bars), error_y=_bars(rows, y, bars)
        )
    for axis, update in ((x, figure.update_xaxes), (y, figure.update_yaxes)):
        log = axis.log and len(points) > 0 and bool((points[axis.name] > 0).all())  # a logarithm has no place for zero
        update(title=escape(f"{axis.title} · {axis.better} is better"), type="log" if log else "linear")
    return _dressed(figure)


def _kinds(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each stack with its name for the legend; all together where a legend would be too long."""
    names = list(rows["label"].value_counts().index)
    if len(names) > _MOST_NAMED:
        return [("rows", rows)]
    return [(label(name), rows[rows["label"] == name]) for name in names]


def _marks(rows: pd.DataFrame, x: Axis, y: Axis, colour_of: Mapping[str, str]) -> dict[str, Any]:
    said = np.where(rows["front"], "on the front", np.where(rows["maybe"], "may be on the front", "shown to be beaten"))
    where = [label(*parts) for parts in rows[["label", "protocol"]].astype(str).itertuples(index=False)]
    return {
        "x": x.of(rows),
        "y": y.of(rows),
        "mode": "markers",
        "marker": {
            "color": [colour_of.get(stack, PALETTE[0]) for stack in rows["label"]],
            "size": np.where(rows["front"], 12, 8).tolist(),
            "symbol": np.where(rows["maybe"], "circle", "circle-open").tolist(),
            "line": {"width": 1, "color": _GREY},
        },
        "customdata": list(zip(rows.index, where, said, _range(rows, x), _range(rows, y), strict=True)),
        "hovertemplate": "%{customdata[1]}<br>%{customdata[2]}<br>x: %{customdata[3]}<br>y: %{customdata[4]}<extra></extra>",
    }


def _range(rows: pd.DataFrame, axis: Axis) -> list[str]:
    parts = [axis.of(rows, part) for part in ("", "__lower", "__upper")]
    return [f"{value:.4g} ({low:.4g} – {high:.4g})" for value, low, high in zip(*parts, strict=True)]


def _bars(rows: pd.DataFrame, axis: Axis, shown: Any) -> dict[str, Any]:
    """95 % intervals of the rows that are `shown`, no bar for the others."""
    value, low, high = (axis.of(rows, part) for part in ("", "__lower", "__upper"))
    return {
        "type": "data", "symmetric": False, "thickness": 1, "width": 2, "color": _GREY, "visible": bool(shown.any()),
        "array": np.where(shown, high - value, 0.0), "arrayminus": np.where(shown, value - low, 0.0),
    }  # fmt: skip


def _iso_lines(figure: go.Figure, xs: Floats, ys: Floats, x: Axis, y: Axis, together: Efficiency) -> None:
    positive = (xs > 0) & (ys > 0)
    if not positive.any():
        return
    xs, ys = xs[positive], ys[positive]
    reached = {"x*y": xs * ys, "y/x": ys / xs, "x/y": xs / ys}[together.kind]
    own = {"x*y": x.factor * y.factor, "y/x": y.factor / x.factor, "x/y": x.factor / y.factor}[together.kind]
    at = np.geomspace(xs.min() / 1.3, xs.max() * 1.3, _LINE_POINTS)
    for level, text in levels(reached, own, together):
        line = {"x*y": level / at, "y/x": level * at, "x/y": at / level}[together.kind]
        inside = (line >= ys.min() / 1.3) & (line <= ys.max() * 1.3)
        if inside.sum() > 1:
            figure.add_scatter(
                x=at[inside], y=line[inside], mode="lines+text", text=[*[""] * (int(inside.sum()) - 1), escape(text)],
                textposition="top left", textfont={"size": 11, "color": _GREY}, line={"color": _FAINT, "width": 1, "dash": "dot"},
                hoverinfo="skip", showlegend=False, name="iso-efficiency", cliponaxis=False,
            )  # fmt: skip


def levels(reached: Floats, own: float, together: Efficiency) -> list[tuple[float, str]]:
    """At most five values for the lines, best first, a round factor apart, with their texts; `own` is what the combination
    of the metrics' own units was multiplied with. Without a unit they are said as shares of the best."""
    lower = together.better == "lower"
    low, high = float(reached.min()), float(reached.max())
    spread = high / low
    step = next((step for step in _STEPS if step ** (_MOST_LINES - 1) >= spread), 1e4)
    count = min(_MOST_LINES, 1 + int(np.ceil(np.log(spread) / np.log(step) - 1e-9)))
    found = [low * step**k if lower else high / step**k for k in range(count)]
    if not together.unit:
        return [(level, "best" if k == 0 else f"best {'×' if lower else '/'} {step**k:.3g}") for k, level in enumerate(found)]
    factor, unit = scale([level / own for level in found], together.unit)
    return [(level, f"{level / own * factor:.3g} {unit}") for level in found]


def roofline(points: pd.DataFrame, roofs: Sequence[Roof], colour_of: Mapping[str, str]) -> go.Figure:
    """Rows of `analysis.roofline.points` below their roofs, FLOP/s against FLOP/B, both logarithmic; at most MAX_ROWS rows and
    MAX_ROOFS roofs. A roof by the rates measured on the device is solid or dashed, one by its datasheet is dotted."""
    rows = points.head(MAX_ROWS)
    figure = go.Figure()
    ends = [*(roof.ridge for roof in roofs), *rows["intensity"]]
    low, high = (min(ends) / 4, max(ends) * 4) if ends else (0.1, 1000.0)
    dtypes = list(dict.fromkeys(roof.dtype for roof in roofs))
    for roof in roofs[:MAX_ROOFS]:
        at = np.array([low, roof.ridge, high])
        dash = ("solid", "dash", "dashdot", "longdash")[dtypes.index(roof.dtype) % 4] if roof.measured else "dot"
        name = f"{label(roof.dtype)}, {'measured' if roof.measured else 'datasheet'}"
        rates = f"{roof.flops_per_s / 1e12:.4g} TFLOP/s, {roof.bytes_per_s / 1e9:.4g} GB/s"
        figure.add_scatter(
            x=at, y=roof.at(at), mode="lines", name=name, line={"color": _GREY, "width": 2 if roof.measured else 1, "dash": dash},
            hovertemplate=f"{name}: {rates}<extra></extra>",
        )  # fmt: skip
    for name, kind in _kinds(rows):
        where = [label(*parts) for parts in kind[["label", "protocol", "dtype"]].astype(str).itertuples(index=False)]
        figure.add_scatter(
            x=kind["intensity"], y=kind["flops_per_s"], mode="markers", name=name,
            marker={"size": 9, "color": [colour_of.get(stack, PALETTE[0]) for stack in kind["label"]],
                    "line": {"width": 1, "color": _GREY}},
            customdata=list(zip(kind.index, where, kind["attained"], strict=True)),
            hovertemplate="%{customdata[1]}<br>%{x:.4s}FLOP/B<br>%{y:.4s}FLOP/s<br>%{customdata[2]:.1%} of the roof<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title="arithmetic intensity (FLOP/B)", type="log")
    figure.update_yaxes(title="FLOP/s", type="log", exponentformat="SI")
    return _dressed(figure)


def _dressed(figure: go.Figure) -> go.Figure:
    figure.update_xaxes(automargin=True, zeroline=False)
    figure.update_yaxes(automargin=True, zeroline=False)
    figure.update_layout(
        height=560, showlegend=True, hovermode="closest", margin={"l": 0, "r": 10, "t": 30, "b": 40},
        legend={"orientation": "h", "y": -0.18}, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
    )  # fmt: skip
    return figure
