"""The part of the run page that shows a row's launches and their raw traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st

from effbench.analysis.launches import Launches, LaunchOfRow, launches_of, trace_frame
from effbench.analysis.rank import find
from effbench.errors import StoreError
from effbench.schema import CaseRecord
from effbench.store import Store
from leaderboard_app.downloads import chart
from leaderboard_app.figures import traces
from leaderboard_app.one_row import PERCENTILES, launches_frame, percentile_frame, why_missing

MOST_LAUNCHES = 12  # drawn in one figure
# Each figure of sensors: its key and title, the unit of its series, and the metrics whose reasons say why it may be missing.
SENSORS = (
    ("power", "Power", "W", ("aec_w", "energy_j_per_step")),
    ("memory", "Memory", "B", ("host_memory_peak_bytes", "device_memory_peak_bytes")),
    ("clocks", "Clocks", "MHz", ("sm_activity", "device_memory_peak_bytes")),
    ("utilisation", "Utilisation", "ratio", ("sm_activity", "gpu_idle_share")),
)


def read_launches(store: Store, record: CaseRecord) -> Launches:
    """The row's launches, read once for each state of the files and shared by all viewers."""
    try:
        found: Launches = _launches(str(store.path), store.fingerprint("launches"), record.run_id, record)
    except StoreError as fault:
        return Launches(rows=(), warnings=(str(fault),))
    return found


@st.cache_resource(max_entries=32, show_spinner="Reading launches …")  # type: ignore[untyped-decorator]  # streamlit is not followed
def _launches(path: str, state: str, run_id: str, _record: CaseRecord) -> Launches:
    return launches_of(Store(path), _record)


@st.cache_resource(max_entries=4, show_spinner="Reading traces …")  # type: ignore[untyped-decorator]  # streamlit is not followed
def _traces(path: str, state: str, ids: tuple[str, ...], _launches: Sequence[LaunchOfRow]) -> tuple[pd.DataFrame, list[str]]:
    """Shared by all viewers: never change the frame."""
    return trace_frame(Store(path), _launches)


def the_launches(launches: Launches) -> None:
    st.subheader("Launches")
    for warning in launches.warnings:
        st.text(warning)
    if not launches.rows:
        st.info("No launch of this row can be shown, so there are no traces.", icon=":material/timeline:")
        return
    number, text = st.column_config.NumberColumn, st.column_config.TextColumn
    st.dataframe(
        launches_frame(launches.rows), hide_index=True, key="launches", placeholder="–", alt="The launches of this row and of its baseline.",
        column_config={
            "launch": text("Launch", pinned=True, help="A launch is one fresh process; a block is one of each side."),
            "status": text("Status"), "remarks": text("Remarks", width="large"),
            "build_s": number("Build (s)", format="%.3f"), "warm_up_s": number("Warm-up (s)", format="%.3f"),
            "window_s": number("Window (s)", format="%.3f", help="The stretch that was measured."),
            "ended_by": text("Ended by", help="rule: long enough and enough steps; limit: the longest window allowed."),
            "position": number("Place", help="In the block's order, which is drawn from the seed."),
            "started": text("Started"), "launch_id": text("Launch id"),
        },
    )  # fmt: skip
    for launch in launches.rows:
        if launch.detail:
            with st.expander(f"What {launch.side} launch in block {launch.block} said", icon=":material/terminal:"):
                st.code(launch.detail, language=None, wrap_lines=True)


def the_traces(record: CaseRecord, store: Store, launches: Launches) -> None:
    st.subheader("Traces")
    by_label = {launch.label: launch for launch in launches.rows}
    if not by_label:
        return
    own = [label for label, launch in by_label.items() if launch.side == "row"] or list(by_label)
    chosen = st.multiselect(
        "Launches", list(by_label), default=own[:MOST_LAUNCHES], key="launch", bind="query-params", max_selections=MOST_LAUNCHES,
        help="All are drawn on one clock: 0 is where the measured window of each begins.",
    )  # fmt: skip
    picked = [by_label[label] for label in chosen]
    state = store.fingerprint("launches")
    frame, missing = _traces(str(store.path), state, tuple(launch.launch_id for launch in picked), picked)
    for line in missing:
        st.text(line)
    if frame.empty:
        st.info("No launch is chosen." if not picked else "None of these launches has a trace.", icon=":material/timeline:")
        return
    shades: dict[str, float | None] = {"warm_up_s": max((launch.warm_up_s for launch in picked), default=0.0)}
    shades["window_s"] = max(
        (launch.windows["window"].length_s for launch in picked if "window" in launch.windows), default=None
    )
    step_figure(record, frame, shades)
    drawn = {traces.STEP, traces.WARM_UP}
    for key, title, unit, metrics in SENSORS:
        part = frame[(frame["unit"] == unit) & ~frame["series"].isin(drawn)]
        st.markdown(f"**{title}**")
        if part.empty:
            st.text(f"Not recorded: {why_missing(record, metrics)}.")
        else:
            sensor_figure(key, title, part, shades)
            drawn |= set(part["series"])
    others = sorted(set(frame["series"]) - drawn)
    if others:
        st.markdown("**Other series**")
        series = st.selectbox(
            "Series", others, key="series", bind="query-params", help="Counters and whatever else was recorded."
        )
        sensor_figure("other", series, frame[frame["series"] == series], shades)


def step_figure(record: CaseRecord, frame: pd.DataFrame, shades: Mapping[str, Any]) -> None:
    st.markdown("**Step times**")
    steps = frame[frame["series"] == traces.STEP]
    if steps.empty:
        st.text(f"Not recorded: {why_missing(record, ('step_p50_s',))}.")
        return
    values = {name: find(record, f"step_{name}_s") for name in PERCENTILES}
    lines = {name: value.value for name, value in values.items() if value is not None and value.value is not None}
    figure = traces.step_times(frame, lines, **shades)
    chart("steps", figure, f"effbench-steps-{record.run_id[:12]}", "Time of each step over the launch, with warm-up shaded.")
    st.caption(
        f"Lines: the row's percentiles, which are means over its launches' own. Hollow: warm-up. {traces.points_note(figure)}"
    )
    table = percentile_frame(steps)
    number = st.column_config.NumberColumn
    titles = {f"{name}_ms": number(f"{name} (ms)", format="%.4g") for name in PERCENTILES}
    st.dataframe(
        table, hide_index=True, key="percentiles", placeholder="–", alt="Percentiles of the step times of each launch.",
        column_config={"launch": "Launch", "steps": number("Steps", help="In the window, warm-up left out.")} | titles | {"tail": "Tail"},
    )  # fmt: skip


def sensor_figure(key: str, title: str, part: pd.DataFrame, shades: Mapping[str, Any]) -> None:
    figure = traces.sensor_lines(part, title, **shades)
    chart(f"trace_{key}", figure, f"effbench-{key}", f"{title} over the time of each launch, with warm-up shaded.")
    sources = part[["series", "scope", "source"]].drop_duplicates()
    st.text("; ".join(f"{row.series}: {row.scope}, {row.source}" for row in sources.head(8).itertuples()))
    if note := traces.points_note(figure):
        st.caption(note)
