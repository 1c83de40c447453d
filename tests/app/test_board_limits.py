"""What matters, the limits, and the pages of the board."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from effbench.schema import CaseRecord
from leaderboard_app import limits
from tests.app.pages import APP, Open, texts
from tests.records import make_case, make_value

PAGE = APP
BEST, ALL = "best of each model and setting", "all rows"


def two() -> list[CaseRecord]:
    """Equal but for speed: 3.2 ms and 1.6 ms a token."""
    return [make_case("generate", ("mha",), baseline=None), make_case("generate", ("gqa",), speed=2.0)]


def many(models: int) -> list[CaseRecord]:
    return [make_case(model=f"model-{number:02}", techniques=(stack,), speed=speed)
            for number in range(models) for stack, speed in (("mha", 1.0), ("gqa", 2.0))]  # fmt: skip


def test_a_pill_ranks_by_what_it_names(open_page: Open) -> None:
    app = open_page(two())
    assert app.pills(key="matters").value == "tokens_per_s"
    app.pills(key="matters").set_value("tpot_s").run()
    assert app.selectbox(key="by").value == "tpot_s"
    assert app.dataframe[0].value["tpot_s"].tolist() == pytest.approx([1.6, 3.2])
    app.selectbox(key="by").set_value("step_p95_s").run()
    assert app.pills(key="matters").value is None


def test_a_latency_limit_leaves_the_fast_row_and_counts_the_slow_one(open_page: Open) -> None:
    app = open_page(two())
    options = app.select_slider(key="tpot").options
    assert options[-1] == "no limit"
    assert "2 ms/token" in options
    app.select_slider(key="tpot").set_value("2 ms/token").run()
    assert list(app.dataframe[0].value["techniques"]) == ["gqa"]
    assert "Hidden rows: 1 by the limits." in texts(app)


def test_a_limit_in_the_url_is_restored(open_page: Open) -> None:
    app = open_page(two(), tpot="2 ms/token")
    assert app.select_slider(key="tpot").value == "2 ms/token"
    assert list(app.dataframe[0].value["techniques"]) == ["gqa"]


def test_a_row_without_the_value_does_not_meet_the_limit_and_that_is_said(open_page: Open) -> None:
    lacking = make_case("generate", ("mqa",), speed=4.0)
    lacking = replace(lacking, metrics=tuple(value for value in lacking.metrics if value.name != "tpot_s"))
    app = open_page([*two(), lacking], tpot="5 ms/token")
    assert set(app.dataframe[0].value["techniques"]) == {"mha", "gqa"}
    assert "1 have no measured value of what is limited" in texts(app)


def test_no_row_within_the_limits_is_said(open_page: Open) -> None:
    fast = two()[1]
    app = open_page([two()[0], replace(fast, metrics=(*fast.metrics, make_value("quality", 0.5)))], quality="0.5")
    app.select_slider(key="tpot").set_value("2 ms/token").run()
    assert not app.exception


def test_every_offered_limit_narrows(open_page: Open) -> None:
    app = open_page(two())
    for key in ("memory", "tpot"):
        slider = app.select_slider(key=key)
        assert slider.label.endswith("at most")
        tight = slider.options[0]
        slider.set_value(tight).run()
        assert not app.exception
        app.select_slider(key=key).set_value("no limit").run()


def test_many_models_show_the_best_of_each_first_and_all_rows_on_request(open_page: Open) -> None:
    app = open_page(many(6))
    assert app.radio(key="show").value == BEST
    assert list(app.dataframe[0].value["techniques"]) == ["gqa"] * 6
    app.radio(key="show").set_value(ALL).run()
    assert len(app.dataframe[0].value) == 8
    app.number_input(key="page").set_value(2).run()
    assert sorted(set(app.dataframe[0].value["model"])) == ["model-04", "model-05"]


def test_few_models_show_all_rows_first(open_page: Open) -> None:
    assert len(open_page(many(2)).dataframe[0].value) == 4


def test_the_reasons_of_many_unranked_rows_are_counted_and_the_newest_shown(open_page: Open) -> None:
    lost = replace(make_case(techniques=("lora",)), status="failed", reason="out_of_memory")
    app = open_page([*two(), *(replace(lost, run_id=f"r{n}", case_id=f"c{n}") for n in range(205))], workload="pretrain")
    assert "Not ranked: 205 rows" in texts(app)
    assert "205 rows: out_of_memory" in texts(app)
    assert not len(app.dataframe)
    app.toggle(key="apart_listed").set_value(True).run()
    assert [len(table.value) for table in app.dataframe] == [200]


@pytest.mark.parametrize(("low", "high"), [(0.0016, 0.0032), (1e9, 8e10), (0.31, 0.47)])
def test_steps_span_the_values_so_that_the_ends_leave_all_rows(low: float, high: float) -> None:
    most, least = limits.steps(np.array([low, high, np.nan]), at_most=True), limits.steps(np.array([low, high]), at_most=False)
    assert most == sorted(most)
    assert most[-1] >= high
    assert least[0] <= low
    assert all(low < number for number in most)
    assert all(number < high for number in least)


def test_values_of_nothing_give_no_slider() -> None:
    assert limits.steps(np.array([np.nan, 0.0]), at_most=True) == []


def test_bounds_are_written_in_units_that_are_easy_to_read() -> None:
    assert limits.in_words(0.02, "s/token") == "20 ms/token"
    assert limits.in_words(1.5e9, "B") == "1.5 GB"
