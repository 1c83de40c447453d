"""Published claims of the founding papers, held against these results; and the paper's own way to show results, kept apart.

index ──(once for each state of the files)──▶ findings ── filters ──▶ a table, and an expander for each claim
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import pandas as pd
import streamlit as st

from effbench.analysis import claims_report, paper_view
from effbench.analysis.claims import ANSWERS, CLAIMS, GRADES, PAPERS, Finding, Shown, findings_of
from leaderboard_app import data, opening
from leaderboard_app.downloads import frame_downloads, table_downloads

ICONS = {
    "supported": ":material/check_circle:",
    "contradicted": ":material/cancel:",
    "not shown": ":material/help:",
    "not measured yet": ":material/hourglass_empty:",
}
CLAIMS_VIEW, PAPER_VIEW = "Claims", "The paper's own way"
RUN_PAGE = "run?run="  # the page of one row


def page() -> None:
    st.title("Claims")
    index = data.index()
    opening.unread(index)
    view = st.segmented_control(
        "View", [CLAIMS_VIEW, PAPER_VIEW], default=CLAIMS_VIEW, required=True, key="view", bind="query-params",
        help="What was claimed and what these results show, or these results as EfficientLLM would show them.",
    )  # fmt: skip
    if view == PAPER_VIEW:
        the_papers_way(index)
    else:
        the_claims(findings(index.state, index))


@st.cache_resource(max_entries=2, show_spinner="Judging the claims …")  # type: ignore[untyped-decorator]  # streamlit is not followed
def findings(state: str, _index: Any) -> list[Finding]:
    """The verdicts for one state of the files; findings are frozen, so all viewers share them."""
    return findings_of(_index, CLAIMS)


def the_claims(every: Sequence[Finding]) -> None:
    """Filters, the table of claims, and what stands behind each."""
    st.markdown(
        "What the papers printed, and what the rows here show of it. A verdict needs the 95 % interval of a comparison of rows "
        "that answer the same question on the same hardware; a single number never decides."
    )
    first, second = st.columns(2)
    papers = first.multiselect("Paper", PAPERS, placeholder="all", key="paper", bind="query-params", help="Whose claim it is.")
    verdicts = second.multiselect(
        "Verdict", ANSWERS, placeholder="all", key="verdict", bind="query-params", help="What these results say of it."
    )
    chosen = [f for f in every if (not papers or f.claim.paper in papers) and (not verdicts or f.answer in verdicts)]
    counts = [f"{sum(f.answer == answer for f in chosen)} {answer}" for answer in ANSWERS]
    st.caption(f"{len(chosen)} of {len(every)} claims: {', '.join(counts)}.")
    if not chosen:
        st.info("No claim passes these filters.")
        return
    table = summary(chosen)
    st.dataframe(
        table, hide_index=True, key="claims", alt="Each claim with its paper, grade of evidence and verdict.",
        column_config={
            "claim": st.column_config.TextColumn("Claim", width="large"),
            "grade": st.column_config.TextColumn("Grade", help="; ".join(f"{key}: {text}" for key, text in GRADES.items())),
            "comparisons": st.column_config.NumberColumn("Comparisons", help="Pairs of rows that the verdict stands on."),
            "hardware": st.column_config.TextColumn("By hardware"),
        },
    )  # fmt: skip
    frame_downloads("claims_table", table, "claims")
    st.download_button(
        "Claims as JSON", lambda: json.dumps(claims_report.document(chosen), indent=1), file_name="claims.json",
        mime="application/json", key="claims_json", on_click="ignore", icon=":material/download:",
        help="Everything on this page, with intervals and run ids; `effbench claims --json` prints the same.",
    )  # fmt: skip
    for finding in chosen:
        one = st.expander(
            f"**{finding.claim.id}** · {finding.answer} · {finding.claim.sentence}", icon=ICONS[finding.answer],
            key=finding.claim.id, bind="query-params",
        )  # fmt: skip
        if one.open:
            with one:
                detail(finding)


def summary(chosen: Sequence[Finding]) -> pd.DataFrame:
    """One line a claim."""
    return pd.DataFrame(
        {
            "id": finding.claim.id,
            "paper": finding.claim.paper,
            "claim": finding.claim.sentence,
            "grade": finding.claim.grade,
            "verdict": finding.answer,
            "comparisons": sum(line.num for line in finding.shown if not line.beside),
            "hardware": "; ".join(f"{name}: {answer}" for name, answer in finding.by_hardware.items()),
        }
        for finding in chosen
    )


def detail(finding: Finding) -> None:
    """What was printed, what is wrong with it, what would show it, and what the rows show."""
    claim = finding.claim
    left, right = st.columns(2)
    with left:
        st.markdown(f"**Printed** · {claim.paper}")
        st.markdown("\n".join(f"- {printed.text} · *{printed.grade}: {GRADES[printed.grade]}*" for printed in claim.printed))
        st.markdown(f"**What is open or wrong in it**: {claim.remark}")
    with right:
        st.markdown("**What would show it**")
        st.markdown("\n".join(_wanted(part) for part in claim.parts))
    st.markdown(f"**Verdict: {finding.answer}**")
    st.text(finding.why)
    if not finding.shown:
        return
    st.dataframe(
        shown_frame(finding.shown), hide_index=True, key=f"shown_{claim.id}", alt=f"What each hardware shows of claim {claim.id}.",
        column_config={
            "number": st.column_config.NumberColumn("Median", format="%.4g", help="Of all comparisons: a ratio, or a value."),
            "interval": st.column_config.TextColumn("95 % interval", help="From the lowest to the highest bound of all comparisons."),
            "beside": st.column_config.CheckboxColumn("Beside", help="Shown with the claim, not counted in its verdict."),
        },
    )  # fmt: skip
    lines = line_frame(finding.shown)
    st.markdown("The most telling comparisons, and their rows:")
    st.dataframe(
        lines, hide_index=True, key=f"lines_{claim.id}", alt=f"Comparisons behind claim {claim.id}, with links to their rows.",
        column_config={
            "number": st.column_config.NumberColumn("Number", format="%.4g"),
            **{
                name: st.column_config.LinkColumn(name.capitalize(), display_text=r"run=(.{8})", help="Open this row.")
                for name in lines
                if name.startswith("row ")
            },
        },
    )  # fmt: skip
    rows = list(dict.fromkeys(run_id for line in finding.shown for run_id in line.run_ids))
    table_downloads(f"rows_{claim.id}", rows, f"claim-{claim.id}")


def _wanted(part: Any) -> str:
    beside = " (beside it, not counted)" if part.beside else ""
    many = " in some comparison" if part.somewhere else ""
    return f"- {part.says}: {part.quantity()}, {part.expected()}{many} · workload `{part.workload}`{beside}"


def shown_frame(shown: Sequence[Shown]) -> pd.DataFrame:
    """One line for each hardware and part."""
    return pd.DataFrame(
        {
            "hardware": line.hardware,
            "what": line.part,
            "metric": line.quantity,
            "verdict": line.answer + (" · screening" if line.screening else ""),
            "number": line.ratio,
            "interval": f"{line.lower:.4g} – {line.upper:.4g}",
            "expected": line.expected,
            "comparisons": line.num,
            "for": line.held,
            "against": line.failed,
            "beside": line.beside,
        }
        for line in shown
    )


def line_frame(shown: Sequence[Shown]) -> pd.DataFrame:
    """One line for each comparison that is shown, with a link for each of up to four of its rows."""
    return pd.DataFrame(
        {
            "what": one.part,
            "hardware": one.hardware,
            "model": line.model,
            "setting": line.setting,
            "compared": line.what,
            "number": line.ratio,
            "interval": f"{line.lower:.4g} – {line.upper:.4g}",
            "says": line.answer,
            **{f"row {i}": f"{RUN_PAGE}{quote(run_id, safe='')}" for i, run_id in enumerate(line.run_ids[:4], 1)},
        }
        for one in shown
        for line in one.lines
    )


def the_papers_way(index: Any) -> None:
    """EfficientLLM's normalisation and ranks, of these rows and as published."""
    st.info(
        "This is how EfficientLLM shows results, not how this leaderboard judges them. The worst technique of a metric is 0.1 and the "
        "best 1, so a number changes with what stands beside it. Ranks are of plain means over models: no intervals, no ties.",
        icon=":material/history_edu:",
    )
    known = [name for name in paper_view.COLUMNS if name in set(index.distinct("workload"))]
    workload = st.selectbox("Workload", known or list(paper_view.COLUMNS), key="paper_workload", bind="query-params",
                            help="Pretraining is its architecture axis, fine-tuning its training axis, generation its bit widths.")  # fmt: skip
    axis = paper_view.BANDS[workload][0].axis
    if known:
        hardware = st.selectbox("Hardware", list(index.distinct("hardware")), key="paper_hardware", bind="query-params",
                                help="The paper has one kind for each axis.")  # fmt: skip
        tables = paper_tables(index.state, workload, hardware, index)
        for band, table in tables.items():
            of_band(band, table)
        if not tables:
            st.info("This hardware has no rows of this workload.")
    else:
        st.info("There are no rows of these workloads yet. The ranks below are the paper's own.")
    st.subheader("Ranks as published")
    st.caption(f"Not measured here. Source: {paper_view.SOURCE}. An empty cell was not published; ties are its own.")
    published = paper_view.published_ranks(axis).reset_index().rename(columns={"group": "band or mechanism"})
    st.dataframe(
        published,
        hide_index=True,
        key="published",
        placeholder="–",
        alt="The ranks that the authors of EfficientLLM published.",
    )
    frame_downloads("published_table", published, "published-ranks")


