"""The board's rows: the limits, the questions, and ranks that agree with those of records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from effbench.analysis.board import Bound, Outline, outline, ranked
from effbench.analysis.frame import frame_of
from effbench.analysis.index import ResultIndex
from effbench.analysis.rank import latest, rank
from effbench.schema import CaseRecord
from effbench.store import Store
from tests.records import GPU, make_board, make_case, make_value

COLUMNS = ("hardware", "model", "question", "tokens_per_s", "tokens_per_s__why", "tpot_s", "tpot_s__why")


def outline_of(folder: Path, records: list[CaseRecord], by: str = "tokens_per_s", *bounds: Bound) -> Outline:
    store = Store(folder)
    for record in records:
        store.write_case(record)
    index = ResultIndex([folder])
    index.refresh()
    return outline(index.select(COLUMNS), by, bounds)


@pytest.mark.parametrize("by", ["tokens_per_s", "tpot_s", "host_memory_peak_bytes", "quality"])
def test_ranks_of_a_frame_are_those_of_its_records(by: str) -> None:
    rng = np.random.default_rng(1)
    records = [
        replace(
            case,
            protocol=rng.choice(["quick", "publish", "smoke"]),
            metrics=tuple(
                replace(value, value=v, lower=v - w, upper=v + w, source=str(rng.choice(["a", "b"])))
                if value.name == by and (v := float(rng.normal(1, 1))) and (w := float(rng.exponential(0.3)))
                else value
                for value in case.metrics
            ),
        )
        for case in make_board(300)
    ]  # negative values too: a change in quality has them
    records = latest(records)[0]
    of_records = {row.record.run_id: (row.rank, row.shared) for row in rank(records, by) if row.rank is not None}
    frame = ranked(frame_of(records, [by]), by)
    assert len(of_records) > 50
    assert {run_id: (int(r), bool(s)) for run_id, r, s in zip(frame.index, frame["rank"], frame["shared"], strict=True)} == (
        of_records
    )


def test_best_is_first_in_each_question() -> None:
    frame = ranked(frame_of(make_board(200), ["tpot_s"]), "tpot_s")
    for _, rows in frame.groupby("question"):
        assert rows["rank"].is_monotonic_increasing
        assert (rows["rank"].iloc[0], len(rows[rows["rank"] == 1])) >= (1, 1)


def test_questions_follow_machine_model_and_setting(tmp_path: Path) -> None:
    found = outline_of(
        tmp_path, [make_case(hardware=GPU), make_case(), make_case(model="a-model"), make_case(techniques=("mha",))]
    )
    assert found.num_questions == 3
    assert [len(found.questions(i, i + 1)) for i in range(3)] == [1, 2, 1]
    assert found.questions(0, 1)["model"].astype(str).tolist() == ["a-model"]
    assert found.questions(1, 99)["hardware"].astype(str).tolist()[-1] == GPU


def test_a_limit_leaves_out_what_is_beyond_it_and_what_has_no_such_value(tmp_path: Path) -> None:
    slow = make_case("generate", ("mha",), baseline=None)
    fast = make_case("generate", ("gqa",), speed=2.0)
    without = replace(fast, run_id="x", case_id="x", metrics=tuple(v for v in fast.metrics if v.name != "tpot_s"))
    limit = Bound(metrics=("tpot_s",), value=0.002, at_most=True)
    found = outline_of(tmp_path, [slow, fast, without], "tokens_per_s", limit)
    assert len(found.rows) == 1
    assert (found.beyond, found.unknown, len(found.apart)) == (2, 1, 0)
    least = Bound(metrics=("tpot_s",), value=0.002, at_most=False)
    assert len(outline_of(tmp_path, [], "tokens_per_s", least).rows) == 1


def test_an_estimate_meets_no_limit_and_is_not_ranked(tmp_path: Path) -> None:
    case = make_case("generate")
    values = [
        make_value(v.name, v.value, reasons=("estimate",)) if v.name in ("tpot_s", "tokens_per_s") else v for v in case.metrics
    ]
    guess = replace(case, metrics=tuple(values))
    found = outline_of(tmp_path, [guess], "tokens_per_s", Bound(metrics=("tpot_s",), value=1e9, at_most=True))
    assert (len(found.rows), len(found.apart)) == (0, 1)
