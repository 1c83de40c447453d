"""The trade-offs page as a visitor uses it, on real parquet files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from effbench.schema import CaseRecord
from effbench.store import Store
from leaderboard_app import one_question, roofline_of_rows
from leaderboard_app.figures import tradeoffs
from leaderboard_app.figures.tradeoffs import thin
from tests.app.pages import REFERENCE, VIEWS, Open, sound, texts
from tests.records import CPU, GPU, make_case, make_launch, make_metrics, make_trace, make_value

PAGE = VIEWS / "tradeoffs.py"
HOSTILE = "<img src=x onerror=alert(1)> **b** [x](javascript:alert(1)) =1+1 \u202e$x$"
RATE, TIME, MEMORY = "tokens_per_s", "step_p50_s", "host_memory_peak_bytes"
PEAKS = {"matrix_flops_per_s": {"fp32": 2e11}, "copy_bytes_per_s": 1e10}
SEVERAL, ROOFLINE, ADVICE = {"show": "Several metrics"}, {"show": "Roofline"}, {"show": "What should I use?"}


def table(app: AppTest) -> pd.DataFrame:
    return app.dataframe[0].value


def charts(app: AppTest) -> int:
    return len(app.get("plotly_chart"))


def row(
    name: str, rate: float = 100.0, step_s: float = 1.0, memory: float = 1e9, quality: float = 0.5, **changes
) -> CaseRecord:
    numbers = {RATE: rate, TIME: step_s, MEMORY: memory, "quality": quality}
    metrics = tuple(make_value(metric, value, half=0.01) for metric, value in numbers.items())
    return make_case("pretrain", (name,), **{"baseline": None, "protocol": "publish", "metrics": metrics} | changes)


def some() -> list[CaseRecord]:
    """gqa and mqa are on the front of memory and rate, mha is beaten, lora may be on it."""
    return [
        row("gqa", 100.0, memory=1e9),
        row("mqa", 200.0, memory=2e9),
        row("mha", 90.0, memory=2e9),
        row("lora", 99.5, memory=1.005e9),
    ]


def titled(name: str) -> str:
    return {
        RATE: "Tokens/s · higher is better",
        TIME: "Step p50 · lower is better",
        MEMORY: "Peak host memory · lower is better",
    }[name]


# -- the question


def test_the_question_with_most_rows_comes_first_and_another_is_kept_by_its_id(open_page: Open) -> None:
    rows = [*some(), row("gqa", seed=7), row("mqa", seed=7)]
    app = open_page(rows)
    setting = app.selectbox(key="setting")
    assert len(setting.options) == 2
    assert "4 rows" in setting.options[0]
    assert "seed=7" in setting.options[1]
    assert len(table(app)) == 4
    assert "question" not in app.query_params
    setting.select_index(1).run()
    assert len(table(sound(app))) == 2
    linked = app.session_state["setting"]
    assert linked in app.query_params["question"]
    assert len(table(open_page(rows, question=linked))) == 2
    assert len(table(open_page(rows, question="nonsense"))) == 4
    app.selectbox(key="setting").select_index(0).run()
    assert "question" not in app.query_params


def test_workload_hardware_and_model_narrow_each_other(open_page: Open) -> None:
    rows = [*some(), row("gqa", hardware=GPU, model="Llama-3.2-1B"), make_case("generate", ("gqa",), model="Qwen2.5-0.5B")]
    app = open_page(rows, workload="pretrain", hardware=GPU)
    assert app.selectbox(key="model").options == ["Llama-3.2-1B"]
    assert len(table(app)) == 1
    app.selectbox(key="workload").set_value("generate").run()
    assert app.selectbox(key="model").value == "Qwen2.5-0.5B"
    app = open_page(rows, workload="pretrain")
    app.selectbox(key="hardware").set_value(GPU).run()
    assert app.selectbox(key="model").value == "Llama-3.2-1B"
    two_models = open_page([*some(), row("gqa", model="another")], workload="pretrain", hardware=CPU, model="tiny-llama")
    assert len(table(two_models)) == 4
    two_models.selectbox(key="model").set_value("another").run()
    assert len(table(sound(two_models))) == 1


def test_only_metrics_that_some_row_here_can_be_ranked_by_are_offered(open_page: Open) -> None:
    options = (
        open_page([make_case(techniques=("gqa",)), make_case(techniques=("gqa",), hardware=GPU)]).selectbox(key="x").options
    )
    assert "Energy per token · lower is better" not in options, "the CPU has no sensor, the GPU's row is of another question"
    assert not any(option.startswith(("Parameters", "Net energy")) for option in options)
    assert options[:2] == ["AMU · lower is better", "PCU · higher is better"], "in the order of the metric table"


# -- two metrics


def test_the_front_of_two_metrics_and_who_may_be_on_it(open_page: Open) -> None:
    app = open_page(some(), x=titled(MEMORY), y=titled(RATE))
    assert dict(zip(table(app)["techniques"], table(app)["standing"], strict=True)) == {
        "gqa": "on the front", "mqa": "on the front", "lora": "may be on it", "mha": "beaten",
    }  # fmt: skip
    assert "2 of 4 rows are on the Pareto front" in texts(app)
    assert "3 may be on it" in texts(app)
    assert "throughput for each byte of memory" in texts(app)
    assert table(app)["link"].iloc[0] == f"run?run={table(app).index[0]}"
    assert charts(app) == 1
    assert len(app.get("download_button")) == 3, "the figure, and its rows as CSV and parquet"


def test_each_switch_of_two_metrics_does_what_it_says(open_page: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple] = []
    draw = tradeoffs.trade_off

    def spy(points, x, y, colours, together, **more):
        seen.append((len(points), x.name, y.name, x.log, y.log, together is not None, more["error_bars"]))
        return draw(points, x, y, colours, together, **more)

    monkeypatch.setattr(tradeoffs, "trade_off", spy)
    app = open_page(some(), x=titled(MEMORY), y=titled(RATE))
    assert seen[-1] == (4, MEMORY, RATE, False, False, True, True)
    for key, changed in (("bars", {6: False}), ("log", {3: True, 4: True}), ("iso", {5: False}), ("best", {0: 3})):
        before = list(seen[-1])
        app.toggle(key=key).set_value(not app.toggle(key=key).value).run()
        sound(app)
        assert list(seen[-1]) == [changed.get(place, value) for place, value in enumerate(before)], key
    app.selectbox(key="x").set_value(TIME).run()
    app.selectbox(key="y").set_value("quality").run()
    assert seen[-1][1:3] == (TIME, "quality")
    again = open_page(some(), x=titled(MEMORY), y=titled(RATE), bars="false", log="true", iso="false", best="true")
    assert seen[-1] == (3, MEMORY, RATE, True, True, False, False)
    assert again.toggle(key="best").value is True


def test_one_metric_twice_is_no_trade_off(open_page: Open) -> None:
    app = open_page(some(), x=titled(RATE), y=titled(RATE))
    assert "Choose two different metrics" in texts(app)
    assert charts(app) == 0


def test_rows_left_out_are_counted_with_their_reason(open_page: Open) -> None:
    lacking = [
        replace(row("full", metrics=()), status="failed", reason="out_of_memory"),
        row("bf16", metrics=(make_value(RATE, 1.0),)),
    ]
    app = open_page([*some(), *lacking], x=titled(MEMORY), y=titled(RATE))
    assert "1 row left out. Peak host memory: " in texts(app)
    assert "out_of_memory." in texts(app)
    assert "(not_taken)" in texts(app)
    assert len(table(app)) == 4


def test_metrics_that_no_row_has_both_of_give_no_figure(open_page: Open) -> None:
    rows = [row("gqa", metrics=(make_value(RATE, 1.0),)), row("mqa", metrics=(make_value(MEMORY, 1.0),))]
    app = open_page(rows)
    assert "No row has both metrics" in texts(app)
    assert charts(app) == 0


def test_thinned_figures_and_cut_tables_say_so(open_page: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tradeoffs, "thin", lambda points, x, y: thin(points, x, y, 3))
    monkeypatch.setattr(tradeoffs, "MAX_BARS", 2)
    monkeypatch.setattr(one_question, "MOST_LINES", 2)
    app = open_page(some(), x=titled(MEMORY), y=titled(RATE))
    assert "3 of 4 rows are drawn" in texts(app)
    assert "the first 2 on the front have error bars" in texts(app)
    assert "The table has the first 2 of 4 rows" in texts(app)
    assert len(table(app)) == 2


# -- several metrics


def test_several_metrics_are_normalised_the_papers_way_and_say_so(open_page: Open) -> None:
    app = open_page(some(), **SEVERAL)
    assert "the worst is 0.1 and the best is 1" in texts(app)
    assert "EfficientLLM" in texts(app)
    app.multiselect(key="metrics").set_value([RATE, MEMORY, TIME]).run()
    assert charts(sound(app)) == 2
    cells = table(app).set_index("techniques")
    assert cells.loc["mqa", RATE].endswith("→ 1.00")
    assert cells.loc["mha", RATE].endswith("→ 0.10")
    assert cells.loc["gqa", MEMORY] == "1.00 ±0.01 → 1.00"
    assert cells.loc["mqa", TIME].endswith("→ 1.00"), "all rows are the best where none is worse"


def test_rows_and_metrics_are_chosen_and_restored(open_page: Open) -> None:
    rows = some()
    app = open_page(rows, **SEVERAL)
    assert len(app.multiselect(key="rows").value) == 4
    chosen = [rows[0].run_id, rows[2].run_id]
    app.multiselect(key="rows").set_value(chosen).run()
    app.multiselect(key="metrics").set_value([RATE, MEMORY]).run()
    assert list(table(sound(app)).index) == chosen
    assert charts(app) == 1
    assert "No radar: the rows have fewer than three metrics" in texts(app)
    labels = [option for option in app.multiselect(key="rows").options if option.startswith(("gqa", "mha"))]
    again = open_page(rows, **SEVERAL, rows=labels, metrics=[titled(TIME), titled(RATE), titled(MEMORY)])
    assert set(again.multiselect(key="rows").value) == set(chosen)
    assert again.multiselect(key="metrics").value == [TIME, RATE, MEMORY]
    again.multiselect(key="rows").set_value(chosen[:1]).run()
    assert "Choose two rows or more" in texts(again)
    assert charts(again) == 0


def test_metrics_that_cannot_be_normalised_are_named(open_page: Open) -> None:
    other = row(
        "bf16", metrics=(make_value(RATE, 1.0), make_value("bits_per_byte", 1.0), make_value(MEMORY, 1.0, source="other"))
    )
    app = open_page([*some(), other], **SEVERAL, metrics=[titled(RATE), titled(MEMORY), "Bits per byte · lower is better"])
    assert "Bits per byte is left out: fewer than two rows" in texts(app)
    assert "Peak host memory is left out: the rows' values come from different sources" in texts(app)


# -- the roofline


def calibrated(tmp_path: Path, *cases: CaseRecord) -> list[CaseRecord]:
    """The rows with a launch each that recorded the device's rates."""
    for case in cases:
        Store(tmp_path / "results").write_launch(make_launch(case.launch_ids[0], facts={"peaks": PEAKS}), make_trace(3))
    return list(cases)


