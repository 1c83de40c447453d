"""Rows side by side: never another verdict than the board's, and a ratio that fits it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effbench.analysis.compare import (
    NO_DIRECTION,
    NOT_ALONE,
    OTHER_QUESTION,
    OTHER_SENSOR,
    Compared,
    compare,
    described,
    differences,
    flat,
    metric_names,
    question_differences,
    ratio_words,
)
from effbench.analysis.rank import question, rank, ratio_verdict
from effbench.schema import CaseRecord, MetricValue, canonical_json
from effbench.stats import verdict
from effbench.store import Store
from tests.records import GPU, make_case, make_value

REFERENCE = Path(__file__).parents[2] / "results" / "reference"
METRIC = "tpot_s"  # lower is better


def row(run_id: str, *metrics: MetricValue, **more: Any) -> CaseRecord:
    return make_case(run_id=run_id, metrics=metrics, **{"techniques": (run_id,), "protocol": "publish"} | more)


def value(middle: float, name: str = METRIC, **more: Any) -> MetricValue:
    return make_value(name, middle, **more)


def one(first: CaseRecord, other: CaseRecord, name: str = METRIC) -> Compared:
    (found,) = compare(first, other, [name])
    return found


def baseline_and(**more: Any) -> tuple[CaseRecord, CaseRecord]:
    """A baseline and a row paired with it: the values' quotient is 0.5, the paired ratio `ratio`."""
    base = row("mha", value(2.0, half=0.5), baseline=None)
    return base, row("gqa", value(1.0, half=0.5, **more), baseline=("mha",))


def test_the_baseline_first_gives_the_paired_ratio_with_its_interval() -> None:
    found = one(*baseline_and(ratio=0.6))
    assert (found.ratio, found.lower, found.upper) == pytest.approx((0.6, 0.588, 0.612))
    assert (found.basis, found.verdict, found.why) == ("paired", "better", "")


def test_the_baseline_second_gives_the_inverse() -> None:
    base, paired = baseline_and(ratio=0.5)
    found = one(paired, base)
    assert (found.ratio, found.lower, found.upper) == pytest.approx((2.0, 1 / 0.51, 1 / 0.49))
    assert (found.basis, found.verdict) == ("paired", "worse")


def test_a_baseline_in_another_environment_is_no_baseline() -> None:
    base, paired = baseline_and(ratio=0.6)
    found = one(replace(base, env_id="f" * 64), paired)
    assert (found.ratio, found.basis, found.verdict) == (pytest.approx(0.5), "values", "no difference shown")


def test_a_shared_baseline_divides_the_paired_ratios_with_bounds_crosswise() -> None:
    first, other = row("gqa", value(1.0, half=0.5, ratio=0.5)), row("mqa", value(1.0, half=0.5, ratio=0.6))
    found = one(first, other)
    assert (found.ratio, found.lower, found.upper) == pytest.approx((1.2, 0.6 * 0.98 / 0.51, 0.6 * 1.02 / 0.49))
    assert (found.basis, found.verdict) == ("same baseline", "worse")


def test_otherwise_the_values_intervals_decide() -> None:
    found = one(row("a", value(1.0), baseline=None), row("b", value(1.3), baseline=None))
    assert (found.ratio, found.lower, found.upper) == pytest.approx((1.3, 1.3 * 0.98 / 1.02, 1.3 * 1.02 / 0.98))
    assert (found.basis, found.verdict) == ("values", "worse")
    assert one(row("a", value(1.0), baseline=None), row("b", value(1.03), baseline=None)).verdict == "no difference shown"


@pytest.mark.parametrize("protocols", [("quick", "publish"), ("publish", "quick")])
def test_screening_on_either_side_claims_no_small_difference(protocols: tuple[str, str]) -> None:
    sides = [row(p, value(v, half=0.001), protocol=p, baseline=None) for p, v in zip(protocols, (1.0, 1.08), strict=True)]
    assert one(*sides).verdict == "no difference shown"
    far = [row(p, value(v, half=0.001), protocol=p, baseline=None) for p, v in zip(protocols, (1.0, 1.2), strict=True)]
    assert one(*far).verdict == "worse"


