"""The part of the run page that says who measured a row of another hand, and whether it held when it was measured again."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from effbench.analysis.index import ResultIndex
from effbench.analysis.table import explain
from effbench.exchange.agreement import Agreement
from effbench.exchange.levels import MEANING, MEASURED, Attempt
from effbench.metrics import metric
from effbench.schema import CaseRecord
from leaderboard_app import data

OUTCOMES = {
    "reproduced": "Measured again here on the same hardware: every headline metric agrees.",
    "differs": "Measured again here on the same hardware: a headline metric differs.",
    "cannot tell": "Measured again here on the same hardware: not every headline metric could be told to agree.",
    "other hardware": "Measured again here on other hardware: only what is counted and quality compare; it earns no level.",
}


def level_of_row(index: ResultIndex, record: CaseRecord) -> None:
    """Nothing for a row measured here, unless it was measured to see whether a submitted one holds."""
    levels = data.levels()
    level = levels.of(record.run_id)
    if level != MEASURED:
        st.info(f"{level.capitalize()}: {MEANING[level]}.", icon=":material/outgoing_mail:")
    if submission := levels.submissions.get(record.run_id):
        lines = [f"contact: {submission.contact or 'none'}", f"licence: {submission.licence or 'none'}"]
        lines += [f"accepted: {submission.accepted_at}, {submission.verdict}", f"bundle: {submission.bundle_sha256}"]
        st.text("\n".join([*lines, *(f"remark: {remark}" for remark in submission.remarks)]))
    elif level != MEASURED:
        st.text("What its bundle said cannot be read.")
    if attempts := levels.attempts.get(record.run_id):
        _the_attempts(index, attempts)
    for submitted in [run_id for run_id, tried in levels.attempts.items() if record.run_id in {a.by_run_id for a in tried}]:
        st.text(f"Measured to see whether submitted row {submitted} holds.")
        _way_to(index, submitted, "Open the submitted row")


def _the_attempts(index: ResultIndex, attempts: tuple[Attempt, ...]) -> None:
    """Every attempt in a line, the newest with its metrics."""
    newest = attempts[-1]
    for earlier in attempts[:-1]:
        st.text(f"{earlier.at}: {earlier.outcome}, by row {earlier.by_run_id}")
    st.text(f"{newest.at}: {OUTCOMES[newest.outcome]}\nby row {newest.by_run_id}")
    _way_to(index, newest.by_run_id, "Open the row measured here")
    text = st.column_config.TextColumn
    st.dataframe(
        agreement_frame(newest.metrics), hide_index=True, key="agreement", placeholder="–",
        alt="Each metric of the submitted row against the row measured here.",
        column_config={
            "metric": text("Metric", pinned=True), "verdict": text("Verdict"),
            "found": text("Here / submitted", help="With its 95 % interval; for a share, here − submitted."),
            "tolerance": text("Tolerance"), "headline": st.column_config.CheckboxColumn("Headline", help="All of these must agree."),
            "why": text("Why", width="large"),
        },
    )  # fmt: skip
    unlike = [
        name for name in newest.here.keys() | newest.submitted.keys() if newest.here.get(name) != newest.submitted.get(name)
    ]
    with st.expander("What differs between the two environments"):
        lines = [f"{name}: {newest.submitted.get(name, '–')} → {newest.here.get(name, '–')}" for name in sorted(unlike)]
        st.text("\n".join(lines) or "Nothing that is recorded.")


def _way_to(index: ResultIndex, run_id: str, label: str) -> None:
    if index.store_of(run_id) is None:
        st.caption("That row is not in these results.")
    elif st.button(label, key=f"way_to_{run_id}", icon=":material/arrow_forward:"):
        st.switch_page("views/run.py", query_params={"run": run_id})


def agreement_frame(lines: tuple[Agreement, ...]) -> pd.DataFrame:
    """One line a metric, headline metrics first."""
    ordered = sorted(lines, key=lambda line: not line.headline)
    found = [
        {
            "metric": metric(line.name).title + (" × baseline" if line.of != "value" else ""),
            "verdict": line.verdict,
            "found": _found(line),
            "tolerance": f"±{100 * line.tolerance:.3g} {'%' if line.measure == 'ratio' else 'points'}",
            "headline": line.headline,
            "why": explain(line.why) if line.why else "",
            "name": line.name,
        }
        for line in ordered
    ]
    return pd.DataFrame(found, columns=["metric", "verdict", "found", "tolerance", "headline", "why", "name"])


def _found(line: Agreement) -> str | None:
    if line.middle is None:
        return None
    sign = "×" if line.measure == "ratio" else ""
    bounds = "" if line.lower is None or line.upper is None else f" ({line.lower:.3f}–{line.upper:.3f})"
    return f"{sign}{line.middle:.3f}{bounds}"
