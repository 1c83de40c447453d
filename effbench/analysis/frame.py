"""Rows as a data frame, one line each: what figures, pages and claims are computed from.

Beside the columns of a row stand, for each metric M that was asked for,

    M                                    the value, NaN where it is missing
    M__lower, M__upper, M__n             its 95 % interval over n blocks
    M__ratio, M__ratio_lower, M__ratio_upper     the paired ratio to the row's baseline
    M__source                            what was read or computed, as text
    M__why                               the code that keeps it out of any ranking; empty where it may be used
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from effbench.analysis.rank import find, is_host_bound, is_screening, latest, question, why_unranked
from effbench.analysis.table import settings_labels
from effbench.schema import CaseRecord, MetricValue

if TYPE_CHECKING:
    import pandas as pd

ROW_COLUMNS = (
    "case_id", "env_id", "status", "reason", "suite", "workload", "model", "label", "techniques", "baseline_case_id", "hardware",
    "protocol", "started_at", "question", "setting", "host_bound", "screening",
)  # fmt: skip
NUMBERS = ("value", "lower", "upper", "n", "ratio", "ratio_lower", "ratio_upper")


def column(name: str, part: str) -> str:
    """The column of one part of a metric: its value has the metric's own name."""
    return name if part == "value" else f"{name}__{part}"


def metric_columns(name: str) -> list[str]:
    """All columns of one metric."""
    return [column(name, part) for part in (*NUMBERS, "source", "why")]


def frame_of(records: Iterable[CaseRecord], metrics: Sequence[str], *, spec: bool = False) -> pd.DataFrame:
    """The rows that count (`rank.latest`) with these metrics; the index is `run_id`, `spec` adds the canonical JSON."""
    import pandas as pd

    rows = latest(records)[0]
    labels = settings_labels(rows)
    host_bound = [is_host_bound(row) for row in rows]
    lines = {
        **{name: [getattr(row, name) for row in rows] for name in ROW_COLUMNS[:-4]},
        "question": (questions := [question(row) for row in rows]),
        "setting": [labels.get(asked, "") for asked in questions],
        "host_bound": np.array(host_bound, bool),
        "screening": np.array([is_screening(row) for row in rows], bool),
        **({"spec": [row.spec for row in rows]} if spec else {}),
    }
    for name in metrics:
        found = [find(row, name) for row in rows]
        lines |= {column(name, part): _numbers(found, part) for part in NUMBERS}
        lines[column(name, "source")] = [value.source if value else "" for value in found]
        lines[column(name, "why")] = [
            why_unranked(row, value, host_bound=bound) for row, value, bound in zip(rows, found, host_bound, strict=True)
        ]
    return pd.DataFrame(lines, index=pd.Index([row.run_id for row in rows], name="run_id"))


def _numbers(values: Sequence[MetricValue | None], part: str) -> np.ndarray:
    numbers = [getattr(value, part) if value else None for value in values]
    return np.array([np.nan if number is None else number for number in numbers], np.float64)
