"""The board's benchmark: its rows are real rows, its viewers see what a browser sees, and it runs."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow.parquet as pq
import pytest

from benchmarks import board, board_cases, board_data, board_viewers, run
from benchmarks.board_viewers import Viewer, key_of, points
from effbench.analysis.rank import latest, question
from effbench.checks import failed
from effbench.schema import STATUSES, Case, CaseRecord, Spec, arrow_schemas, canonical_json
from effbench.store import Store
from tests.app import browser

pytestmark = pytest.mark.alone

NUM_ROWS = 1000
PAGE = """
import streamlit as st
choice = st.selectbox("Workload", ["pretrain", "generate"], key="workload")
chosen = st.multiselect("Hardware", ["a", "b"], key="hardware")
st.selectbox("Not a filter of the board", ["1", "2"], key="other")
st.dataframe({"choice": [choice]}, key="board")
st.plotly_chart({"data": [{"x": list(range(len(chosen) + 3)), "y": [1, 2, 3]}], "layout": {}}, key="ranking")
if choice == "generate":
    raise ValueError("no such thing")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tmp_path_factory.mktemp("rows")
    board_data.write(found, NUM_ROWS)
    return found


@pytest.fixture(scope="module")
def records(folder: Path) -> tuple[CaseRecord, ...]:
    rows = Store(folder).cases()
    assert rows.warnings == ()
    return rows.rows


def test_generated_rows_have_the_real_schema_and_no_implausible_number(folder: Path, records: Any) -> None:
    assert len({record.run_id for record in records}) == NUM_ROWS
    file = next((folder / "runs").iterdir())
    assert pq.read_schema(file).remove_metadata().equals(arrow_schemas()["runs"])
    reference = next(record for record in Store(board_data.REFERENCE).cases() if record.workload == "generate")
    for record in records:
        assert record.status in STATUSES
        assert not record.provenance.keys() - reference.provenance.keys() - {"driver", "cuda", "power_limit_w"}
        if record.status == "ok":
            assert {value.name for value in record.metrics} == {value.name for value in reference.metrics}
            assert failed(record) == [], record


def test_generated_identities_follow_from_the_specs(records: Any) -> None:
    for record in records[:200]:
        plain = json.loads(record.spec)
        spec = Spec.from_json(plain)
        base = Spec.from_json({**plain, "techniques": [asdict(one) for one in board_cases.stacks(record.workload)[0]]})
        assert record.spec == canonical_json(spec.to_json())
        assert spec.stack == record.techniques
        assert record.case_id == Case(spec=spec, baseline=base if record.baseline_case_id else None).case_id
        assert record.baseline_case_id in (None, Case(spec=base).case_id)
    assert 700 < np.mean([len(record.spec) for record in records]) < 1000  # as in results/reference


def test_generated_rows_are_as_mixed_as_a_board(records: Any) -> None:
    assert {record.workload for record in records} == set(board_cases.WORKLOADS)
    assert {record.status for record in records} == set(STATUSES)
    assert {record.protocol for record in records} == {"quick", "publish"}
    assert len({record.hardware for record in records}) >= 3
    assert len({question(record) for record in records}) == NUM_ROWS // board_cases.ROWS_A_QUESTION + 1
    assert len(latest(records)[1]) >= 10  # later runs replace earlier ones
    assert any("host_bound" in value.reasons for record in records for value in record.metrics)
    assert any("estimate" in value.reasons for record in records for value in record.metrics)


def test_the_same_seed_gives_the_same_rows_and_another_gives_others(records: Any, tmp_path: Path) -> None:
    board_data.write(tmp_path / "again", NUM_ROWS)
    board_data.write(tmp_path / "other", NUM_ROWS, seed=2)
    assert Store(tmp_path / "again").cases().rows == records
    assert not {r.run_id for r in Store(tmp_path / "other").cases()} & {r.run_id for r in records}


