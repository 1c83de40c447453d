"""Rows and figures taken home: raw, complete, made on a click, and harmless in a spreadsheet."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest
from streamlit.testing.v1 import AppTest

from effbench.schema import CaseRecord, MetricValue
from effbench.store import Store
from leaderboard_app import data, downloads
from leaderboard_app.downloads import csv_bytes, figure_config, file_name, html_bytes, neutral, parquet_bytes
from tests.records import make_board, make_case, make_value

FORMULAS = ("=1+1", "+1", "-1+2", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1")


def lines_of(records: Sequence[CaseRecord]) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(csv_bytes(records).decode(), newline="")))


def read_back(content: bytes, folder: Path) -> list[CaseRecord]:
    (folder / "runs").mkdir(parents=True)
    (folder / "runs" / "downloaded.parquet").write_bytes(content)
    found = Store(folder).cases()
    assert found.warnings == ()
    return list(found)


def test_csv_has_one_line_a_row_with_every_field_and_every_metric() -> None:
    record = make_case("generate", ("gqa", "bf16"), speed=2.0)
    (line,) = lines_of([record])
    for field in fields(CaseRecord):
        assert field.name in line or field.name in ("provenance", "metrics"), field.name
    assert line["techniques"] == "gqa+bf16"
    assert line["launch_ids"] == " ".join(record.launch_ids)
    assert line["spec"] == record.spec
    assert line["provenance.driver"] == "570.86"
    for metric in record.metrics:
        for part in (f.name for f in fields(MetricValue) if f.name not in ("name", "value")):
            assert f"{metric.name}__{part}" in line
    speed = next(m for m in record.metrics if m.name == "tokens_per_s")
    assert float(line["tokens_per_s"]) == speed.value
    assert float(line["tokens_per_s__ratio_upper"]) == speed.ratio_upper
    assert line["tokens_per_s__n"] == "3"
    assert line["tokens_per_s__unit"] == "tokens/s"


def test_missing_is_an_empty_cell_and_its_reason_is_kept() -> None:
    (line,) = lines_of([make_case()])
    assert line["aec_w"] == line["aec_w__lower"] == ""
    assert line["aec_w__reasons"] == "no_energy_sensor"
    assert line["aec_w__valid"] == "false"
    bare = lines_of([make_case(), make_case(techniques=("mqa",), status="failed", reason="out_of_memory")])[1]
    assert bare["tokens_per_s"] == bare["tokens_per_s__n"] == ""
    assert bare["reason"] == "out_of_memory"


def test_csv_agrees_with_the_parquet_of_the_same_rows(tmp_path: Path) -> None:
    records = make_board(30)
    back = {record.run_id: record for record in read_back(parquet_bytes(records), tmp_path)}
    frame = pd.read_csv(io.BytesIO(csv_bytes(records)), index_col="run_id")
    assert set(frame.index) == set(back)
    for run_id, record in back.items():
        for metric in record.metrics:
            shown = frame.loc[run_id, metric.name]
            assert (pd.isna(shown) and metric.value is None) or shown == metric.value


@pytest.mark.parametrize("formula", FORMULAS)
def test_no_cell_starts_a_formula(formula: str) -> None:
    metric = replace(make_value("tokens_per_s", -3.5, source=formula), unit=formula, reasons=(formula,))
    foreign = replace(metric, name=formula)
    record = make_case(techniques=(formula,), model=formula, hardware=formula, protocol=formula, metrics=(metric, foreign))
    record = replace(record, run_id=formula, suite=formula, workload=formula, reason=formula, spec=formula)
    record = replace(record, provenance={"driver": formula, "cpu": formula})
    rows = list(csv.reader(io.StringIO(csv_bytes([record]).decode(), newline="")))
    texts = [cell for row in rows for cell in row if cell and not re.fullmatch(r"-?[\d.]+", cell)]
    assert not [cell for cell in texts if cell.startswith(downloads.FORMULA_STARTS)]
    assert f"'{formula}" in texts
    cells = dict(zip(*rows, strict=True))
    assert cells["tokens_per_s"] == "-3.5", "a number stays a number"


def test_text_that_starts_no_formula_is_left_alone() -> None:
    for text in ("gqa(groups=2)", "", "'=1", " =1", "1-2", "µ"):
        assert neutral(text) == text


def test_a_metric_named_like_a_field_hides_nothing() -> None:
    record = make_case(metrics=(replace(make_value("tokens_per_s", 1.5), name="model"),))
    (line,) = lines_of([record])
    assert line["model"] == "tiny-llama"
    assert line["metric.model"] == "1.5"


def test_metrics_of_other_people_are_columns_of_their_own() -> None:
    strange = replace(make_value("tokens_per_s", 2.0), name='a <b>,"strange" one', unit="bananas")
    first, second = lines_of([make_case(), make_case(techniques=("mqa",), metrics=(strange,))])
    assert first[strange.name] == ""
    assert second[strange.name] == "2.0" or float(second[strange.name]) == 2.0
    assert second[f"{strange.name}__unit"] == "bananas"


def test_many_rows_are_written_chunk_by_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "CHUNK_ROWS", 7)
    records = make_board(40)
    assert [line["run_id"] for line in lines_of(records)] == [record.run_id for record in records]
    assert len(read_back(parquet_bytes(iter(records)), tmp_path)) == 40


def test_a_results_folder_takes_the_parquet_as_it_is(tmp_path: Path) -> None:
    records = [*make_board(25), make_case(techniques=("=1",), model="</script>\u202e", status="failed", reason="out_of_memory")]
    back = {record.run_id: record for record in read_back(parquet_bytes(records), tmp_path)}
    assert back == {record.run_id: record for record in records}
    assert Store(tmp_path).compact().rows == len(records)
    assert {r.run_id: r for r in Store(tmp_path).cases()} == back


def test_a_number_that_is_none_is_stored_as_the_store_does_it(tmp_path: Path) -> None:
    record = make_case(metrics=(make_value("tokens_per_s", float("nan")),))
    (value,) = read_back(parquet_bytes([record]), tmp_path)[0].metrics
    assert value.value is None
    assert "not_a_number" in value.reasons
    assert lines_of([record])[0]["tokens_per_s"] == ""


def test_no_rows_are_files_without_rows(tmp_path: Path) -> None:
    assert lines_of([]) == []
    assert read_back(parquet_bytes([]), tmp_path) == []


class Reads:
    """An index that notes what it is asked for."""

    def __init__(self, records: Sequence[CaseRecord]):
        self.known = {record.run_id: record for record in records}
        self.asked: list[list[str]] = []

    def records(self, run_ids: Sequence[str]) -> list[CaseRecord]:
        self.asked.append(list(run_ids))
        return [self.known[run_id] for run_id in run_ids if run_id in self.known]


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Reads:
    reads = Reads(make_board(5))
    monkeypatch.setattr(data, "index", lambda: reads, raising=False)
    return reads


@pytest.fixture
def buttons(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What the page gave to each download button."""
    import streamlit as st

    found: list[dict] = []
    real = st.download_button

    def noted(label: str, **options: object) -> bool:
        found.append({"label": label, **options})
        return real(label, **options)

    monkeypatch.setattr(st, "download_button", noted)
    return found


