"""The workload `usam`: its arms, the gate, the parts that are timed, training, refusals, memory, suites."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from effbench import registry
from effbench.analysis.claims import CLAIMS
from effbench.errors import CorrectnessError, LaunchError
from effbench.metrics import METRICS
from effbench.models import builders
from effbench.models.memory import expected_memory
from effbench.modules.usam_forms import encoder_flops, encoder_sizes
from effbench.planning import Options, plan, techniques
from effbench.schema import Spec
from effbench.store import Store
from effbench.suite import read_suite
from effbench.workload import BuildContext
from tests.commands import effbench, require_sound
from tests.factories import resolved
from tests.models.test_memory import ALLOWED, compare

ARMS = ("usam_single", "usam_soft", "usam_top", "usam_aliased")
SMALL = {"encoders": "none", "width": 64, "seconds": 2.0, "prompt_tokens": 6, "new_tokens": 4, "patches": 16}
TRAIN = {"mode": "train", "batch_size": 3}
SMALL_TINY = {"encoders": "tiny", "seconds": 0.5}
CONTRASTIVE = ("usam_soft", {"contrastive": True})
Arm = str | tuple[str, dict[str, Any]]


def spec_of(*stack: Arm, **params: Any) -> Spec:
    plain = resolved("tiny-llama", workload="usam")
    given = registry.workload("usam").Params(**{**SMALL, **params}).model_dump(mode="json")
    named = tuple((s, {}) if isinstance(s, str) else s for s in stack)
    return replace(plain, params=given, techniques=techniques(named, "cpu"))


def session_of(*stack: Arm, **params: Any) -> Any:
    spec, ticks = spec_of(*stack, **params), count()
    assert builders.refusal(spec) is None
    return registry.workload("usam")(spec.params).build(BuildContext(spec=spec, seed=1, clock=lambda: float(next(ticks))))


# Sessions


@pytest.mark.parametrize("mode", ["pipeline", "projector", "train"])
@pytest.mark.parametrize("arm", [*ARMS, ("usam_top", {"top_k": 2}), CONTRASTIVE], ids=str)
def test_every_arm_passes_the_gate_steps_and_times_its_parts(arm: Arm, mode: str) -> None:
    session = session_of(arm, mode=mode, batch_size=2)
    session.check()
    session.begin()
    for _ in range(2):
        session.step()
    facts, found = session.facts(), {s.name: len(s.values) for s in session.series()}
    parts = {"projector": {"projector_s": 2}, "train": {"train_step_s": 2}}
    answered = {"qformer_s": 2, "projector_s": 2, "prefill_s": 2, "token": 2 * 4}
    assert found == parts.get(mode, answered)
    figures = facts["figures"]
    assert set(figures) <= set(METRICS) and all("own" in METRICS[name].tags for name in figures)
    aliased = session.form.kind == "aliased"
    assert figures["output_error"] == 0 if aliased else figures["output_error"] < 1e-14
    assert facts["feature_tokens"] == 3 and facts["feature_frames"] == 52
    assert facts["encoders"] == "none: the features are drawn"
    assert facts["params_trainable"] == (sum(p.numel() for p in session.added.parameters()) if mode == "train" else 0)
    json.dumps(facts, allow_nan=False)


def test_the_encoders_are_a_part_of_their_own() -> None:
    session = session_of("usam_soft", **SMALL_TINY)
    session.check()
    session.begin()
    session.step()
    assert {s.name for s in session.series()} == {"encoder_s", "qformer_s", "projector_s", "prefill_s", "token"}
    facts = session.facts()
    assert facts["encoders"] == "tiny"
    assert facts["params_total"] == facts["encoder_params"] + facts["qformer_params"] + facts["projector_params"] + 590464
    encoders = encoder_flops(encoder_sizes("tiny", 64), 0.5)
    assert session.step_work.model_flops > encoders > 0.5 * session.step_work.model_flops


def test_half_precision_passes_the_gate() -> None:
    for arm in ARMS:
        session = session_of(arm, "bf16")
        session.check()
        session.step()
        assert session.facts()["compute_dtype"] == "bf16"
    trained = session_of(CONTRASTIVE, "bf16", **TRAIN)
    trained.check()
    trained.step()
    assert {p.dtype for p in trained.added.parameters()} == {torch.float32}


def test_the_contrastive_loss_is_in_training_alone() -> None:
    sizes = {}
    for mode in ("pipeline", "train"):
        for arm in ("usam_soft", CONTRASTIVE):
            session = session_of(arm, **{**TRAIN, "mode": mode})
            sizes[mode, arm == "usam_soft"] = session.facts()["weight_bytes"], session.step_work.model_flops
    assert sizes["pipeline", True] == sizes["pipeline", False]
    assert sizes["train", True][0] < sizes["train", False][0]
    assert sizes["train", True][1] < sizes["train", False][1]


def test_the_same_seed_gives_both_arms_the_same_numbers_and_the_loss_differs_by_the_term() -> None:
    plain, other = session_of("usam_soft", **TRAIN), session_of(CONTRASTIVE, **TRAIN)
    with torch.no_grad():
        for name, value in plain.added.state_dict().items():
            other.added.state_dict()[name].copy_(value)
        other.drawn = plain.drawn
        term = other.added["contrastive"]
        sound = other.added["projector"](other.added["qformer"](other.features(0)), other._embedded(other.prompt_BP))
        extra = term(sound, other._embedded(other.answers[0]), torch.tensor([2, 0, 1]))
        assert float(other._loss(0)) == pytest.approx(float(plain._loss(0) + extra), rel=1e-5)


def test_training_lowers_the_loss_and_leaves_the_language_model_alone() -> None:
    session = session_of(CONTRASTIVE, **TRAIN)
    before = {name: p.clone() for name, p in session.model.named_parameters()}
    for group in session.optimizer.param_groups:
        group["lr"] = 2e-3
    for _ in range(24):
        session.step()
    assert sum(session.losses[-4:]) < 0.9 * sum(session.losses[:4])
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in session.model.named_parameters())


def test_the_load_of_a_sparse_projector_is_that_of_its_routes() -> None:
    session = session_of(("usam_top", {"experts": 4}), mode="projector", batch_size=4)
    with torch.no_grad():
        session.added["projector"].router.weight.zero_()  # ties, which all go the same way
    assert session._load() == (1.0, 1.0)
    soft = session_of(("usam_soft", {"experts": 4}), mode="projector").facts()["figures"]
    assert (soft["experts_touched"], soft["expert_load_share_max"]) == (4.0, 0.25)


def test_a_wrong_projector_does_not_pass_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    from effbench.modules import tapm

    def plain_sum(rows_ETO: torch.Tensor, gate_TE: torch.Tensor) -> torch.Tensor:
        return rows_ETO.mean(0)

    monkeypatch.setattr(tapm, "weighted", plain_sum)
    for mode in ("projector", "train"):
        with pytest.raises(CorrectnessError):
            session_of("usam_soft", mode=mode, batch_size=2).check()


def test_what_is_not_finite_ends_the_launch() -> None:
    for params in ({"mode": "projector"}, TRAIN):
        session = session_of("usam_soft", **params)
        with torch.no_grad():
            session.added["projector"].experts.bias.fill_(float("inf"))
        with pytest.raises(LaunchError):
            session.step()


# Refusals

REFUSED: list[tuple[tuple[Arm, ...], dict[str, Any], str]] = [
    (("usam_soft",), {"seconds": 0}, "0 frames"),
    (("usam_soft",), {"seconds": 0.4}, "from 0.5 to 30"),
    (("usam_soft",), {"seconds": 31}, "from 0.5 to 30"),
    (("usam_soft",), {"encoders": "paper"}, "768 wide"),
    ((("usam_top", {"top_k": 4}),), {}, "top_k is 4 and there are 3 experts"),
    ((), {}, "add one of usam_"),
    (("moe",), {}, "add one of usam_"),
    (("smop_dense",), {}, "part of the workload smop"),
    ((CONTRASTIVE,), {"mode": "train"}, "batch_size is 1"),
    (("usam_soft", "fp16"), TRAIN, "scaled loss"),
    (("usam_soft", "int8"), TRAIN, "packs the language model"),
    (("usam_soft", "gqa"), {"mode": "projector"}, "no language model"),
    (("usam_soft", "lora"), {}, "axis peft"),
]


@pytest.mark.parametrize(("stack", "params", "said"), REFUSED, ids=[said for _, _, said in REFUSED])
def test_what_cannot_be_done_is_refused_in_a_sentence(stack: tuple[Arm, ...], params: dict[str, Any], said: str) -> None:
    reason = builders.refusal(spec_of(*stack, **params))
    assert reason is not None and said in reason
    assert "\n" not in reason


def test_trained_weights_are_refused() -> None:
    spec = spec_of("usam_soft")
    assert "use random" in str(builders.refusal(replace(spec, model=replace(spec.model, weights="trained"))))


def test_an_arm_is_refused_in_other_work() -> None:
    spec = replace(resolved("tiny-llama", workload="generate"), techniques=techniques((("usam_soft", {}),), "cpu"))
    assert "part of the workload usam" in str(builders.refusal(spec))


@pytest.mark.parametrize("params", [{"width": 100}, {"width": 0}, {"mode": "other"}, {"patches": 0}, {"frames": 3}])
def test_parameters_out_of_their_bounds_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        registry.workload("usam").Params(**params)


def test_baselines() -> None:
    def baseline(name: str, **params: Any) -> Any:
        kind = registry.technique(name)
        return kind(kind.Params(**params)).baseline(spec_of(name))

    assert [baseline(arm) for arm in ARMS] == [None, *[("usam_single", {})] * 3]
    assert baseline("usam_soft", contrastive=True) == ("usam_soft", {})
    assert baseline("usam_soft", contrastive=True, experts=8) == ("usam_soft", {"experts": 8})


# Memory

MEMORY = [
    *(((arm,), {"mode": mode, "batch_size": 2}) for arm in ARMS for mode in ("projector", "pipeline", "train")),
    ((("usam_top", {"experts": 8, "top_k": 2}),), {"mode": "projector", "seconds": 20, "batch_size": 4}),
    ((CONTRASTIVE,), {**TRAIN, "patches": 256, "seconds": 10}),
    (("usam_soft",), SMALL_TINY),
    (("usam_soft",), {"encoders": "tiny", "seconds": 10, "batch_size": 2}),
]


@pytest.mark.parametrize(("stack", "params"), MEMORY, ids=str)
def test_a_step_has_as_many_bytes_alive_as_expected(stack: tuple[Arm, ...], params: dict[str, Any]) -> None:
    assert compare(spec_of(*stack, **params)) == pytest.approx(1, abs=ALLOWED)


def test_a_plan_at_the_published_size_knows_its_memory() -> None:
    for case in plan(read_suite(Path("suites/usam.yaml")), Options()):
        found = expected_memory(case.spec)
        assert found is not None
        model = 8_030_261_248 * 4 if case.spec.params["mode"] != "projector" else 0
        assert 0 < found.weights - model < 2e9


# Suites


@pytest.mark.parametrize("path", ["suites/usam.yaml", "suites/cpu/usam.yaml"])
def test_the_suites_plan_without_a_refusal_and_have_every_arm(path: str) -> None:
    cases = plan(read_suite(Path(path)), Options())
    assert not [case.skip_reason for case in cases if case.skip_reason]
    assert {ref.name for case in cases for ref in case.spec.techniques if ref.axis == "ffn"} == set(ARMS)
    assert {case.spec.params["mode"] for case in cases} == {"pipeline", "projector", "train"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    results = tmp_path_factory.mktemp("usam") / "results"
    done = effbench("run", "suites/cpu/usam.yaml", "--results", results, "--protocol", "smoke", timeout_s=560)
    assert done.returncode == 0, done.stdout + done.stderr
    return results


def test_the_cpu_suite_runs_and_its_rows_answer_the_claims(ran: Path) -> None:
    rows = Store(ran).cases()
    assert {row.status for row in rows} == {"ok"}
    for row in rows:
        found, mode = {m.name: m for m in row.metrics}, json.loads(row.spec)["params"]["mode"]
        timed = {"pipeline": ("encoder_s", "qformer_s", "projector_s", "prefill_s", "ttft_s"), "train": ("train_step_s",)}
        for name in timed.get(mode, ("projector_s",)):
            assert found[name].value is not None and found[name].value > 0, (row.label, name)
        assert found["tensor_peak_ratio"].value == pytest.approx(1, abs=ALLOWED)
        assert found["output_error"].value <= (0 if "aliased" in row.label else 1e-14)
    require_sound(ran, ran.parent / "bundle.zip")
    said = json.loads(effbench("claims", "--results", ran, "--json").stdout)
    verdicts = {claim["id"]: claim for claim in said["claims"] if claim["id"] in ("U1", "U2", "U3", "U4")}
    parts = {claim.id: {part.says for part in claim.parts} for claim in CLAIMS if claim.id in verdicts}
    for key, claim in verdicts.items():
        assert {shown["part"] for shown in claim["shown"]} == parts[key], f"{key}: {claim['why']}"
    assert verdicts["U4"]["verdict"] == "supported"
    flops = next(shown for shown in verdicts["U1"]["shown"] if "FLOPs" in shown["part"])
    assert flops["answer"] == "supported"