def test_a_large_folder_has_sealed_files_and_thousands_of_distinct_questions(tmp_path: Path) -> None:
    board_data.write(tmp_path, 25_000)
    files = sorted((tmp_path / "runs").iterdir())
    assert [pq.read_metadata(file).num_rows for file in files] == [10_000, 10_000, 5_000]
    assert all(file.name.startswith("sealed-") for file in files)
    places = {board_cases.place(k) for k in range(1_000_000 // board_cases.ROWS_A_QUESTION + 1)}
    assert len(places) == 1_000_000 // board_cases.ROWS_A_QUESTION + 1


def test_points_of_a_figure_are_counted_as_the_browser_gets_them() -> None:
    packed = json.loads(go.Figure([go.Scatter(x=np.arange(700.0), y=np.arange(700.0)), go.Bar(y=[1, 2, 3])]).to_json())
    assert isinstance(packed["data"][0]["x"], dict)
    assert points(packed) == 703
    parallel = go.Figure(go.Parcoords(dimensions=[{"values": [1, 2, 3, 4]}, {"values": [4, 3, 2, 1]}]))
    assert points(json.loads(parallel.to_json())) == 4
    assert points({"data": []}) == 0


def test_a_widget_is_known_by_its_key() -> None:
    assert key_of("$$ID-0123abcd-workload") == "workload"
    assert key_of("$$ID-0123abcd-two-words") == "two-words"


def test_a_viewer_changes_widgets_and_sees_figures_and_faults(tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    script.write_text(PAGE)

    async def visit(port: int) -> list[Any]:
        async with Viewer(port) as viewer:
            seen = [await viewer.rerun(), viewer.page]
            await viewer.choose("hardware", ["a", "b"])
            seen.append(viewer.page)
            seen.append({(await viewer.change(random.Random(i)))[0] for i in range(6)})
            await viewer.choose("workload", "generate")
            return [*seen, viewer.page]

    with browser.serve(script) as server:
        took_s, first, chosen, changed, last = asyncio.run(visit(server.port))
        load = asyncio.run(board_viewers.load(server.port, viewers=3, changes=2, think_s=0.01, seed=1))
    assert 0 < took_s < 30
    assert (set(first.widgets), first.points, first.tables, first.errors) == ({"workload", "hardware"}, [3], 1, [])
    assert chosen.points == [5]
    assert changed == {"workload", "hardware"}
    assert last.errors == ["ValueError: no such thing"]
    assert len(load.times_s) == 6
    assert load.errors and all("no such thing" in fault for fault in load.errors)


def test_a_server_that_is_gone_is_an_error_of_each_viewer(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        asyncio.run(board_viewers.load(browser.free_port(), viewers=1, changes=1, think_s=0.0, seed=1))


def test_memory_tells_data_from_pages_of_files(tmp_path: Path) -> None:
    before = board.memory_mb(os.getpid())
    held = np.ones(8_000_000)
    file = tmp_path / "pages"
    held.tofile(file)
    mapped = np.memmap(file, np.float64, "r")
    assert mapped.sum() == len(held)
    after = board.memory_mb(os.getpid())
    assert after["anonymous"] - before["anonymous"] == pytest.approx(64, abs=16)
    assert after["rss"] - before["rss"] == pytest.approx(128, abs=32)
    assert after["peak"] >= after["rss"]


@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "there is a browser")
def test_the_benchmark_runs_with_a_browser_and_a_tiny_run_claims_nothing() -> None:
    command = [sys.executable, str(Path(run.__file__)), "board", "--tiny", "--blocks", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    figures = report["figures"]
    assert {"paint_1000_ratio", "paint_aa_ratio", "script_1000_p95_s", "viewers_1000_p95_s", "memory_1000_mb"} <= figures.keys()
    assert figures["viewers_1000_errors_count"]["value"] == 0
    assert figures["script_1000_errors_count"]["value"] == 0
    assert 0 < figures["points_1000_count"]["value"] <= board.MAX_POINTS
    assert figures["paint_1000_s"]["value"] > 0
    assert not any("verdict" in figure for figure in figures.values())
    assert report["machine"]["others_share"] < 0.9


def test_without_a_browser_the_paint_is_missing_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board.browser, "missing", lambda: "there is no Chromium")
    samples, figures = board._paint(None, {}, board.TINY, board.Options())  # type: ignore[arg-type]
    assert samples.blocks == ()
    assert [figure.interval.reasons for figure in figures] == [("there is no Chromium",)]
