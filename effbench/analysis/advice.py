"""What should I use? The rows that meet the limits, by what matters, with what each gives up.

    rows of one question ── limits ──▶ those that meet them ── by one metric ──▶ choices
                                                    └── the best of every metric ──▶ what a choice gives up, as a ratio

Two rows are compared as in `analysis.rank`, by the first of these that applies: the paired ratio to each other where one is
the other's baseline; their paired ratios where both have the same baseline; else their values. The interval of a ratio goes
from bound to opposite bound, so it leaves out 1 exactly where the two intervals do not overlap. A limit is met by the value;
where the interval reaches beyond the limit, that is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from effbench.analysis.board import Bound, first_usable, ranked
from effbench.analysis.compare import ratio_words
from effbench.analysis.frame import column
from effbench.analysis.pareto import Floats, Mask, Texts, counted, floors, why_left_out
from effbench.analysis.rank import has_sources, rankable
from effbench.metrics import metric

BEST, BETTER, WORSE, NOT_SHOWN, NO_VALUE = "best", "better", "worse", "no difference shown", "no value"
MOST = 50  # choices that are held against the best
_VALUES, _RATIOS = ("value", "lower", "upper"), ("ratio", "ratio_lower", "ratio_upper")


@dataclass(frozen=True, kw_only=True)
class Advice:
    """`choices` has the rows in order, best first, with the frame's columns and, for each metric M that was asked for:

        M__against, M__against_lower, M__against_upper   ratio to the best of M among the rows that meet the limits
        M__verdict   "best", "better", "worse", "no difference shown", or "no value" where it cannot be compared
        M__best      run_id of that best

    and `rank` (1 + the number of rows shown to be better in what matters), `shared` (bool: another row has the same) and
    `unsure` (titles of the metrics whose interval reaches beyond their limit)."""

    choices: pd.DataFrame
    num_met: int  # rows that meet the limits; `choices` has at most MOST of them
    left_out: dict[str, int]  # for each reason, how many rows


def advise(frame: pd.DataFrame, by: str, limits: Sequence[Bound] = (), others: Sequence[str] = (), most: int = MOST) -> Advice:
    """Rank the rows of one question (a frame of `analysis.frame`) by `by` among those that meet `limits`, and hold each
    against the best in `by` and in each of `others`. A row that lacks a limited metric does not meet its limit.

    Raises ValueError for a metric that rows are not ranked by, or rows of more than one question."""
    names = list(dict.fromkeys((by, *others)))
    for name in names:
        if not rankable(metric(name)):
            raise ValueError(f"{name} is not a metric that rows are ranked by: no row is better than another in it")
    if frame["question"].nunique() > 1:
        raise ValueError("rows of more than one question cannot be compared")
    why = why_left_out(frame, (by,))
    for limit in limits:
        met, unknown = limit.met(frame)
        why = np.where((why == "") & unknown, f"{title(limit)}: no usable value to hold against the limit", why)
        why = np.where((why == "") & ~met, f"{title(limit)}: beyond the limit", why)
    rows = ranked(frame[why == ""], by)
    choices = rows.head(most).copy()
    choices["unsure"] = _unsure(choices, limits)
    for name in names:
        _give_up(choices, rows, name)
    return Advice(choices=choices, num_met=len(rows), left_out=counted(why))


def against(rows: pd.DataFrame, other: pd.DataFrame, name: str) -> tuple[Floats, Texts]:
    """Each of `rows` against the one row of `other` in one metric: its ratio with lower and upper bound, shape (3, rows), and its verdict.

    A ratio is NaN where a value is missing, not positive, or of another sensor; a verdict needs the bounds alone."""
    mine, theirs = ((frame[[column(name, part) for part in _VALUES]].to_numpy(float).T) for frame in (rows, other))
    my_ratio, their_ratio = ((frame[[column(name, part) for part in _RATIOS]].to_numpy(float).T) for frame in (rows, other))
    (my_case, my_base), (case, base) = _identity(rows), _identity(other)
    paired, is_paired = np.isfinite(my_ratio[1:]).all(axis=0), np.isfinite(their_ratio[1:]).all(axis=0)
    shared = (my_base == base) & (base != "") & paired & is_paired
    to_other, to_mine = (my_base == case) & paired, (my_case == base) & is_paired
    first = np.where(shared | to_other, my_ratio, mine)
    first = np.where(to_mine, 1.0, first)
    second = np.where(shared | to_mine, their_ratio, np.where(to_other, 1.0, theirs))
    comparable = (rows[column(name, "why")] == "").to_numpy() & (other[column(name, "why")] == "").to_numpy()
    if has_sources(metric(name)):
        comparable &= rows[column(name, "source")].to_numpy(object) == other[column(name, "source")].to_numpy(object)
    floor = np.maximum(floors(rows["protocol"]), floors(other["protocol"]))
    with np.errstate(divide="ignore", invalid="ignore"):
        possible = comparable & (first > 0).all(axis=0) & (second > 0).all(axis=0)
        ratio = np.where(possible, first / second[[0, 2, 1]], np.nan)
    return ratio, _verdicts(first, second, floor, comparable, higher=metric(name).better == "higher")


def _identity(frame: pd.DataFrame) -> tuple[Texts, Texts]:
    """Each row's case and its baseline's, on its machine; "" where it has no baseline."""
    env, base = frame["env_id"].astype(str), frame["baseline_case_id"].fillna("").astype(str)
    case, base = frame["case_id"].astype(str) + "@" + env, (base + "@" + env).where(base != "", "")
    return case.to_numpy(object), base.to_numpy(object)


def _verdicts(mine: Floats, other: Floats, floor: Floats, comparable: Mask, *, higher: bool) -> Texts:
    """The rule of `analysis.rank` for (value, lower, upper) of a row and of another; also where values are not positive."""
    with np.errstate(divide="ignore", invalid="ignore"):
        middle = np.sqrt((mine[1] * mine[2]) / (other[1] * other[2]))
        far = (floor == 0) | ((middle <= 1 - floor + 1e-12) | (middle >= 1 / (1 - floor) - 1e-12))
    below, above = (mine[2] < other[1]) & far, (mine[1] > other[2]) & far
    good, bad = (above, below) if higher else (below, above)
    found = np.where(good, BETTER, np.where(bad, WORSE, NOT_SHOWN)).astype(object)
    return np.where(comparable & np.isfinite(mine).all(axis=0) & np.isfinite(other).all(axis=0), found, NO_VALUE)


def _give_up(choices: pd.DataFrame, rows: pd.DataFrame, name: str) -> None:
    """Add the columns of one metric: each choice against the best of its own sensor among all rows that meet the limits."""
    ratio = np.full((3, len(choices)), np.nan)
    said, best_id = np.full(len(choices), NO_VALUE, object), np.full(len(choices), None, object)
    own, why = choices[column(name, "source")], choices[column(name, "why")]
    usable = rows[rows[column(name, "why")] == ""]
    for source in usable[column(name, "source")].unique() if has_sources(metric(name)) else [None]:
        group = usable if source is None else usable[usable[column(name, "source")] == source]
        mine = ((why == "") & ((source is None) | (own == source))).to_numpy()
        if mine.any():
            best = group[name].idxmin() if metric(name).better == "lower" else group[name].idxmax()
            ratio[:, mine], said[mine] = against(choices[mine], group.loc[[best]], name)
            best_id[mine] = best
    is_best = best_id == choices.index.to_numpy(object)
    ratio[:, is_best], said[is_best] = 1.0, BEST
    choices[[f"{name}__against", f"{name}__against_lower", f"{name}__against_upper"]] = ratio.T
    choices[f"{name}__verdict"], choices[f"{name}__best"] = said, best_id


def _unsure(choices: pd.DataFrame, limits: Sequence[Bound]) -> list[str]:
    """For each choice the titles of the limits that its value meets but not its whole interval."""
    found: list[list[str]] = [[] for _ in range(len(choices))]
    for limit in limits:
        edge, taken = np.full(len(choices), np.nan), np.zeros(len(choices), bool)
        for name in limit.metrics:
            mine = ~taken & np.isfinite(first_usable(choices, [name]))
            edge = np.where(mine, choices[column(name, "upper" if limit.at_most else "lower")], edge)
            taken |= mine
        crossed = edge > limit.value if limit.at_most else edge < limit.value
        for titles, crosses in zip(found, crossed, strict=True):
            titles += [title(limit)] * bool(crosses)
    return [", ".join(titles) for titles in found]


def title(limit: Bound) -> str:
    """What is limited: 'Peak device memory or Peak host memory'."""
    return " or ".join(metric(name).title for name in limit.metrics)


def in_words(choice: pd.Series, name: str) -> str:
    """What a choice gives up in one metric: '×1.31 (1.25–1.37) worse', 'best', 'no difference shown' or 'no value'."""
    said = str(choice[f"{name}__verdict"])
    if said in (BEST, NO_VALUE):
        return said
    ratio, lower, upper = (float(choice[f"{name}__against{end}"]) for end in ("", "_lower", "_upper"))
    return f"{ratio_words(ratio, lower, upper)} {said}" if np.isfinite(ratio) else said
