"""Who is better, and who cannot be told apart.

A row's rank is 1 + the number of rows that are shown to be better (competition ranking: 1, 1, 3). "Not shown" is not
transitive: of three rows the first may be shown to be better than the third alone, and their ranks are then 1, 1, 2; a row
with a wide interval may share the first rank with rows that are themselves in order.

A difference between two rows is shown, by the first of these that applies:
    one is the other's baseline   the paired ratio's interval leaves out 1
    both have the same baseline   their paired ratios' intervals do not overlap
    otherwise                     their values' intervals do not overlap
and the protocols of both must allow the claim: `quick` rows are screening and claim nothing below 10 %.

Rows are ranked only within one question: same machine, same workload with its parameters, same model and text (and the
same sensor for energy and memory, the same figure for quality). What failed, is invalid, was estimated, is host-bound or
has no interval is returned without a rank and with the reason.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from effbench.metrics import METRICS, Metric, metric
from effbench.schema import CaseRecord, MetricValue, canonical_json, digest
from effbench.stats import SCREENING_FLOOR, Verdict, verdict

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
HOST_BOUND, ESTIMATE = "host_bound", "estimate"
SCREENING = "quick"  # the protocol whose rows are screening
NO_CLAIM = "smoke"  # the protocol whose rows never show a difference
_BY_SENSOR = frozenset({"amu_gb", "aec_w"})  # of the paper's six, those that depend on what the sensor sees
_PAIRS = 1_000_000  # pairs of rows, times metrics, compared at a time: about 50 MB
_NOT_ASKED = ("environment", "workload_identity", "protocol", "time_limit_s", "text")


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One row in a ranking. `rank` is None where it cannot be ranked, and `reason` is the code that says why."""

    record: CaseRecord
    value: MetricValue | None
    rank: int | None = None
    shared: bool = False  # another row of the same question has the same rank
    reason: str = ""


def rank(records: Iterable[CaseRecord], name: str) -> list[Ranked]:
    """Rank `records` by the metric `name` within each question; ranked rows first, best first, then those without a rank.

    Raises ValueError for a metric that has no direction or is never ranked alone."""
    return rank_all(records, [name])[name]


def rank_all(records: Iterable[CaseRecord], names: Iterable[str]) -> dict[str, list[Ranked]]:
    """`rank` by each of several metrics. Raises ValueError as `rank` does."""
    by = [metric(name) for name in names]
    for row in by:
        if not rankable(row):
            raise ValueError(f"{row.name} is not a metric that rows are ranked by")
    questions: dict[str, list[CaseRecord]] = {}
    for record in records:
        questions.setdefault(question(record), []).append(record)
    found: dict[str, list[Ranked]] = {row.name: [] for row in by}
    for members in questions.values():
        for row, ranked in zip(by, _rank(members, by), strict=True):
            found[row.name] += ranked
    return {row.name: sorted(found[row.name], key=_best_first(row)) for row in by}


def _rank(records: Sequence[CaseRecord], by: Sequence[Metric]) -> list[list[Ranked]]:
    """The rows of one question by each metric, in the order given."""
    host_bound = [is_host_bound(record) for record in records]
    known = [{value.name: value for value in record.metrics} for record in records]
    ranked = [
        [
            Ranked(record=record, value=found.get(row.name), reason=why_unranked(record, found.get(row.name), host_bound=bound))
            for record, found, bound in zip(records, known, host_bound, strict=True)
        ]
        for row in by
    ]
    places = (1 + _num_better(records, ranked, by)).tolist()
    for row, line, numbers in zip(by, ranked, places, strict=True):
        same = Counter((place, _sensor(one.value, row)) for one, place in zip(line, numbers, strict=True) if not one.reason)
        for index, (one, place) in enumerate(zip(line, numbers, strict=True)):
            if not one.reason:
                shared = same[place, _sensor(one.value, row)] > 1
                line[index] = Ranked(record=one.record, value=one.value, rank=place, shared=shared)
    return ranked


def _best_first(by: Metric) -> Callable[[Ranked], tuple[bool, int, float]]:
    sign = -1.0 if by.better == "higher" else 1.0

    def key(row: Ranked) -> tuple[bool, int, float]:
        number = row.value.value if row.value is not None else None
        return row.rank is None, row.rank or 0, math.inf if number is None else sign * number

    return key


def rankable(row: Metric) -> bool:
    """Whether rows may be ranked by this metric: it has a direction and is not the net energy, which is never ranked alone."""
    return row.better != "none" and not row.name.startswith("energy_net_")


