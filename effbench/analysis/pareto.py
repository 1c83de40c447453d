"""Which rows are worth choosing when two metrics matter: the Pareto front, and who may be on it.

    front    by the values as they are: no other row is at least as good in both metrics and better in one
    maybe    by the intervals: no other row is SHOWN to be no worse in one metric and better in the other

A row is shown to be no worse when its worst bound is no worse than the other's best bound, and better when it is better
by that bound too; screening rows must be apart by the floor of `stats.verdict`, bound against bound, and smoke rows show
nothing. So `front` is always part of `maybe`, and a row that is in `maybe` alone was measured too coarsely to be ruled out.
Both take O(n log n) for all groups together: a sort, a running minimum and a binary search.

Rows are compared within a group only: one question, for energy and memory the same sensor, for quality the same figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from effbench.analysis.rank import floor_of, has_sources
from effbench.analysis.table import explain
from effbench.metrics import Better, metric

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]
Texts = npt.NDArray[np.object_]


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """What two metrics are together: the product where both have the same direction, else the higher over the lower."""

    kind: Literal["x*y", "y/x", "x/y"]
    better: Literal["lower", "higher"]
    meaning: str
    unit: str  # "" where the combination has no name: then only the ratio between two lines means something


def front(x: Floats, y: Floats, better_x: Better, better_y: Better, groups: Counts | None = None) -> Mask:
    """The rows that no other row of their group beats by the values as they are; equal rows are both on it.

    `x` and `y` have shape (N,); a row without a finite value in both is not on the front. Raises ValueError for a metric
    without direction."""
    a, b = _cost(x, better_x), _cost(y, better_y)
    used = np.flatnonzero(np.isfinite(a) & np.isfinite(b))
    group = np.zeros(len(used), np.int64) if groups is None else np.unique(np.asarray(groups)[used], return_inverse=True)[1]
    a, ranks = a[used], _falling(group, _dense(b[used])[0])
    order = np.lexsort((ranks, a, group))
    first = np.ones(len(used), bool)  # of the rows with this group and x, the one with the best y
    first[1:] = (np.diff(a[order]) != 0) | (np.diff(group[order]) != 0)
    start = np.flatnonzero(first)[np.cumsum(first) - 1]
    best = np.minimum.accumulate(ranks[order])
    before = np.where(start > 0, best[start - 1], np.iinfo(np.int64).max)
    found = np.zeros(len(x), bool)
    found[used[order]] = (ranks[order] == ranks[order][start]) & (ranks[order] < before)
    return found


def maybe(
    x: Floats, y: Floats, better_x: Better, better_y: Better, groups: Counts | None = None, floors: Floats | None = None
) -> Mask:
    """The rows that no other row of their group is shown to beat.

    `x` and `y` have shape (N, 2): lower and upper bound. `floors` is the share by which rows must differ before a difference
    is shown (0: any). A row whose bounds are not known neither beats nor is beaten. Raises ValueError as `front` does."""
    best_x, worst_x = _cost_bounds(x, better_x)
    best_y, worst_y = _cost_bounds(y, better_y)
    number = len(best_x)
    group = np.zeros(number, np.int64) if groups is None else np.asarray(groups)
    floor = np.zeros(number) if floors is None else floors
    known = np.isfinite(best_x) & np.isfinite(worst_x) & np.isfinite(best_y) & np.isfinite(worst_y) & (floor < 1)
    beaten = np.zeros(number, bool)
    for mine in np.unique(floor[known]):
        for other in np.unique(floor[known]):
            asked, given = np.flatnonzero(known & (floor == mine)), np.flatnonzero(known & (floor == other))
            least = max(float(mine), float(other))
            dominators = (group[given], worst_x[given], worst_y[given])
            for better_in_x in (True, False):
                px, py = best_x[asked], best_y[asked]
                px, py = (_apart(px, least), py) if better_in_x else (px, _apart(py, least))
                beaten[asked] |= _exists_below(dominators, (group[asked], px, py), strict=(better_in_x, not better_in_x))
    return ~beaten


def trade_off(frame: pd.DataFrame, x: str, y: str) -> tuple[pd.DataFrame, dict[str, int]]:
    """The rows of a frame of `analysis.frame` that have both metrics, with three columns more: `group` (a number: rows
    with the same can be compared), `front` and `maybe` (bool); and for each reason how many rows were left out.

    Raises ValueError for a metric without direction."""
    by = metric(x), metric(y)
    why = why_left_out(frame, (x, y))
    rows = frame[why == ""].copy()
    rows["group"] = group_codes(rows, ("question", *(f"{row.name}__source" for row in by if has_sources(row))))
    codes = rows["group"].to_numpy()
    better = by[0].better, by[1].better
    rows["front"] = front(rows[x].to_numpy(float), rows[y].to_numpy(float), *better, codes)
    bounds = [rows[[f"{name}__lower", f"{name}__upper"]].to_numpy(float) for name in (x, y)]
    rows["maybe"] = maybe(bounds[0], bounds[1], *better, codes, floors(rows["protocol"]))
    return rows, counted(why)


def why_left_out(frame: pd.DataFrame, names: Iterable[str]) -> Texts:
    """For each row the first reason, in words, why one of these metrics cannot be used; empty where all can. Shape (N,)."""
    found = np.full(len(frame), "", object)
    for name in names:
        why = frame[f"{name}__why"].where(np.isfinite(frame[name]) | (frame[f"{name}__why"] != ""), "missing").to_numpy(object)
        words = {code: f"{metric(name).title}: {explain(code)}" if code else "" for code in set(why)}
        found = np.where(found == "", [words[code] for code in why], found) if len(why) else found
    return found


def counted(reasons: Texts) -> dict[str, int]:
    """How many rows each reason that is not empty keeps out, most first."""
    return {str(reason): int(count) for reason, count in pd.Series(reasons[reasons != ""], dtype=object).value_counts().items()}


def group_codes(frame: pd.DataFrame, columns: Iterable[str]) -> Counts:
    """A number for each row; rows that agree in all of these columns have the same. Shape (N,)."""
    codes = np.zeros(len(frame), np.int64)
    for column in columns:
        found = pd.factorize(frame[column].astype(str), sort=False)[0].astype(np.int64)
        codes = np.unique(codes * (int(found.max(initial=0)) + 1) + found, return_inverse=True)[1].astype(np.int64)
    return codes


def floors(protocols: Iterable[str]) -> Floats:
    """The share by which rows of each protocol must differ before a difference is shown; 1 means never."""
    return np.array([floor_of(str(protocol)) for protocol in protocols], np.float64)


_TOGETHER: dict[frozenset[str], tuple[str, str]] = {
    frozenset({"W", "s"}): ("mean power × time", "J"),
    frozenset({"W", "s/token"}): ("mean power × time per token", "J/token"),
    frozenset({"W", "tokens/s"}): ("tokens per joule: throughput / mean power", "tokens/J"),
    frozenset({"W", "samples/s"}): ("samples per joule: throughput / mean power", "samples/J"),
    frozenset({"B", "s"}): ("memory held × time", "B·s"),
    frozenset({"B", "s/token"}): ("memory held × time per token", "B·s/token"),
    frozenset({"J/token", "s/token"}): ("energy-delay product: energy × time, both per token", "J·s/token²"),
    frozenset({"J/step", "s"}): ("energy-delay product of a step: energy × time", "J·s"),
    frozenset({"B", "tokens/s"}): ("throughput for each byte of memory", "tokens/s/B"),
    frozenset({"B", "samples/s"}): ("throughput for each byte of memory", "samples/s/B"),
    frozenset({"J/token", "tokens/s"}): ("inverse energy-delay product: throughput / energy per token", "tokens²/(J·s)"),
}


def efficiency(x: str, y: str) -> Efficiency | None:
    """What is the same all along an iso-efficiency line of two metrics; None where one has no direction or they are one."""
    first, second = metric(x), metric(y)
    if x == y or "none" in (first.better, second.better):
        return None
    units = frozenset("B" if row.unit == "GB" else row.unit for row in (first, second))
    known, unit = _TOGETHER.get(units, ("", ""))
    unit = unit.replace("B", "GB") if "GB" in (first.unit, second.unit) else unit
    if first.better == second.better:
        meaning = known or f"{first.title} × {second.title}"
        return Efficiency(kind="x*y", better="lower" if first.better == "lower" else "higher", meaning=meaning, unit=unit)
    top, bottom = (second, first) if second.better == "higher" else (first, second)
    meaning = known or f"{top.title} / {bottom.title}"
    return Efficiency(kind="y/x" if top is second else "x/y", better="higher", meaning=meaning, unit=unit)


def _cost(values: Floats, better: Better) -> Floats:
    if better == "none":
        raise ValueError("a metric without a direction has no better side, and so no front")
    return np.asarray(values, np.float64) * (1.0 if better == "lower" else -1.0)


def _cost_bounds(bounds: Floats, better: Better) -> tuple[Floats, Floats]:
    """Best and worst bound, lower is better in both."""
    cost = np.sort(_cost(np.reshape(bounds, (-1, 2)), better), axis=1)
    return cost[:, 0], cost[:, 1]


def _apart(best: Floats, floor: float) -> Floats:
    """What another row's worst bound must be below, to be better by `floor`: 0.9 of a time, 1 / 0.9 of a rate."""
    return np.where(best > 0, best * (1.0 - floor), best / (1.0 - floor)) if floor else best