def placed(name: str, mfu: float, share: float = 0.5, source: str = "analytic work, peak of fp32") -> CaseRecord:
    shares = (make_value("mfu", mfu, source=source), make_value("bandwidth_share", share), make_value(RATE, 1.0))
    return replace(row(name, metrics=shares), launch_ids=(f"launch-{name}",))


def test_rows_stand_below_the_roofline_of_what_their_launch_recorded(open_page: Open, tmp_path: Path) -> None:
    rows = calibrated(
        tmp_path, placed("gqa", 0.25), placed("mqa", 0.5), placed("mha", 0.1, source="analytic work, peak of fp16")
    )
    app = open_page([*rows, placed("lora", 0.1)], **ROOFLINE)
    found = table(app).set_index("techniques")
    assert dict(found["flops_per_s"]) == pytest.approx({"gqa": 50.0, "mqa": 100.0})
    assert dict(found["intensity"]) == pytest.approx({"gqa": 10.0, "mqa": 20.0})
    assert dict(found["attained"]) == pytest.approx({"gqa": 50.0, "mqa": 50.0})
    assert "2 rows left out. no rates of this number format" in texts(app)
    assert charts(app) == 1
    app.selectbox(key="work").set_value("last decode step").run()
    assert "No row here can stand below a roofline" in texts(sound(app))
    assert "Decode FLOPs" in texts(app)
    assert open_page(REFERENCE, **ROOFLINE, work="last decode step").selectbox(key="work").value == "last decode step"


