"""One row in full: what was measured, whether it is plausible, its raw traces, and how to measure it again."""

from __future__ import annotations

from functools import partial

import pandas as pd
import streamlit as st

from effbench.analysis.compare import described
from effbench.analysis.index import ResultIndex
from effbench.analysis.launches import Launches
from effbench.analysis.rank import find, is_host_bound, is_screening
from effbench.analysis.reproduce import reproduction
from effbench.analysis.table import column_names, describe, explain, heading, interval, scale
from effbench.checks import run_checks
from effbench.errors import UsageError
from effbench.metrics import metric
from effbench.protocol import PROTOCOLS
from effbench.schema import CaseRecord
from effbench.stats import SCREENING_FLOOR
from effbench.store import Store
from leaderboard_app import chooser, opening, traces_of_row
from leaderboard_app.downloads import file_name, table_downloads
from leaderboard_app.level_of_row import level_of_row
from leaderboard_app.one_row import metrics_frame, ratio_text, row_json, trace_csv, trace_parquet

HEAD_METRICS = 6


def page() -> None:
    st.title("Run")
    index = opening.results()
    if index is None:
        return
    record = choose(index)
    if record is None:
        return
    store = index.store_of(record.run_id)
    launches = Launches(rows=(), warnings=()) if store is None else traces_of_row.read_launches(store, record)
    head(record)
    level_of_row(index, record)
    beside_its_baseline(index, record)
    the_metrics(record)
    the_checks(record)
    traces_of_row.the_launches(launches)
    if store is not None:
        traces_of_row.the_traces(record, store, launches)
    how_to_reproduce(record, launches)
    about(record)
    downloads(record, store, launches)


def choose(index: ResultIndex) -> CaseRecord | None:
    """The row: its id in a text, which the URL holds, or from a list, which fills the text."""
    text = st.text_input(
        "Run id", key="run", bind="query-params", placeholder="choose below, or paste a run id",
        help="The whole id of a row, or as much of its beginning as no other row shares.",
    )  # fmt: skip
    records, problems = chooser.resolve(index, chooser.named(text)[:1])
    for problem in problems:
        st.text(problem)
    box = st.expander("Find a row", expanded=not records, key="find", on_change="rerun", icon=":material/search:")
    if box.open:
        with box:
            found = chooser.offered(index)
            st.session_state["picked_run"] = None
            st.selectbox(
                "Row", list(found.labels), key="picked_run", format_func=lambda run_id: f"{run_id[:8]} · {found.labels[run_id]}",
                on_change=_keep_picked, placeholder="type to search", help="The newest rows that pass the filters.",
            )  # fmt: skip
            if found.left_out:
                st.caption(f"{found.left_out:,} more rows pass: narrow the filters to have them offered.")
    return records[0] if records else None


def _keep_picked() -> None:
    st.session_state["run"] = st.session_state["picked_run"] or ""


def head(record: CaseRecord) -> None:
    """What the row is, and its main figures."""
    st.text(f"{record.label} · {record.workload} · {record.model}")
    protocol = PROTOCOLS[record.protocol].summary if record.protocol in PROTOCOLS else "not known here"
    st.text(f"on {record.hardware}, {record.started_at}, suite {record.suite}\nprotocol {record.protocol}: {protocol}")
    if record.status != "ok":
        st.error("The case was not measured.", icon=":material/error:")
        st.text(f"{record.status}: {explain(record.reason or 'no reason given')}")
    if is_host_bound(record):
        st.warning(f"Host-bound: {explain('host_bound')}.", icon=":material/hourglass:")
    if is_screening(record):
        st.caption(f"Screening: this row claims no difference below {100 * SCREENING_FLOOR:.0f} %; a smoke row claims none.")
    names = [name for name in column_names(record.workload) if (v := find(record, name)) and v.value is not None]
    for place, name in zip(st.columns(HEAD_METRICS), names[:HEAD_METRICS], strict=False):
        value = find(record, name)
        assert value is not None
        factor, unit = scale([value.value], value.unit)
        place.metric(
            heading(name, unit), interval(value, factor), delta=ratio_text(record, value) or None, delta_color="off",
            delta_arrow="off", help=describe(metric(name)),
        )  # fmt: skip


def beside_its_baseline(index: ResultIndex, record: CaseRecord) -> None:
    """The way to the rows of the baseline's case in the same environment."""
    if not record.baseline_case_id:
        return
    rows = index.frame(metrics=(), where={"case_id": [record.baseline_case_id], "env_id": [record.env_id]})
    if rows.empty:
        st.caption("The row of its baseline is not in these results.")
    elif st.button("Compare with its baseline", key="beside", icon=":material/compare_arrows:", help="Both rows side by side."):
        st.switch_page("views/compare.py", query_params={"rows": f"{rows.index[-1]},{record.run_id}"})