def run(script) -> AppTest:
    app = AppTest.from_function(script, default_timeout=60).run()
    assert not app.exception, app.exception
    return app


def test_files_are_made_when_a_button_is_clicked_and_not_before(index: Reads, buttons: list[dict]) -> None:
    def script() -> None:
        from leaderboard_app import data
        from leaderboard_app.downloads import table_downloads

        table_downloads("board", list(data.index().known), "results")

    run(script)
    assert index.asked == []
    assert [button["file_name"] for button in buttons] == ["results.csv", "results.parquet"]
    assert all(button["on_click"] == "ignore" and button["help"] for button in buttons)
    content = buttons[0]["data"]()
    assert index.asked == [list(index.known)]
    assert content == csv_bytes(index.known.values())
    assert buttons[1]["data"]() == parquet_bytes(index.known.values())


def test_the_rows_of_a_frame_are_its_index_in_its_order(index: Reads, buttons: list[dict]) -> None:
    def script() -> None:
        import pandas as pd

        from leaderboard_app import data
        from leaderboard_app.downloads import table_downloads

        ids = list(data.index().known)[3:0:-1]
        table_downloads("board", pd.DataFrame({"x": 1}, index=pd.Index(ids, name="run_id")))
        table_downloads("empty", pd.DataFrame())

    run(script)
    assert len(buttons) == 2, "a table without rows has nothing to take home"
    found = list(csv.DictReader(io.StringIO(buttons[0]["data"]().decode(), newline="")))
    assert [line["run_id"] for line in found] == list(index.known)[3:0:-1]


