"""Rows side by side: every metric of each against the first, with what may be said of the difference.

The verdict is that of `rank.py`, asked of the two rows alone, so that a page which compares never says other than the board.
The ratio that stands beside it, by the first of these that applies:
    one is the other's baseline   the paired ratio, or its inverse
    both have the same baseline   the quotient of their paired ratios, its interval from the bounds divided crosswise
    otherwise                     the quotient of the values, its interval from the bounds divided crosswise
Dividing crosswise gives an interval that is too wide rather than too narrow: it leaves out 1 exactly where the two do not overlap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from effbench.analysis.rank import find, is_host_bound, question, rank_all, rankable, why_unranked
from effbench.analysis.table import explain
from effbench.metrics import metric, table_order
from effbench.schema import CaseRecord, MetricValue, canonical_json
from effbench.stats import Verdict

Basis = Literal["paired", "same baseline", "values", ""]
NOT_COMPARABLE: Literal["not comparable"] = "not comparable"
_DEPTH = 12  # of nested JSON; a spec has four
MOST_ROWS = 6  # side by side; more do not fit a screen
BASES: Mapping[Basis, str] = {
    "paired": "paired in the same blocks",
    "same baseline": "both paired with the same baseline",
    "values": "from the two values",
    "": "no ratio",
}
# Why there is no verdict, where it is no reason code of a record.
NO_DIRECTION, NOT_ALONE, OTHER_QUESTION, OTHER_SENSOR = "no_direction", "never_alone", "other_question", "other_sensor"
WHY = {
    NO_DIRECTION: "neither more nor less of it is better",
    NOT_ALONE: "net energy is never judged alone",
    OTHER_QUESTION: "the two rows answer different questions",
    OTHER_SENSOR: "the two values come from different sensors, or are different figures",
}


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One metric of a row against the first row. `ratio` is row / first, with its 95 % interval; None is missing.

    `why` is the code that says why there is no verdict, or why it is "not comparable"; empty where there is one.
    """

    name: str
    unit: str
    first: MetricValue | None
    value: MetricValue | None
    ratio: float | None = None
    lower: float | None = None
    upper: float | None = None
    basis: Basis = ""
    verdict: Verdict | Literal["not comparable"] | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One dotted path of the rows' specs or provenance and what each row has there; None where it has nothing."""

    path: str
    values: tuple[str | None, ...]

    @property
    def differs(self) -> bool:
        return len(set(self.values)) > 1


def metric_names(records: Iterable[CaseRecord]) -> list[str]:
    """The metrics that some row has a value of, as the metric table orders them."""
    return sorted({value.name for record in records for value in record.metrics if value.value is not None}, key=table_order)


def compare(first: CaseRecord, other: CaseRecord, names: Iterable[str] | None = None) -> list[Compared]:
    """Every metric of `other` against `first`; `names` chooses some, else all that either has a value of."""
    names = metric_names((first, other)) if names is None else list(names)
    same = question(first) == question(other)
    ranked = [name for name in names if rankable(metric(name))]
    places = rank_all((first, other), ranked) if same and ranked else {}
    found = []
    for name in names:
        mine, theirs = find(first, name), find(other, name)
        ratio, lower, upper, basis = _ratio(first, other, mine, theirs)
        said, why = _verdict(first, other, name, places)
        unit = next((v.unit for v in (theirs, mine) if v is not None), metric(name).unit)
        line = Compared(name=name, unit=unit, first=mine, value=theirs, ratio=ratio, lower=lower, upper=upper, basis=basis)
        found.append(replace(line, verdict=said, why=why))
    return found


def _verdict(
    first: CaseRecord, other: CaseRecord, name: str, places: Mapping[str, Sequence[Any]]
) -> tuple[Verdict | Literal["not comparable"] | None, str]:
    """What rank.py says of the two rows, and the code that says why it says nothing."""
    both = (first, other)
    missing = [why_unranked(record, find(record, name), host_bound=False) for record in both if _absent(record, name)]
    if missing:
        return None, missing[0]
    if not rankable(metric(name)):
        return None, NO_DIRECTION if metric(name).better == "none" else NOT_ALONE
    if name not in places:
        return NOT_COMPARABLE, OTHER_QUESTION
    for record in both:
        if why := why_unranked(record, find(record, name), host_bound=is_host_bound(record)):
            return NOT_COMPARABLE, why
    of = {row.record.run_id: row for row in places[name]}
    mine, theirs = of[first.run_id], of[other.run_id]
    if mine.rank == theirs.rank:
        return ("no difference shown", "") if theirs.shared else (NOT_COMPARABLE, OTHER_SENSOR)
    return ("better" if theirs.rank < mine.rank else "worse"), ""


def _absent(record: CaseRecord, name: str) -> bool:
    value = find(record, name)
    return value is None or value.value is None


def _ratio(
    first: CaseRecord, other: CaseRecord, mine: MetricValue | None, theirs: MetricValue | None
) -> tuple[float | None, float | None, float | None, Basis]:
    """other / first with its interval, in the order of precedence that rank.py has."""
    if mine is None or theirs is None:
        return None, None, None, ""
    own, base = (theirs.ratio, theirs.ratio_lower, theirs.ratio_upper), (mine.ratio, mine.ratio_lower, mine.ratio_upper)
    if _is_baseline(first, other) and theirs.ratio is not None:
        return *own, "paired"
    if _is_baseline(other, first) and mine.ratio is not None:
        return *_quotient((1.0, 1.0, 1.0), base), "paired"
    if _share_baseline(first, other) and None not in own and None not in base:
        return *_quotient(own, base), "same baseline"
    values = _quotient((theirs.value, theirs.lower, theirs.upper), (mine.value, mine.lower, mine.upper))
    return *values, "" if values[0] is None else "values"