def _dense(*values: npt.NDArray[Any]) -> list[Counts]:
    """The values as whole numbers in the same order, equal where they are equal."""
    ranks = np.unique(np.concatenate(values), return_inverse=True)[1].astype(np.int64)
    return np.split(ranks, np.cumsum([len(part) for part in values])[:-1])


def _falling(group: Counts, ranks: Counts, size: int | None = None) -> Counts:
    """Ranks moved down from group to group, so that one running minimum over rows sorted by group starts anew in each."""
    size = int(ranks.max(initial=0)) + 1 if size is None else size
    return ranks - group * size


def _exists_below(given: tuple[Counts, Floats, Floats], asked: tuple[Counts, Floats, Floats], strict: Sequence[bool]) -> Mask:
    """For each (group, p, q) of `asked`: whether one of `given` has the same group, p below and q below (or, where not
    `strict`, equal)."""
    group, group_asked = _dense(given[0], asked[0])
    p, p_asked = _dense(given[1], asked[1])
    q, q_asked = _dense(given[2], asked[2])
    if not len(p) or not len(p_asked):
        return np.zeros(len(p_asked), bool)
    size_p, size_q = (int(max(one.max(), other.max())) + 1 for one, other in ((p, p_asked), (q, q_asked)))
    key = group * size_p + p
    order = np.argsort(key)
    least = np.minimum.accumulate(_falling(group, q, size_q)[order])
    end = np.searchsorted(key[order], group_asked * size_p + p_asked, "left" if strict[0] else "right")
    best = least[np.maximum(end - 1, 0)]
    own = _falling(group_asked, q_asked, size_q)
    return (end > 0) & ((best < own) if strict[1] else (best <= own))
