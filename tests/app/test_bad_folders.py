"""Results that are missing, empty, broken or newer, through every page that shows rows: it says so, and the rest works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from effbench.schema import SCHEMA_VERSION
from effbench.store import Store
from tests.app.pages import VIEWS, opened, stored, texts
from tests.records import make_case

PAGES = ("board", "tradeoffs", "compare", "run", "claims")


def good(folder: Path) -> Path:
    return stored(folder, [make_case(), make_case(techniques=("mqa",))])


def half_written(folder: Path) -> None:
    whole = next((good(folder) / "runs").glob("*.parquet")).read_bytes()
    (folder / "runs" / "half.parquet").write_bytes(whole[: len(whole) // 2])


def newer(folder: Path) -> None:
    Store(good(folder)).write_case(replace(make_case(techniques=("gqa",)), run_id="newer", schema_version=SCHEMA_VERSION + 1))


def of_another_table(folder: Path) -> None:
    pq.write_table(pa.table({"invented": ["x"]}), good(folder) / "runs" / "other.parquet")


BROKEN = {"half.parquet": half_written, "written with schema version": newer, "other.parquet": of_another_table}


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_without_results_a_page_says_what_to_run(page: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "results"
    if kind == "empty":
        folder.mkdir()
    elif kind == "file":
        folder.write_text("no folder")
    monkeypatch.setenv("EFFBENCH_RESULTS", str(folder))
    app = opened(VIEWS / f"{page}.py")
    assert "make run" in texts(app) or page == "claims"
    if page == "claims":
        assert set(app.dataframe[0].value["verdict"]) == {"not measured yet"}
    if kind == "file":
        assert str(folder) in texts(app).replace("\\", "")


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("said", BROKEN)
def test_a_broken_file_is_named_and_the_rest_is_shown(
    page: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it: Callable[[Path], None] = BROKEN[said]
    break_it(tmp_path)
    monkeypatch.setenv("EFFBENCH_RESULTS", str(tmp_path))
    app = opened(VIEWS / f"{page}.py")
    text = texts(app).replace("\\", "")
    assert said in text
    assert "make run" not in text


@pytest.mark.parametrize("page", PAGES)
def test_columns_that_others_invented_change_nothing(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = next((good(tmp_path) / "runs").glob("*.parquet"))
    monkeypatch.setenv("EFFBENCH_RESULTS", str(tmp_path))
    plain = opened(VIEWS / f"{page}.py")
    table = pq.read_table(file)
    pq.write_table(table.append_column("invented", pa.array(["<b>x</b>"] * table.num_rows)), file)
    app = opened(VIEWS / f"{page}.py")
    assert texts(app) == texts(plain)
    assert [table.value.to_dict() for table in app.dataframe] == [table.value.to_dict() for table in plain.dataframe]
    assert app.dataframe or app.multiselect