def rankable_metrics() -> list[str]:
    """The names of all metrics of the table that rows may be ranked by."""
    return [name for name, row in METRICS.items() if rankable(row)]


def find(record: CaseRecord, name: str) -> MetricValue | None:
    """The metric `name` of a row."""
    return next((value for value in record.metrics if value.name == name), None)


def is_screening(record: CaseRecord) -> bool:
    return record.protocol in (SCREENING, NO_CLAIM)


def is_host_bound(record: CaseRecord) -> bool:
    """Whether Python was measured and not the technique: the GPU waited for the host."""
    return record.reason == HOST_BOUND or any(HOST_BOUND in value.reasons for value in record.metrics)


def why_unranked(record: CaseRecord, value: MetricValue | None, *, host_bound: bool) -> str:
    """The reason code that keeps a row out of the ranking, or an empty string."""
    if record.status != "ok":
        return record.reason or record.status
    if host_bound:
        return HOST_BOUND
    if value is None:
        return "not_taken"
    if ESTIMATE in value.reasons:
        return ESTIMATE
    if value.value is None or not value.valid:
        return (value.reasons and value.reasons[0]) or "invalid"
    return "one_block" if value.lower is None or value.upper is None else ""


def question(record: CaseRecord) -> str:
    """What two rows must have in common to be compared, as a short digest."""
    return question_of(record.hardware, record.workload, record.model, record.spec)


@lru_cache(16_384)
def question_of(hardware: str, workload: str, model: str, spec: str) -> str:
    """`question` from the parts of a row; `spec` is its canonical JSON."""
    return digest([hardware, workload, model, _setting(spec)])[:16]


def has_sources(row: Metric) -> bool:
    """Whether values of this metric compare only where their source is equal: energy and memory by their sensor and its
    scope, quality by its figure."""
    return bool(row.tags) or row.name in _BY_SENSOR


def _sensor(value: MetricValue | None, by: Metric) -> str:
    return value.source if value is not None and has_sources(by) else ""


def _setting(spec: str) -> str:
    """What of a spec belongs to the question and not to the answer."""
    fields = spec_fields(spec)
    if fields is None:
        return spec
    try:
        return canonical_json({key: value for key, value in what_was_asked(fields).items() if key != "techniques"})
    except (ValueError, RecursionError):  # NaN, or too deep
        return spec


def what_was_asked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a spec without how and where it was measured; techniques are still in it."""
    kept = {key: value for key, value in fields.items() if key not in _NOT_ASKED}
    if isinstance(model := kept.get("model"), dict):  # the same weights may lie anywhere
        kept["model"] = {key: value for key, value in model.items() if key != "location"}
    return kept


def spec_fields(spec: str) -> dict[str, Any] | None:
    """The fields of a stored spec; None where a text of another hand is no JSON object."""
    try:
        fields = json.loads(spec)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def latest(
    records: Iterable[CaseRecord], origins: Mapping[str, str] = MappingProxyType({})
) -> tuple[list[CaseRecord], list[CaseRecord]]:
    """The rows that count, and those that a later row of the same case, machine and origin has replaced.

    A failed retry does not replace a good row: both count, so that the failure stays visible. `origins` names the bundle that
    brought a row of another hand, by run id: no such row replaces one measured here, or one of another bundle."""
    newest: dict[tuple[str, str, str], CaseRecord] = {}
    newest_ok: dict[tuple[str, str, str], CaseRecord] = {}
    records = sorted(records, key=lambda r: r.started_at or "")
    for record in records:
        key = (record.case_id, record.hardware, origins.get(record.run_id, ""))
        newest[key] = record
        if record.status == "ok":
            newest_ok[key] = record
    kept = {record.run_id for record in (*newest.values(), *newest_ok.values())}
    return [r for r in records if r.run_id in kept], [r for r in records if r.run_id not in kept]


def ratio_verdict(record: CaseRecord, value: MetricValue, *, host_bound: bool = False) -> Verdict | None:
    """What a row's paired ratio says against its baseline; None where there is no ratio or no direction."""
    better = metric(value.name, value.unit).better
    if value.ratio is None or better == "none":
        return None
    if host_bound or not value.valid or ESTIMATE in value.reasons:
        return "no difference shown"
    return verdict(value.ratio_lower, value.ratio_upper, better, record.protocol)


