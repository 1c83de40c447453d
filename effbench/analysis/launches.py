"""The launches and raw traces of a few rows, without reading those of all the others.

A results directory may hold a hundred thousand launches, each with kilobytes of facts. So the ids alone are read first, then, of the
files that hold a wanted one, the columns that a page needs.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from effbench.analysis.reproduce import read_spec
from effbench.errors import StoreError
from effbench.schema import CaseRecord, Series, Spec, Window
from effbench.store import Store, read_file

_COLUMNS = [
    "launch_id",
    "schema_version",
    "spec",
    "block",
    "position",
    "status",
    "reason",
    "detail",
    "started_at",
    "windows",
    "reasons",
]
TRACE_COLUMNS = ("launch", "side", "launch_id", "block", "series", "unit", "scope", "source", "t_s", "since_s", "value")


@dataclass(frozen=True, kw_only=True)
class LaunchOfRow:
    """What a page says of one launch. `windows` are in s on the launch's clock; `spec` is None where it cannot be read."""

    launch_id: str
    side: str  # "row" or "baseline"
    block: int
    position: int
    status: str
    reason: str
    detail: str
    started_at: str
    reasons: tuple[str, ...]
    windows: dict[str, Window] = field(default_factory=dict)
    spec: Spec | None = None

    @property
    def label(self) -> str:
        return f"block {self.block}" + (" · baseline" if self.side == "baseline" else "")

    @property
    def window_start_s(self) -> float:
        """Where the measured window begins; the birth of the launch where there was no window."""
        return self.windows["window"].start_s if "window" in self.windows else 0.0

    @property
    def warm_up_s(self) -> float:
        """From the start of warm-up to the start of the window; 0 where one of them was not."""
        both = "warm_up" in self.windows and "window" in self.windows
        return self.window_start_s - self.windows["warm_up"].start_s if both else 0.0


@dataclass(frozen=True, kw_only=True)
class Launches:
    """The launches of a row that were found, own ones first, each by block; and a sentence for each that was not."""

    rows: tuple[LaunchOfRow, ...]
    warnings: tuple[str, ...]

    @property
    def baseline(self) -> Spec | None:
        """What the row was compared with, as its baseline's launches say."""
        return next((launch.spec for launch in self.rows if launch.side == "baseline" and launch.spec), None)


def launches_of(store: Store, record: CaseRecord) -> Launches:
    """The launches that a row names. Never raises: what cannot be read is named in the warnings."""
    side = dict.fromkeys(record.baseline_launch_ids, "baseline") | dict.fromkeys(record.launch_ids, "row")
    found: dict[str, LaunchOfRow] = {}
    warnings: list[str] = []
    try:
        paths = [path for path, _ in store.files("launches")]
    except StoreError as fault:
        paths, warnings = [], [str(fault)]
    for path in paths:
        if len(found) == len(side):
            break
        try:
            for row in _rows(path, side.keys() - found.keys()):
                found[row["launch_id"]] = _launch(row, side[row["launch_id"]])
        except FileNotFoundError:
            warnings.append(f"{path} was merged meanwhile: reload the page.")
        except StoreError as fault:
            warnings.append(f"Skipped: {fault}")
        except (TypeError, ValueError, AttributeError) as fault:
            warnings.append(f"Skipped a launch in {path}: its row is damaged ({str(fault) or type(fault).__name__}).")
    lost = [launch_id for launch_id in side if launch_id not in found]
    if lost:
        warnings.append(f"{len(lost)} of the row's {len(side)} launches are not in {store.path}: {', '.join(lost[:6])}.")
    rows = sorted(found.values(), key=lambda launch: (launch.side == "baseline", launch.block, launch.position))
    return Launches(rows=tuple(rows), warnings=tuple(warnings))


def _rows(path: Path, wanted: Collection[str]) -> list[dict[str, Any]]:
    """The rows of one file that are wanted; the other columns are read only where there are some. Raises as `read_file`."""
    mask = pc.is_in(read_file(path, "launches", ["launch_id"])["launch_id"], pa.array(sorted(wanted), pa.string()))
    if not pc.any(mask).as_py():
        return []
    return list(read_file(path, "launches", _COLUMNS).filter(mask).to_pylist())


def _launch(row: dict[str, Any], side: str) -> LaunchOfRow:
    texts = {name: row[name] or "" for name in ("launch_id", "status", "reason", "detail", "started_at")}
    return LaunchOfRow(
        **texts,
        side=side,
        block=row["block"] or 0,
        position=row["position"] or 0,
        reasons=tuple(row["reasons"] or ()),
        windows=_windows(row["windows"] or "{}"),
        spec=read_spec(row["spec"] or ""),
    )


def _windows(text: str) -> dict[str, Window]:
    """The windows of a launch; none where a text of another hand does not say them."""
    try:
        return {name: Window(**window) for name, window in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def trace_frame(store: Store, launches: Sequence[LaunchOfRow]) -> tuple[pd.DataFrame, list[str]]:
    """The raw series of these launches, one line a sample, TRACE_COLUMNS; and a sentence for each trace that is missing.

    `t_s` is on the launch's clock, `since_s` counts from the start of its window; `value` is in `unit`."""
    parts, missing = [], []
    for launch in launches:
        try:
            trace = store.trace(launch.launch_id)
        except StoreError as fault:
            missing.append(f"{launch.label}: {fault}")
            continue
        parts += [_samples(launch, series) for series in trace.series if len(series.t_s)]
        empty = [series.name for series in trace.series if not len(series.t_s)]
        missing += [f"{launch.label}: the sensor {name} gave no samples." for name in empty]
    frame = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(TRACE_COLUMNS))
    texts = ("launch", "side", "launch_id", "series", "unit", "scope", "source")
    return frame.astype(dict.fromkeys(texts, "category")), missing  # a trace repeats few texts millions of times


def _samples(launch: LaunchOfRow, series: Series) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "launch": launch.label,
            "side": launch.side,
            "launch_id": launch.launch_id,
            "block": launch.block,
            "series": series.name,
            "unit": series.unit,
            "scope": series.scope,
            "source": series.source,
            "t_s": series.t_s,
            "since_s": series.t_s - launch.window_start_s,
            "value": series.values,
        }
    )