def test_another_question_keeps_its_ratio_but_is_not_comparable() -> None:
    found = one(row("a", value(1.0)), row("b", value(3.0), hardware=GPU, seed=4))
    assert (found.ratio, found.verdict, found.why) == (pytest.approx(3.0), "not comparable", OTHER_QUESTION)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"source": "RAPL"}, OTHER_SENSOR),
        ({"reasons": ("estimate",)}, "estimate"),
        ({"valid": False, "reasons": ("mig",)}, "mig"),
    ],
)
def test_values_that_cannot_be_held_against_each_other(changes: dict[str, Any], why: str) -> None:
    name = "energy_j_per_token"
    found = one(row("a", value(1.0, name)), row("b", replace(value(2.0, name), **changes)), name)
    assert (found.verdict, found.why, found.ratio) == ("not comparable", why, pytest.approx(2.0))


def test_a_host_bound_row_is_not_comparable() -> None:
    idle = make_value("gpu_idle_share", 0.5, reasons=("host_bound",))
    assert one(row("a", value(1.0)), row("b", value(2.0), idle)).why == "host_bound"


def test_what_is_missing_has_no_verdict_and_keeps_its_reason() -> None:
    missing = make_value(METRIC, None, reasons=("no_steps",))
    found = one(row("a", value(1.0)), row("b", missing))
    assert (found.ratio, found.verdict, found.why) == (None, None, "no_steps")
    assert one(row("a", missing), row("b", value(1.0))).why == "no_steps"
    assert one(row("a"), row("b", value(1.0))).why == "not_taken"
    assert one(row("a", value(1.0)), row("b", status="failed", reason="out_of_memory")).why == "out_of_memory"


def test_a_metric_without_direction_or_never_alone_has_a_ratio_and_no_verdict() -> None:
    for name, why in (("params_total", NO_DIRECTION), ("energy_net_j_per_token", NOT_ALONE), ("of_a_plugin", NO_DIRECTION)):
        found = one(row("a", value(1.0, name)), row("b", value(2.0, name)), name)
        assert (found.ratio, found.verdict, found.why) == (pytest.approx(2.0), None, why)


@pytest.mark.parametrize("middles", [(0.0, 1.0), (-1.0, 1.0), (1.0, -1.0)])
def test_no_ratio_of_what_is_not_positive(middles: tuple[float, float]) -> None:
    name = "quality_change"
    found = one(*(row(str(i), value(v, name), baseline=None) for i, v in enumerate(middles)), name)
    assert (found.ratio, found.lower, found.upper, found.basis) == (None, None, None, "")


def test_a_single_block_has_a_ratio_without_an_interval() -> None:
    single = replace(value(2.0), lower=None, upper=None, n=1)
    found = one(row("a", value(1.0), baseline=None), row("b", single, baseline=None))
    assert (found.ratio, found.lower, found.verdict, found.why) == (2.0, None, "not comparable", "one_block")


def test_ratios_are_written_with_three_digits_each() -> None:
    assert ratio_words(0.71, 0.7, 1.2) == "×0.710 (0.700–1.20)"
    assert ratio_words(123.4, None, 2.0) == "×123"
    assert ratio_words(1.0, 1e-9, 3e7) == "×1.00 (1e-09–3e+07)"
    assert ratio_words(None, 1.0, 2.0) == ""


SIDES = st.tuples(
    st.floats(0.5, 2.0),
    st.floats(0.001, 0.4),
    st.one_of(st.none(), st.floats(0.5, 2.0)),
    st.sampled_from(["quick", "publish", "smoke"]),
)


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, st.sampled_from(["", "first", "second", "shared"]), st.sampled_from([METRIC, "tokens_per_s"]))
def test_ratio_and_verdict_agree_with_the_board(first: Any, other: Any, tie: str, name: str) -> None:
    """The verdict is the rank's, and it is what `stats.verdict` says of the interval that stands beside it."""
    middle, half, ratio, protocol = first
    mine = row("a", value(middle, name, half=half, ratio=ratio if tie in ("second", "shared") else None), protocol=protocol)
    middle, half, ratio, protocol2 = other
    theirs = row("b", value(middle, name, half=half, ratio=ratio if tie in ("first", "shared") else None), protocol=protocol2)
    mine = replace(mine, baseline_case_id={"second": theirs.case_id, "shared": "base"}.get(tie))
    theirs = replace(theirs, baseline_case_id={"first": mine.case_id, "shared": "base"}.get(tie))
    found = one(mine, theirs, name)
    places = {ranked.record.run_id: ranked.rank or 0 for ranked in rank([mine, theirs], name)}
    assert (
        found.verdict == ["no difference shown", "worse", "better"][(places["b"] > places["a"]) - (places["b"] < places["a"])]
    )
    stricter = next((p for p in ("smoke", "quick") if p in (protocol, protocol2)), "publish")
    better: Any = "lower" if name == METRIC else "higher"
    assert found.verdict == verdict(found.lower, found.upper, better, stricter)
    back = one(theirs, mine, name)
    opposite = {"better": "worse", "worse": "better", "no difference shown": "no difference shown"}
    assert back.verdict == opposite[str(found.verdict)]
    assert found.ratio is not None and back.ratio == pytest.approx(1 / found.ratio)


