"""The shapes that a part of a claim can have. Each is asked the same: one line for each comparison that the rows allow.

    Ratio          one technique to another, or one figure to another of the same row, in a region
    Best           one technique shown to have the least (or the most) of a metric among several
    Trend          a ratio or a value from the smallest to the largest of a parameter, its quotient in a region
    Straight       values over a parameter: rising, and none of them off the line from end to end

The shape that looks at all rows of a question at once is in `standing.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from effbench.analysis.claims.pairing import against, floors, of_arm, ratios
from effbench.analysis.claims.types import JUDGED, Part, Specs
from effbench.analysis.rank import spec_fields, what_was_asked
from effbench.metrics import metric as metric_row
from effbench.schema import canonical_json

MOST_SPECS = 2000  # rows of one part whose specs are read: a trend over a parameter needs them, newest first
OFF_THE_LINE = 0.10  # relative; a point so far from the line between the ends is off it


def finished(found: pd.DataFrame, answer: Any, run_ids: list[tuple[str, ...]]) -> pd.DataFrame:
    """The columns of JUDGED, from a table of `pairing.ratios`."""
    found = found.assign(screening=found["floor"] > 0, answer=answer)
    found["run_ids"] = pd.Series(run_ids, index=found.index, dtype=object)
    return found[list(JUDGED)]


def _named(techniques: Set[str], *arms: str | None) -> bool:
    """Whether each of the arms is among the techniques."""
    return all(arm == "*" or arm.partition("(")[0] in techniques for arm in arms if arm)


def _two(found: pd.DataFrame) -> list[tuple[str, ...]]:
    return list(zip(found["run_a"], found["run_b"], strict=True))


@dataclass(frozen=True, kw_only=True)
class Ratio(Part):
    """`arm` ÷ `base` in `metric`, in one question. Without `base`, the arm's own value; with `per`, over that metric of its row."""

    arm: str
    base: str | None = None
    per: str | None = None
    alike: bool = False

    def metrics(self) -> tuple[str, ...]:
        return (*super().metrics(), *((self.per,) if self.per else ()))

    def may_answer(self, techniques: Set[str]) -> bool:
        return _named(techniques, self.arm, self.base)

    def judged(self, frame: pd.DataFrame, specs: Specs) -> pd.DataFrame:
        found = self.compared(_of_size(frame, self.size))
        answer = against(
            found["lower"], found["upper"], found["floor"], above=self.above, below=self.below, exact=self.exact
        )  # fmt: skip
        return finished(found, answer, _two(found) if self.base else [(run_id,) for run_id in found["run_a"]])

    def compared(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The table of `pairing.ratios`."""
        if self.base:
            return ratios(frame, self.arm, self.base, self.metric, alike=self.alike)
        return values(frame, self.arm, self.metric, self.per)


def values(frame: pd.DataFrame, arm: str, metric: str, per: str | None = None) -> pd.DataFrame:
    """As `pairing.ratios`, for the values of rows with `arm` (over the value of `per` in the same row)."""
    rows = of_arm(frame, arm, metric, *((per,) if per else ()))
    found = rows[["hardware", "workload", "model", "setting", "question", "started_at", "own"]].copy()
    found["started_at"] = found["started_at"].astype(object)
    ends = ("", "__lower", "__upper")
    bounds = rows[[metric + end for end in ends]].to_numpy(np.float64)
    if per:
        other = rows[[per + end for end in ends]].to_numpy(np.float64)
        bounds = bounds / np.where(other > 0, other, np.nan)[:, [0, 2, 1]]
    found["what"] = rows["part"] + (f", over {metric_row(per).title}" if per else "")
    found["ratio"], found["lower"], found["upper"] = bounds.T
    found["floor"] = floors(rows["protocol"])
    found["run_a"] = found["run_b"] = rows["run_id"]
    return found[np.isfinite(bounds).all(axis=1)]


def _of_size(frame: pd.DataFrame, size: tuple[float, float] | None) -> pd.DataFrame:
    return frame if size is None else frame[frame["params_total"].between(*size)]


@dataclass(frozen=True, kw_only=True)
class Best(Part):
    """`arm` has the least (`most`: the most) of `metric`, against each of `rivals`; all must be there for it to be supported."""

    arm: str
    rivals: tuple[str, ...]
    most: bool = False
    alike: bool = False

    def expected(self) -> str:
        return f"the {'most' if self.most else 'least'} of {', '.join((self.arm, *self.rivals))}"

    def may_answer(self, techniques: Set[str]) -> bool:
        return any(_named(techniques, self.arm, rival) for rival in self.rivals)

    def judged(self, frame: pd.DataFrame, specs: Specs) -> pd.DataFrame:
        frame = _of_size(frame, self.size)
        tables = [ratios(frame, self.arm, rival, self.metric, alike=self.alike).assign(rival=rival) for rival in self.rivals]
        every = pd.concat(tables, ignore_index=True)
        above, below = (1.0, None) if self.most else (None, 1.0)
        every["answer"] = against(every["lower"], every["upper"], every["floor"], above=above, below=below)
        # The rival that comes closest is the one to show: the largest ratio where least is best.
        every["order"] = np.where(self.most, -1, 1) * np.log(every["ratio"].where(every["ratio"] > 0))
        every = every.sort_values(["answer", "order"], ascending=[True, False], kind="stable")
        groups = every.groupby("run_a", sort=False)
        closest = groups.head(1).set_index("run_a", drop=False)
        worst, seen = groups["answer"].min(), groups["rival"].nunique()
        answer = worst.where((worst < 0) | (seen == len(self.rivals)), 0)[closest.index]
        return finished(closest, answer.to_numpy(np.int8), _two(closest)).reset_index(drop=True)


@dataclass(frozen=True, kw_only=True)
class Trend(Part):
    """How `arm` ÷ `base` (or the arm's value) changes from the smallest to the largest of `over`: large ÷ small, in the region.

    `over`: a metric of the row such as "params_total", or a place in its spec such as "params.tokens", "techniques.moe.experts" or
    the product "params.batch_size*params.seq_len". `ignoring`: further places that may differ along it.
    """

    arm: str
    over: str
    base: str | None = None
    ignoring: tuple[str, ...] = ()
    alike: bool = False

    def metrics(self) -> tuple[str, ...]:
        return (*super().metrics(), *(() if "." in self.over else (self.over,)))

    def may_answer(self, techniques: Set[str]) -> bool:
        return _named(techniques, self.arm, self.base)

    def points(self, frame: pd.DataFrame, specs: Specs) -> pd.DataFrame:
        """The table of comparisons with `x`, the parameter's value, and `line`, equal for rows that differ in nothing else."""
        frame = _of_size(frame, self.size)
        found = Ratio(says="", workload="", metric=self.metric, arm=self.arm, base=self.base, alike=self.alike).compared(frame)
        found = found.sort_values("started_at", ascending=False).head(MOST_SPECS)
        texts = specs(list(dict.fromkeys(found["run_a"])))
        read = [_along(texts.get(run_id, ""), self.over, self.ignoring) for run_id in found["run_a"]]
        sizes = None if "." in self.over else frame[self.over].reindex(found["run_a"]).to_numpy(np.float64)
        found["x"] = [x for x, _ in read] if sizes is None else sizes
        rest = pd.Series([line for _, line in read], index=found.index, dtype=object)
        found["line"] = found["hardware"].astype(str) + " " + rest
        return found[np.isfinite(found["x"].astype(float)) & (rest != "")]

    def judged(self, frame: pd.DataFrame, specs: Specs) -> pd.DataFrame:
        points = self.points(frame, specs)
        lines = []
        for _, line in points.groupby("line", sort=False):
            small, large = line.loc[line["x"].idxmin()], line.loc[line["x"].idxmax()]
            if large["x"] > small["x"] and small["lower"] > 0:
                lines.append(self._line(line, small, large))
        found = pd.DataFrame(lines, columns=[*JUDGED, "floor"])
        found = found[np.isfinite(found[["ratio", "lower", "upper"]].to_numpy(np.float64)).all(axis=1)]
        answer = against(
            found["lower"], found["upper"], found["floor"], above=self.above, below=self.below, exact=self.exact
        )  # fmt: skip
        return finished(found, answer, list(found["run_ids"]))

    def _line(self, line: pd.DataFrame, small: Any, large: Any) -> dict[str, Any]:
        over = metric_row(self.over).title if "." not in self.over else self.over.rpartition(".")[2].replace("_", " ")
        models = f"{small['model']} → {large['model']}" if small["model"] != large["model"] else small["model"]
        runs = [run for end in (small, large) for run in dict.fromkeys((end["run_a"], end["run_b"]))]
        return {
            **{name: large[name] for name in ("hardware", "workload", "setting", "started_at")},
            "model": models,
            "what": f"{large['what']}, {over} {small['x']:g} → {large['x']:g}",
            "ratio": large["ratio"] / small["ratio"],
            "lower": large["lower"] / small["upper"],
            "upper": large["upper"] / small["lower"],
            "floor": line["floor"].max(),
            "run_ids": tuple(runs),
        }


@dataclass(frozen=True, kw_only=True)
class Straight(Trend):
    """As Trend, and each point between the ends lies on the line through them, within OFF_THE_LINE; needs three points."""

    def judged(self, frame: pd.DataFrame, specs: Specs) -> pd.DataFrame:
        points = self.points(frame, specs)
        lines = []
        for _, line in points.groupby("line", sort=False):
            line = line.drop_duplicates("x").sort_values("x")
            if len(line) < 3 or line["lower"].iloc[0] <= 0:
                continue
            small, large = line.iloc[0], line.iloc[-1]
            share = (line["x"] - small["x"]) / (large["x"] - small["x"])
            expected = small["ratio"] + share * (large["ratio"] - small["ratio"])
            inner = line.iloc[1:-1]
            off = against(
                inner["lower"] / expected.iloc[1:-1], inner["upper"] / expected.iloc[1:-1], inner["floor"],
                above=1 - OFF_THE_LINE, below=1 + OFF_THE_LINE,
            )  # fmt: skip
            found = self._line(line, small, large)
            rises = int(against([found["lower"]], [found["upper"]], [found["floor"]], above=1.0)[0])
            runs = tuple(dict.fromkeys(run for pair in _two(line) for run in pair))
            lines.append({**found, "answer": min(rises, int(off.min())), "run_ids": runs})
        found_lines = pd.DataFrame(lines, columns=[*JUDGED, "floor"])
        return finished(found_lines, found_lines["answer"], list(found_lines["run_ids"]))

    def expected(self) -> str:
        return "rising, on a straight line"


def _along(spec: str, over: str, ignoring: tuple[str, ...]) -> tuple[float, str]:
    """(the parameter's value, what else the spec says) of one row; NaN where the spec does not have it."""
    try:
        value = what_was_asked(spec_fields(spec) or {})
        value["techniques"] = {t["name"]: t["params"] for t in value["techniques"]}
        places = over.split("*") if "." in over else []
        numbers = [_take(value, place) for place in places]
        for place in ignoring:
            _take(value, place)
        known = [float(number) for number in numbers if isinstance(number, int | float)]
        return (math.prod(known) if len(known) == len(places) else math.nan), canonical_json(value)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # a row of another hand
        return math.nan, ""


def _take(value: Mapping[str, Any], place: str) -> Any:
    """Remove and return what stands at a dotted place; None where there is nothing."""
    *path, last = place.split(".")
    inner: Any = value
    for name in path:
        inner = inner.get(name) if isinstance(inner, dict) else None
    return inner.pop(last, None) if isinstance(inner, dict) else None
