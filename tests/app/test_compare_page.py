"""The compare page as a visitor uses it, on real parquet files, and its figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from effbench.schema import CaseRecord
from leaderboard_app import chooser
from leaderboard_app.figures.comparison import MAX_RATIOS, ratio_forest
from tests.app.pages import VIEWS, Open, sound, texts
from tests.records import CPU, GPU, make_board, make_case, make_value

PAGE = VIEWS / "compare.py"
HOSTILE = "<img src=x onerror=alert(1)> **b** [x](javascript:alert(1)) =1+1 \u202e$x$"


def table(app: AppTest, number: int) -> pd.DataFrame:
    return app.dataframe[number].value


def ids(records: Sequence[CaseRecord]) -> str:
    return ",".join(record.run_id for record in records)


def pair(**more: float) -> list[CaseRecord]:
    return [make_case(techniques=("mha",), baseline=None), make_case(techniques=("gqa",), speed=2.0, **more)]


def test_nothing_chosen_offers_every_row_and_says_what_to_do(open_page: Open) -> None:
    app = open_page(pair())
    assert "Choose two rows or more" in texts(app)
    assert [option[10:].split(" · ")[0].strip("· ") for option in app.multiselect(key="picked").options] == ["mha", "gqa"]


def test_rows_of_the_url_stand_side_by_side_in_their_order(open_page: Open) -> None:
    rows = pair()
    app = open_page(rows, rows=ids(rows))
    metrics = table(app, 1).set_index("metric")
    assert list(metrics.columns) == ["1: mha", "2: gqa", "2 / 1"]
    assert metrics.loc["k tokens/s", "1: mha"] == "12.2 ±0.2"
    assert metrics.loc["k tokens/s", "2 / 1"] == "×2.00 (1.96–2.04) ▲ better"
    assert metrics.loc["Step p50 (ms)", "2 / 1"] == "×0.500 (0.490–0.510) ▲ better"
    turned = table(open_page(rows, rows=ids(rows[::-1])), 1).set_index("metric")
    assert turned.loc["k tokens/s", "2 / 1"] == "×0.500 (0.490–0.510) ▼ worse"


def test_a_list_fills_the_url_and_unchosen_rows_go(open_page: Open) -> None:
    rows = make_board(4)
    app = open_page(rows)
    for count in (1, 2, 3):
        app.multiselect(key="picked").set_value([row.run_id for row in rows[:count]])
        sound(app.run())
        assert app.text_input(key="rows").value == ids(rows[:count])
    assert len(table(app, 0)) == 3
    app.text_input(key="rows").set_value(ids(rows[2:])).run()
    assert list(table(sound(app), 0)["run_id"]) == [row.run_id for row in rows[2:]]


def test_beginnings_of_ids_are_enough_and_wrong_ones_are_named(open_page: Open) -> None:
    rows = [replace(row, run_id=name) for row, name in zip(make_board(3), ("aa1", "aa2", "b3"), strict=True)]
    app = open_page(rows, rows="b, aa1 aa zz b3")
    assert list(table(app, 0)["run_id"]) == ["b3", "aa1"]
    assert "2 rows begin with 'aa'" in texts(app)
    assert "No row has the run id 'zz'" in texts(app)


def test_more_than_six_rows_are_cut_and_said(open_page: Open) -> None:
    rows = make_board(8)
    app = open_page(rows, rows=ids(rows))
    assert len(table(app, 0)) == 6
    assert "8 rows are named; the first 6 are shown" in texts(app)


def test_rows_of_another_question_keep_the_ratio_and_say_what_differs(open_page: Open) -> None:
    rows = [make_case(techniques=("gqa",)), make_case(techniques=("gqa",), seed=5, hardware=GPU)]
    app = open_page(rows, rows=ids(rows))
    assert list(table(app, 0)["comparable"]) == ["the reference", "no: hardware, device, seed"]
    metrics = table(app, 1).set_index("metric")
    assert metrics.loc["k tokens/s", "2 / 1"] == "×1.00 (0.961–1.04) not comparable: other_question"
    assert "the two rows answer different questions" in texts(app)


def test_what_differs_comes_alone_and_all_on_demand(open_page: Open) -> None:
    rows = [make_case(techniques=("gqa",)), make_case(techniques=("mqa",))]
    app = open_page(rows, rows=ids(rows))
    found = table(app, 2).set_index("field")
    assert list(found.loc["techniques.attention.name"]) == ["gqa", "≠ mqa"]
    assert "params.batch" not in found.index
    app.toggle(key="fields").set_value(True).run()
    every = table(sound(app), 2).set_index("field")
    assert list(every.loc["params.batch"]) == ["8", "8"]
    assert list(every.index[: len(found)]) == list(found.index)


def test_all_metrics_are_one_click_away(open_page: Open) -> None:
    rows = pair()
    app = open_page(rows, rows=ids(rows), all="true")
    assert app.toggle(key="all").value is True
    assert "Parameters (M)" in list(table(app, 1)["metric"])
    assert "neither more nor less of it is better" in texts(app)


def test_failed_rows_and_rows_without_values_are_shown(open_page: Open) -> None:
    rows = [make_case(techniques=(name,), status="failed", reason="out_of_memory") for name in ("gqa", "mqa")]
    app = open_page(rows, rows=ids(rows))
    assert list(table(app, 0)["status"]) == ["failed: out_of_memory"] * 2
    assert "None of these rows has a value" in texts(app)
    mixed = [make_case(techniques=("lora",)), rows[0]]
    assert "no verdict: out_of_memory" in table(open_page(mixed, rows=ids(mixed)), 1).to_string()


def test_filters_and_words_narrow_what_is_offered_but_not_what_is_chosen(open_page: Open) -> None:
    rows = make_board(30)
    cpu = [row for row in rows if row.hardware == CPU]
    app = open_page(rows, rows=rows[-1].run_id, hardware=CPU, search="GQA bf16")
    offered = app.multiselect(key="picked").options
    assert offered[0].startswith(rows[-1].run_id[:8])
    assert len(offered) == 1 + sum(row.techniques == ("gqa", "bf16") for row in cpu)
    assert app.multiselect(key="picked").value == [rows[-1].run_id]


def test_at_most_500_rows_are_offered_newest_first_and_the_rest_is_counted(
    open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chooser, "MOST_OFFERED", 5)
    rows = make_board(20)
    app = open_page(rows)
    newest = sorted(rows, key=lambda row: row.started_at)[-5:]
    assert {option[:8] for option in app.multiselect(key="picked").options} == {row.run_id[:8] for row in newest}
    assert "15 more rows pass" in texts(app)


def test_too_many_rows_are_not_searched_until_they_are_narrowed(open_page: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chooser, "MOST_SEARCHED", 12)
    rows = make_board(20)
    app = open_page(rows, rows=f"{rows[0].run_id},{rows[1].run_id[:9]}")
    assert "20 rows pass. Choose workload" in texts(app)
    assert "give the whole id" in texts(app)
    app.multiselect(key="workload").set_value(["finetune"]).run()
    assert len(app.multiselect(key="picked").options) > 1


def test_hostile_texts_stay_texts(open_page: Open) -> None:
    rows = [
        replace(make_case(techniques=(name,)), hardware=HOSTILE, model=HOSTILE, suite=HOSTILE, run_id=name * 3, reason=HOSTILE)
        for name in ("gqa", "mqa")
    ]
    evil = make_value("tokens_per_s", 3.0, reasons=(HOSTILE,), source=HOSTILE)
    rows.append(replace(rows[0], run_id="<b>", metrics=(evil, replace(evil, name=HOSTILE)), spec=HOSTILE))
    app = open_page(rows, rows=ids(rows), all="true")
    assert table(app, 0)["model"].tolist() == [HOSTILE] * 3
    assert table(app, 0)["link"].isna().tolist() == [False, False, True]
    marked_up = [element.value for kind in (app.markdown, app.caption, app.info, app.title, app.subheader) for element in kind]
    assert not any("<img" in str(value) or "onerror" in str(value) for value in marked_up)


def test_reference_rows_are_compared_like_the_board_does(open_page: Open) -> None:
    app = open_page(rows="e9e6d4fb,31006b4d,57299b9b", all="true")
    metrics = table(app, 1).set_index("metric")
    assert metrics.loc["AMU (MB)", "2 / 1"] == "×0.833 (0.769–0.903) ▲ better"
    assert list(table(app, 0)["comparable"]) == ["the reference", "yes", "yes"]


def test_an_empty_folder_is_no_fault(open_page: Open) -> None:
    app = open_page([])
    assert not app.multiselect
    assert "There are no results to show yet" in texts(app)


# -- the figure


def lines(count: int = 1, **changes: object) -> pd.DataFrame:
    line = {"metric": "TPOT", "row": "2: gqa", "ratio": 0.5, "lower": 0.4, "upper": 0.6, "verdict": "better"} | changes
    return pd.DataFrame([line] * count)


def test_ratios_stand_on_a_log_axis_with_their_interval_and_are_filled_where_shown() -> None:
    figure = ratio_forest(pd.concat([lines(), lines(metric="AL", lower=None, upper=None, verdict="no difference shown")]))
    (marks,) = figure.data
    assert figure.layout.xaxis.type == "log"
    assert list(marks.x) == [0.5, 0.5]
    assert list(marks.error_x.array) == pytest.approx([0.1, 0.0])
    assert list(marks.error_x.arrayminus) == pytest.approx([0.1, 0.0])
    assert list(marks.marker.symbol) == ["circle", "circle-open"]
    assert list(figure.layout.yaxis.ticktext) == ["TPOT", "AL"]


def test_ratios_that_no_log_axis_can_show_are_left_out_and_colours_stay() -> None:
    frame = pd.concat([lines(ratio=0.0), lines(ratio=None), lines(row="3: mqa")])
    (marks,) = ratio_forest(frame).data
    assert marks.name == "3: mqa"
    assert marks.marker.color == "#E69F00"  # the second row's, though the first has no mark


def test_the_figure_is_bounded_and_its_texts_are_escaped() -> None:
    figure = ratio_forest(lines(2 * MAX_RATIOS, row="<b>x</b>", metric="<i>y"))
    assert sum(len(trace.x) for trace in figure.data) == MAX_RATIOS
    assert figure.layout.meta["points"] == (2 * MAX_RATIOS, MAX_RATIOS)
    assert "<b>" not in figure.data[0].name
    assert "<i>" not in str(figure.layout.yaxis.ticktext) + str(figure.data[0].customdata[0][0])