def _is_baseline(one: CaseRecord, of: CaseRecord) -> bool:
    return of.baseline_case_id == one.case_id and of.env_id == one.env_id


def _share_baseline(first: CaseRecord, other: CaseRecord) -> bool:
    same = first.baseline_case_id == other.baseline_case_id and first.env_id == other.env_id
    return same and first.baseline_case_id is not None


Bounds = tuple[float | None, float | None, float | None]


def _quotient(above: Bounds, below: Bounds) -> Bounds:
    """(middle, lower, upper) of above / below, the bounds crosswise; None where a side is missing or not positive."""
    (middle, low, high), (by, by_low, by_high) = above, below
    if middle is None or by is None or middle < 0 or by <= 0:
        return None, None, None
    if low is None or high is None or by_low is None or by_high is None or low <= 0 or by_low <= 0:
        return middle / by, None, None
    return middle / by, low / by_high, high / by_low


def ratio_words(ratio: float | None, lower: float | None, upper: float | None) -> str:
    """'×0.833 (0.817–0.850)': three digits each; without the interval where there is none, empty without a ratio."""
    if ratio is None:
        return ""
    bounds = "" if lower is None or upper is None else f" ({_three_digits(lower)}–{_three_digits(upper)})"
    return f"×{_three_digits(ratio)}{bounds}"


def _three_digits(number: float) -> str:
    if number == 0 or not 1e-4 <= abs(number) < 1e6:
        return f"{number:.3g}"
    return f"{number:.{max(2 - math.floor(math.log10(abs(number)) + 1e-9), 0)}f}"


def explain_why(code: str) -> str:
    """Why there is no verdict, in words."""
    return WHY.get(code) or explain(code)


def question_differences(first: CaseRecord, other: CaseRecord) -> list[str]:
    """The dotted paths that make two rows answer different questions; empty where they can be compared.

    A part of a spec belongs to the question when changing it alone changes `rank.question`, so the list there is the only one."""
    mine, theirs = _json(first.spec), _json(other.spec)
    found = ["hardware"] if first.hardware != other.hardware else []
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in sorted(mine.keys() | theirs.keys()):
            changed = {**mine, key: theirs[key]} if key in theirs else {k: v for k, v in mine.items() if k != key}
            if question(replace(first, spec=canonical_json(changed))) != question(replace(first, spec=canonical_json(mine))):
                one, two = flat({key: mine.get(key)}), flat({key: theirs.get(key)})
                found += [path for path in sorted(one.keys() | two.keys()) if one.get(path) != two.get(path)]
    if not found and question(first) != question(other):  # rows of another hand, whose columns do not follow from their specs
        found = [name for name in ("workload", "model", "spec") if getattr(first, name) != getattr(other, name)]
    return found


def differences(records: Sequence[CaseRecord]) -> list[Difference]:
    """Every dotted path of the rows' specs and provenance, those that differ first, each in the order of their names.

    A stack has one technique an axis, so a technique is found by its axis: `techniques.attention.params.groups`."""
    sides = [described(record) for record in records]
    paths = [path for path in sorted(set().union(*sides)) if not _only_holds_others(path, sides)]
    found = [Difference(path=path, values=tuple(side.get(path) for side in sides)) for path in paths]
    return sorted(found, key=lambda line: (not line.differs, line.path.startswith("provenance.")))


def _only_holds_others(path: str, sides: Sequence[Mapping[str, str]]) -> bool:
    """Whether a path is empty where it is and has parts elsewhere: the parts say it."""
    return all(side.get(path, "{}") == "{}" for side in sides) and any(
        key.startswith(f"{path}.") for side in sides for key in side
    )


def described(record: CaseRecord) -> dict[str, str]:
    """What a row says of itself besides its metrics, as text by dotted path."""
    spec = _json(record.spec)
    if isinstance(spec, dict) and isinstance(spec.get("techniques"), list):
        spec = {**spec, "techniques": _by_axis(spec["techniques"])}
    row = {"hardware": record.hardware, "env_id": record.env_id, "schema_version": record.schema_version}
    provenance = {key: _json(value) if isinstance(value, str) else value for key, value in record.provenance.items()}
    return {
        **flat(row),
        **(flat(spec) if isinstance(spec, dict) else {"spec": record.spec}),
        **flat({"provenance": provenance}),
    }


def _by_axis(techniques: Sequence[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number, technique in enumerate(techniques):
        axis = str(technique.get("axis", number)) if isinstance(technique, dict) else str(number)
        found[axis if axis not in found else f"{axis}.{number}"] = technique
    return found


def flat(value: Any, path: str = "", depth: int = 0) -> dict[str, str]:
    """The leaves of nested JSON as text, by dotted path; what is empty, a list, or deeper than _DEPTH is a leaf."""
    if isinstance(value, Mapping) and value and depth < _DEPTH:
        parts = [flat(part, f"{path}.{key}" if path else str(key), depth + 1) for key, part in value.items()]
        return {name: text for part in parts for name, text in part.items()}
    return {path: value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)}


def _json(text: str) -> Any:
    """JSON as a value, or the text where it is none; only mappings and lists count, so that "1" stays a text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict | list) else text
