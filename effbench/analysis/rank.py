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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from effbench.metrics import METRICS, Metric, metric
from effbench.schema import CaseRecord, MetricValue, canonical_json, digest
from effbench.stats import SCREENING_FLOOR, Verdict, verdict

HOST_BOUND, ESTIMATE = "host_bound", "estimate"
SCREENING = "quick"  # the protocol whose rows are screening
NO_CLAIM = "smoke"  # the protocol whose rows never show a difference
_BY_SENSOR = frozenset({"amu_gb", "aec_w"})  # of the paper's six, those that depend on what the sensor sees
_CHUNK = 500  # rows compared with all others at a time, which bounds memory
_NOT_ITS_QUESTION = ("techniques", "environment", "workload_identity", "protocol", "time_limit_s", "text")


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
    records = list(records)
    host_bound = [is_host_bound(record) for record in records]
    values = [{value.name: value for value in record.metrics} for record in records]
    return {name: _rank(records, host_bound, [found.get(name) for found in values], metric(name)) for name in names}


def _rank(
    records: Sequence[CaseRecord], host_bound: Sequence[bool], values: Sequence[MetricValue | None], by: Metric
) -> list[Ranked]:
    if not rankable(by):
        raise ValueError(f"{by.name} is not a metric that rows are ranked by")
    found: list[Ranked] = []
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, (record, bound, value) in enumerate(zip(records, host_bound, values, strict=True)):
        reason = why_unranked(record, value, host_bound=bound)
        found.append(Ranked(record=record, value=value, reason=reason))
        if value is not None and not reason:
            groups.setdefault((question(record), _sensor(value, by)), []).append(index)
    for members in groups.values():
        places = 1 + _num_better([found[i] for i in members], by)
        counts = dict(zip(*np.unique(places, return_counts=True), strict=True))
        for i, place in zip(members, places, strict=True):
            found[i] = replace(found[i], rank=int(place), shared=bool(counts[place] > 1))
    sign = -1.0 if by.better == "higher" else 1.0

    def order(row: Ranked) -> tuple[bool, int, float]:
        number = row.value.value if row.value is not None else None
        return row.rank is None, row.rank or 0, math.inf if number is None else sign * number

    return sorted(found, key=order)


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
        return value.reasons[0] if value.reasons else "invalid"
    return "one_block" if value.lower is None or value.upper is None else ""


def question(record: CaseRecord) -> str:
    """What two rows must have in common to be compared, as a short digest."""
    return _question(record.hardware, record.workload, record.model, record.spec)


@lru_cache(16_384)
def _question(*parts: str) -> str:
    *where, spec = parts
    return digest([*where, _setting(spec)])[:16]


def _sensor(value: MetricValue, by: Metric) -> str:
    """What two values must have in common besides: energy and memory their sensor and its scope, quality its figure."""
    return value.source if by.tags or by.name in _BY_SENSOR else ""


def _setting(spec: str) -> str:
    """What of a spec belongs to the question and not to the answer."""
    try:
        return canonical_json({k: v for k, v in json.loads(spec).items() if k not in _NOT_ITS_QUESTION})
    except (ValueError, AttributeError):
        return spec


def latest(records: Iterable[CaseRecord]) -> tuple[list[CaseRecord], list[CaseRecord]]:
    """The rows that count, and those that a later row of the same case on the same machine has replaced.

    A failed retry does not replace a good row: both count, so that the failure stays visible."""
    newest: dict[tuple[str, str], CaseRecord] = {}
    newest_ok: dict[tuple[str, str], CaseRecord] = {}
    records = sorted(records, key=lambda r: r.started_at or "")
    for record in records:
        key = (record.case_id, record.hardware)
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


def _num_better(rows: Sequence[Ranked], row: Metric) -> npt.NDArray[np.int64]:
    """For each row of one question, how many of the others are shown to be better; shape (rows,)."""
    values = [r.value for r in rows if r.value is not None]
    own = _bounds([(v.lower, v.upper) for v in values])
    ratio = _bounds([(v.ratio_lower, v.ratio_upper) for v in values])
    bases = [f"{r.record.baseline_case_id}@{r.record.env_id}" if r.record.baseline_case_id else "" for r in rows]
    cases = [f"{r.record.case_id}@{r.record.env_id}" for r in rows]
    codes = np.unique(["", *bases, *cases], return_inverse=True)[1]
    nothing, base, case = codes[0], codes[1 : len(rows) + 1], codes[len(rows) + 1 :]
    floor = np.array([_floor(r.record.protocol) for r in rows])
    paired = np.isfinite(ratio[:, 0]) & np.isfinite(ratio[:, 1])
    one = np.ones((1, 2))
    counts = np.zeros(len(rows), np.int64)
    for start in range(0, len(rows), _CHUNK):
        mine = slice(start, start + _CHUNK)
        least = np.maximum(floor[mine, None], floor[None, :])
        shown = _shown_better(own[mine], own, least, row.better)
        shared = (base[mine, None] == base[None, :]) & paired[mine, None] & paired[None, :] & (base[None, :] != nothing)
        shown = np.where(shared, _shown_better(ratio[mine], ratio, least, row.better), shown)
        other_is_baseline = (base[mine, None] == case[None, :]) & paired[mine, None]
        shown = np.where(other_is_baseline, _shown_better(ratio[mine], one, least, row.better), shown)
        i_am_baseline = (case[mine, None] == base[None, :]) & paired[None, :]
        shown = np.where(i_am_baseline, _shown_better(one, ratio, least, row.better), shown)
        counts[mine] = shown.sum(axis=1)
    return counts


def _shown_better(
    mine: npt.NDArray[np.float64],
    other: npt.NDArray[np.float64],
    floor: npt.NDArray[np.float64],
    better: Literal["lower", "higher", "none"],
) -> npt.NDArray[np.bool_]:
    """Whether `other` (columns) is shown to be better than `mine` (rows); bounds have shape (N, 2), the answer (N, M).

    The rule of `stats.verdict` for the interval [other lower / mine upper, other upper / mine lower]."""
    mine_low, mine_high = mine[:, None, 0], mine[:, None, 1]
    other_low, other_high = other[None, :, 0], other[None, :, 1]
    apart = other_high < mine_low if better == "lower" else other_low > mine_high
    with np.errstate(invalid="ignore", divide="ignore"):
        middle = np.sqrt((other_low * other_high) / (mine_low * mine_high))  # NaN where a sign differs: nothing is claimed
        far = (middle <= 1 - floor + 1e-12) | (middle >= 1 / (1 - floor) - 1e-12)
    answer: npt.NDArray[np.bool_] = apart & np.where(floor > 0, (floor < 1) & far, True)
    return answer


def _floor(protocol: str) -> float:
    return {SCREENING: SCREENING_FLOOR, NO_CLAIM: 1.0}.get(protocol, 0.0)


def _bounds(pairs: Sequence[tuple[float | None, float | None]]) -> npt.NDArray[np.float64]:
    return np.array([(np.nan, np.nan) if low is None or high is None else (low, high) for low, high in pairs]).reshape(-1, 2)