def test_reference_rows_against_their_baselines_say_what_the_board_says() -> None:
    rows = {record.case_id: record for record in Store(REFERENCE).cases()}
    pairs = [(rows[record.baseline_case_id], record) for record in rows.values() if record.baseline_case_id in rows]
    assert len(pairs) == 8
    checked = 0
    for base, record in pairs:
        assert question_differences(base, record) == []
        for found in compare(base, record):
            assert found.value is not None
            if found.basis == "paired" and found.why == "":
                assert (found.ratio, found.lower) == (found.value.ratio, found.value.ratio_lower)
                assert found.verdict == ratio_verdict(record, found.value)
                checked += 1
    assert checked > 100


def test_metrics_stand_in_the_order_of_the_table() -> None:
    rows = [row("a", value(1.0, "quality"), value(1.0, "al_s"), value(1.0, "of_a_plugin")), row("b", make_value("pcu", None))]
    assert metric_names(rows) == ["al_s", "quality", "of_a_plugin"]


def test_what_makes_two_rows_different_questions_is_named() -> None:
    first = make_case()
    assert question_differences(first, make_case(techniques=("mqa",), protocol="publish")) == []
    assert question_differences(first, make_case(seed=3)) == ["seed"]
    assert question_differences(first, make_case(hardware=GPU)) == ["hardware", "device"]
    spec = json.loads(first.spec)
    bigger = {**spec, "params": {**spec["params"], "batch": 16}, "text_digest": "0"}
    assert question_differences(first, replace(first, spec=canonical_json(bigger))) == ["params.batch", "text_digest"]
    fewer = {name: part for name, part in spec.items() if name != "threads"}
    assert question_differences(first, replace(first, spec=canonical_json(fewer))) == ["threads"]


@pytest.mark.parametrize(
    "changes", [{"model": "other"}, {"workload": "other"}, {"spec": "no JSON"}, {"spec": "[1]"}, {"hardware": "x"}]
)
def test_rows_of_another_hand_always_say_what_differs(changes: dict[str, Any]) -> None:
    first = make_case()
    other = replace(first, run_id="other", **changes)
    assert question(first) != question(other)
    assert question_differences(first, other) == list(changes)


def test_differences_come_first_and_a_technique_is_found_by_its_axis() -> None:
    rows = [make_case(techniques=("gqa",)), make_case(techniques=("lora",)), make_case(techniques=("gqa", "bf16"))]
    found = differences(rows)
    differing = [line for line in found if line.differs]
    assert found[: len(differing)] == differing
    by_path = {line.path: line for line in found}
    assert by_path["techniques.attention.name"].values == ("gqa", None, "gqa")
    assert by_path["techniques.precision.name"].values == ("fp32", "fp32", "bf16")
    assert not by_path["params.batch"].differs
    assert by_path["provenance.packages.torch"].values == ("2.13.0",) * 3
    assert not any(line.path.startswith("provenance.") for line in differing)


def test_rows_that_cannot_be_parsed_are_described_as_they_are() -> None:
    assert described(replace(make_case(), spec="{broken"))["spec"] == "{broken"
    assert "techniques.0" in described(replace(make_case(), spec='{"techniques": ["a", "b"]}'))
    deep = "[" * 400 + "]" * 400
    described(replace(make_case(), spec='{"a":' * 400 + deep + "}" * 400))
    assert flat({"a": {"b": [1, {"c": 2}], "d": {}, "e": None}}) == {"a.b": '[1, {"c": 2}]', "a.d": "{}", "a.e": "null"}
