"""The sliders of a board: at most this much memory, time or energy, at least this quality."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import streamlit as st

from effbench.analysis.board import Bound, first_usable
from effbench.analysis.table import interval_text, scale

_STEPS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)  # of a decade


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One slider. `metrics`: the first that a row has counts."""

    key: str
    title: str
    metrics: tuple[str, ...]
    at_most: bool = True


LIMITS = (
    Limit(key="memory", title="Memory at most", metrics=("device_memory_peak_bytes", "host_memory_peak_bytes")),
    Limit(key="tpot", title="TPOT at most", metrics=("tpot_s",)),
    Limit(key="step", title="Step at most", metrics=("step_p50_s",)),
    Limit(key="energy", title="Energy per token at most", metrics=("energy_j_per_token",)),
    Limit(key="quality", title="Quality at least", metrics=("quality",), at_most=False),
)


def offered(measured: Sequence[str]) -> list[Limit]:
    """The limits on what a workload has figures of; a step's length only where no token's time is known."""
    have = set(measured)
    return [limit for limit in LIMITS if have & set(limit.metrics) and not (limit.key == "step" and "tpot_s" in have)]


def with_steps(limits: Sequence[Limit], rows: pd.DataFrame) -> list[tuple[Limit, list[float]]]:
    """The limits that these rows can be told apart by, with their steps. `rows` has value and why of each limit's metrics."""
    return [(limit, found) for limit in limits if (found := steps(first_usable(rows, limit.metrics), at_most=limit.at_most))]


def sliders(shown: Sequence[tuple[Limit, list[float]]], units: Mapping[str, str]) -> list[Bound]:
    """Draw one slider for each limit (`with_steps`); the bounds that were chosen."""
    if not shown:
        return []
    bounds = []
    for (limit, numbers), column in zip(shown, st.columns(len(shown)), strict=True):
        unit = units.get(next(name for name in limit.metrics if name in units), "")
        options = {"no limit": math.nan, **{in_words(number, unit): number for number in numbers}}
        names = list(options)
        names = [*names[1:], names[0]] if limit.at_most else names
        chosen = column.select_slider(limit.title, names, value="no limit", key=limit.key, bind="query-params")
        if chosen != "no limit":
            bounds.append(Bound(metrics=limit.metrics, value=options[str(chosen)], at_most=limit.at_most))
    if bounds:
        st.caption("A row without a measured value does not meet a limit.")
    return bounds


def steps(values: np.ndarray, *, at_most: bool) -> list[float]:
    """Round numbers that span these values: 1, 1.5, 2, 3, 5, 7 of each decade. Values of one size have no steps."""
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return []
    low, high = float(values.min()), float(values.max())
    found = [
        step * 10.0**decade
        for decade in range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 2)
        for step in _STEPS
    ]
    below = [number for number in found if number <= low][-1:] if not at_most else []
    above = [number for number in found if number >= high][:1] if at_most else []
    return [*below, *(number for number in found if low < number < high), *above]


def in_words(number: float, unit: str) -> str:
    """A bound in a unit that is easy to read: '20 ms/token'."""
    factor, shown = scale([number], unit)
    return f"{float(interval_text(number * factor)):g} {shown}".strip()
