"""Trade-offs within one question: two metrics, several metrics, the roofline, and what to use under given limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from effbench.analysis.advice import MOST, advise, in_words
from effbench.analysis.frame import column
from effbench.analysis.index import ResultIndex
from effbench.analysis.paper_view import FLOOR
from effbench.analysis.pareto import efficiency, trade_off
from effbench.analysis.table import HEADLINE, heading, interval_text
from effbench.metrics import PAPER_SIX, metric
from effbench.stats import SCREENING_FLOOR
from leaderboard_app import data, limits, opening
from leaderboard_app.downloads import chart
from leaderboard_app.figures import profiles, tradeoffs
from leaderboard_app.one_question import (
    Where,
    choose_metric,
    one_question,
    show_table,
    texts,
    titled,
    told_left_out,
    usable_metrics,
)
from leaderboard_app.ranking_table import scales
from leaderboard_app.roofline_of_rows import below_the_roofline

TABS = ("Two metrics", "Several metrics", "Roofline", "What should I use?")
MOST_OFFERED = 500  # rows in a list
MOST_METRICS = 12  # in one figure
_COSTS = ("energy_j_per_token", "device_memory_peak_bytes", "host_memory_peak_bytes", "tpot_s", "step_p50_s")
_GAINS = ("quality", HEADLINE)


def page() -> None:
    st.title("Trade-offs")
    st.caption("What a choice gains and what it gives up, among rows that answer one question on one machine.")
    index = opening.results()
    if index is None:
        return
    where = one_question(index)
    usable = usable_metrics(index, where)
    if not usable:
        st.info("No row here has a value that rows are ranked by: they failed, were skipped, or are invalid.")
        return
    two, several, roofline, use = st.tabs(TABS, key="show", bind="query-params")
    with two:
        if two.open:
            two_metrics(index, where, usable)
    with several:
        if several.open:
            several_metrics(index, where, usable)
    with roofline:
        if roofline.open:
            below_the_roofline(index, where)
    with use:
        if use.open:
            advice(index, where, usable)


# -- two metrics


def two_metrics(index: ResultIndex, where: Where, usable: Sequence[str]) -> None:
    left, right = st.columns(2)
    x = choose_metric(left, "Across", "x", usable, _COSTS)
    y = choose_metric(right, "Up", "y", usable, [name for name in (*_GAINS, *usable) if name != x])
    if x == y:
        st.info("Choose two different metrics.")
        return
    switches = st.container(horizontal=True)
    bars = switches.toggle("Error bars", True, key="bars", bind="query-params", help="95 % intervals over blocks.")
    log = switches.toggle("Logarithmic axes", key="log", bind="query-params")
    iso = switches.toggle("Iso-efficiency lines", True, key="iso", bind="query-params", help="Lines of equal efficiency.")
    best = switches.toggle("Only rows that may be on the front", key="best", bind="query-params")
    rows, left_out = trade_off(index.frame([x, y], where), x, y)
    told_left_out(left_out)
    shown = rows[rows["maybe"]] if best else rows
    if shown.empty:
        st.info("No row has both metrics.")
        return
    drawn = tradeoffs.thin(shown, x, y)
    scaled = scales(shown, (x, y), index.units)
    axes = [
        tradeoffs.Axis(
            name=name, factor=scaled[name][0], title=heading(name, scaled[name][1]), better=metric(name).better, log=log
        )
        for name in (x, y)
    ]
    together = efficiency(x, y) if iso else None
    figure = tradeoffs.trade_off(drawn, axes[0], axes[1], data.colours(), together, error_bars=bars)
    chart(
        "pareto", figure, "effbench-pareto", f"{axes[1].title} against {axes[0].title}; the table below has the same numbers."
    )
    notes = [
        f"{rows['front'].sum():,} of {len(rows):,} rows are on the Pareto front: no other row is as good in both and better in one."
    ]
    notes.append(
        f"{rows['maybe'].sum():,} may be on it: no other row is shown to beat them by the intervals of both (filled marks)."
    )
    if rows["screening"].any():
        notes.append(f"Screening rows must be {100 * SCREENING_FLOOR:.0f} % apart for that; smoke rows show nothing.")
    if rows["group"].nunique() > 1:
        notes.append("Values of different sensors or figures are not compared: each of them has its own front.")
    if len(drawn) < len(shown):
        notes.append(f"{len(drawn):,} of {len(shown):,} rows are drawn: the front and the extremes, then a fixed sample.")
    if bars and len(drawn) > tradeoffs.MAX_BARS:
        notes.append(f"Of so many rows the first {tradeoffs.MAX_BARS} on the front have error bars.")
    if log and (drawn[[x, y]] <= 0).any(axis=None):
        notes.append("An axis with values of zero or below stays linear.")
    st.caption(" ".join(notes))
    if together:  # as text: a part of a metric is named by its record
        st.text(f"Along a dotted line this is the same: {together.meaning} ({together.better} is better).")
    order = shown.sort_values(["front", "maybe"], ascending=False, kind="stable")
    standing = [
        "on the front" if on else "may be on it" if may else "beaten"
        for on, may in zip(order["front"], order["maybe"], strict=True)
    ]
    lines = {"techniques": order["label"], "standing": standing}
    lines |= {name: texts(order, name, scaled[name][0]) for name in (x, y)}
    show_table("pareto_rows", order, lines, {name: heading(name, scaled[name][1]) for name in (x, y)}, "effbench-pareto")


# -- several metrics


def several_metrics(index: ResultIndex, where: Where, usable: Sequence[str]) -> None:
    by = HEADLINE if HEADLINE in usable else usable[0]
    known = index.frame([by], where)
    best = known[known[column(by, "why")] == ""].sort_values(by, ascending=metric(by).better == "lower", kind="stable")
    default = list(best.drop_duplicates("label").index[:5])
    newest = known.sort_values("started_at", ascending=False, kind="stable").index[:MOST_OFFERED]
    names_of = {
        str(run_id): f"{known.at[run_id, 'label']} · {known.at[run_id, 'protocol']} · {run_id[:8]}"
        for run_id in [*default, *newest]
    }
    chosen = st.multiselect(
        "Rows", list(names_of), default, format_func=names_of.__getitem__, max_selections=profiles.MAX_ROWS, key="rows",
        bind="query-params", help="The best row of each of five stacks, until you choose.",
    )  # fmt: skip
    if len(known) > len(names_of):
        st.caption(f"The newest {MOST_OFFERED} of {len(known):,} rows are offered.")
    wanted = [name for name in (*PAPER_SIX, "quality") if name in usable]
    names = st.multiselect(
        "Metrics", usable, wanted if len(wanted) > 2 else usable[:6], format_func=titled, max_selections=MOST_METRICS, key="metrics",
        bind="query-params",
    )  # fmt: skip
    if len(chosen) < 2 or not names:
        st.info("Choose two rows or more, and a metric.")
        return
    rows = index.frame(names, where).loc[chosen]
    table, left_out = profiles.scores(rows, names)
    for name, why in left_out.items():
        st.text(f"{metric(name).title} is left out: {why}.")
    st.caption(
        f"Normalised as in EfficientLLM (arXiv 2505.13840): of the rows that are chosen the worst is {FLOOR} and the best "
        "is 1 in every metric. Choose other rows and every point moves: the distance between two rows says nothing of how far apart "
        "they are, and nothing here is a verdict."
    )
    if table.empty or not len(table.columns):
        return
    scaled = scales(rows, table.columns, index.units)
    headings = {name: heading(name, unit) for name, (_, unit) in scaled.items()}
    ends = {}
    for name in table.columns:
        values = [
            interval_text(value * scaled[name][0]) for value in rows.loc[[table[name].idxmin(), table[name].idxmax()], name]
        ]
        ends[str(name)] = (values[0], values[1])
    figure = profiles.parallel(table, names_of, headings, ends)
    chart("parallel", figure, "effbench-parallel", "A line a row over all metrics, worst to best; the table has the values.")
    complete = table.columns[table.notna().all()]
    if len(complete) > 2:
        figure = profiles.radar(table[complete], names_of, headings)
        chart(
            "radar", figure, "effbench-radar", "A polygon a row over the metrics that all rows have; the table has the values."
        )
        st.caption(
            f"The radar has the {len(complete)} metrics that all rows have. Its areas mean nothing: they follow the order of the metrics."
        )
    else:
        st.caption("No radar: the rows have fewer than three metrics in common.")
    lines = {"techniques": rows["label"]} | {
        name: [
            f"{text} → {score:.2f}" if text else ""
            for text, score in zip(texts(rows, name, scaled[name][0]), table[name], strict=True)
        ]
        for name in headings
    }
    show_table("profile_rows", rows, lines, headings, "effbench-rows")


# -- what should I use?


def advice(index: ResultIndex, where: Where, usable: Sequence[str]) -> None:
    by = choose_metric(st, "What matters most", "by", usable, _GAINS[::-1])
    offered = limits.offered(usable)
    frame_needs = dict.fromkeys([by, *(name for limit in offered for name in limit.metrics)])
    others = st.multiselect(
        "Say what each gives up in", usable, [name for name in (*_GAINS, *_COSTS) if name in usable and name != by],
        format_func=titled, max_selections=MOST_METRICS, key="others", bind="query-params",
    )  # fmt: skip
    frame = index.frame([*dict.fromkeys([*frame_needs, *others])], where)
    bounds = limits.sliders(limits.with_steps(offered, frame), index.units)
    found = advise(frame, by, bounds, others)
    told_left_out(found.left_out)
    choices = found.choices
    if choices.empty:
        st.info("No row meets these limits. Loosen one of them.")
        return
    scaled = scales(choices, [by], index.units)
    first = choices[choices["rank"] == 1]
    st.text(
        f"First choice: {', '.join(first['label'].unique()[:5])}"
        + (" (no difference between them is shown)" if len(first) > 1 else "")
    )
    lines: dict[str, Any] = {
        "place": [f"{rank}{'=' * shared}" for rank, shared in zip(choices["rank"], choices["shared"], strict=True)],
        "techniques": choices["label"],
        by: texts(choices, by, scaled[by][0]),
    }
    lines |= {
        f"against {name}": [in_words(choice, name) for _, choice in choices.iterrows()] for name in dict.fromkeys([by, *others])
    }
    lines["unsure"] = choices["unsure"]
    titles = {by: heading(by, scaled[by][1]), "place": "#", "unsure": "Limit inside the interval"}
    titles |= {f"against {name}": f"{metric(name).title} against the best" for name in (by, *others)}
    show_table("advice_rows", choices, lines, titles, "effbench-choices")
    st.caption(
        f"{found.num_met:,} of {len(frame):,} rows meet the limits"
        + (f"; the first {MOST} are shown" if found.num_met > MOST else "")
        + ". "
        "Against the best: × the best value among these rows, with its 95 % interval; paired where both ran in the same blocks. "
        "Rows share a place (=) where no difference is shown. A limit inside the interval: the value meets it, not the whole interval."
    )


page()
