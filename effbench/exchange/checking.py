"""What all checks share: findings, names, numbers of another hand, and a guard, so that no record can end a check.

A check is a generator of findings. What it raises on a record becomes a finding itself: a record that cannot be checked is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from effbench.exchange.limits import MESSAGE_CHARACTERS
from effbench.exchange.report import Finding
from effbench.schema import CaseRecord, Launch, Series, Spec, Trace, Window

Array = npt.NDArray[np.float64]
OWN = "effbench:"  # how the identity of a built-in workload begins
SENSORS_OF_STEPS = ("warm_up_step", "step")


def refused(check: str, where: str, message: str) -> Finding:
    """What no honest record shows."""
    return Finding(check=check, severity="refused", message=shown(message, MESSAGE_CHARACTERS - 1), where=where)


def remark(check: str, where: str, message: str) -> Finding:
    """What should make one look twice."""
    return Finding(check=check, severity="remark", message=shown(message, MESSAGE_CHARACTERS - 1), where=where)


def guarded(check: str, where: str, run: Callable[..., Iterable[Finding]], *given: Any) -> list[Finding]:
    """The findings of a check; where it raises, what it found before and one that says so."""
    found: list[Finding] = []
    try:
        found.extend(run(*given))
    except Exception as fault:
        about = shown(f"{type(fault).__name__}: {fault}", 120)
        found.append(refused(check, where, f"the record cannot be checked ({about})"))
    return found


def number(value: Any) -> float | None:
    """A finite number, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    try:
        plain = float(value)
    except OverflowError:
        return None
    return plain if math.isfinite(plain) else None


def text_number(value: Any) -> float | None:
    """A finite number that was written as text, as provenance has it."""
    try:
        return number(float(value)) if isinstance(value, str) else number(value)
    except ValueError:
        return None


def shown(value: Any, most: int = 40) -> str:
    """A text of another hand for a message: one line, printable, short."""
    try:
        plain = value if isinstance(value, str) else repr(value)
    except Exception:
        plain = f"a {type(value).__name__}"
    plain = "".join(c if c.isprintable() else "?" for c in plain[: most + 1])
    return plain if len(plain) <= most else f"{plain[:most]}…"


def row_name(row: CaseRecord) -> str:
    return f"row {shown(row.run_id, 12)}"


def launch_name(launch_id: Any) -> str:
    return f"launch {shown(launch_id, 12)}"


def read_spec(text: Any) -> Spec | None:
    """The spec of a row; None where the text is none."""
    try:
        spec = Spec.from_json(json.loads(text))
        spec.spec_id  # noqa: B018  (what cannot be digested is no spec)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return spec


@dataclass(frozen=True)
class Seen:
    """One launch beside its trace, as checks look at it. Times in s on the launch's clock."""

    launch: Launch
    trace: Trace

    @cached_property
    def where(self) -> str:
        return launch_name(self.launch.launch_id)

    @cached_property
    def series(self) -> Mapping[str, Series]:
        """Series that have samples, by name."""
        return {s.name: s for s in self.trace.series if len(s.t_s)}

    @property
    def window(self) -> Window:
        return self.launch.windows["window"]

    @cached_property
    def step_start_s(self) -> Array:
        return self.series["step"].t_s if "step" in self.series else np.empty(0)

    @cached_property
    def step_s(self) -> Array:
        return self.series["step"].values if "step" in self.series else np.empty(0)

    @cached_property
    def end_s(self) -> float:
        """The end of the last stretch that the launch recorded."""
        return max((w.end_s for w in self.launch.windows.values()), default=0.0)

    @property
    def gpu(self) -> bool:
        return self.launch.spec.device == "cuda"

    @property
    def own_workload(self) -> bool:
        """Whether the workload is one of effbench's: its steps are all alike."""
        return self.launch.spec.workload_identity.startswith(OWN)

    def fact(self, name: str) -> float | None:
        return number(self.launch.facts.get(name))

    def provenance(self, name: str) -> float | None:
        return text_number(self.launch.provenance.get(name))

    def inside(self, name: str) -> Array:
        """Values of a series within the window, none where there is no such series."""
        if name not in self.series:
            return np.empty(0)
        series, window = self.series[name], self.window
        return series.values[(series.t_s >= window.start_s) & (series.t_s <= window.end_s)]

    def grown(self, name: str) -> tuple[float, float] | None:
        """How much a cumulative series grew from its first to its last sample, and in how many s."""
        if name not in self.series or len(self.series[name].t_s) < 2:
            return None
        series = self.series[name]
        return float(series.values[-1] - series.values[0]), float(series.t_s[-1] - series.t_s[0])


def step_ticks(lengths_s: Array) -> npt.NDArray[np.int64]:
    """Lengths of steps in whole ns."""
    return np.rint(lengths_s * 1e9).astype(np.int64)