def _num_better(records: Sequence[CaseRecord], rows: Sequence[Sequence[Ranked]], by: Sequence[Metric]) -> Counts:
    """For each metric and row of one question, how many of the other rows are shown to be better; shape (metrics, rows)."""
    used = [[None if row.reason else row.value for row in line] for line in rows]
    return num_better(
        own=_bounds([[(v.lower, v.upper) if v else None for v in line] for line in used]),
        ratio=_bounds([[(v.ratio_lower, v.ratio_upper) if v else None for v in line] for line in used]),
        sensor=np.array([[hash(_sensor(v, row)) for v in line] for line, row in zip(used, by, strict=True)]),
        base=[f"{r.baseline_case_id}@{r.env_id}" if r.baseline_case_id else "" for r in records],
        case=[f"{r.case_id}@{r.env_id}" for r in records],
        protocol=[r.protocol for r in records],
        higher=np.array([row.better == "higher" for row in by]),
    )


def num_better(
    *, own: Floats, ratio: Floats, sensor: Counts, base: Sequence[str], case: Sequence[str], protocol: Sequence[str],
    higher: npt.NDArray[np.bool_],
) -> Counts:  # fmt: skip
    """For each metric and row of one question, how many of the other rows are shown to be better; shape (metrics, rows).

    `own` and `ratio` are intervals of shape (metrics, rows, 2), `sensor` (metrics, rows) numbers that comparable values share,
    `base` and `case` name each row's baseline ("": none) and itself, `higher` says of each metric whether more is better.
    A row that takes no part has NaN bounds: a comparison with NaN is false."""
    paired = np.isfinite(ratio[:, :, 0]) & np.isfinite(ratio[:, :, 1])
    one = np.where(np.isnan(own), np.nan, 1.0)  # a baseline's ratio to itself
    codes = np.unique(["", *base, *case], return_inverse=True)[1]
    nothing, bases, cases = codes[0], codes[1 : len(base) + 1], codes[len(base) + 1 :]
    floor = np.array([floor_of(name) for name in protocol])
    more = higher[:, None, None]
    counts = np.zeros(own.shape[:2], np.int64)
    chunk = max(1, _PAIRS // max(counts.size, 1))
    for start in range(0, len(base), chunk):
        mine = slice(start, start + chunk)
        least = np.maximum(floor[mine, None], floor)
        shown = _shown_better(own[:, mine], own, least, more)
        shared = (bases[mine, None] == bases) & (bases != nothing) & paired[:, mine, None] & paired[:, None]
        shown = np.where(shared, _shown_better(ratio[:, mine], ratio, least, more), shown)
        other_is_baseline = (bases[mine, None] == cases) & paired[:, mine, None]
        shown = np.where(other_is_baseline, _shown_better(ratio[:, mine], one, least, more), shown)
        i_am_baseline = (cases[mine, None] == bases) & paired[:, None]
        shown = np.where(i_am_baseline, _shown_better(one[:, mine], ratio, least, more), shown)
        counts[:, mine] = (shown & (sensor[:, mine, None] == sensor[:, None])).sum(axis=2)
    return counts


def _shown_better(mine: Floats, other: Floats, floor: Floats, higher: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Whether `other` (columns) is shown to be better than `mine` (rows); bounds have shape (metrics, rows, 2).

    The rule of `stats.verdict` for the interval [other lower / mine upper, other upper / mine lower]."""
    mine_low, mine_high = mine[:, :, None, 0], mine[:, :, None, 1]
    other_low, other_high = other[:, None, :, 0], other[:, None, :, 1]
    apart = np.where(higher, other_low > mine_high, other_high < mine_low)
    with np.errstate(invalid="ignore", divide="ignore"):
        middle = np.sqrt((other_low * other_high) / (mine_low * mine_high))  # NaN where a sign differs: nothing is claimed
        far = (middle <= 1 - floor + 1e-12) | (middle >= 1 / (1 - floor) - 1e-12)
    answer: npt.NDArray[np.bool_] = apart & np.where(floor > 0, (floor < 1) & far, True)
    return answer


def floor_of(protocol: str) -> float:
    """The share by which rows of a protocol must differ before a difference is shown; 1 means never."""
    return {SCREENING: SCREENING_FLOOR, NO_CLAIM: 1.0}.get(protocol, 0.0)


def _bounds(lines: Sequence[Sequence[tuple[float | None, float | None] | None]]) -> Floats:
    pairs = [[(math.nan, math.nan) if b is None or None in b else b for b in line] for line in lines]
    return np.array(pairs, np.float64).reshape(len(lines), -1, 2)
