"""What the terminal shows and what programs get."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effbench.analysis.table import (
    CASE_COLUMNS,
    Columns,
    column_names,
    document,
    explain,
    heading,
    interval,
    leaderboard,
    metrics_read,
    rich_tables,
    scale,
)
from effbench.metrics import METRICS, PAPER_SIX
from effbench.schema import CaseRecord
from effbench.store import Store
from tests.records import GPU, make_board, make_case, make_value

BASELINE = make_case("generate", ("mha",), baseline=None)
FASTER = make_case("generate", ("gqa",), speed=2.0)


def printed(cases: list[CaseRecord], columns: Columns = "default", width: int = 200, **more: Any) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width)
    for renderable in rich_tables(cases, columns, **more):
        console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_document_is_json_with_units_verdicts_and_ranks() -> None:
    found = json.loads(json.dumps(document([BASELINE, FASTER]), allow_nan=False))
    first, second = found["rows"]
    assert (found["schema_version"], found["hidden"]) == (1, 0)
    assert (first["techniques"], second["techniques"]) == (["gqa"], ["mha"])
    assert first["question"] == second["question"]
    tpot = first["metrics"]["tpot_s"]
    assert (tpot["unit"], tpot["ratio"], tpot["verdict"], tpot["rank"]) == ("s/token", 0.5, "better", 1)
    assert second["metrics"]["tpot_s"]["rank"] == 2
    missing = first["metrics"]["aec_w"]
    assert (missing["value"], missing["rank"], missing["unranked"]) == (None, None, "no_energy_sensor")
    assert first["metrics"]["params_total"]["unranked"] == "no_direction"


def test_leaderboard_gives_only_the_metrics_asked_for_in_every_row() -> None:
    rows = leaderboard(make_board(30), metrics=["tpot_s", "mfu"])
    assert len(rows) == 30
    assert all(set(row["metrics"]) <= {"tpot_s", "mfu"} for row in rows)


def test_rows_that_a_later_one_replaced_are_counted_as_hidden() -> None:
    again = replace(FASTER, run_id="again", started_at="2026-11-21T00:00:00+00:00")
    assert document([FASTER, again])["hidden"] == 1
    assert "1 rows are hidden" in printed([FASTER, again])


def test_table_shows_values_intervals_ratios_and_verdicts() -> None:
    text = printed([BASELINE, FASTER])
    assert "generate on 2 × x86-64 core, ranked by Tokens/s" in text
    assert "TPOT (ms/token)" in text
    assert "1.60 ±0.03" in text
    assert "×0.50 ▲" in text
    assert "vs mha" in text
    assert "▲ better, ▼ worse, ≈ no difference shown" in text
    assert "screening: no difference below 10 % is claimed" in text


def test_missing_value_is_a_dash_and_its_reason_is_explained_once() -> None:
    text = printed([BASELINE, FASTER])
    assert "Energy per token (" not in text, "a column without any value is left out"
    assert text.count("no_energy_sensor") == 1
    assert "– Energy per token: no sensor of this machine gives energy (no_energy_sensor)." in text
    assert "not_this_workload" not in text
    mixed = printed([BASELINE, replace(FASTER, metrics=tuple(m for m in FASTER.metrics if m.name != "ttft_s"))])
    assert " – " in mixed


def test_flagged_value_carries_a_star_that_is_explained() -> None:
    flagged = tuple(replace(m, reasons=("missing_in_some_blocks",)) if m.name == "tpot_s" else m for m in FASTER.metrics)
    text = printed([replace(FASTER, metrics=flagged)])
    assert "1.60 ±0.03*" in text
    assert "* TPOT: some blocks have no value (missing_in_some_blocks)." in text


def test_failed_and_skipped_rows_show_their_reason() -> None:
    text = printed(
        [
            FASTER,
            make_case("generate", ("mqa",), status="failed", reason="out_of_memory"),
            make_case("generate", ("bf16",), status="skipped", reason="this CPU has no bf16 instructions"),
        ]
    )
    assert "failed: mqa on tiny-llama: out_of_memory" in text
    assert "skipped: bf16 on tiny-llama: this CPU has no bf16 instructions" in text


def test_row_kept_out_of_the_ranking_says_why() -> None:
    idle = make_value("gpu_idle_share", 0.5, reasons=("host_bound",))
    bound = replace(FASTER, hardware=GPU, metrics=(*(m for m in FASTER.metrics if m.name != "gpu_idle_share"), idle))
    text = printed([bound])
    assert "host_bound" in text
    assert "▲ " not in text.replace("▲ better", "")


def test_all_six_metrics_of_the_paper_can_be_seen() -> None:
    cases = [make_case(workload, hardware=GPU) for workload in ("pretrain", "finetune", "generate")]
    text = printed(cases, "paper")
    for name in PAPER_SIX:
        assert METRICS[name].title in text
    everything = printed(cases, "all")
    assert all(METRICS[m.name].title.lower() in everything.lower() for m in cases[0].metrics if m.value is not None)


def test_metric_of_a_plugin_is_shown_with_its_own_unit() -> None:
    foreign = replace(make_value("cache_hits", 12.0), unit="hits/s")
    text = printed([replace(FASTER, metrics=(*FASTER.metrics, foreign))], "all")
    assert "cache_hits (hits/s): 12.0 ±0.2" in text


def test_settings_that_tell_questions_apart_are_shown() -> None:
    text = printed([make_case(seed=1), make_case(seed=2)])
    assert "seed=1" in text
    assert "seed=2" in text
    assert "batch" not in text


def test_rows_beyond_the_limit_are_counted() -> None:
    board = [case for case in make_board(300) if (case.hardware, case.workload) == (GPU, "generate")]
    text = printed(board, limit=20)
    assert text.count("quick n=3") <= 20
    assert f"{len(board) - 20} more rows are hidden" in text


def test_hostile_text_is_text() -> None:
    text = printed([replace(FASTER, model="[red]model[/red]", hardware="[link=x]", techniques=("[bold]",), spec="{}")])
    assert "[red]model[/red]" in text
    assert "[link=x]" in text
    assert "[bold]" in text


@pytest.mark.parametrize("spec", ["no JSON", "[1]", '{"params": 7}', '{"model": "x"}', "[" * 100_000])
def test_a_spec_of_another_hand_has_no_setting_and_hides_no_row(spec: str) -> None:
    text = printed([FASTER, replace(FASTER, run_id="r2", case_id="c2", techniques=("foreign",), spec=spec)])
    assert "foreign" in text


@pytest.mark.parametrize("columns", ["default", "paper"])
def test_projection_reads_all_that_a_table_shows(tmp_path: Any, columns: Columns) -> None:
    store = Store(tmp_path)
    board = make_board(30)
    for case in board:
        store.write_case(case)
    projected = store.cases(columns=CASE_COLUMNS, metrics=metrics_read(columns)).rows
    assert printed(list(projected), columns) == printed(board, columns)


def test_every_default_column_is_in_the_metric_table() -> None:
    for workload in ("pretrain", "finetune", "generate", "a plugin's"):
        assert set(column_names(workload)) <= METRICS.keys()


@pytest.mark.parametrize(
    ("values", "unit", "wanted"),
    [
        ([0.0414], "s", (1e3, "ms")), ([120.0], "s", (1.0, "s")), ([3.1e9], "B", (1e-9, "GB")), ([0.21], "GB", (1e3, "MB")),
        ([0.03], "J/token", (1e3, "mJ/token")), ([2e-5], "s/token", (1e6, "µs/token")), ([2048.0], "B/token", (1e-3, "kB/token")),
        ([12e3], "tokens/s", (1e-3, "k tokens/s")), ([310.0], "tokens/s", (1.0, "tokens/s")), ([3.28e6], "count", (1e-6, "M")),
        ([2.4e-3], "tokens/param/s", (1e3, "10⁻³ tokens/param/s")), ([0.31], "ratio", (1.0, "")), ([1.6], "×", (1.0, "×")),
        ([], "s", (1.0, "s")), ([None, 0.0], "B", (1.0, "B")), ([412.0], "W", (1.0, "W")), ([1000.0], "B", (1e-3, "kB")),
    ],
)  # fmt: skip
def test_scale_makes_values_readable(values: list[float | None], unit: str, wanted: tuple[float, str]) -> None:
    factor, shown = scale(values, unit)
    assert (pytest.approx(factor), shown) == wanted


def test_heading_does_not_say_its_unit_twice() -> None:
    assert heading("tokens_per_s", "k tokens/s") == "k tokens/s"
    assert heading("step_p50_s", "ms") == "Step p50 (ms)"
    assert heading("mfu", "") == "MFU"


@pytest.mark.parametrize(
    ("value", "lower", "upper", "wanted"),
    [
        (41.4, 40.6, 42.2, "41.4 ±0.8"), (41.4, 41.36, 41.44, "41.40 ±0.04"), (41.4, 41.399, 41.401, "41.40 ±<0.01"),
        (41.4, 30.1, 57.0, "41.4 (30.1–57.0)"), (41.4, None, None, "41.4"), (3.0, 3.0, 3.0, "3.00"), (0.0, 0.0, 0.0, "0.00"),
        (-0.5, -0.6, -0.4, "-0.500 ±0.100"), (1234.0, 1200.0, 1268.0, "1234 ±34"),
    ],
)  # fmt: skip
def test_interval_is_written_as_people_read_it(value: float, lower: float | None, upper: float | None, wanted: str) -> None:
    assert interval(replace(make_value("al_s", value), lower=lower, upper=upper)) == wanted


@given(st.floats(1e-12, 1e12), st.floats(0, 0.9), st.sampled_from(sorted({m.unit for m in METRICS.values()})))
def test_scaled_value_is_short_and_right(value: float, half: float, unit: str) -> None:
    factor, _ = scale([value], unit)
    text = interval(make_value("al_s", value, half=half), factor)
    shown = float(text.split()[0])
    assert shown == pytest.approx(value * factor, rel=0.006, abs=0.006)


def test_reason_is_explained_or_given_as_it_is() -> None:
    assert explain("no_gpu") == "the case ran on a CPU (no_gpu)"
    assert "power limit" in explain("power_capped")
    assert explain("something_new") == "something_new"
