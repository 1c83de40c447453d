"""The workload `smop`: refusals, pooling, parts timed apart, the gate, memory as planned, and its CPU suite to the claims."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from effbench import registry
from effbench.errors import CorrectnessError
from effbench.models import builders
from effbench.planning import Options, plan, techniques
from effbench.recompute import launch_metrics
from effbench.schema import ModelRef, Spec, Trace, Window
from effbench.store import Store
from effbench.suite import read_suite
from effbench.workload import BuildContext
from tests.commands import effbench, require_sound
from tests.factories import resolved
from tests.models.test_memory import ALLOWED, compare

ARMS = ("smop_dense", "smop_jejr", "smop_jedr", "smop_dedr", "smop_loop")
SMALL = {"seconds": 1.0, "d_in": 32, "hidden": 48, "prompt_tokens": 5, "new_tokens": 3, "batch_size": 2}


def spec_of(*stack: Any, **params: Any) -> Spec:
    named = tuple((s, {}) if isinstance(s, str) else s for s in stack)
    given = registry.workload("smop").Params(**{**SMALL, **params}).model_dump(mode="json")
    return replace(resolved("tiny-llama", workload="smop"), params=given, techniques=techniques(named, "cpu"))


def session_of(*stack: Any, **params: Any) -> Any:
    spec = spec_of(*stack, **params)
    assert builders.refusal(spec) is None
    return registry.workload("smop")(spec.params).build(BuildContext(spec=spec, seed=1, clock=time.perf_counter))


# Refusals


@pytest.mark.parametrize(
    ("stack", "params", "says"),
    [
        (("smop_jejr",), {"seconds": 0}, "0 s are 0 frames of audio"),
        (("smop_dense",), {"seconds": 0.03}, "1 frames of audio"),
        (("smop_jejr",), {"seconds": 0.1, "video_rate": 3}, "2 frames of video, and 3 of them are one token"),
        ((("smop_jejr", {"experts": 1}),), {}, "choose top_k from 1"),
        ((("smop_loop", {"experts": 3, "top_k": 4}),), {}, "choose top_k from 1, 2"),
        ((), {}, "add one of smop_dedr, smop_dense"),
        (("dense",), {}, "add one of smop_dedr"),
        (("smop_jejr", "mqa"), {"mode": "projector"}, "mode projector has no language model, so mqa would change nothing"),
        (("smop_jejr", "lora"), {}, "axis peft changes nothing in smop"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(stack: Any, params: dict[str, Any], says: str) -> None:
    reason = builders.refusal(spec_of(*stack, **params))
    assert reason is not None
    assert says in reason
    assert "\n" not in reason


def test_weights_that_would_mean_nothing_are_refused() -> None:
    spec = replace(spec_of("smop_jejr"), model=ModelRef(name="tiny-llama", weights="trained"))
    assert "the projector is drawn" in str(builders.refusal(spec))


@pytest.mark.parametrize("workload", ["generate", "finetune", "moe_layer"])
def test_the_arms_are_of_this_work_alone(workload: str) -> None:
    plain = resolved("tiny-llama", workload=workload)
    spec = replace(plain, techniques=techniques((("smop_jejr", {}),), "cpu"))
    assert "part of the workload smop" in str(builders.refusal(spec))


@pytest.mark.parametrize("wrong", [{"experts": 33}, {"experts": 0}, {"top_k": 3}, {"balance": -1}])
def test_parameters_out_of_bounds_are_refused_by_the_declaration(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        registry.technique("smop_jejr").Params(**wrong)


# Sessions


def test_frames_become_tokens_by_their_means_and_those_that_fill_none_go() -> None:
    session = session_of("smop_jejr", seconds=0.7, audio_rate=4, video_rate=2)
    frames = session.features(0)
    assert [tuple(x.shape) for x in frames] == [(2, 35, 32), (2, 17, 32)]
    pooled = session._pool(frames)
    assert [tuple(x.shape) for x in pooled] == [(2, 8, 32), (2, 8, 32)]
    for x, before, rate in zip(pooled, frames, (4, 2), strict=True):
        for place in range(8):
            mean = sum(before[:, place * rate + i] for i in range(rate)) / rate
            torch.testing.assert_close(x[:, place], mean)


def test_all_arms_read_the_same_features() -> None:
    first = [session_of(arm, mode="projector").features(1)[1] for arm in ARMS]
    assert all(torch.equal(first[0], other) for other in first[1:])


def test_a_pipeline_times_its_parts_apart_and_forgets_what_was_before_the_window() -> None:
    session = session_of("smop_jejr")
    session.check()
    session.step()
    session.begin()
    start_s = time.perf_counter()
    for _ in range(3):
        session.step()
    end_s = time.perf_counter()
    found = {s.name: s for s in session.series()}
    assert set(found) == {"pooling_s", "projector_s", "prefill_s", "token"}
    assert len(found["token"].t_s) == 3 * SMALL["new_tokens"]
    parts = [found[name] for name in ("pooling_s", "projector_s", "prefill_s")]
    assert all(len(s.t_s) == 3 and (s.values > 0).all() and start_s < s.t_s[0] < s.t_s[-1] < end_s for s in parts)
    assert sum(float(s.values.sum()) for s in parts) < end_s - start_s
    assert list(found["prefill_s"].t_s) == list(found["token"].t_s[:: SMALL["new_tokens"]]), "prefill ends at the first token"


def test_facts_count_projector_and_language_model() -> None:
    alone, whole = (session_of("smop_jejr", mode=mode) for mode in ("projector", "pipeline"))
    for session in (alone, whole):
        session.check()
        session.step()
    form, one, both = alone.form, alone.facts(), whole.facts()
    assert one["params_total"] == form.weights() == one["figures"]["moe_params"]
    assert one["params_active"] == form.active_weights()
    assert one["weight_bytes"] == 4 * form.weights()
    assert both["params_total"] - one["params_total"] == 590_464, "tiny-llama's"
    assert both["weight_bytes"] == sum(both["weight_bytes_by_kind"].values()) > one["weight_bytes"]
    assert one["figures"]["projector_flops"] == 2 * 24 * form.flops_per_token(), "2 recordings of 12 + 12 tokens"
    assert (alone.step_work.tokens, whole.step_work.tokens) == (48, 2 * SMALL["new_tokens"])
    assert whole.step_work.model_flops > alone.step_work.model_flops == one["figures"]["projector_flops"]
    assert both["kv_cached_tokens"] == 2 * (24 + 5 + 3 - 1)
    assert both["kv_cache_bytes"] == both["kv_cached_tokens"] * 2 * 2 * 128 * 4
    assert json.loads(json.dumps(both)) == both


def test_load_and_touched_experts_are_those_of_the_routing() -> None:
    session = session_of(("smop_dedr", {"experts": 4, "top_k": 1}), mode="projector")
    loads = []
    for number in range(4):
        expert = session.projector.route(session._pool(session.features(number))).expert.flatten().tolist()
        loads.append([expert.count(e) for e in range(8)])
    figures = session.figures()
    assert figures["experts_touched"] == sum(sum(n > 0 for n in load) for load in loads) / 4
    assert figures["expert_load_share_max"] == pytest.approx(sum(max(load) / 48 for load in loads) / 4)
    assert figures["output_error"] == "not_taken", "before the gate"


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_gate_passes_every_arm_and_stops_a_damaged_one(arm: str, precision: str) -> None:
    session = session_of(arm, precision, mode="projector")
    session.check()
    assert 0 < session.figures()["output_error"] < {"fp32": 1e-5, "bf16": 0.02}[precision]
    forward = session.projector.forward
    session.projector.forward = lambda streams: forward(streams) * 1.05
    with pytest.raises(CorrectnessError, match=r"the embeddings are off by 0\.0[45]"):
        session.check()


def test_a_training_step_has_gradients_of_embeddings_and_of_both_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of(("smop_jedr", {"experts": 3}), mode="train")
    projector, grads = session.projector, []
    keep = projector.zero_grad
    monkeypatch.setattr(
        projector, "zero_grad", lambda **how: (grads.append([p.grad.clone() for p in projector.parameters()]), keep(**how))
    )
    session.step()
    out = projector(session._pool(session.features(0)))
    loss = (out * session.grad_BTO).sum() + projector.auxiliary_loss
    for found, true in zip(grads[0], torch.autograd.grad(loss, list(projector.parameters())), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)
    assert {s.name for s in session.series()} == {"train_step_s"}
    facts = session.facts()
    assert facts["params_trainable"] == facts["params_total"]
    assert facts["auxiliary_loss"] == pytest.approx(float(projector.auxiliary_loss.detach()), rel=1e-6)


def test_the_expected_time_stands_on_rates_of_the_device_or_says_that_there_are_none() -> None:
    session = session_of("smop_jejr", mode="projector")
    session.check()
    facts = session.facts()
    window = {"window": Window(start_s=0.0, end_s=1.0)}

    def expected(peaks: dict[str, Any]) -> Any:
        readings = launch_metrics(spec=session.spec, windows=window, facts={**facts, "peaks": peaks}, trace=Trace())
        return next(r for r in readings if r.name == "expected_projector_s")

    flops, moved = facts["figures"]["projector_flops"], facts["projector_bytes"]
    assert moved == 4 * facts["figures"]["experts_touched"] * session.form.expert_weights
    slow = expected({"matrix_flops_per_s": {"fp32": 1e6}, "copy_bytes_per_s": 1e15})
    assert (slow.value, slow.reasons) == (pytest.approx(flops / 1e6), ("estimate",))
    assert expected({"matrix_flops_per_s": {"fp32": 1e15}, "copy_bytes_per_s": 1e6}).value == pytest.approx(moved / 1e6)
    missing = expected({})
    assert (missing.value, missing.reasons) == (None, ("not_calibrated",))


CASES = [
    (arm, mode, precision)
    for mode in ("pipeline", "projector", "train")
    for arm, precision in (
        *((arm, "fp32") for arm in ARMS),
        ("smop_jejr", "bf16"),
        (("smop_dedr", {"experts": 8, "top_k": 4}), "fp32"),
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_has_as_many_bytes_alive_as_planned(case: Any) -> None:
    arm, mode, precision = case
    spec = spec_of(arm, precision, mode=mode, seconds=4, d_in=64, hidden=96)
    assert compare(spec) == pytest.approx(1, abs=ALLOWED)


# Suites


@pytest.mark.parametrize("path", [Path("suites/smop.yaml"), Path("suites/cpu/smop.yaml")], ids=str)
def test_the_suites_plan_without_a_refusal_and_have_every_arm(path: Path) -> None:
    cases = plan(read_suite(path), Options(device="cpu"))
    assert [case.skip_reason for case in cases if case.skip_reason] == []
    assert {ref.name for case in cases for ref in case.spec.techniques if ref.axis == "ffn"} == set(ARMS)


def test_the_cpu_suite_runs_and_its_rows_answer_the_claims(tmp_path: Path) -> None:
    results = tmp_path / "results"
    done = effbench("run", "suites/cpu/smop.yaml", "--protocol", "smoke", "--results", results, timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = Store(results).cases()
    assert {row.status for row in rows} == {"ok"}
    for row in rows:
        found = {m.name: m for m in row.metrics}
        mode = json.loads(row.spec)["params"]["mode"]
        timed = {"pipeline": ("projector_s", "prefill_s", "ttft_s", "tpot_s"), "projector": ("projector_s",)}
        for name in timed.get(mode, ("train_step_s",)):
            assert found[name].value > 0, (row.label, name)
        assert found["output_error"].value < 1e-5
        assert abs(found["tensor_peak_ratio"].value - 1) < ALLOWED, row.label
    require_sound(results, tmp_path / "bundle.zip")
    told = effbench("claims", "--json", "--results", results)
    assert told.returncode == 0, told.stdout + told.stderr
    said = {claim["id"]: claim for claim in json.loads(told.stdout)["claims"]}
    assert said["S3"]["verdict"] == "supported"
    parts = {(key, part["part"]): part for key in ("S1", "S2") for part in said[key]["shown"]}
    assert parts["S1", "FLOPs, from few experts to many"]["answer"] == "supported"
    assert parts["S2", "FLOPs of the projector"]["answer"] == "contradicted", "two experts are twice the FLOPs of one"
    assert {part for _, part in parts} >= {"latency of the projector, from few experts to many", "end to end, to 5 %"}
