"""Rows below the roofline of their device, from what their launches recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from effbench.analysis.frame import frame_of
from effbench.analysis.roofline import NOT_CALIBRATED, READS, Roof, points, roofs, roofs_of, used
from effbench.store import Store
from tests.records import make_case, make_launch, make_trace, make_value

PEAKS = {
    "matrix_flops_per_s": {"fp32": 2e11, "bf16": 4e11},
    "copy_bytes_per_s": 1e10,
    "datasheet_flops_per_s": {"bf16": 1e12},
    "datasheet_bytes_per_s": 2e10,
    "calibrated_at": "2026-11-24T01:18:56+00:00",
}
FP32 = Roof(dtype="fp32", flops_per_s=2e11, bytes_per_s=1e10, measured=True)
SOURCE = "analytic work, peak of fp32"


def case_of(*values, name: str = "gqa", **params):
    case = make_case("generate", (name,), baseline=None, metrics=values)
    spec = json.loads(case.spec)
    return replace(case, spec=json.dumps(spec | {"params": spec["params"] | params}))


def step_case(mfu: float = 0.25, share: float = 0.5, source: str = SOURCE, name: str = "gqa"):
    return case_of(make_value("mfu", mfu, source=source), make_value("bandwidth_share", share), name=name)


def test_roofs_are_the_measured_rates_then_those_of_the_datasheet() -> None:
    found = roofs(PEAKS)
    assert [(roof.dtype, roof.flops_per_s, roof.bytes_per_s, roof.measured) for roof in found] == [
        ("fp32", 2e11, 1e10, True), ("bf16", 4e11, 1e10, True), ("bf16", 1e12, 2e10, False),
    ]  # fmt: skip
    assert FP32.ridge == 20
    assert FP32.at(np.array([2.0, 20.0, 200.0])).tolist() == [2e10, 2e11, 2e11]


@pytest.mark.parametrize(
    "peaks",
    [None, "text", [], {}, PEAKS | {"copy_bytes_per_s": None}, PEAKS | {"copy_bytes_per_s": -1.0}, PEAKS | {"matrix_flops_per_s": 3},
     PEAKS | {"matrix_flops_per_s": {"fp32": float("inf"), "bf16": True, "fp16": "1e9", "int8": 0}}],
)  # fmt: skip
def test_what_is_no_rate_gives_no_measured_roof(peaks) -> None:
    assert not [roof for roof in roofs(peaks) if roof.measured]


def test_a_whole_step_stands_where_its_shares_say() -> None:
    rows, left_out = points(frame_of([step_case()], READS["step"]), [roofs(PEAKS)], "step")
    (row,) = rows.itertuples()
    assert row.flops_per_s == pytest.approx(5e10)
    assert row.intensity == pytest.approx(5e10 / 5e9)
    assert row.attained == pytest.approx(5e10 / 1e11), "left of the ridge the bandwidth is the roof"
    assert (row.dtype, row.roof, left_out) == ("fp32", FP32, {})


def test_a_decode_step_counts_every_sequence_of_the_batch() -> None:
    values = [("decode_flops", 1e9), ("expected_decode_bytes", 1e8), ("tpot_s", 0.05)]
    case = case_of(*(make_value(*value) for value in values), make_value("mfu", 0.1, source=SOURCE), batch_size=4)
    rows, left_out = points(frame_of([case], READS["decode"], spec=True), [[FP32]], "decode")
    (row,) = rows.itertuples()
    assert row.intensity == pytest.approx(10)
    assert row.flops_per_s == pytest.approx(4 * 1e9 / 0.05)
    assert row.attained == pytest.approx(8e10 / 1e11)
    assert left_out == {}


def test_rows_that_cannot_stand_there_are_counted_with_the_reason() -> None:
    cases = [
        step_case(),
        step_case(source="analytic work, peak of fp16", name="mqa"),
        case_of(
            make_value("mfu", 0.1, source=SOURCE), make_value("bandwidth_share", None, reasons=("no_flop_model",)), name="mha"
        ),
        step_case(share=0.0, name="lora"),
        step_case(name="full"),
        step_case(source="analytic work, peak of int8", name="int8"),
    ]
    frame = frame_of(cases, READS["step"])
    sheet = PEAKS | {"datasheet_flops_per_s": {"int8": 1e12}}
    known = [[] if label == "full" else roofs(sheet) for label in frame["label"]]
    rows, left_out = points(frame, known, "step")
    assert list(rows["label"]) == ["gqa"]
    assert left_out.pop(NOT_CALIBRATED) == 3, "a datasheet's rate is not a measured one"
    assert left_out.pop("its numbers are missing or not positive") == 1
    ((why, count),) = left_out.items()
    assert "no_flop_model" in why
    assert count == 1


@pytest.mark.parametrize(("changes", "why"), [({"batch_size": None}, "missing"), ({"bytes": None}, "Expected decode bytes")])
def test_a_decode_step_needs_a_batch_and_its_bytes(changes: dict, why: str) -> None:
    given = {"batch_size": 4, "bytes": 1e8} | changes
    values = [("decode_flops", 1e9), ("expected_decode_bytes", given.pop("bytes")), ("tpot_s", 0.05)]
    case = case_of(*(make_value(*value) for value in values), make_value("mfu", 0.1, source=SOURCE), **given)
    rows, left_out = points(frame_of([case], READS["decode"], spec=True), [[FP32]], "decode")
    assert rows.empty
    ((said, count),) = left_out.items()
    assert why in said
    assert count == 1
    for spec in ("{", "[" * 100_000):
        broken = frame_of([case], READS["decode"], spec=True).assign(spec=spec)
        assert points(broken, [[FP32]], "decode")[0].empty


def test_only_the_roofs_of_formats_in_use_are_drawn_each_once() -> None:
    frame = frame_of([step_case(), step_case(name="mqa")], READS["step"])
    known = [roofs(PEAKS), roofs(PEAKS)]
    assert used(points(frame, known, "step")[0], known) == [FP32]
    both = frame_of([step_case(), step_case(source="analytic work, peak of bf16", name="mqa")], READS["step"])
    found = used(points(both, known, "step")[0], known)
    assert [(roof.dtype, roof.measured) for roof in found] == [("bf16", True), ("fp32", True), ("bf16", False)]


def test_no_rows_have_no_points() -> None:
    for work in ("step", "decode"):
        rows, left_out = points(frame_of([], READS[work], spec=True), [], work)
        assert (len(rows), left_out) == (0, {})


def test_rates_are_read_from_the_launches_that_are_asked_for(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number, peaks in enumerate((PEAKS, {}, PEAKS | {"copy_bytes_per_s": 5e9})):
        store.write_launch(make_launch(f"launch{number}", facts={"peaks": peaks}), make_trace(3))
    store.write_launch(make_launch("bare", facts={}), make_trace(3))
    found, warnings = roofs_of(store, ["launch0", "launch1", "bare", "unknown"])
    assert {name: len(known) for name, known in found.items()} == {"launch0": 3, "launch1": 0, "bare": 0}
    assert set(found["launch0"]) == set(roofs(PEAKS))
    assert warnings == []
    store.compact()
    assert roofs_of(store, ["launch2"])[0]["launch2"][0].bytes_per_s == 5e9


def test_a_damaged_file_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_launch(make_launch("launch0", facts={"peaks": PEAKS}), make_trace(3))
    (tmp_path / "launches" / "00.parquet").write_bytes(b"PAR1 broken")
    found, warnings = roofs_of(store, ["launch0"])
    assert len(found["launch0"]) == 3
    assert "00.parquet" in warnings[0]
    (tmp_path / "file").write_text("no folder")
    assert roofs_of(Store(tmp_path / "file"), ["launch0"])[1]
