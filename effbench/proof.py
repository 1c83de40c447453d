"""Do rows follow from their raw traces? The one comparison behind `effbench export --recompute` and `effbench verify`. numpy only.

launch ──recomputed──▶ launch with its metrics from the trace ──row_metrics──▶ the row's metrics ──differences──▶ what is another number
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from effbench.pairing import case_metrics
from effbench.recompute import launch_metrics
from effbench.schema import CaseRecord, Launch, MetricValue, Reading, Trace

RELATIVE_TOLERANCE = 1e-9  # the same code on the same numbers; only the order of additions may differ
NUMBERS = ("value", "lower", "upper", "ratio", "ratio_lower", "ratio_upper")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric that is another in a record than from the traces; None where one of the two has no such metric."""

    name: str
    kept: MetricValue | Reading | None
    fresh: MetricValue | Reading | None

    @property
    def unit(self) -> str:
        return next((str(m.unit) for m in (self.fresh, self.kept) if m is not None), "")

    def told(self, where: str) -> str:
        """One sentence without its unit: 'al_s is 0.1 in the row and 0.2 from the traces'."""
        return f"{self.name} is {_value(self.kept)} in the {where} and {_value(self.fresh)} from the traces"


def recomputed(launch: Launch, trace: Trace) -> Launch:
    """The launch with its metrics computed from its trace."""
    metrics = launch_metrics(spec=launch.spec, windows=launch.windows, facts=launch.facts, trace=trace, reasons=launch.reasons)
    return replace(launch, metrics=metrics)


def row_metrics(row: CaseRecord, own: Sequence[Launch], baselines: Sequence[Launch]) -> tuple[MetricValue, ...]:
    """The metrics of a row from its launches, whose own metrics are computed from their traces."""
    return case_metrics(own, baselines if row.baseline_case_id else None) if own else ()


def differences(
    kept: Sequence[MetricValue] | Sequence[Reading], fresh: Sequence[MetricValue] | Sequence[Reading]
) -> Iterator[Difference]:
    """Metrics whose numbers, count of blocks or validity are others, by name."""
    ours: dict[str, MetricValue | Reading] = {m.name: m for m in kept}
    right: dict[str, MetricValue | Reading] = {m.name: m for m in fresh}
    for name in sorted(ours.keys() | right.keys()):
        if not _same(right.get(name), ours.get(name)):
            yield Difference(name=name, kept=ours.get(name), fresh=right.get(name))


def _same(a: MetricValue | Reading | None, b: MetricValue | Reading | None) -> bool:
    if a is None or b is None:
        return a is b
    numbers = all(_close(getattr(a, name, None), getattr(b, name, None)) for name in NUMBERS)
    return getattr(a, "n", 0) == getattr(b, "n", 0) and a.valid == b.valid and numbers


def _close(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-300)


def _value(metric: MetricValue | Reading | None) -> str:
    return "absent" if metric is None else "null" if metric.value is None else f"{metric.value:.6g}"
