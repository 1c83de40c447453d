"""The rules by which rows answer a claim: what may be compared, which interval counts, how many comparisons make a verdict."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from effbench.analysis.claims import Finding, judge
from effbench.analysis.claims.judging import expected_by_chance
from effbench.analysis.claims.pairing import against, ratios
from effbench.analysis.claims.shapes import _along
from tests.analysis.claim_cases import (
    BY_ID,
    CASES,
    PEFT,
    attention,
    best_in,
    no_best,
    rows_of,
    sized,
    verdict,
)
from tests.analysis.claim_rows import made_frame, make_row
from tests.records import CPU


def test_screening_claims_nothing_below_ten_per_cent() -> None:
    def dora(al_s: float) -> Finding:
        return verdict(
            "C13", rows_of("finetune", {"lora": {"al_s": 1.0}, "dora": {"al_s": al_s}}, protocol="quick", half=0.001)
        )

    assert dora(1.09).answer == "not shown"
    assert "below 10 %" in dora(1.09).why
    assert dora(1.15).answer == "supported"


def test_the_paired_ratio_is_used_where_the_other_arm_is_the_baseline() -> None:
    lora = make_row("finetune", "lora", al_s=1.0, half=0.3)
    dora = make_row("finetune", "dora", al_s=1.2, half=0.3, baseline=lora)
    assert verdict("C13", [lora, dora]).answer == "not shown"  # the two values overlap
    paired = replace(dora, metrics=tuple(replace(m, ratio=1.2, ratio_lower=1.19, ratio_upper=1.21) for m in dora.metrics))
    found = verdict("C13", [lora, paired])
    assert found.answer == "supported"
    assert (found.shown[0].lower, found.shown[0].upper) == pytest.approx((1.19, 1.21))
    table = ratios(made_frame([lora, paired]), "lora", "dora", "al_s")
    assert table[["lower", "upper"]].to_numpy().tolist()[0] == pytest.approx([1 / 1.21, 1 / 1.19])
    elsewhere = replace(paired, env_id="another environment")
    assert verdict("C13", [lora, elsewhere]).answer == "not shown"


def test_two_ratios_to_the_same_baseline_are_divided_crosswise() -> None:
    full = make_row("finetune", "full", al_s=1.0)
    arms = [
        make_row("finetune", name, al_s=value, half=0.05, baseline=full, ratios={"al_s": value})
        for name, value in (("lora", 1.0), ("dora", 1.5))
    ]
    table = ratios(made_frame([full, *arms]), "dora", "lora", "al_s")
    assert table[["ratio", "lower", "upper"]].to_numpy().tolist()[0] == pytest.approx(
        [1.5, 1.5 * 0.95 / 1.05, 1.5 * 1.05 / 0.95]
    )


def test_only_rows_of_one_question_and_one_rest_of_the_stack_are_compared() -> None:
    base = make_row("finetune", "lora + nf4", al_s=1.0)
    for other in (
        make_row("finetune", "dora", al_s=2.0),
        make_row("finetune", "dora + nf4", al_s=2.0, model="another"),
        make_row("finetune", "dora + nf4", al_s=2.0, hardware=CPU),
        make_row("finetune", "dora + nf4", al_s=2.0, params={"batch": 1}),
        make_row("finetune", "dora(r=8) + nf4", al_s=2.0),
    ):
        assert verdict("C13", [base, other]).answer == "not measured yet"
    assert verdict("C13", [base, make_row("finetune", "dora + nf4", al_s=2.0)]).answer == "supported"


def test_energy_of_another_sensor_is_not_compared() -> None:
    rows = [
        make_row("generate", name, energy_j_per_token=v, amu_gb=v, source=s)
        for name, v, s in (("bf16", 4.0, "a"), ("int4", 1.0, "b"))
    ]
    assert verdict("C2", rows).answer == "not measured yet"


def test_invalid_and_failed_rows_do_not_count() -> None:
    lora = make_row("finetune", "lora", al_s=1.0)
    dora = make_row("finetune", "dora", al_s=2.0)
    for bad in (
        replace(dora, status="failed", reason="out_of_memory"),
        replace(dora, metrics=tuple(replace(m, valid=False, reasons=("throttled",)) for m in dora.metrics)),
        replace(dora, metrics=tuple(replace(m, reasons=("estimate",)) for m in dora.metrics)),
        replace(dora, metrics=tuple(replace(m, lower=None, upper=None, n=1) for m in dora.metrics)),
    ):
        assert verdict("C13", [lora, bad]).answer == "not measured yet"


def test_hardware_that_disagrees_leaves_the_claim_open_and_says_where() -> None:
    there = rows_of("finetune", {"lora": {"al_s": 1.0}, "dora": {"al_s": 1.5}})
    here = rows_of("finetune", {"lora": {"al_s": 1.0}, "dora": {"al_s": 0.5}}, hardware=CPU)
    found = verdict("C13", [*there, *here])
    assert found.answer == "not shown"
    assert set(found.by_hardware.values()) == {"supported", "contradicted"}
    assert verdict("C13", here).by_hardware == {CPU: "contradicted"}


def test_a_claim_with_one_part_unmeasured_is_not_supported_but_may_be_contradicted() -> None:
    half = rows_of("pretrain", {"dense": {"perplexity": 8.09}, "moe": {"perplexity": 7.10}})
    assert verdict("C1", half).answer == "not shown"
    assert (
        verdict("C1", rows_of("pretrain", {"dense": {"perplexity": 7.0}, "moe": {"perplexity": 8.0}})).answer == "contradicted"
    )


def test_best_needs_every_rival_to_be_supported() -> None:
    assert verdict("C6", attention("perplexity", mla=7.0, gqa=8.0, mqa=8.0)).answer == "not shown"
    assert verdict("C6", attention("perplexity", mla=7.0, gqa=8.0, mqa=8.0, nsa=8.0)).answer == "supported"


def test_one_of_many_against_it_is_no_more_than_chance() -> None:
    assert [expected_by_chance(n) for n in (1, 2, 3, 14, 15)] == [0, 0, 1, 1, 2]

    def dora(*al_s: float) -> Finding:
        rows = []
        for number, value in enumerate(al_s):
            rows += rows_of("finetune", {"lora": {"al_s": 1.0}, "dora": {"al_s": value}}, model=f"model-{number}")
        return verdict("C13", rows)

    assert dora(1.5, 1.5, 1.5, 1.5, 0.5).answer == "supported"
    assert dora(1.5, 1.5, 1.5, 0.5, 0.5).answer == "contradicted"
    assert dora(1.5, 1.0, 1.0, 1.0, 1.0).answer == "not shown"
    assert dora(1.5, 1.5, 1.5, 1.0, 1.0).answer == "supported"
    shown = dora(1.5, 1.5, 1.5, 0.5, 0.5).shown[0]
    assert (shown.num, shown.held, shown.failed) == (5, 3, 2)
    assert {line.answer for line in shown.lines} == {"supported", "contradicted"}


def test_the_size_of_the_model_chooses_the_rows() -> None:
    outside = best_in("finetune", PEFT, "validation_loss", "lora_plus", size=8e9)
    assert verdict("C10", outside).answer == "not measured yet"


def test_the_price_of_dora_falls_with_tokens_per_step() -> None:
    rows = []
    for tokens, slow in ((64, 2.0), (4096, 1.1)):
        stacks = {"lora(r=8)": {"al_s": 1.0}, "dora(r=8)": {"al_s": slow}}
        rows += rows_of(
            "finetune", stacks, params={"batch_size": 1, "seq_len": tokens, "activation_checkpointing": tokens > 64}
        )
    trend = next(line for line in verdict("C13", rows).shown if "price" in line.part)
    assert trend.answer == "supported"
    assert trend.ratio == pytest.approx(0.55)
    assert len(trend.run_ids) == 4
    assert "64 → 4096" in trend.lines[0].what


def test_full_fine_tuning_is_compared_across_sizes_whatever_the_learning_rate() -> None:
    rows = []
    for size, loss, rate in ((1e9, 1.0, 5e-5), (24e9, 3.3, 1e-5)):
        rows += sized(
            "finetune",
            size,
            {"lora": {"validation_loss": 1.0}, "full": {"validation_loss": loss}},
            params={"learning_rate": rate},
        )
    assert verdict("C14", rows).answer == "supported"
    for_other_batch = rows_of("finetune", {"lora": {"validation_loss": 1.0}}, params={"batch": 4})
    assert verdict("C14", [*rows[:2], *for_other_batch]).answer == "not measured yet"


def test_a_claim_of_no_single_best_names_the_winner() -> None:
    found = verdict("C17", no_best(winner=True))
    assert {line.answer for line in found.shown} == {"contradicted"}
    quick = verdict("C17", [replace(row, protocol="quick") for row in no_best(winner=False)])
    assert quick.answer == "supported"  # twice as much is far beyond the screening floor


@pytest.mark.parametrize(
    ("low", "high", "floor", "bounds", "answer"),
    [
        (0.8, 0.9, 0.0, {"below": 1.0}, 1),
        (1.1, 1.2, 0.0, {"below": 1.0}, -1),
        (0.9, 1.1, 0.0, {"below": 1.0}, 0),
        (0.9, 0.99, 0.1, {"below": 1.0}, 0),
        (0.8, 0.95, 0.1, {"below": 1.0}, 1),
        (0.1, 0.2, 1.0, {"below": 1.0}, 0),
        (0.98, 1.02, 0.0, {"above": 0.95, "below": 1.05}, 1),
        (0.98, 1.02, 0.1, {"above": 0.95, "below": 1.05}, 0),
        (0.90, 1.02, 0.0, {"above": 0.95, "below": 1.05}, 0),
        (1.10, 1.20, 0.0, {"above": 0.95, "below": 1.05}, -1),
        (-0.03, -0.01, 0.0, {"above": -0.05}, 1),
        (-0.2, -0.1, 0.0, {"above": -0.05}, -1),
        (0.0, 0.0, 1.0, {"below": 0.0, "exact": True}, 1),
        (1e-9, 1e-9, 0.0, {"below": 0.0, "exact": True}, -1),
        (1.0, 1.0, 0.1, {"above": 1.0, "below": 1.0, "exact": True}, 1),
    ],
)
def test_an_interval_against_a_region(low: float, high: float, floor: float, bounds: dict[str, Any], answer: int) -> None:
    assert against([low], [high], [floor], **bounds).tolist() == [answer]


@pytest.mark.parametrize("spec", ["", "no JSON", "[]", '{"techniques": 1}', "[" * 100_000])
def test_a_spec_that_cannot_be_read_takes_part_in_no_trend(spec: str) -> None:
    found = judge(BY_ID["C14"], made_frame(CASES["C14"][0]), lambda run_ids: dict.fromkeys(run_ids, spec))
    assert found.answer == "not measured yet"


def test_where_weights_lie_and_when_it_was_measured_divide_no_trend() -> None:
    def spec(**model: str) -> str:
        asked = {
            "params": {"batch_size": 4, "seq_len": 8},
            "techniques": [],
            "model": {"name": "m", **model},
            "protocol": "quick",
        }
        return json.dumps(asked)

    here, there = (_along(spec(location=place), "params.batch_size", ()) for place in ("/data/a", "/home/b"))
    assert here == there
    assert here[0] == 4
    assert here != _along(spec(digest="other"), "params.batch_size", ())


def test_a_parameter_that_is_no_number_takes_part_in_no_trend() -> None:
    spec = '{"params": {"batch_size": "x", "seq_len": 8}, "techniques": []}'
    found = judge(BY_ID["C13"], made_frame(CASES["C13"][0]), lambda run_ids: dict.fromkeys(run_ids, spec))
    assert [line.part for line in found.shown] == ["slower than LoRA"]


@pytest.mark.parametrize("claim_id", ["C2", "C6", "C13", "C14", "C17"])
def test_a_frame_whose_texts_are_categories_says_the_same(claim_id: str) -> None:
    rows = CASES[claim_id][1]
    frame = made_frame(rows)
    texts = [name for name in frame if name != "techniques" and frame[name].map(type).isin([str, type(None)]).all()]
    specs = {row.run_id: row.spec for row in rows}
    found = judge(
        BY_ID[claim_id], frame.astype(dict.fromkeys(texts, "category")), lambda run_ids: {i: specs[i] for i in run_ids}
    )
    assert "question" in texts
    assert found == verdict(claim_id, rows)
