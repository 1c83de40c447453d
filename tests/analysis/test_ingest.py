"""A file of many rows of every kind gives the index what the same rows give one by one as records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from effbench.analysis import ingest
from effbench.analysis.frame import frame_of
from effbench.analysis.index import ResultIndex
from effbench.analysis.rank import question
from effbench.schema import CaseRecord
from effbench.store import Store
from tests.records import GPU, make_board, make_case, make_value

METRICS = ("tokens_per_s", "tpot_s", "energy_j_per_token", "of_a_plugin", "unheard_of")
FOREIGN_SPECS = ("", "no json", "[1]", '{"a":NaN}', '{"techniques":5}', '{"params":7,"seed":2}', '{"params":{"x":1},"seed":2}')


def odd_rows() -> list[CaseRecord]:
    """Rows of every way to be unranked; each of a case of its own."""
    speed = make_value("tokens_per_s", 3.0)
    values = [
        (replace(speed, reasons=("noted", "estimate")),),
        (replace(speed, valid=False),),
        (replace(speed, value=None, reasons=("first", "second")),),
        (replace(speed, lower=None),),
        (replace(speed, value=2.0), replace(speed, value=4.0)),  # the same metric twice
        (speed, make_value("of_a_plugin", 1.0, reasons=("host_bound",))),
        (speed, replace(make_value("of_a_plugin", 1.0), source="a second source")),
        (),
    ]
    rows = [make_case(techniques=("mqa",), metrics=found) for found in values]
    whole = make_case(hardware=GPU, techniques=("mqa",))
    rows += [replace(whole, status="failed", reason=reason) for reason in ("", "out_of_memory")]
    rows += [replace(whole, reason="host_bound"), replace(whole, baseline_case_id=None)]
    return [replace(row, run_id=f"odd{number}", case_id=f"case{number}") for number, row in enumerate(rows)]


def index_of(path: Path, records: Iterable[CaseRecord]) -> ResultIndex:
    """An index of these rows, all in one file."""
    store = Store(path)
    for record in records:
        store.write_case(record)
    store.compact()
    assert len(store.files()) == 1
    index = ResultIndex([path])
    index.refresh()
    return index


def test_one_file_of_many_rows_gives_the_frame_of_its_records(tmp_path: Path) -> None:
    records = [*make_board(80), *odd_rows()]
    index = index_of(tmp_path, records)
    assert index.warnings == ()
    found, wanted = index.frame(METRICS), frame_of(records, METRICS)
    pd.testing.assert_frame_equal(found.sort_index(), wanted.sort_index(), check_dtype=False, check_index_type=False)
    assert {"estimate", "invalid", "first", "one_block", "host_bound", "failed", "out_of_memory", "not_taken", ""} <= set(
        found["tokens_per_s__why"]
    )
    assert index.units["of_a_plugin"] == ""


def test_specs_of_other_hands_have_the_label_and_the_question_of_their_records(tmp_path: Path) -> None:
    stacks: list[tuple[str, ...]] = [(), ("a", "b")]
    pairs = [(text, names) for text in FOREIGN_SPECS for names in stacks]
    records = [
        replace(make_case(), spec=text, techniques=names, run_id=f"odd{number}", case_id=f"case{number}")
        for number, (text, names) in enumerate(pairs)
    ]
    frame = index_of(tmp_path, records).frame()
    assert dict(frame["question"]) == {record.run_id: question(record) for record in records}
    assert dict(frame["label"]) == {record.run_id: record.label for record in records}


def test_an_invalid_value_with_an_empty_reason_is_not_ranked(tmp_path: Path) -> None:
    value = replace(make_value("tokens_per_s", 3.0), valid=False, reasons=("", "second"))
    assert list(index_of(tmp_path, [make_case(metrics=(value,))]).frame(METRICS)["tokens_per_s__why"]) == ["invalid"]


def test_equal_specs_of_a_file_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_case()
    rows = [replace(one, run_id=f"run{day}", started_at=f"2026-11-{day:02}T00:00:00+00:00") for day in range(1, 29)]
    read: list[str] = []
    real = ingest._read_spec
    monkeypatch.setattr(ingest, "_read_spec", lambda text: (read.append(text), real(text))[1])
    index = index_of(tmp_path, rows)
    assert index.replaced == 27
    assert read == [one.spec]


def test_more_metrics_than_an_index_takes_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "MAX_METRICS", 2)
    values = tuple(make_value(name, 1.0) for name in ("tokens_per_s", "first_invented", "second_invented"))
    index = index_of(tmp_path, [make_case(metrics=values), replace(make_case(metrics=values[1:]), run_id="b", case_id="c")])
    assert len(index.units) == 2
    assert index.frame(("second_invented",))["second_invented"].isna().all()
