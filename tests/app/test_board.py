"""The board as a visitor uses it, on real parquet files."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from effbench.metrics import METRICS
from effbench.schema import SCHEMA_VERSION
from effbench.store import Store
from leaderboard_app import data
from tests.app.pages import APP, ROOT, Open, texts
from tests.records import CPU, GPU, make_board, make_case, make_value

PAGE = APP


def column_settings(app: AppTest) -> str:
    return json.dumps(json.loads(app.dataframe[0].proto.columns), ensure_ascii=False)


def test_first_sight_is_a_ranked_table_with_units_and_help(open_page: Open) -> None:
    app = open_page([make_case("generate", ("mha",), baseline=None), make_case("generate", ("gqa",), speed=2.0)])
    frame = app.dataframe[0].value
    assert list(frame["techniques"]) == ["gqa", "mha"]
    assert list(frame["place"]) == ["1", "2"]
    assert frame["tokens_per_s"].tolist() == pytest.approx([24.38, 12.19])
    assert frame["ratio"].iloc[0] == pytest.approx(2.0)
    assert list(frame["verdict"]) == ["better", "–"]
    settings = column_settings(app)
    assert "k tokens/s" in settings
    assert "TPOT (ms/token)" in settings
    assert METRICS["tpot_s"].formula in settings
    assert "Hidden rows: none." in texts(app)


def test_a_row_leads_to_its_record_unless_its_name_is_no_plain_word(open_page: Open) -> None:
    strange = replace(make_case(techniques=("mqa",)), run_id="javascript:alert(1)")
    app = open_page([make_case(techniques=("gqa",)), strange])
    links = app.dataframe[0].value["record"]
    assert links.dropna().tolist() == [f"run?run={make_case(techniques=('gqa',)).run_id}"]
    assert len(links) == 2


def test_rank_is_shared_when_no_difference_is_shown(open_page: Open) -> None:
    app = open_page([make_case(techniques=("gqa",), speed=1.0), make_case(techniques=("mqa",), speed=1.05)])
    assert list(app.dataframe[0].value["place"]) == ["1=", "1="]
    assert "share a rank" in texts(app)


def test_screening_rows_are_marked(open_page: Open) -> None:
    app = open_page([make_case(techniques=("gqa",)), make_case(techniques=("mqa",), protocol="publish")])
    assert sorted(app.dataframe[0].value["protocol"]) == ["publish", "quick · screening"]
    assert "no difference below 10 %" in texts(app)


def test_every_filter_narrows_and_says_how_many_rows_it_hides(open_page: Open) -> None:
    app = open_page([make_case(techniques=("gqa",)), make_case(techniques=("mqa",), hardware=GPU, model="Qwen2.5-0.5B")])
    for key, choice in (("hardware", CPU), ("model", "tiny-llama"), ("technique", "gqa")):
        app.multiselect(key=key).set_value([choice]).run()
        assert list(app.dataframe[0].value["techniques"]) == ["gqa"]
        assert "Hidden rows: 1 by the filters." in texts(app)
        app.multiselect(key=key).set_value([]).run()
    app.multiselect(key="protocol").set_value(["quick"]).run()
    assert len(app.dataframe[0].value) == 2
    app.multiselect(key="status").set_value(["failed"]).run()
    assert len(app.dataframe) == 0
    assert "No row can be ranked" in texts(app)


def test_workload_and_metric_change_the_ranking(open_page: Open) -> None:
    cases = [make_case(techniques=("gqa",)), make_case("generate", ("mqa",)), make_case("generate", ("lora",), speed=2.0)]
    app = open_page(cases)
    app.selectbox(key="workload").set_value("generate").run()
    assert list(app.dataframe[0].value["techniques"]) == ["lora", "mqa"]
    app.selectbox(key="by").set_value("tpot_s").run()
    assert app.dataframe[0].value["tpot_s"].tolist() == pytest.approx([1.6, 3.2])
    assert not any(name.startswith("energy_net") for name in app.selectbox(key="by").options)


def test_choices_in_the_url_are_restored(open_page: Open) -> None:
    app = open_page(make_board(60), workload="generate", hardware=GPU, by="TPOT · lower is better")
    assert app.selectbox(key="workload").value == "generate"
    assert app.selectbox(key="by").value == "tpot_s"
    assert app.multiselect(key="hardware").value == [GPU]
    assert set(app.dataframe[0].value["hardware"]) == {GPU}


def test_choice_in_the_url_that_does_not_exist_is_dropped(open_page: Open) -> None:
    app = open_page([make_case()], workload="nonsense", hardware="nonsense", by="nonsense")
    assert len(app.dataframe[0].value) == 1


def test_rows_without_a_rank_stand_apart_with_their_reason(open_page: Open) -> None:
    good = make_case(techniques=("gqa",))
    idle = make_value("gpu_idle_share", 0.5, reasons=("host_bound",))
    bound = make_case(techniques=("mqa",))
    app = open_page(
        [
            good,
            replace(bound, metrics=(*bound.metrics, idle)),
            make_case(techniques=("lora",), status="failed", reason="out_of_memory"),
            make_case(techniques=("bf16",), status="invalid", reason="throttled"),
        ]
    )
    assert list(app.dataframe[0].value["techniques"]) == ["gqa"]
    apart = app.dataframe[1].value.set_index("techniques")["why"]
    assert set(apart.index) == {"mqa", "lora", "bf16"}
    assert "host_bound" in apart["mqa"]
    assert apart["lora"] == "out_of_memory"
    assert "Not ranked: 3 rows" in texts(app)


def test_missing_values_are_explained(open_page: Open) -> None:
    app = open_page([make_case()])
    assert "no sensor of this machine gives energy" in texts(app)


def test_all_metrics_are_one_click_away(open_page: Open) -> None:
    app = open_page([make_case()])
    assert "params_total" not in column_settings(app)
    app.toggle(key="all").set_value(True).run()
    assert "params_total" in column_settings(app)


def test_replaced_rows_are_counted(open_page: Open) -> None:
    again = replace(make_case(), run_id="again", started_at="2026-12-01T00:00:00+00:00")
    app = open_page([make_case(), again])
    assert len(app.dataframe[0].value) == 1
    assert "1 that a later run of the same case replaced" in texts(app)


def test_no_results_say_how_to_get_some(open_page: Open) -> None:
    app = open_page([])
    assert "no results" in texts(app)
    assert "make run" in texts(app)


def test_broken_file_is_named_while_the_rest_works(open_page: Open, tmp_path: Path) -> None:
    broken = tmp_path / "results" / "runs" / "bro_ken.parquet"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"PAR1 not really")
    app = open_page([make_case()])
    assert len(app.dataframe[0].value) == 1
    assert "bro\\_ken.parquet" in app.warning[0].value, "the name is escaped, not markup"


def test_newer_results_beside_ours_are_refused_in_a_sentence(
    open_page: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = Store(tmp_path / "newer")
    newer.write_case(replace(make_case(), schema_version=SCHEMA_VERSION + 1))
    file = tmp_path / "file"
    file.write_text("")
    app = open_page([make_case()])
    ours = str(tmp_path / "results")
    monkeypatch.setenv("EFFBENCH_RESULTS", f"{newer.path}:{ours}:{file}")
    app.run()
    assert len(app.dataframe[0].value) == 1
    said = " ".join(warning.value for warning in app.warning)
    assert f"schema version {SCHEMA_VERSION + 1}" in said
    assert "is a file, not a folder" in said


def test_files_are_read_again_only_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.write_case(make_case())
    monkeypatch.setenv("EFFBENCH_RESULTS", str(tmp_path))
    first = data.index()
    state = first.state
    assert data.index() is first
    assert first.state == state
    store.write_case(make_case(techniques=("mqa",)))
    assert data.index().count() == 2
    assert first.state != state


def test_folders_come_from_the_environment_or_are_the_usual_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFBENCH_RESULTS", "a:b")
    assert data.folders() == (Path("a"), Path("b"))
    monkeypatch.delenv("EFFBENCH_RESULTS")
    assert data.folders() == (Path("results/local"), Path("results/reference"))


def test_app_never_loads_the_measuring_arm(tmp_path: Path) -> None:
    Store(tmp_path).write_case(make_case())
    script = (
        "import os, sys\n"
        f"os.environ['EFFBENCH_RESULTS'] = {str(tmp_path)!r}\n"
        "from streamlit.testing.v1 import AppTest\n"
        "app = AppTest.from_file('leaderboard_app/app.py', default_timeout=60).run()\n"
        "assert len(app.dataframe) == 1 and not app.exception\n"
        "heavy = {'torch', 'triton', 'transformers', 'pynvml', 'effbench.runner', 'effbench.scheduler', 'effbench.registry'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
