"""The part of the trade-offs page that shows rows below the roofline of their device."""

from __future__ import annotations

from collections.abc import Mapping

import streamlit as st

from effbench.analysis.index import ResultIndex
from effbench.analysis.roofline import READS, Roof, Work, points, roofs_of, used
from effbench.store import Store
from leaderboard_app import data
from leaderboard_app.downloads import chart
from leaderboard_app.figures import tradeoffs
from leaderboard_app.one_question import Where, show_table, told_left_out

WORKS: Mapping[str, Work] = {"whole step": "step", "last decode step": "decode"}
MOST_PLACED = 500  # rows: each needs the rates that its launch recorded


def below_the_roofline(index: ResultIndex, where: Where) -> None:
    work = WORKS[
        str(st.selectbox("Work", list(WORKS), key="work", bind="query-params", help="What the FLOPs and bytes are of."))
    ]
    known = index.frame(READS[work], where, spec=work == "decode")
    frame = known.iloc[::-1].head(MOST_PLACED)
    found, warnings = rates(tuple(frame.index), index.state, launches_state())
    for warning in warnings:
        st.text(warning)
    of_rows = [found.get(str(run_id), ()) for run_id in frame.index]
    rows, left_out = points(frame, of_rows, work)
    told_left_out(left_out)
    if len(frame) < len(known):
        st.caption(f"The newest {len(frame)} of {len(known):,} rows are looked at.")
    if rows.empty:
        st.info("No row here can stand below a roofline; the lines above say what each lacks.")
        return
    roofs = used(rows, of_rows)
    chart(
        "roofline",
        tradeoffs.roofline(rows, roofs, data.colours()),
        "effbench-roofline",
        "FLOP/s reached against FLOP for each byte moved.",
    )
    notes = (
        "The work is that of the model, counted or analytic, not what kernels moved. "
        "Left of the bend memory is the limit, right of it arithmetic."
    )
    if len(roofs) > tradeoffs.MAX_ROOFS:
        notes += f" {tradeoffs.MAX_ROOFS} of {len(roofs)} roofs are drawn."
    st.caption(notes)
    lines = {
        "techniques": rows["label"],
        "dtype": rows["dtype"],
        "flops_per_s": rows["flops_per_s"] / 1e9,
        "intensity": rows["intensity"],
        "attained": 100 * rows["attained"],
    }
    titles = {"dtype": "Number format", "flops_per_s": "GFLOP/s", "intensity": "FLOP/B", "attained": "% of the roof"}
    show_table("roofline_rows", rows, lines, titles, "effbench-roofline")


def launches_state() -> tuple[str, ...]:
    return tuple(Store(folder).fingerprint("launches") for folder in data.folders() if folder.is_dir())


@st.cache_resource(max_entries=16, show_spinner="Reading launches …")  # type: ignore[untyped-decorator]  # streamlit is not followed
def rates(run_ids: tuple[str, ...], runs: str, launches: tuple[str, ...]) -> tuple[dict[str, list[Roof]], list[str]]:
    """For each row the roofs that its first launch recorded, and what could not be read; `runs` and `launches` change with the files."""
    first = {row.launch_ids[0]: row.run_id for row in data.index().records(run_ids) if row.launch_ids}
    found: dict[str, list[Roof]] = {}
    warnings: list[str] = []
    for folder in data.folders():
        of_launches, faults = roofs_of(Store(folder), first.keys())
        found |= {first[launch_id]: roofs for launch_id, roofs in of_launches.items()}
        warnings += faults
    return found, warnings