@st.cache_data(max_entries=32, show_spinner="Reading results …")  # type: ignore[untyped-decorator]  # streamlit is not followed
def paper_tables(state: str, workload: str, hardware: str, _index: Any) -> dict[str, paper_view.PaperTable]:
    """The paper's table of each size band that has rows."""
    frame = _index.frame(metrics=paper_view.metrics_needed(workload), where={"workload": [workload], "hardware": [hardware]})
    names = paper_view.bands(frame)
    order = [*(band.name for band in paper_view.BANDS[workload]), paper_view.OTHER]
    return {name: paper_view.paper_table(frame[names == name]) for name in order if (names == name).any()}


def of_band(band: str, table: paper_view.PaperTable) -> None:
    """Ranks and normalised values of one band."""
    st.subheader(f"Size band {band}" if band != paper_view.OTHER else "Sizes outside the paper's bands")
    if table.ranks.empty:
        st.info("No technique of this band has a measured value of the paper's metrics.")
        return
    st.caption("Means over these models, each counted alike:")
    st.text(", ".join(table.models))
    both = table.ranks.astype("Int64").add_suffix(" rank").join(table.normalised.add_suffix(" 0.1–1")).reset_index()
    names = [name for title in table.ranks for name in (f"{title} rank", f"{title} 0.1–1")]
    shown = both[["label", *names]]
    st.dataframe(
        shown, hide_index=True, key=f"paper_{band}", placeholder="–",
        alt=f"Rank and normalised value of each technique in the size band {band}, the paper's way.",
        column_config={
            "label": st.column_config.TextColumn("Techniques", pinned=True),
            **{name: st.column_config.NumberColumn(name, format="%.2f" if name.endswith("1") else "%d") for name in names},
        },
    )  # fmt: skip
    frame_downloads(f"paper_table_{band}", shown, f"paper-{band}")


page()
