"""The table of ranked rows and that of rows shown apart: which columns, what they hold, how they are headed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from effbench.analysis.origins import MEASURED_HERE, NO_ORIGINS, Origins
from effbench.analysis.table import describe, explain, heading, interval_text, scale
from effbench.metrics import metric
from effbench.stats import verdict

LEVELS = (
    "Who measured it: this board's own runs, or another hand whose bundle was accepted; reproduced is both, and they agree."
)


def ranking_frame(
    ranked: pd.DataFrame,
    by: str,
    names: Sequence[str],
    factors: Mapping[str, float],
    labels: Mapping[str, str],
    origins: Origins = NO_ORIGINS,
) -> pd.DataFrame:
    """One line a ranked row (`analysis.board.ranked`): where it stands, the metric it is ranked by with interval, ratio and
    verdict, and each of `names`, numbers times their factor. `labels` names baselines by case. The index is run_id."""
    factor = factors[by]
    value, lower, upper = (ranked[column].to_numpy(float) * factor for column in (by, f"{by}__lower", f"{by}__upper"))
    better = metric(by).better
    assert better != "none", "rows are ranked by it"
    found = {
        **{name: ranked[name] for name in ("hardware", "model", "setting", "rank", "screening")},
        "place": [f"{rank}{'=' * shared}" for rank, shared in zip(ranked["rank"], ranked["shared"], strict=True)],
        "techniques": ranked["label"],
        "protocol": [f"{name} · screening" if screening else name for name, screening in zip(ranked["protocol"], ranked["screening"], strict=True)],
        by: value,
        "lower": lower,
        "upper": upper,
        "shown": [interval_text(*numbers) for numbers in zip(value, lower, upper, strict=True)],
        "range": [f"{low:.4g} – {high:.4g}" for low, high in zip(lower, upper, strict=True)],
        "n": ranked[f"{by}__n"],
        "baseline": ["–" if not case else labels.get(case, case[:8]) for case in ranked["baseline_case_id"].fillna("")],
        "ratio": ranked[f"{by}__ratio"],
        "verdict": [
            "–" if np.isnan(ratio) else verdict(_known(low), _known(high), better, protocol)
            for ratio, low, high, protocol in zip(
                *(ranked[f"{by}__{end}"] for end in ("ratio", "ratio_lower", "ratio_upper")), ranked["protocol"], strict=True
            )
        ],
        "record": [link_of(str(run_id)) for run_id in ranked.index],
        "level": [origins.level(str(run_id)) for run_id in ranked.index],
        **{name: ranked[name].where(~_unusable(ranked, name)) * factors[name] for name in names if name != by},
    }  # fmt: skip
    return pd.DataFrame(found, index=ranked.index)


def apart_frame(rows: pd.DataFrame, by: str, unit: str, origins: Origins = NO_ORIGINS) -> pd.DataFrame:
    """One line for each row that is shown apart: what it is, why it has no rank, and the value it has all the same."""
    values = [
        "–" if np.isnan(number) else f"{interval_text(number, low, high)} {unit}"
        for number, low, high in zip(rows[by], rows[f"{by}__lower"], rows[f"{by}__upper"], strict=True)
    ]
    return pd.DataFrame(
        {
            "hardware": rows["hardware"],
            "model": rows["model"],
            "techniques": rows["label"],
            "status": rows["status"],
            "why": [explain(code) for code in rows[f"{by}__why"]],
            "value": values,
            "started": rows["started_at"],
            **({"level": [origins.level(str(run_id)) for run_id in rows.index]} if origins.levels else {}),
            "record": [link_of(str(run_id)) for run_id in rows.index],
        },
        index=rows.index,
    )


def link_of(run_id: str) -> str | None:
    """The address of a row's page beside this one; an id of another hand that is no plain word gets none."""
    return f"run?run={run_id}" if run_id.isalnum() else None


def scales(rows: pd.DataFrame, names: Iterable[str], units: Mapping[str, str]) -> dict[str, tuple[float, str]]:
    """For each metric the factor and the unit its column is shown in."""
    return {name: scale(rows[name].dropna(), units.get(name) or metric(name).unit) for name in names}


def missing_notes(ranked: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """Why values of these columns are missing: one sentence a reason."""
    titles: dict[str, list[str]] = {}
    for name in names:
        codes = ranked.loc[_unusable(ranked, name), f"{name}__why"]
        for code in codes[codes != "not_this_workload"].unique():
            titles.setdefault(code, []).append(metric(name).title)
    return [f"{', '.join(of)}: {explain(code)}." for code, of in titles.items()]


def columns(headings: Mapping[str, str]) -> dict[str, Any]:
    """How each column is headed, explained and written. `headings` are those of metrics."""
    column = st.column_config
    found: dict[str, Any] = {
        "place": column.TextColumn("#", help="1 + the number of rows shown to be better; = is shared.", pinned=True, width=45),
        "hardware": column.TextColumn("Hardware"),
        "model": column.TextColumn("Model"),
        "setting": column.TextColumn("Setting", help="What differs between otherwise equal rows."),
        "techniques": column.TextColumn("Techniques", pinned=True),
        "protocol": column.TextColumn("Protocol", help="How long and how often was measured."),
        "range": column.TextColumn("95 % interval", help="Student t over blocks, on logarithms."),
        "n": column.NumberColumn("n", help="Blocks: a block is one fresh process of each side.", width=40),
        "baseline": column.TextColumn("Baseline", help="What the ratio compares with, in the same blocks."),
        "ratio": column.NumberColumn("× baseline", format="%.3f", help="Paired ratio of the ranking metric."),
        "verdict": column.TextColumn("Verdict", width=150, help="Shown when the ratio's interval leaves out 1."),
        "status": column.TextColumn("Status"),
        "level": column.TextColumn("Level", help=LEVELS),
        "why": column.TextColumn("Why", width="large"),
        "value": column.TextColumn("Value"),
        "started": column.TextColumn("Started"),
        "record": column.LinkColumn("Record", display_text="open", help="The whole record of this row."),
    }
    for name, text in headings.items():
        found[name] = column.NumberColumn(text, format="%.4g", help=describe(metric(name)))
    return found


def headings(scaled: Mapping[str, tuple[float, str]]) -> dict[str, str]:
    return {name: heading(name, unit) for name, (_, unit) in scaled.items()}


def order(frame: pd.DataFrame, by: str, names: Sequence[str]) -> list[str]:
    """Columns from left to right; those that say the same in every row are left out."""
    where = [name for name in ("hardware", "model", "setting") if frame[name].nunique() > 1 or name == "model"]
    level = ["level"] if (frame["level"] != MEASURED_HERE).any() else []
    return [
        "place",
        "techniques",
        *level,
        *where,
        by,
        "range",
        "n",
        "baseline",
        "ratio",
        "verdict",
        "record",
        "protocol",
        *names,
    ]


def _unusable(rows: pd.DataFrame, name: str) -> pd.Series:
    return rows[name].isna() | ~rows[f"{name}__why"].isin(["", "one_block"])


def _known(number: float) -> float | None:
    return None if np.isnan(number) else number
