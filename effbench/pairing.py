"""Launches → a case: each launch one number per metric, each block one pair, and an interval over the blocks.

The block is the unit of replication; what happens inside a launch is `recompute.py`'s. numpy only, like the rest of level 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from effbench import stats
from effbench.metrics import metric, table_order
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
    tasks = {f"quality_change.{n.partition('.')[2]}": _change_of(n) for n in names if n.startswith("task_accuracy.")}
    values += [
        _compared(n, of_block, ok, paired, table, baselines is None) for n, of_block in {**_COMPARISONS, **tasks}.items()
    ]
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


_Block = tuple[float | None, str, str]  # value, else the reason; what it stands on


def _compared(
    name: str,
    of_block: Callable[[Launch, Launch, _Table], _Block],
    ok: Sequence[Launch],
    paired: Mapping[str, Launch],
    table: _Table,
    is_reference: bool,
) -> MetricValue:
    """A metric that a block has only with its baseline: one number per block, and an interval over them."""
    values: list[float] = []
    reasons, sources = [], set()
    for launch in ok:
        base = paired.get(launch.block_id)
        value, reason, source = of_block(launch, base, table) if base else (None, "baseline_failed", "")
        sources.add(source)
        if value is None:
            reasons.append(reason)
        else:
            values.append(value)
    if is_reference:
        values, reasons = [], ["no_baseline"]
    interval = stats.block_interval(values, plain=name.startswith("quality_change"))
    return MetricValue(
        name=name, value=interval.value, lower=interval.lower, upper=interval.upper, n=interval.n, ratio=None,
        ratio_lower=None, ratio_upper=None, unit=metric(name).unit, valid=bool(values),
        source=" · ".join(sorted(sources - {""})), reasons=tuple(dict.fromkeys(reasons)),
    )  # fmt: skip


def _qualities(
    launch: Launch, base: Launch, table: _Table, name: str = "quality"
) -> tuple[tuple[float, float] | None, str, str]:
    """(own, baseline) quality of a block where both name the same figure, else the reason; the figure."""
    own, other = (table[side.launch_id].get(name) for side in (launch, base))
    if own is None or other is None or own.value is None or other.value is None:
        wrong = "quality_not_higher_is_better"
        given = [reason for side in (own, other) if side is not None for reason in side.reasons]
        return None, wrong if wrong in given else "no_quality", ""
    if own.source != other.source:
        return None, "quality_not_comparable", ""
    return (own.value, other.value), "", own.source


def _mcr(launch: Launch, base: Launch, table: _Table) -> _Block:
    """EfficientLLM, equation 9, from measured stored bytes."""
    size, base_size = (table[side.launch_id]["weight_bytes"].value for side in (launch, base))
    return _rate(size, base_size, "no_quality", "stored bytes and", launch, base, table)


def _mcr_nominal(launch: Launch, base: Launch, table: _Table) -> _Block:
    """The same from the bits in the formats' names, as the paper's tables have it."""
    bits, base_bits = (side.facts.get("nominal_bits") for side in (launch, base))
    return _rate(bits, base_bits, "no_nominal_bits", "nominal bits and", launch, base, table)


def _rate(
    size: float | None, base_size: float | None, absent: str, what: str, launch: Launch, base: Launch, table: _Table
) -> _Block:
    qualities, reason, figure = _qualities(launch, base, table)
    if qualities is None or not qualities[1]:
        return None, reason or "no_quality", ""
    if not (size and base_size):
        return None, absent, ""
    return (base_size / size) * (qualities[0] / qualities[1]), "", f"{what} {figure}"


def _change_of(name: str) -> Callable[[Launch, Launch, _Table], _Block]:
    """The absolute change of a quality figure, where its ratio is the relative one."""

    def change(launch: Launch, base: Launch, table: _Table) -> _Block:
        qualities, reason, figure = _qualities(launch, base, table, name)
        return (None, reason, "") if qualities is None else (qualities[0] - qualities[1], "", figure)

    return change


_COMPARISONS = {"mcr": _mcr, "mcr_nominal": _mcr_nominal, "quality_change": _change_of("quality")}