def test_only_the_newest_rows_are_placed_and_that_is_said(
    open_page: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline_of_rows, "MOST_PLACED", 1)
    old, new = calibrated(tmp_path, placed("gqa", 0.25), replace(placed("mqa", 0.5), started_at="2026-11-21T10:00:00+00:00"))
    app = open_page([old, new], **ROOFLINE)
    assert list(table(app)["techniques"]) == ["mqa"]
    assert "The newest 1 of 2 rows are looked at" in texts(app)


# -- what should I use?


def test_advice_ranks_what_meets_the_limits_and_says_what_each_gives_up(open_page: Open) -> None:
    app = open_page([*some(), row("full", 50.0, memory=1.49e9)], **ADVICE)
    assert app.selectbox(key="by").value == RATE
    assert "First choice: mqa" in texts(app)
    found = table(app).set_index("techniques")
    assert list(found["place"]) == ["1", "2=", "2=", "4", "5"]
    assert found.loc["mqa", f"against {MEMORY}"] == "×2.00 (1.96–2.04) worse"
    assert found.loc["gqa", f"against {RATE}"] == "×0.500 (0.490–0.510) worse"
    app.select_slider(key="memory").set_value("1.5 GB").run()
    assert list(table(sound(app))["techniques"]) == ["gqa", "lora", "full"]
    assert "beyond the limit" in texts(app)
    assert table(app)["unsure"].tolist() == ["", "", "Peak device memory or Peak host memory"]
    assert "First choice: gqa, lora (no difference between them is shown)" in texts(app)