def test_a_table_of_very_many_rows_is_cut_and_says_so(
    index: Reads, buttons: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "MAX_ROWS", 3)

    def script() -> None:
        from leaderboard_app import data
        from leaderboard_app.downloads import table_downloads

        table_downloads("board", list(data.index().known))

    app = run(script)
    assert "first 3 of 5 rows" in app.caption[0].value
    assert len(list(csv.DictReader(io.StringIO(buttons[0]["data"]().decode(), newline="")))) == 3


def figure_script() -> None:
    import plotly.graph_objects as go

    from leaderboard_app.downloads import chart

    chart("ranking", go.Figure(go.Bar(x=[1, 2], y=["a", "</script><b>"])), "ranking of =1/../x", "Two bars.")


def test_a_figure_is_saved_as_html_on_a_click_and_as_a_picture_by_its_camera(buttons: list[dict]) -> None:
    app = run(figure_script)
    (button,) = buttons
    assert button["file_name"] == "ranking-of-1-..-x.html"
    page = button["data"]().decode()
    assert "plotly.js v" in page
    assert "</script><b>" not in page
    assert not re.search(r'<(script|link)[^>]+(src|href)="', page)
    (shown,) = app.get("plotly_chart")
    assert shown.proto.alt == "Two bars."
    assert '"format": "png"' in shown.proto.config or '"format":"png"' in shown.proto.config


def test_the_picture_s_format_is_chosen_and_restored_from_the_url() -> None:
    app = AppTest.from_function(figure_script, default_timeout=60)
    app.query_params["ranking_figure_format"] = "svg"
    app.run()
    assert not app.exception, app.exception
    assert "svg" in app.get("plotly_chart")[0].proto.config


def test_a_figure_s_bar_is_always_there_and_names_the_file() -> None:
    config = figure_config("a b", "svg")
    assert config["displayModeBar"] is True
    assert config["toImageButtonOptions"] == {"format": "svg", "filename": "a-b", "scale": 2}


def test_file_names_are_harmless() -> None:
    assert file_name("../../etc/passwd") == "etc-passwd"
    assert file_name("</script>") == "script"
    assert file_name("…") == "effbench"
    assert len(file_name("x" * 500)) == 80


def test_html_of_a_figure_needs_no_network() -> None:
    page = html_bytes(go.Figure(), "empty").decode()
    assert len(page) > 1_000_000, "plotly.js is in it"
    assert "cdn.plot.ly/plotly" not in page.split("<body>")[0]


def test_a_table_that_is_no_rows_is_neutral_as_csv_and_itself_as_parquet(buttons: list[dict]) -> None:
    frame = pd.DataFrame({"claim": ["=1+1", "C1"], "ratio": [1.5, None]})
    downloads.frame_downloads("claims", frame, "claims")
    as_csv, as_parquet = (button["data"]() for button in buttons)
    assert list(csv.reader(io.StringIO(as_csv.decode()))) == [["claim", "ratio"], ["'=1+1", "1.5"], ["C1", ""]]
    pd.testing.assert_frame_equal(pd.read_parquet(io.BytesIO(as_parquet)), frame)
    assert [button["file_name"] for button in buttons] == ["claims.csv", "claims.parquet"]
