"""Launches → a case: each launch one number per metric, each block one pair, and an interval over the blocks.

The block is the unit of replication; what happens inside a launch is `recompute.py`'s. numpy only, like the rest of level 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from effbench import stats
from effbench.metrics import METRICS, table_order
from effbench.schema import Launch, MetricValue, Reading


def case_metrics(launches: Sequence[Launch], baselines: Sequence[Launch] | None) -> tuple[MetricValue, ...]:
    """Every metric of a case over its blocks, each block one number; ratios pair a launch with its block's baseline."""
    ok = [launch for launch in launches if launch.status == "ok"]
    paired = {launch.block_id: launch for launch in baselines or () if launch.status == "ok"}
    if not ok:
        return ()
    names = list(dict.fromkeys(r.name for launch in ok for r in launch.metrics))
    table = {launch.launch_id: {r.name: r for r in launch.metrics} for launch in (*ok, *paired.values())}
    values = [_case_value(name, ok, paired, table, is_reference=baselines is None) for name in names]
    values.append(_mcr(ok, paired, table, is_reference=baselines is None))
    return tuple(sorted(values, key=lambda v: table_order(v.name)))


_Table = Mapping[str, Mapping[str, Reading]]


def _case_value(
    name: str, ok: Sequence[Launch], paired: Mapping[str, Launch], table: _Table, *, is_reference: bool
) -> MetricValue:
    readings = [table[launch.launch_id].get(name) for launch in ok]
    present = [r for r in readings if r is not None]
    # An invalid reading keeps its number in the launch's row; only valid ones enter an interval.
    numbers = [r.value for r in present if r.value is not None and r.valid]
    reasons = list(dict.fromkeys(reason for r in present for reason in r.reasons))
    interval = stats.block_interval(numbers)
    ratio, why = _paired(name, ok, paired, table) if not is_reference else (stats.block_interval([]), "no_baseline")
    if numbers and len(numbers) < len(ok):
        reasons.append("missing_in_some_blocks")
    if numbers:
        reasons.extend(interval.reasons)
    if numbers and ratio.value is None and why != "no_baseline":
        reasons.append(why)
    sources = list(dict.fromkeys(r.source for r in present if r.source))
    scopes = list(dict.fromkeys(r.scope for r in present if r.scope))
    return MetricValue(
        name=name, value=interval.value, lower=interval.lower, upper=interval.upper, n=interval.n,
        ratio=ratio.value, ratio_lower=ratio.lower, ratio_upper=ratio.upper, unit=present[0].unit,
        source=" · ".join((*sources, *scopes)), valid=bool(numbers), reasons=tuple(dict.fromkeys(reasons)),
    )  # fmt: skip


def _paired(name: str, ok: Sequence[Launch], paired: Mapping[str, Launch], table: _Table) -> tuple[stats.Interval, str]:
    own: list[float] = []
    other: list[float] = []
    for launch in ok:
        base = paired.get(launch.block_id)
        if base is None:
            continue
        pair = [
            r.value for side in (launch, base) if (r := table[side.launch_id].get(name)) and r.valid and r.value is not None
        ]
        if len(pair) == 2:
            own.append(pair[0])
            other.append(pair[1])
    if not own:
        return stats.block_interval([]), "baseline_failed"
    if min(*own, *other) <= 0:
        return stats.block_interval([]), "not_positive"
    return stats.paired_ratio(own, other), ""


def _mcr(ok: Sequence[Launch], paired: Mapping[str, Launch], table: _Table, *, is_reference: bool) -> MetricValue:
    """The paper's compression rate per block: measured stored bytes, times the quality kept."""
    rates, reasons, figures = [], [], set()
    for launch in ok:
        base = paired.get(launch.block_id)
        rate, reason, figure = _mcr_of_block(table[launch.launch_id], table[base.launch_id] if base else None)
        figures.add(figure)
        if rate is None:
            reasons.append(reason)
        else:
            rates.append(rate)
    if is_reference:
        rates, reasons = [], ["no_baseline"]
    interval = stats.block_interval(rates)
    return MetricValue(
        name="mcr", value=interval.value, lower=interval.lower, upper=interval.upper, n=interval.n, ratio=None,
        ratio_lower=None, ratio_upper=None, unit=METRICS["mcr"].unit, valid=bool(rates),
        source=f"stored bytes and {' · '.join(sorted(figures - {''}))}" if figures - {""} else "stored bytes",
        reasons=tuple(dict.fromkeys(reasons)),
    )  # fmt: skip


def _mcr_of_block(own: Mapping[str, Reading], base: Mapping[str, Reading] | None) -> tuple[float | None, str, str]:
    if base is None:
        return None, "baseline_failed", ""
    size, quality = own["weight_bytes"].value, own["quality"].value
    base_size, base_quality = base["weight_bytes"].value, base["quality"].value
    if not (size and base_size and quality and base_quality):
        return None, "no_quality", ""
    if own["quality"].source != base["quality"].source:
        return None, "quality_not_comparable", ""
    return (base_size / size) * (quality / base_quality), "", own["quality"].source