def test_advice_has_a_slider_for_each_limit_and_keeps_all_choices_in_the_url(open_page: Open) -> None:
    base = [
        make_case(
            "generate",
            (name,),
            hardware=GPU,
            protocol="publish",
            baseline=None,
            metrics=make_metrics("generate", "cuda", speed=speed),
        )
        for name, speed in (("gqa", 1.0), ("mqa", 2.0), ("mha", 5.0))
    ]
    app = open_page(base, **ADVICE)
    assert [slider.key for slider in app.select_slider] == ["memory", "tpot", "energy", "quality"]
    tpot = [option for option in app.select_slider(key="tpot").options if option != "no limit"]
    app = open_page(base, **ADVICE, tpot=tpot[1], by="TPOT · lower is better", others="Quality · higher is better")
    assert app.select_slider(key="tpot").value == tpot[1]
    assert list(table(app)["techniques"]) == ["mha"]
    assert app.multiselect(key="others").value == ["quality"]
    assert [name for name in table(app) if name.startswith("against")] == ["against tpot_s", "against quality"]
    for key in ("memory", "energy", "quality"):
        app.select_slider(key=key).set_value(app.select_slider(key=key).options[0 if key != "quality" else -1]).run()
        sound(app)
        app.select_slider(key=key).set_value("no limit").run()
    app.select_slider(key="tpot").set_value("no limit").run()
    app.selectbox(key="by").set_value("energy_j_per_token").run()
    app.multiselect(key="others").set_value([]).run()
    assert [name for name in table(sound(app)) if name.startswith("against")] == ["against energy_j_per_token"]
    assert len(table(app)) == 3


