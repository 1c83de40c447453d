"""Which rows of a frame may be set against each other, and with which interval; all columns at once.

Two rows are compared within one question, when the rest of their stacks is the same. The ratio, by the first that applies:
    one is the other's baseline   the paired ratio of the same blocks, or its inverse
    both have the same baseline   the quotient of their paired ratios, bounds divided crosswise
    otherwise                     the quotient of their values, bounds divided crosswise
which is the rule of `rank.py` and `compare.py`, so that no page says other than the next.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from effbench.analysis.rank import NO_CLAIM, SCREENING
from effbench.metrics import metric as metric_row
from effbench.stats import SCREENING_FLOOR

_ONE_SENSOR = ("amu_gb", "aec_w")  # besides those that the metric table tags
Triples = npt.NDArray[np.float64]  # value, lower, upper of each row; shape (N, 3)
_OF_ROW = (
    "case_id", "env_id", "baseline_case_id", "workload", "model", "label", "hardware", "protocol", "started_at", "question", "setting",
)  # fmt: skip
_KEPT = ("run_id", "case_id", "env_id", "baseline_case_id", "started_at", "protocol", "own", "part")


def is_usable(frame: pd.DataFrame, *metrics: str) -> npt.NDArray[np.bool_]:
    """Of each row, whether its values of `metrics` are all measured, valid and with an interval; shape (rows,)."""
    keep = np.ones(len(frame), bool)
    for metric in metrics:
        keep &= (frame[f"{metric}__why"] == "").to_numpy() & np.isfinite(frame[f"{metric}__upper"].to_numpy(np.float64))
    return keep


def _columns(*metrics: str) -> list[str]:
    ends = ("", "__lower", "__upper", "__ratio", "__ratio_lower", "__ratio_upper", "__source")
    return [f"{metric}{end}" for metric in metrics for end in ends]


def of_one_sensor(metric: str) -> bool:
    """Whether two values of `metric` are compared only where their sources are the same: energy, memory, quality."""
    return bool(metric_row(metric).tags) or metric in _ONE_SENSOR


def of_arm(frame: pd.DataFrame, arm: str, *metrics: str) -> pd.DataFrame:
    """The rows with usable values of `metrics` whose stack has this technique, with the columns of these metrics and the rows' own,
    and: `run_id`, `part` (the technique as the label has it), `own` (its given parameters), `rest` (the rest of the stack).

    `arm`: "*" every stack, "moe" with any parameters, "dense()" without any given, "moe(granularity=1)" with at least these.
    """
    name, _, inside = arm.partition("(")
    wanted = [item for item in inside.rstrip(")").split(",") if item]
    codes, stacks = pd.factorize(frame["label"], use_na_sentinel=False)
    found = [_part(str(stack), name) for stack in stacks]
    fits = [part is not None and _fits(part[1], wanted, bare="(" in arm and not wanted) for part in found]
    keep = np.array(fits, dtype=bool)[codes] & is_usable(frame, *metrics)
    chosen = frame.loc[keep, [*_OF_ROW, *_columns(*metrics)]].reset_index(names="run_id")
    for index, column in enumerate(("part", "own", "rest")):
        texts = np.array([part[index] if part else "" for part in found], dtype=object)
        chosen[column] = texts[codes[keep]]
    return chosen


def _part(stack: str, name: str) -> tuple[str, str, str] | None:
    """(technique as written, its parameters, the others) where the stack has it."""
    parts = stack.split(" + ")
    if name == "*":
        return stack, "", ""
    for part in parts:
        if part == name or part.startswith(f"{name}("):
            return part, part[len(name) + 1 : -1], " + ".join(other for other in parts if other is not part)
    return None


def _fits(own: str, wanted: list[str], *, bare: bool) -> bool:
    given = own.split(",") if own else []
    return not given if bare else all(item in given for item in wanted)


def floors(protocol: pd.Series) -> npt.NDArray[np.float64]:
    """The smallest relative difference that rows of each protocol may claim; 1: none at all."""
    found: npt.NDArray[np.float64] = (
        protocol.astype(object).map({SCREENING: SCREENING_FLOOR, NO_CLAIM: 1.0}).fillna(0.0).to_numpy(np.float64)
    )
    return found


def ratios(frame: pd.DataFrame, arm: str, base: str, metric: str, *, alike: bool = False) -> pd.DataFrame:
    """One line for each pair of a row with `arm` and one with `base` in its place: hardware, workload, model, setting, question,
    what, ratio, lower, upper, floor, own, run_a, run_b, started_at. `alike`: only pairs whose own parameters are the same text."""
    shared = ["question", "rest", *(["own"] if alike else [])]
    common = ["hardware", "workload", "model", "setting"]
    # A question holds few rows, so the pairs within it are few too.
    own = [name for name in _KEPT if name not in shared]
    left = of_arm(frame, arm, metric)[[*shared, *common, *own, *_columns(metric)]]
    right = of_arm(frame, base, metric)[[*shared, *own, *_columns(metric)]]
    pairs = left.merge(right, on=shared, suffixes=("", "__b"))
    pairs = pairs[pairs["run_id"] != pairs["run_id__b"]]
    if of_one_sensor(metric):
        sources = pairs[[f"{metric}__source", f"{metric}__source__b"]].astype(object)
        pairs = pairs[(sources.iloc[:, 0] == sources.iloc[:, 1]).to_numpy()]
    bounds = _bounds(pairs, metric)
    found = pairs[[*common, "question", "started_at"]].copy()
    found["own"], found["started_at"] = pairs["own"], pairs["started_at"].astype(object)
    found["what"] = pairs["part"] + " ÷ " + pairs["part__b"]
    found["ratio"], found["lower"], found["upper"] = bounds.T
    found["floor"] = np.maximum(floors(pairs["protocol"]), floors(pairs["protocol__b"]))
    found["run_a"], found["run_b"] = pairs["run_id"], pairs["run_id__b"]
    return found[np.isfinite(bounds).all(axis=1)]


def _bounds(pairs: pd.DataFrame, metric: str) -> Triples:
    """Ratio, lower and upper of each pair; shape (pairs, 3)."""

    def three(side: str, kind: str) -> Triples:
        ends = ("ratio", "ratio_lower", "ratio_upper") if kind == "ratio" else ("", "lower", "upper")
        names = [f"{metric}{'__' if end else ''}{end}{side}" for end in ends]
        found: Triples = pairs[names].to_numpy(np.float64)
        return found

    # As objects: categories of two columns differ, and pandas refuses to compare such.
    env, case, base, env_b, case_b, base_b = (
        pairs[f"{name}{side}"].astype(object) for side in ("", "__b") for name in ("env_id", "case_id", "baseline_case_id")
    )
    same_env = (env == env_b).to_numpy()
    ratio, ratio_b = three("", "ratio"), three("__b", "ratio")
    has, has_b = np.isfinite(ratio).all(axis=1), np.isfinite(ratio_b).all(axis=1)
    found = _crosswise(three("", "value"), three("__b", "value"))
    both = same_env & has & has_b & (base.notna() & (base == base_b)).to_numpy()
    found = np.where(both[:, None], _crosswise(ratio, ratio_b), found)
    inverse = same_env & has_b & (base_b == case).to_numpy()
    found = np.where(inverse[:, None], _crosswise(np.ones_like(ratio_b), ratio_b), found)
    paired = same_env & has & (base == case_b).to_numpy()
    return np.where(paired[:, None], ratio, found)


def _crosswise(above: Triples, below: Triples) -> Triples:
    """above / below, bounds divided so that the interval is never too narrow; NaN where a divisor is not positive."""
    safe = np.where(below > 0, below, np.nan)
    return above / safe[:, [0, 2, 1]]


def against(
    lower: npt.ArrayLike,
    upper: npt.ArrayLike,
    floor: npt.ArrayLike,
    *,
    above: float | None = None,
    below: float | None = None,
    exact: bool = False,
) -> npt.NDArray[np.int8]:
    """1 where the intervals lie in the region, −1 where they lie outside it, else 0; shape (N,).

    The rule of `stats.verdict` at each bound: the interval must leave the bound out, and its middle must be at least `floor` from
    it. `exact` is for counts and equalities: the bound itself is in the region and there is no floor.
    """
    low, high, least = (np.asarray(a, np.float64) for a in (lower, upper, floor))
    with np.errstate(invalid="ignore"):
        middle = np.where(low > 0, np.sqrt(np.abs(low * high)), (low + high) / 2)
    hold, fail = np.ones(low.shape, bool), np.zeros(low.shape, bool)
    for bound, less in ((below, True), (above, False)):
        if bound is None:
            continue
        slack = 1e-9 * abs(bound)
        if exact:
            inside = high <= bound + slack if less else low >= bound - slack
            outside = low > bound + slack if less else high < bound - slack
        else:
            far = least * abs(bound) if bound < 0 else bound * (1 / np.maximum(1 - least, 1e-12) - 1)
            under = (least < 1) & (high < bound) & (middle <= bound - least * abs(bound) + slack)
            over = (least < 1) & (low > bound) & (middle >= bound + far - slack)
            inside, outside = (under, over) if less else (over, under)
        hold &= inside
        fail |= outside
    answer: npt.NDArray[np.int8] = hold.astype(np.int8) - fail.astype(np.int8)
    return answer
