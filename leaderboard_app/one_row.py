"""One row as tables and as files: what the run page shows and gives away, without the page."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from effbench.analysis.compare import ratio_words
from effbench.analysis.launches import LaunchOfRow, trace_frame
from effbench.analysis.rank import find, is_host_bound, ratio_verdict
from effbench.analysis.table import HEADLINE, explain, interval, scale
from effbench.metrics import metric, table_order
from effbench.schema import CaseRecord, MetricValue
from effbench.stats import percentile, tail_is_resolved
from effbench.store import Store
from leaderboard_app.downloads import neutral

PERCENTILES = {"p50": 50.0, "p95": 95.0, "p99": 99.0}


def metrics_frame(record: CaseRecord) -> pd.DataFrame:
    """One line a metric of the row, in the order of the metric table."""
    lines = []
    for value in sorted(record.metrics, key=lambda v: (v.name != HEADLINE, table_order(v.name))):
        factor, unit = scale([value.value], value.unit)
        line = {
            "metric": metric(value.name).title,
            "shown": None if value.value is None else interval(value, factor) + ("" if value.valid else " (invalid)"),
            "unit": unit or value.unit,
            "n": value.n,
            "ratio": ratio_words(value.ratio, value.ratio_lower, value.ratio_upper) or None,
            "verdict": ratio_verdict(record, value, host_bound=is_host_bound(record)),
            "source": value.source,
            "remarks": "; ".join(map(explain, value.reasons)),
            "value": np.nan if value.value is None else value.value,
            "name": value.name,
            "formula": metric(value.name).formula,
        }
        lines.append(line)
    columns = ["metric", "shown", "unit", "n", "ratio", "verdict", "source", "remarks", "value", "name", "formula"]
    return pd.DataFrame(lines, columns=columns)


def ratio_text(record: CaseRecord, value: MetricValue) -> str:
    said = ratio_verdict(record, value, host_bound=is_host_bound(record))
    return " ".join(filter(None, (f"{ratio_words(value.ratio, None, None)} baseline" if value.ratio is not None else "", said)))


def launches_frame(launches: Sequence[LaunchOfRow]) -> pd.DataFrame:
    """One line a launch: how it went and how long its phases were, in s."""
    lines = [
        {
            "launch": launch.label,
            "status": launch.status,
            "remarks": "; ".join(map(explain, filter(None, (launch.reason, *launch.reasons)))),
            **{
                f"{name}_s": phase_length(launch, phase)
                for name, phase in (("build", "build"), ("warm_up", "warm_up"), ("window", "window"))
            },
            "ended_by": launch.windows["window"].ended_by if "window" in launch.windows else None,
            "position": launch.position,
            "started": launch.started_at,
            "launch_id": launch.launch_id,
        }
        for launch in launches
    ]
    return pd.DataFrame(lines)


def phase_length(launch: LaunchOfRow, phase: str) -> float | None:
    return launch.windows[phase].length_s if phase in launch.windows else None


def percentile_frame(steps: pd.DataFrame) -> pd.DataFrame:
    """Percentiles of each launch in ms, and which of them fewer steps than needed stand behind."""
    lines = []
    for launch, part in steps.groupby("launch", sort=False):
        found = {name: percentile(part["value"].to_numpy(), percent) for name, percent in PERCENTILES.items()}
        open_ = [name for name, percent in PERCENTILES.items() if not tail_is_resolved(len(part), percent)]
        milliseconds = {f"{name}_ms": None if value is None else 1e3 * value for name, value in found.items()}
        tail = f"{' and '.join(open_)} of {len(part)} steps is little more than the maximum" if open_ else "resolved"
        lines.append({"launch": str(launch), "steps": len(part), **milliseconds, "tail": tail})
    return pd.DataFrame(lines)


def why_missing(record: CaseRecord, metrics: Sequence[str]) -> str:
    """The reasons of the metrics that would have come from these series."""
    found = [find(record, name) for name in metrics]
    reasons = dict.fromkeys(reason for value in found if value is not None and value.value is None for reason in value.reasons)
    return "; ".join(map(explain, reasons)) or "the row does not say why"


def row_json(record: CaseRecord) -> bytes:
    """The row as one JSON document."""
    return json.dumps(asdict(record) | {"spec": _parsed(record.spec)}, indent=1, ensure_ascii=False).encode(
        "utf-8", "backslashreplace"
    )


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def trace_csv(store: Store, launches: Sequence[LaunchOfRow]) -> bytes:
    """All samples as CSV, texts neutral in a spreadsheet."""
    frame, _ = trace_frame(store, launches)
    texts = {name: frame[name].map(neutral) for name in ("series", "unit", "scope", "source", "launch_id")}
    text: str = frame.assign(**texts).to_csv(index=False)
    return text.encode("utf-8", "backslashreplace")


def trace_parquet(store: Store, launches: Sequence[LaunchOfRow]) -> bytes:
    """All samples as parquet."""
    sink = io.BytesIO()
    trace_frame(store, launches)[0].to_parquet(sink, index=False)
    return sink.getvalue()