def test_limits_that_nothing_meets_say_so(open_page: Open) -> None:
    app = open_page([*some(), row("full", 10.0, memory=1e8, quality=0.01)], **ADVICE)
    for key, place in (("memory", 0), ("quality", -1)):
        bounds = [option for option in app.select_slider(key=key).options if option != "no limit"]
        app.select_slider(key=key).set_value(bounds[place])
    sound(app.run())
    assert "No row meets these limits" in texts(app)
    assert "Quality: beyond the limit" in texts(app)


# -- any results


def test_an_empty_folder_tells_what_to_run(open_page: Open) -> None:
    app = open_page([])
    assert "no results to show yet" in texts(app)
    assert app.code[0].value == "make run"


def test_rows_that_all_failed_are_said_not_drawn(open_page: Open) -> None:
    app = open_page([replace(row("gqa", metrics=()), status="failed", reason="out_of_memory")])
    assert "No row here has a value" in texts(app)


@pytest.mark.parametrize("show", [{}, SEVERAL, ROOFLINE, ADVICE])
@pytest.mark.parametrize("workload", ["finetune", "generate", "pretrain"])
def test_the_reference_results_make_a_page_of_every_kind(open_page: Open, show: dict, workload: str) -> None:
    app = open_page(workload=workload, **show)
    drawn = charts(app)
    if show == ROOFLINE and workload != "generate":
        assert "no_flop_model" in texts(app)
        assert drawn == 0
    else:
        assert len(table(app)) == 3
        assert drawn == {"Several metrics": 2, "What should I use?": 0}.get(show.get("show", ""), 1)


@pytest.mark.parametrize("show", [{}, SEVERAL, ROOFLINE, ADVICE])
def test_hostile_texts_stay_texts(open_page: Open, tmp_path: Path, show: dict) -> None:
    names = dict.fromkeys(("hardware", "model", "suite"), HOSTILE)
    rows = calibrated(
        tmp_path, *(replace(placed(HOSTILE + kind, 0.2), **names, launch_ids=(f"launch{kind}",)) for kind in "ab")
    )
    rows[1] = replace(rows[1], run_id="<u>")
    rows.append(replace(rows[0], run_id="<b>", case_id="c", status="failed", reason=HOSTILE, metrics=()))
    app = open_page(rows, **show)
    marked_up = [element.value for kind in (app.markdown, app.caption, app.info, app.title, app.subheader) for element in kind]
    assert not any("<img" in str(value) or "onerror" in str(value) for value in marked_up)
    assert HOSTILE in table(app)["techniques"].iloc[0]
    assert table(app)["link"].isna().tolist() == [run_id == "<u>" for run_id in table(app).index]
    assert charts(app) or show == ADVICE


def test_a_part_of_a_metric_is_named_by_its_record_and_stays_text(open_page: Open) -> None:
    name = f"task_accuracy.{HOSTILE}"
    rows = [
        row(stack, metrics=(make_value(RATE, 1.0), make_value(name, share))) for stack, share in (("gqa", 0.1), ("mqa", 0.2))
    ]
    app = open_page(rows, x=f"Task accuracy, {HOSTILE} · higher is better", y=titled(RATE))
    assert app.selectbox(key="x").value == name
    assert charts(app) == 1
    assert HOSTILE in "".join(element.value for element in app.text)
    assert not any("<img" in element.value for kind in (app.markdown, app.caption, app.info) for element in kind)
