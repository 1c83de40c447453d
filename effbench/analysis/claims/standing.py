"""The shape of a claim that looks at all rows of a question at once: no row is the best in everything."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from effbench.analysis.claims.pairing import floors, is_usable, of_one_sensor
from effbench.analysis.claims.shapes import finished
from effbench.analysis.claims.types import Part, Specs
from effbench.metrics import metric as metric_row

Flags = npt.NDArray[np.bool_]
MOST_RUNS = 6  # rows of a question that a line names
LEAST = 2  # rows that a question must have, and metrics that two of them can be compared in


@dataclass(frozen=True, kw_only=True)
class NoSingleBest(Part):
    """No row is the best of its question in every one of `names`: each is shown to be behind another in at least one.

    Contradicted by a row that is shown to be ahead of all others in every metric that its question has. The line's number is the
    share of the rows that are shown to be behind somewhere."""

    names: tuple[str, ...]

    def metrics(self) -> tuple[str, ...]:
        return self.names

    def quantity(self) -> str:
        return "share of rows behind another"

    def expected(self) -> str:
        return "every row is behind another in at least one metric"

    def judged(self, frame: pd.DataFrame, specs: Specs) -> pd.DataFrame:
        run_ids, frame = frame.index, frame.set_axis(pd.RangeIndex(len(frame)))
        behind, ahead, counted = np.zeros(len(frame), bool), np.ones(len(frame), bool), np.zeros(len(frame), int)
        for name in self.names:
            at = np.flatnonzero(is_usable(frame, name) & (frame[f"{name}__lower"] > 0).to_numpy())
            if at.size:
                columns = ["question", "protocol", f"{name}__source", f"{name}__lower", f"{name}__upper"]
                worse, best, several = _standing(frame[columns].iloc[at], name)
                behind[at] |= worse
                ahead[at] &= best
                counted[at] += several
        rows = frame[["hardware", "workload", "model", "setting", "started_at", "question"]].assign(
            run_id=run_ids, behind=behind, ahead=ahead & (counted > 0), floor=floors(frame["protocol"])
        )
        rows = rows[counted >= LEAST]
        code = pd.factorize(rows["question"])[0]
        groups = rows.groupby(code)
        ordered = rows["run_id"].take(np.argsort(code, kind="stable")).tolist()
        size = groups.size().to_numpy()
        starts = np.cumsum(size) - size
        found = rows[groups.cumcount() == 0].reset_index(drop=True)
        found["ratio"], found["floor"] = groups["behind"].mean().to_numpy(), groups["floor"].max().to_numpy()
        found["run_ids"] = [tuple(ordered[at : at + min(num, MOST_RUNS)]) for at, num in zip(starts, size, strict=True)]
        found["what"] = [f"rows behind another somewhere, of {number}" for number in size]
        found["lower"] = found["upper"] = found["ratio"]
        answer = np.where(groups["ahead"].any().to_numpy(), -1, np.where(found["ratio"] == 1, 1, 0)).astype(np.int8)
        return finished(found, answer, list(found["run_ids"]))[size >= LEAST]


def _standing(rows: pd.DataFrame, name: str) -> tuple[Flags, Flags, Flags]:
    """Of each row: shown to be behind another, shown to be ahead of all others, and whether there are others; in `name`.

    Sufficient, not complete: a row is held against the one whose interval ends first, so no row is called behind that is not."""
    low, high = (rows[f"{name}__{end}"].to_numpy(np.float64) for end in ("lower", "upper"))
    if metric_row(name).better == "higher":
        low, high = 1 / high, 1 / low
    middle, floor = np.sqrt(low * high), floors(rows["protocol"])
    group = rows["question"].astype(object)
    if of_one_sensor(name):
        group = group + " " + rows[f"{name}__source"].astype(object)
    code = pd.factorize(group)[0]
    by_high, by_low = np.lexsort((high, code)), np.lexsort((low, code))
    starts = np.flatnonzero(np.diff(code[by_high], prepend=-1))  # of each group; codes count up from 0
    sizes = np.diff(starts, append=len(code))
    far = 1 - np.maximum.reduceat(floor[by_high], starts)  # the protocols of all must allow the claim
    champion = by_high[starts][code]
    worse = (high[champion] < low) & (middle[champion] <= far[code] * middle) & (far[code] > 0)
    leader, second = by_low[starts], by_low[starts + (sizes > 1)]
    best = np.zeros(len(code), bool)
    best[leader] = (high[leader] < low[second]) & (middle[leader] <= far * middle[second]) & (far > 0)
    return worse, best, sizes[code] > 1
