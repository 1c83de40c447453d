"""The index gives what records give, at every state of the files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from effbench.analysis.frame import frame_of
from effbench.analysis.index import ResultIndex
from effbench.store import Store
from tests.records import GPU, make_board, make_case, make_value

METRICS = ("tokens_per_s", "energy_j_per_token", "tpot_s", "unheard_of")


def same(left: pd.DataFrame, right: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(left.sort_index(), right.sort_index(), check_dtype=False, check_index_type=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


def index_of(*stores: Store) -> ResultIndex:
    index = ResultIndex([store.path for store in stores])
    index.refresh()
    return index


def write(store: Store, records: list) -> None:
    for record in records:
        store.write_case(record)


def test_frame_is_that_of_the_records(store: Store) -> None:
    records = make_board(120)
    odd = [
        make_case(techniques=("mqa",), metrics=(make_value("tokens_per_s", 3.0, reasons=("estimate",)),), run_id="estimated"),
        make_case(
            techniques=("mha",), metrics=(make_value("tokens_per_s", 3.0, valid=False),), baseline=None, run_id="invalid"
        ),
        replace(make_case(hardware=GPU, techniques=("mqa",)), reason="host_bound", run_id="slow"),
        replace(make_case(hardware=GPU), spec="no json", run_id="foreign"),
    ]
    write(store, records + odd)
    index = index_of(store)
    same(index.frame(METRICS), frame_of(records + odd, METRICS))
    assert index.count() == len(index.frame())


def test_filters_take_any_of_the_values(store: Store) -> None:
    records = make_board(60)
    write(store, records)
    index = index_of(store)
    where = {"workload": ["pretrain"], "techniques": ["gqa", "lora"], "hardware": []}
    wanted = {r.run_id for r in records if r.workload == "pretrain" and {"gqa", "lora"} & set(r.techniques)}
    assert set(index.frame(where=where).index) == wanted
    assert index.count(where) == len(wanted) > 0
    assert index.distinct("techniques") == sorted({name for r in records for name in r.techniques})
    assert index.distinct("hardware", {"workload": ["nothing"]}) == []


def test_compaction_replacement_and_removal_are_followed(store: Store) -> None:
    write(store, make_board(30))
    index = index_of(store)
    before, state = index.frame(METRICS), index.state
    store.compact()
    index.refresh()
    same(index.frame(METRICS), before)
    assert index.state != state
    later = replace(store.cases().rows[0], run_id="later", started_at="2026-12-01T00:00:00+00:00")
    store.write_case(later)
    index.refresh()
    same(index.frame(METRICS), frame_of(store.cases(), METRICS))
    assert index.replaced == 1
    for path, _ in store.files():
        path.unlink()
    index.refresh()
    assert index.count() == 0


def test_a_broken_file_is_named_and_the_rest_is_there(store: Store) -> None:
    write(store, make_board(3))
    (store.path / "runs" / "broken.parquet").write_bytes(b"nothing")
    index = index_of(store)
    assert index.count() == 3
    assert len(index.warnings) == 1
    assert "broken.parquet" in index.warnings[0]


def test_specs_are_those_of_the_records_and_unknown_rows_have_none(store: Store) -> None:
    records = make_board(12)
    write(store, records)
    index = index_of(store)
    asked = [record.run_id for record in records[:5]]
    assert index.specs([*asked, "nobody's"]) == {record.run_id: record.spec for record in records[:5]}
    assert index.specs(["nobody's"]) == index.specs([]) == {}


def test_records_come_whole_and_in_the_order_asked(store: Store, tmp_path: Path) -> None:
    records, other = make_board(12), Store(tmp_path / "other")
    write(store, records[:8])
    store.compact()
    write(other, records[8:])
    index = index_of(store, other)
    asked = [records[i].run_id for i in (9, 2, 11, 5)]
    assert index.records([*asked, "unknown"]) == [records[i] for i in (9, 2, 11, 5)]
    assert index.record("unknown") is None
    assert index.store_of(asked[0]).path == other.path
    frame = index.frame(spec=True)
    assert dict(frame["spec"]) == {record.run_id: record.spec for record in records}


def test_the_same_run_in_two_folders_counts_once(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    for one in (store, other):
        write(one, make_board(5))
    assert index_of(store, other).count() == 5


def test_nothing_is_there_yet(tmp_path: Path) -> None:
    index = index_of(Store(tmp_path / "none"))
    assert index.count() == 0
    assert list(index.frame(("tokens_per_s",)).columns)[-1] == "tokens_per_s__why"
    assert index.records(["x"]) == []
