"""Is a row plausible? Each check looks at what one row says of itself and answers, or does not apply.

A check finds what cannot be (an `error`: do not use the number) and what should make one look twice (a `warning`). Passing
all of them proves nothing; that a row follows from its raw traces is shown by `effbench export --recompute`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from effbench.metrics import METRICS
from effbench.protocol import PROTOCOLS
from effbench.schema import CaseRecord, MetricValue

Severity = Literal["error", "warning"]
Values = Mapping[str, MetricValue]
SLACK = 0.05  # relative; two sensors or two medians of one window may differ by this much
_TIMES = ("al_s", "step_p50_s", "step_p95_s", "step_p99_s", "ttft_s", "tpot_s", "itl_p99_s")
_MAY_BE_NEGATIVE = (
    "energy_net_j_per_token",
    "energy_net_j_per_step",
    "quality_change",
)  # below idle power; worse than the baseline
_SHARES = ("pcu", "mfu", "mfu_datasheet", "bandwidth_share", "sm_activity", "tensor_activity", "dram_activity")


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of one check. `message` says what was found, in units."""

    name: str
    passed: bool
    message: str
    severity: Severity


def run_checks(record: CaseRecord) -> list[Check]:
    """Every check that applies to this row, in order."""
    values = {value.name: value for value in record.metrics if value.value is not None}
    if record.status != "ok":
        return [_status(record)]
    found: list[Check | None] = [_status(record), _blocks(record, values)]
    found += [check(values) for check in _CHECKS]
    return [check for check in found if check is not None]


def failed(record: CaseRecord) -> list[Check]:
    """The checks that did not pass, errors first."""
    return sorted((check for check in run_checks(record) if not check.passed), key=lambda check: check.severity)


def _status(record: CaseRecord) -> Check:
    message = "the case was measured" if record.status == "ok" else f"{record.status}: {record.reason or 'no reason given'}"
    return Check(name="status", passed=record.status == "ok", message=message, severity="error")


def _blocks(record: CaseRecord, values: Values) -> Check | None:
    """As many blocks as the protocol asks for, and no metric that counts more blocks than there were launches."""
    asked = PROTOCOLS[record.protocol].blocks if record.protocol in PROTOCOLS else 2
    counts = [value.n for value in values.values()]
    had = max(counts, default=0)
    passed = asked <= had <= len(record.launch_ids)
    message = f"{had} blocks of {len(record.launch_ids)} launches; {record.protocol} asks for {asked}"
    return Check(name="blocks", passed=passed, message=message, severity="warning" if had < asked else "error")


def _positive(values: Values) -> Check | None:
    """Times are above zero, everything else is not below it."""
    wrong = [f"{name} = {_number(values, name):g}" for name in _TIMES if name in values and _number(values, name) <= 0]
    others = [name for name in values if name not in _TIMES and name in METRICS and name not in _MAY_BE_NEGATIVE]
    wrong += [f"{name} = {_number(values, name):g}" for name in others if _number(values, name) < 0]
    return _result("positive", not wrong, "; ".join(wrong) or "times are above zero, nothing is below", "error", values)


def _intervals(values: Values) -> Check | None:
    """A value lies in its interval, a ratio in its own."""
    wrong = []
    for name, value in values.items():
        for middle, low, high, what in (
            (value.value, value.lower, value.upper, "value"),
            (value.ratio, value.ratio_lower, value.ratio_upper, "ratio"),
        ):
            if middle is not None and low is not None and high is not None:
                slack = 1e-9 * max(abs(low), abs(high))
                if not low - slack <= middle <= high + slack:
                    wrong.append(f"{what} of {name} {middle:g} outside {low:g}–{high:g}")
    return _result("intervals", not wrong, "; ".join(wrong) or "values lie in their intervals", "error", values)


def _percentiles(values: Values) -> Check | None:
    """p50 ≤ p95 ≤ p99 of the step times."""
    names = [name for name in ("step_p50_s", "step_p95_s", "step_p99_s") if name in values]
    if len(names) < 2:
        return None
    steps = [_number(values, name) for name in names]
    passed = all(low <= high * (1 + 1e-9) for low, high in pairwise(steps))
    return _result("percentiles", passed, " ≤ ".join(f"{step:g} s" for step in steps), "error", values)


def _throughput(values: Values) -> Check | None:
    """Tokens/s × mean step time is the tokens of a step: a whole number, and the same one that the energy was divided by."""
    if not {"tokens_per_s", "al_s"} <= values.keys():
        return None
    tokens = _number(values, "tokens_per_s") * _number(values, "al_s")
    passed = tokens > 0 and abs(tokens - round(tokens)) <= 0.01
    message = f"tokens/s × step time = {tokens:.6g} tokens a step"
    if passed and {"energy_j_per_step", "energy_j_per_token"} <= values.keys() and _number(values, "energy_j_per_token") > 0:
        by_energy = _number(values, "energy_j_per_step") / _number(values, "energy_j_per_token")
        passed = abs(by_energy / tokens - 1) <= SLACK
        message += f", energy per step ÷ per token = {by_energy:.6g}"
    return _result("throughput", passed, message, "warning", values)


def _energy(values: Values) -> Check | None:
    """Energy per step is mean power × step time, or more: the window has gaps between steps, but not below 5 %."""
    if not {"energy_j_per_step", "aec_w", "al_s"} <= values.keys():
        return None
    expected_j, given_j = _number(values, "aec_w") * _number(values, "al_s"), _number(values, "energy_j_per_step")
    passed = expected_j * (1 - SLACK) <= given_j <= expected_j * 2
    message = f"{given_j:g} J a step; mean power × step time = {expected_j:g} J"
    return _result("energy", passed, message, "warning", values)


def _memory(values: Values) -> Check | None:
    """The peak of the memory that holds the weights is not below their size."""
    peak = next((name for name in ("device_memory_peak_bytes", "host_memory_peak_bytes") if name in values), None)
    if peak is None or "weight_bytes" not in values:
        return None
    passed = _number(values, peak) >= _number(values, "weight_bytes") * (1 - SLACK)
    message = f"{peak} = {_number(values, peak):g} B, weights = {_number(values, 'weight_bytes'):g} B"
    return _result("memory", passed, message, "error" if peak.startswith("device") else "warning", values)


def _shares(values: Values) -> Check | None:
    """No share of a ceiling is above 1; the ceilings are measured too, hence the slack."""
    given = [name for name in _SHARES if name in values]
    wrong = [f"{name} = {_number(values, name):g}" for name in given if _number(values, name) > 1 + SLACK]
    return _result("shares", not wrong, "; ".join(wrong) or "no share is above 1", "error", given)


_CHECKS: tuple[Callable[[Values], Check | None], ...] = (
    _positive,
    _intervals,
    _percentiles,
    _throughput,
    _energy,
    _memory,
    _shares,
)


def _number(values: Values, name: str) -> float:
    number = values[name].value
    assert number is not None, "run_checks passes only metrics that have a value"
    return number


def _result(name: str, passed: bool, message: str, severity: Severity, applies_to: Iterable[str]) -> Check | None:
    return Check(name=name, passed=passed, message=message, severity=severity) if any(True for _ in applies_to) else None