def the_metrics(record: CaseRecord) -> None:
    st.subheader("Metrics")
    missing = st.toggle(
        "Also what is missing", key="missing", bind="query-params", help="Metrics without a value, with the reason."
    )
    frame = metrics_frame(record)
    shown = frame if missing else frame[frame["value"].notna()]
    text, number = st.column_config.TextColumn, st.column_config.NumberColumn
    st.dataframe(
        shown, hide_index=True, key="metrics", placeholder="–",
        alt="Every metric of the row with unit, interval, ratio to the baseline, source and remarks.",
        column_config={
            "metric": text("Metric", pinned=True),
            "shown": text("Value", help="With its 95 % interval over blocks: Student t on logarithms."),
            "unit": text("Unit"),
            "n": number("n", help="Blocks: a block is one fresh process of each side."),
            "ratio": text("× baseline", help="Paired ratio in the same blocks, with its 95 % interval."),
            "verdict": text("Verdict", help="Shown when the ratio's interval leaves out 1."),
            "source": text("Source", help="What was read or computed."),
            "remarks": text("Remarks", width="large", help="Why a value is missing or flagged."),
            "value": None, "name": text("Name"), "formula": text("Formula", width="large"),
        },
    )  # fmt: skip
    if not missing:
        st.caption(f"{int(frame['value'].isna().sum())} metrics have no value.")


def the_checks(record: CaseRecord) -> None:
    st.subheader("Checks")
    checks = run_checks(record)
    bad = [check for check in checks if not check.passed]
    st.caption(
        f"{len(checks) - len(bad)} of {len(checks)} checks passed. They find what cannot be; passing all of them proves nothing."
    )
    outcome = {"error": "error: do not use the number", "warning": "warning: look twice"}
    lines = [
        {"check": check.name, "outcome": "passed" if check.passed else outcome[check.severity], "found": check.message}
        for check in sorted(checks, key=lambda check: (check.passed, check.severity))
    ]
    text = st.column_config.TextColumn
    st.dataframe(
        pd.DataFrame(lines), hide_index=True, key="checks", alt="Plausibility checks of this row and their outcome.",
        column_config={"check": text("Check"), "outcome": text("Outcome"), "found": text("What was found", width="large")},
    )  # fmt: skip


def how_to_reproduce(record: CaseRecord, launches: Launches) -> None:
    st.subheader("Measure it again")
    try:
        made = reproduction(record, launches.baseline)
    except UsageError as fault:
        st.text(str(fault))
        return
    st.caption("The suite of exactly this row and its baseline. Save it, then run the commands in a checkout of effbench.")
    st.code("\n".join(made.commands), language="bash")
    for sentence in made.inexact:
        st.text(sentence)
    st.text(f"Measured on {record.hardware}: another machine or other package versions give another env_id, and other numbers.")
    with st.expander("The suite", icon=":material/description:"):
        st.code(made.suite, language="yaml")
    st.download_button(
        "Suite as YAML", made.suite, made.file_name, "application/yaml", key="suite", on_click="ignore", icon=":material/download:",
        help="The file that the command names.",
    )  # fmt: skip


def about(record: CaseRecord) -> None:
    st.subheader("Spec and provenance")
    lines = [{"field": path, "value": text} for path, text in described(record).items()]
    identities = ("run_id", "case_id", "baseline_case_id")
    lines = [{"field": name, "value": getattr(record, name) or "none"} for name in identities] + lines
    text = st.column_config.TextColumn
    st.dataframe(
        pd.DataFrame(lines), hide_index=True, key="about", alt="The row's spec and provenance, by dotted path.",
        column_config={"field": text("Field", pinned=True), "value": text("Value", width="large")},
    )  # fmt: skip


def downloads(record: CaseRecord, store: Store | None, launches: Launches) -> None:
    st.subheader("Downloads")
    name = file_name(f"effbench-{record.run_id[:12]}")
    table_downloads("row", [record.run_id], name)
    with st.container(horizontal=True):
        st.download_button(
            "Row as JSON", partial(row_json, record), f"{name}.json", "application/json", key="row_json", on_click="ignore",
            icon=":material/download:", help="Every field of the row; spec and provenance as JSON.",
        )  # fmt: skip
        if store is None or not launches.rows:
            return
        for kind, make, mime in (("CSV", trace_csv, "text/csv"), ("parquet", trace_parquet, "application/vnd.apache.parquet")):
            st.download_button(
                f"Traces as {kind}", partial(make, store, launches.rows), f"{name}-traces.{kind.lower()}", mime,
                key=f"traces_{kind.lower()}", on_click="ignore", icon=":material/download:",
                help="Every sample of every launch of this row and of its baseline.",
            )  # fmt: skip


page()
