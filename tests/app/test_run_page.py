"""The run page as a visitor uses it, on real parquet files with real traces, and its figures."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from effbench.analysis.launches import launches_of
from effbench.schema import CaseRecord, Series, Trace, Window
from effbench.store import Store
from leaderboard_app.figures.traces import MAX_POINTS, keep_peaks, points_note, sensor_lines, step_times
from leaderboard_app.one_row import metrics_frame, percentile_frame, row_json, trace_csv, trace_parquet, why_missing
from tests.app.pages import REFERENCE, VIEWS, Open, sound, texts
from tests.records import GPU, make_case, make_launch, make_spec, make_trace, make_value

PAGE = VIEWS / "run.py"
WINDOWS = {"warm_up": Window(start_s=0.4, end_s=0.9), "window": Window(start_s=1.0, end_s=2.5, ended_by="rule")}
HOSTILE = "<img src=x onerror=alert(1)> **b** [x](javascript:alert(1)) =1+1 \u202e$x$ ```"


def table(app: AppTest, key: str) -> pd.DataFrame:
    """The table of a section, by the columns that only it has."""
    column = {"metrics": "remarks", "checks": "check", "launches": "launch_id", "percentiles": "p99_ms", "about": "field"}[key]
    return next(element.value for element in app.dataframe if column in element.value.columns)


def written(folder: Path, record: CaseRecord | None = None, trace: Trace | None = None, **launch: Any) -> CaseRecord:
    """A row with two launches and one of its baseline in `folder`."""
    record = record or make_case(techniques=("gqa",))
    record = replace(record, launch_ids=("a0", "a1"), baseline_launch_ids=("b0",) if record.baseline_case_id else ())
    store = Store(folder)
    for name, block in (("a0", 0), ("a1", 1), ("b0", 0)):
        spec = make_spec(techniques=("mha",) if name == "b0" else ("gqa",))
        changes = {"block": block, "spec": spec, "windows": WINDOWS} | launch
        store.write_launch(make_launch(name, **changes), trace or make_trace(seed=block))
    store.write_case(record)
    return record


def test_no_row_chosen_offers_rows(open_page: Open) -> None:
    app = open_page()
    assert len(app.selectbox(key="picked_run").options) == 12
    assert not app.dataframe


def test_a_row_of_the_list_fills_the_url_and_opens(open_page: Open) -> None:
    app = open_page()
    app.selectbox(key="picked_run").set_value("e6bdf4662de64aab973eb25f57c915a5").run()
    assert app.text_input(key="run").value == "e6bdf4662de64aab973eb25f57c915a5"
    assert "gqa(groups=2) · generate · small-llama" in texts(sound(app))


@pytest.mark.parametrize("record", Store(REFERENCE).cases().rows, ids=lambda record: record.run_id[:8])
def test_every_reference_row_is_shown_in_full(open_page: Open, record: CaseRecord) -> None:
    app = open_page(run=record.run_id[:10])
    shown = table(app, "metrics")
    assert len(shown) == sum(value.value is not None for value in record.metrics)
    assert (table(app, "checks")["outcome"] == "passed").all()
    launches = table(app, "launches")
    assert set(launches["launch_id"]) == {*record.launch_ids, *record.baseline_launch_ids}
    assert (launches["window_s"] > 1.4).all() and (launches["warm_up_s"] > 0.2).all()
    assert len(table(app, "percentiles")) == 3
    assert f"git checkout {record.provenance['git_commit']}" in texts(app)
    about = table(app, "about").set_index("field")["value"]
    assert about["run_id"] == record.run_id
    assert about["provenance.packages.torch"] == "2.13.0+cpu"
    assert "Not recorded: the kernel offers no RAPL energy counter" in texts(app)  # in the place of the power trace


def test_the_way_to_the_baseline_is_a_button_where_its_row_is_here(open_page: Open, tmp_path: Path) -> None:
    assert open_page(run="31006b4d").button(key="beside").label == "Compare with its baseline"
    assert not open_page(run="e9e6d4fb").button  # it is a reference itself
    record = written(tmp_path)
    assert "The row of its baseline is not in these results" in texts(open_page(tmp_path, run=record.run_id))


def test_missing_metrics_are_one_click_away_with_their_reasons(open_page: Open) -> None:
    app = open_page(run="31006b4d", missing="true")
    found = table(app, "metrics").set_index("name")
    assert len(found) == 51
    assert "rapl_missing" in found.loc["energy_j_per_token", "remarks"]
    assert found.loc["amu_gb", "ratio"] == "×0.833 (0.769–0.903)"
    assert found.loc["amu_gb", "verdict"] == "better"


def test_an_unknown_or_ambiguous_id_is_said(open_page: Open) -> None:
    assert "No row has the run id 'nothing'" in texts(open_page(run="nothing"))
    assert "rows begin with '9'" in texts(open_page(run="9"))


def test_a_failed_row_shows_its_reason_and_what_its_launches_said(open_page: Open, tmp_path: Path) -> None:
    record = make_case(techniques=("gqa",), status="failed", reason="out_of_memory")
    written(tmp_path, record, Trace(), status="failed", reason="out_of_memory", detail="Traceback: boom", windows={})
    app = open_page(tmp_path, run=record.run_id)
    assert "The case was not measured" in texts(app)
    assert app.code[0].value == "Traceback: boom"
    assert "None of these launches has a trace" in texts(app)
    assert list(table(app, "checks")["outcome"]) == ["error: do not use the number"]


def test_a_row_whose_launches_are_gone_says_so_and_shows_the_rest(open_page: Open, tmp_path: Path) -> None:
    record = make_case(techniques=("gqa",))
    Store(tmp_path).write_case(record)
    app = open_page(tmp_path, run=record.run_id)
    assert "6 of the row's 6 launches are not in" in texts(app)
    assert "compared with is not in these results" in texts(app)
    assert len(table(app, "metrics")) > 10


def test_a_lost_trace_is_named_and_the_others_are_drawn(open_page: Open, tmp_path: Path) -> None:
    record = written(tmp_path)
    (tmp_path / "traces" / "a1.parquet").unlink()
    app = open_page(tmp_path, run=record.run_id)
    assert "block 1: There is no trace of launch a1" in texts(app)
    assert "the sensor gpu_energy_counter gave no samples" in texts(app)
    assert list(table(app, "percentiles")["launch"]) == ["block 0"]


def test_launches_and_series_are_chosen_and_restored_from_the_url(open_page: Open, tmp_path: Path) -> None:
    record = written(tmp_path)
    assert open_page(tmp_path, run=record.run_id).multiselect(key="launch").value == ["block 0", "block 1"]
    app = open_page(tmp_path, run=record.run_id, launch=["block 0 · baseline"])
    assert list(table(app, "percentiles")["launch"]) == ["block 0 · baseline"]
    app = open_page(run="31006b4d", series="process_cpu_time")
    assert app.selectbox(key="series").value == "process_cpu_time"
    app.multiselect(key="launch").set_value([]).run()
    assert "No launch is chosen" in texts(sound(app))


def test_host_bound_screening_and_failed_checks_are_said(open_page: Open, tmp_path: Path) -> None:
    record = make_case(techniques=("gqa",), hardware=GPU)
    worse = (make_value("gpu_idle_share", 0.5, reasons=("host_bound",)), make_value("mfu", 3.0))
    record = replace(record, metrics=(*(v for v in record.metrics if v.name not in ("gpu_idle_share", "mfu")), *worse))
    app = open_page(tmp_path, run=written(tmp_path, record).run_id)
    assert "Host-bound" in texts(app)
    assert "no difference below 10 %" in texts(app)
    checks = table(app, "checks")
    assert dict(zip(checks["check"], checks["outcome"], strict=True))["shares"] == "error: do not use the number"
    assert checks["outcome"].iloc[-1] == "passed" != checks["outcome"].iloc[0]


def test_hostile_texts_stay_texts(open_page: Open, tmp_path: Path) -> None:
    trace = make_trace()
    odd = Series(name=HOSTILE, unit=HOSTILE, scope=HOSTILE, source=HOSTILE, t_s=np.arange(9.0), values=np.arange(9.0))
    record = make_case(techniques=("gqa",))
    values = (make_value("al_s", 1.0, reasons=(HOSTILE,), source=HOSTILE), replace(make_value("al_s", 1.0), name=HOSTILE))
    about = {
        "hardware": HOSTILE,
        "model": HOSTILE,
        "suite": HOSTILE,
        "started_at": HOSTILE,
        "protocol": HOSTILE,
        "metrics": values,
    }
    record = replace(record, provenance={"git_commit": HOSTILE, "details": HOSTILE}, **about)
    record = written(tmp_path, record, Trace(series=(*trace.series, odd)), detail=HOSTILE, reasons=(HOSTILE,))
    app = open_page(tmp_path, run=record.run_id, missing="true")
    kinds = (app.markdown, app.caption, app.info, app.title, app.subheader, app.warning, app.error, app.metric)
    assert not any("<img" in str(element.value) + str(getattr(element, "label", "")) for kind in kinds for element in kind)
    assert HOSTILE in table(app, "metrics")["source"].tolist()
    csv = trace_csv(Store(tmp_path), launches_of(Store(tmp_path), record).rows).decode()
    assert "=1+1" in csv and "\n=" not in csv and ",=" not in csv


# -- tables and files


def test_metrics_stand_in_the_order_of_the_table_with_all_numbers() -> None:
    frame = metrics_frame(make_case(techniques=("gqa",), speed=2.0)).set_index("name")
    assert frame.index[0] == "tokens_per_s"
    line = frame.loc["tokens_per_s"]
    assert (line["shown"], line["unit"], line["n"], line["ratio"], line["verdict"]) == (
        "24.4 ±0.5", "k tokens/s", 3, "×2.00 (1.96–2.04)", "better",
    )  # fmt: skip
    assert line["value"] == pytest.approx(24380)
    assert pd.isna(frame.loc["aec_w", "value"]) and pd.isna(frame.loc["aec_w", "shown"])
    assert "metric" in metrics_frame(make_case(status="failed")).columns


def test_percentiles_of_each_launch_say_which_tail_is_not_resolved() -> None:
    steps = pd.DataFrame({"launch": ["a"] * 101 + ["b"] * 5, "value": [*np.linspace(0.1, 0.2, 101), *[0.3] * 5]})
    found = percentile_frame(steps).set_index("launch")
    assert found.loc["a", ["p50_ms", "p95_ms", "p99_ms"]].tolist() == pytest.approx([150.0, 195.0, 199.0])
    assert found.loc["a", "tail"] == "resolved"
    assert found.loc["b", "tail"] == "p95 and p99 of 5 steps is little more than the maximum"


def test_missing_traces_take_the_reasons_of_their_metrics() -> None:
    assert "no_energy_sensor" in why_missing(make_case(), ("aec_w",))
    assert why_missing(make_case(metrics=()), ("aec_w",)) == "the row does not say why"


def test_the_downloads_hold_everything(tmp_path: Path) -> None:
    record = written(tmp_path)
    store = Store(tmp_path)
    document = json.loads(row_json(record))
    assert document["run_id"] == record.run_id and document["spec"]["workload"] == "pretrain"
    assert len(document["metrics"]) == len(record.metrics)
    launches = launches_of(store, record).rows
    parquet, csv = (
        pd.read_parquet(io.BytesIO(trace_parquet(store, launches))),
        pd.read_csv(io.BytesIO(trace_csv(store, launches))),
    )
    expected = sum(len(series.t_s) for launch in launches for series in store.trace(launch.launch_id).series)
    assert len(parquet) == len(csv) == expected
    step = parquet[(parquet["launch_id"] == "a1") & (parquet["series"] == "step")]
    kept = store.trace("a1").get("step")
    assert kept is not None
    assert step["value"].tolist() == kept.values.tolist() and step["t_s"].tolist() == kept.t_s.tolist()
    assert csv["value"].sum() == pytest.approx(parquet["value"].sum())


def test_download_buttons_are_there_and_build_nothing_before_the_click(
    open_page: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = written(tmp_path)
    for name in ("trace_csv", "trace_parquet", "row_json"):
        monkeypatch.setattr(f"leaderboard_app.one_row.{name}", lambda *_: pytest.fail("built before the click"))
    app = open_page(tmp_path, run=record.run_id)
    labels = {button.label for button in app.get("download_button")}
    assert {"Rows as CSV", "Rows as parquet", "Row as JSON", "Traces as CSV", "Traces as parquet", "Suite as YAML"} <= labels


# -- figures


def trace_lines(count: int, series: str = "power", launch: str = "block 0", unit: str = "W", **more: Any) -> pd.DataFrame:
    values = np.ones(count)
    values[count // 3] = 900.0
    values[count // 2] = -900.0
    columns = {
        "since_s": np.arange(count) / 100,
        "value": values,
        "series": series,
        "launch": launch,
        "unit": unit,
        "side": "row",
    }
    return pd.DataFrame(columns | more)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=300), st.integers(2, 50))
def test_no_peak_is_lost_whatever_the_values(numbers: list[float], most: int) -> None:
    values = np.array(numbers, np.float64)
    kept = keep_peaks(values, most)
    finite = values[np.isfinite(values)]
    assert len(kept) <= most and (np.diff(kept) > 0).all() and np.isfinite(values[kept]).all()
    if len(finite):
        assert values[kept].max() == finite.max() and values[kept].min() == finite.min()
    if len(finite) <= most:
        assert values[kept].tolist() == finite.tolist()


def test_a_line_of_one_point_cannot_keep_peaks() -> None:
    with pytest.raises(ValueError, match="1 points"):
        keep_peaks(np.ones(3), 1)


@pytest.mark.parametrize("lines", [1, 7, 61, 200])
def test_a_figure_has_at_most_5000_points_and_keeps_the_peaks(lines: int) -> None:
    frame = pd.concat([trace_lines(4_000, launch=f"block {i}") for i in range(lines)])
    figure = sensor_lines(frame, "Power")
    drawn = [np.asarray(trace.y) for trace in figure.data]
    assert sum(map(len, drawn)) <= MAX_POINTS
    assert all(y.max() == 900.0 and y.min() == -900.0 for y in drawn)
    note = points_note(figure)
    assert (note == "") == (lines == 1)
    assert lines == 1 or f"of {4_000 * lines:,} points are drawn" in note


def test_warm_up_is_shaded_up_to_the_window_and_the_windows_end_is_marked() -> None:
    figure = sensor_lines(trace_lines(50), "Power", warm_up_s=0.3, window_s=1.5)
    shade = next(shape for shape in figure.layout.shapes if shape.type == "rect")
    assert (shade.x0, shade.x1) == (-0.3, 0)
    assert any(shape.type == "line" and shape.x0 == shape.x1 == 1.5 for shape in figure.layout.shapes)
    assert {note.text for note in figure.layout.annotations} == {"warm-up", "window ends"}
    assert not sensor_lines(trace_lines(50), "Power").layout.shapes


def test_series_have_a_colour_each_baselines_are_dotted_and_units_are_readable() -> None:
    frame = pd.concat(
        [
            trace_lines(9, "used", unit="B").assign(value=2e9),
            trace_lines(9, "used", "block 0 · baseline", "B", side="baseline").assign(value=3e9),
            trace_lines(9, "process", unit="B").assign(value=1e9),
        ]
    )
    figure = sensor_lines(frame, "Memory")
    assert figure.layout.yaxis.title.text == "Memory (GB)"
    assert [trace.line.dash for trace in figure.data] == ["solid", "dot", "solid"]
    colours = [trace.line.color for trace in figure.data]
    assert colours[0] == colours[1] != colours[2]
    assert [trace.showlegend for trace in figure.data] == [True, False, True]
    assert figure.data[0].y[0] == pytest.approx(2.0)


def test_steps_are_points_with_hollow_warm_up_and_percentile_lines_in_ms() -> None:
    frame = pd.concat([trace_lines(4, "warm_up_step", unit="s"), trace_lines(20, "step", unit="s"), trace_lines(5)])
    frame["value"] = 0.05
    figure = step_times(frame, {"p50": 0.05, "p99": 0.08}, warm_up_s=0.2)
    assert [trace.marker.symbol for trace in figure.data] == ["circle-open", "circle"]
    assert [len(trace.x) for trace in figure.data] == [4, 20]
    assert [trace.showlegend for trace in figure.data] == [False, True]
    assert figure.layout.yaxis.title.text == "step time (ms)"
    heights = sorted(shape.y0 for shape in figure.layout.shapes if shape.type == "line")
    assert heights == pytest.approx([50.0, 80.0])
    assert {"p50 50 ms", "p99 80 ms"} <= {note.text for note in figure.layout.annotations}


def test_texts_of_a_trace_are_escaped_in_its_figure() -> None:
    frame = trace_lines(9, "<b>s</b>", "<i>l</i>", "<u>")
    for figure in (sensor_lines(frame, "<h1>"), step_times(frame.assign(series="step"), {"<b>p</b>": 1.0})):
        shown = [
            figure.layout.yaxis.title.text,
            *(trace.name for trace in figure.data),
            *(t.hovertemplate for t in figure.data),
        ]
        shown += [note.text for note in figure.layout.annotations]
        assert not any(tag in text for text in shown for tag in ("<b>", "<i>", "<u>", "<h1>"))


def test_figures_of_nothing_are_empty() -> None:
    empty = trace_lines(1).iloc[:0]
    assert len(sensor_lines(empty, "Power").data) == len(step_times(empty, {}).data) == 0
