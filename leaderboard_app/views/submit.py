"""Bring results: upload a bundle, read what verification says of it, and see what became of the others."""

from __future__ import annotations

import streamlit as st

from effbench.errors import EffbenchError
from effbench.exchange import limits
from effbench.exchange.queue import TOKEN, Queue, can_decide, may_decide
from effbench.exchange.queue_tables import Entry
from leaderboard_app import data, submissions

SHOWN = 200  # bundles in the table
MAX_MB = -(-limits.BUNDLE_BYTES // 2**20)  # as Streamlit counts them
STATES = ("received", "verified", "accepted", "rejected")
MEASURE = """effbench doctor --calibrate                       # what this machine can measure, and its own peak rates
effbench plan suites/quick.yaml                   # what would run, and the memory that it needs
effbench run suites/quick.yaml --results results/mine --protocol publish"""
CHECK = """effbench show --results results/mine
effbench export rows.csv --results results/mine --recompute   # every number from its raw trace again"""
BUNDLE = """effbench submit --results results/mine --out bundle.zip --contact you@example.org --licence CC-BY-4.0
effbench verify bundle.zip                        # what this page will say of it"""


def page() -> None:
    st.title("Submit")
    st.markdown(
        "Nobody has to trust you here. Every number of a bundle is computed again from its raw traces before anyone sees it, and a "
        "row of another hand is marked **submitted** until it has been measured again on the same hardware: **reproduced**."
    )
    queue = submissions.queue()
    upload(queue)
    the_queue(queue)
    how_to()
    st.caption("This board reads:")
    st.text("\n".join(str(folder) for folder in data.folders()))


def upload(queue: Queue) -> None:
    st.header("Upload a bundle")
    if problem := submissions.problem(queue):
        st.warning("Nothing can be received here.", icon=":material/block:")
        st.text(f"{problem} Whoever runs the board can name another folder with EFFBENCH_QUEUE.")
        return
    with st.form("upload", clear_on_submit=True, border=False):
        file = st.file_uploader(
            f"A bundle that `effbench submit` wrote, at most {limits.BUNDLE_BYTES / 1e6:.0f} MB", type="zip", key="file", max_upload_size=MAX_MB,
            help="It is kept, verified at once in a process of its own, and shown to a maintainer. None of its code is run.",
        )  # fmt: skip
        sent = st.form_submit_button("Verify", key="send", icon=":material/verified:")
    if sent and file is None:
        st.text("Choose a file first.")
    elif sent:
        try:
            with st.spinner("Verifying …"):
                entry = submissions.take(queue, file.getvalue(), file.name)
            st.session_state["bundle"] = entry.digest
        except EffbenchError as fault:
            st.error("It was not received.", icon=":material/error:")
            st.text(str(fault))


def the_queue(queue: Queue) -> None:
    st.header("Queue")
    try:
        counts, entries = queue.counts(), queue.entries(limit=SHOWN)
    except EffbenchError as fault:
        st.warning("The queue cannot be read.", icon=":material/broken_image:")
        st.text(str(fault))
        return
    token = maintainer()
    if not entries:
        st.caption("No bundle has been received yet.")
        return
    st.caption(", ".join(f"{counts.get(state, 0)} {state}" for state in STATES) + ".")
    text, number = st.column_config.TextColumn, st.column_config.NumberColumn
    st.dataframe(
        submissions.entries_frame(entries), hide_index=True, key="queue", placeholder="–", alt="Bundles in the queue, newest first.",
        column_config={
            "bundle": text("Bundle", help="The beginning of its SHA-256.", pinned=True), "state": text("State"), "file": text("File"),
            "megabytes": number("MB", format="%.2f"), "received": text("Received"),
            "changed": text("Changed"), "by": text("By"), "why": text("Why", width="large"),
        },
    )  # fmt: skip
    known = {entry.digest: entry for entry in entries}
    if st.session_state.get("bundle") not in known:
        st.session_state["bundle"] = None
    chosen = st.selectbox(
        "Bundle", list(known), key="bundle", format_func=lambda digest: f"{digest[:12]} · {known[digest].state} · {known[digest].name}",
        placeholder="choose one to read its report", index=None,
    )  # fmt: skip
    if chosen:
        the_bundle(queue, queue.entry(chosen) or known[chosen], token)


def maintainer() -> str:
    """The token that was typed, kept in the session only; empty where it is not the maintainer's."""
    if not can_decide():
        st.caption(f"This page only receives: {TOKEN} is not set where the board runs, so nobody decides here.")
        return ""
    token = st.text_input(
        "Maintainer's token", type="password", key="token", autocomplete="off", placeholder="only to accept or reject",
        help=f"What {TOKEN} holds where the board runs. It is kept in this session only.",
    )  # fmt: skip
    if token and not may_decide(token):
        st.error("This is not the maintainer's token.", icon=":material/key_off:")
    return token if token and may_decide(token) else ""


def the_bundle(queue: Queue, entry: Entry, token: str) -> None:
    """The report of one bundle, its history and, for a maintainer, the decision."""
    st.text(f"{entry.name}\n{entry.digest}\n{entry.state} since {entry.changed_at}, by {entry.changed_by}: {entry.why or '–'}")
    report = entry.report
    if report is None:
        st.info("It has not been verified yet: upload it again, or let a maintainer do it.", icon=":material/hourglass:")
    else:
        show = {"accepted": st.success, "rejected": st.error}.get(report.verdict, st.warning)
        show(submissions.VERDICTS[report.verdict], icon=":material/verified:")
        st.caption(
            f"{report.rows} rows, {report.launches} launches. Passing shows that rows follow from traces, not that they are true."
        )
        if report.findings:
            text = st.column_config.TextColumn
            st.dataframe(
                submissions.findings_frame(report), hide_index=True, key="findings", alt="What verification found.",
                column_config={"severity": text("Severity"), "check": text("Check"), "found": text("What was found", width="large"), "where": text("Where")},
            )  # fmt: skip
        if report.notes:
            st.text("\n".join(report.notes))
    with st.expander("History", icon=":material/history:"):
        st.dataframe(
            submissions.trail_frame(queue.trail(entry.digest)), hide_index=True, key="trail", alt="Every change of state."
        )
    if token and entry.state in ("received", "verified"):
        decision(queue, entry, token)


def decision(queue: Queue, entry: Entry, token: str) -> None:
    st.subheader("Decide")
    st.caption("Accepted rows go to the first results directory of this board, marked as submitted:")
    st.text(str(submissions.accepted_into()))
    who = st.text_input("Your name", key="who", max_chars=100, help="It goes into the audit trail.")
    why = st.text_input("Reason", key="why", max_chars=300, help="It goes into the audit trail and is shown here.")
    with st.container(horizontal=True):
        accept = st.button("Accept", key="accept", type="primary", icon=":material/check:", disabled=entry.state != "verified")
        reject = st.button("Reject", key="reject", icon=":material/close:")
        again = entry.state == "received" and st.button("Verify", key="again", icon=":material/verified:")
    try:
        if accept:
            with st.spinner("Writing its rows …"):
                submissions.accept(queue, entry.digest, token=token, who=who, why=why)
        elif reject:
            submissions.reject(queue, entry.digest, token=token, who=who, why=why)
        elif again:
            submissions.check(queue, entry)
        else:
            return
    except EffbenchError as fault:
        st.error("Nothing was decided.", icon=":material/error:")
        st.text(str(fault))
        return
    st.rerun()


def how_to() -> None:
    st.header("How to make a bundle")
    st.markdown(
        "**1. Measure.** Rows of the protocol `quick` are screening and claim no difference below 10 %; `publish` takes longer and "
        "has no such floor. A run that is stopped goes on where it was."
    )
    st.code(MEASURE, language="bash")
    st.markdown("**2. Check.** `--recompute` computes every metric from its trace and compares, as verification does.")
    st.code(CHECK, language="bash")
    st.markdown(
        "**3. Bundle.** One file with the rows, their launches and raw traces, each with its SHA-256. User and host names, paths and "
        "serial numbers are taken out unless you ask for them. What will leave your machine is shown first; contact and licence are yours to choose."
    )
    st.code(BUNDLE, language="bash")
    st.markdown(
        "A technique of your own begins with `effbench plugin new`. What verification can see, and that it cannot see a coherent "
        "forgery, stands in `docs/design/0010-nobody-has-to-trust-you.md`."
    )


page()
