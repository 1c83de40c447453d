"""The workload `fuximt`: the data and their orders, both sessions, figures, refusals, the suites, and the claims on their rows."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effbench import registry
from effbench.costs import FeedForwardCost
from effbench.errors import CorrectnessError
from effbench.models import builders, context, text
from effbench.models.memory import expected_memory
from effbench.models.shapes import shape, shape_names
from effbench.planning import Options, plan
from effbench.store import Store
from effbench.suite import read_suite
from effbench.workload import BuildContext
from effbench.workloads import _fuximt, _language_pairs
from effbench.workloads.fuximt import LANGUAGES, FuxiMTWorkParams
from tests.commands import effbench, require_sound
from tests.factories import resolved
from tests.models.test_memory import ALLOWED, compare
from tests.modules.test_inserted_experts import arm, some_ids, spec_of

VOCABULARY = 321
SMALL = {"batch_size": 4, "prompt_tokens": 16, "new_tokens": 16, "pass_steps": 8}


def session_of(*stack: tuple[str, dict[str, Any]], **params: Any) -> Any:
    spec = spec_of(*stack, **{**SMALL, **params})
    assert builders.refusal(spec) is None
    return registry.workload("fuximt")(spec.params).build(BuildContext(spec=spec, seed=1, clock=time.perf_counter))


def rows_of(**params: Any) -> _language_pairs.Rows:
    given = FuxiMTWorkParams(**{**SMALL, **params})
    return _language_pairs.rows(text.read_text(text.BUILTIN), given, VOCABULARY, 5)


# The data


def test_a_row_is_pairs_behind_tags_and_its_targets_are_the_text() -> None:
    found = rows_of(pass_steps=40)
    assert found.ids.shape == found.targets.shape == (160, 32)
    for ids, targets, language in zip(found.ids, found.targets, found.language, strict=True):
        tags = np.flatnonzero(ids >= VOCABULARY - LANGUAGES)
        assert len(tags) in (1, 2, 4) and np.array_equal(tags, np.arange(len(tags)) * (32 // len(tags)))
        assert set(ids[tags]) == {VOCABULARY - LANGUAGES + language}
        half = 32 // len(tags) // 2
        for tag in tags:
            source, target = ids[tag + 1 : tag + half], ids[tag + half : tag + 2 * half]
            assert np.array_equal((source - 7919 * language) % 256, target[:-1]), "the target is the source in plain bytes"
            assert np.array_equal(targets[tag + half - 1 : tag + 2 * half - 1], target)
        assert (targets != -100).sum() == 16, "as many targets in every row"


def test_languages_are_skewed_as_asked_and_differ() -> None:
    random = np.random.default_rng(0)
    drawn = np.bincount(_language_pairs.languages(200_000, 1.0, random), minlength=LANGUAGES) / 200_000
    true = 1 / np.arange(1, LANGUAGES + 1)
    assert drawn == pytest.approx(true / true.sum(), rel=0.2)
    even = np.bincount(_language_pairs.languages(200_000, 0.0, random), minlength=LANGUAGES) / 200_000
    assert even == pytest.approx(1 / LANGUAGES, rel=0.2)
    assert len({7919 * language % 256 for language in range(LANGUAGES)}) == LANGUAGES


def test_ids_can_be_drawn_from_the_whole_vocabulary() -> None:
    given = FuxiMTWorkParams(**SMALL, ids="drawn")
    found = _language_pairs.rows(text.read_text(text.BUILTIN), given, 5000, 5)
    assert found.ids.max() >= 5000 - LANGUAGES > 4000
    assert found.ids[found.ids < 5000 - LANGUAGES].max() > 4000


@settings(max_examples=60, deadline=None)
@given(stage=st.lists(st.sampled_from([0.0, 0.1, 0.34, 0.5, 0.67, 0.9]), min_size=1, max_size=80), seed=st.integers(0, 9))
def test_the_curriculum_is_a_permutation_that_never_runs_ahead_without_need(stage: list[float], seed: int) -> None:
    stages = np.asarray(stage)
    order = _language_pairs.curriculum(stages, np.random.default_rng(seed))
    assert sorted(order) == list(range(len(stage)))
    for place, row in enumerate(order):
        left = stages[order[place:]]
        assert stages[row] <= place / len(stage) or stages[row] == left.min()


def test_both_orders_have_the_same_rows_and_as_many_tokens_and_targets_in_every_step() -> None:
    found, seen = rows_of(pass_steps=25), {}
    for order in ("curriculum", "shuffled"):
        made = _language_pairs.batches(found, 4, order, 3)
        one_pass = [next(made) for _ in range(25)]
        assert {ids.shape for ids, _ in one_pass} == {(4, 32)}
        assert {int((targets != -100).sum()) for _, targets in one_pass} == {4 * 16}
        seen[order] = np.concatenate([ids for ids, _ in one_pass])
        again = next(made)[0]
        assert np.array_equal(again, one_pass[0][0]), "the pass is repeated"
    one, other = (sorted(map(tuple, ids)) for ids in seen.values())
    assert one == other
    assert not np.array_equal(seen["curriculum"], seen["shuffled"])


def test_the_curriculum_widens() -> None:
    found = rows_of(pass_steps=100)
    order = _language_pairs.curriculum(found.stage, np.random.default_rng(0))
    first, last = found.language[order[:80]], found.language[order[-80:]]
    assert len(set(first)) < 0.5 * len(set(last))
    pairs = (found.ids >= VOCABULARY - LANGUAGES).sum(1)
    assert pairs[order[:80]].mean() > 3.5 > 2.5 > pairs[order[-80:]].mean(), "short pairs, four of them in a row, come first"


# The sessions


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", [{}, {"top_k": 1}, {"form": "upcycled"}, {"experts_by": "loop"}], ids=str)
def test_a_training_session_passes_its_gate_and_says_what_trains(changes: dict[str, Any], precision: str) -> None:
    session = session_of(arm(**changes), (precision, {}))
    session.check()
    for _ in range(3):
        session.step()
    session.quality()
    facts = session.facts()
    figures = facts["figures"]
    assert figures["moe_params"] == figures["optimizer_params"] == facts["params_trainable"] > 1e6
    assert facts["params_total"] - figures["moe_params"] <= shape("tiny-bloom").num_parameters
    assert 1 <= figures["experts_touched"] <= 4
    assert 0.25 <= figures["expert_load_share_max"] <= 1
    assert facts["trained_layers"] == [1, 3]
    assert set(facts["check_errors"]) == {"output", *(f"gradient of {n}" for n in ("x", "w_in", "b_in", "w_out", "b_out"))}
    assert session.step_work.tokens == 4 * 32


def test_the_dense_model_trains_whole_and_has_no_experts() -> None:
    session = session_of(("dense", {}))
    session.check()
    session.step()
    session.quality()
    facts = session.facts()
    total = shape("tiny-bloom").num_parameters
    assert facts["params_trainable"] == facts["figures"]["optimizer_params"] == total
    assert facts["figures"]["moe_params"] == 0
    assert facts["figures"]["experts_touched"] == "no_such_part"


@pytest.mark.parametrize("engine", ["eager", "static"])
@pytest.mark.parametrize("stack", [(("dense", {}),), (arm(),), (arm(form="upcycled"), ("bf16", {}))], ids=str)
def test_translation_decodes_what_a_full_forward_picks(stack: Any, engine: str) -> None:
    session = session_of(*stack, mode="translate", prompt_tokens=16, new_tokens=8, decode_engine=engine)
    session.check()
    session.begin()
    session.step()
    session.quality()
    facts = session.facts()
    assert facts["decode_engine"] == engine
    assert len(session.series()[0].t_s) == 8
    assert facts["params_trainable"] == 0 and "optimizer_params" not in facts["figures"]
    assert facts["decode_flops"] == pytest.approx(facts["expected"]["decode_flops"], rel=0.01)
    for prompt_BP in session.prompts:
        assert prompt_BP.shape == (4, 16) and bool((prompt_BP[:, 0] >= VOCABULARY - LANGUAGES).all())
        assert bool((prompt_BP[:, 1:] < 256).all())


def test_training_lowers_the_loss() -> None:
    session = session_of(arm(order="shuffled"), batch_size=8, learning_rate=5e-3)
    for _ in range(60):
        session.step()
    first, last = np.mean(session.losses[:5]), np.mean(session.losses[-5:])
    print(f"loss {first:.3f} → {last:.3f}")
    assert last < first - 0.7


def test_a_checkpoint_of_the_library_s_own_naming_is_the_base(tmp_path: Path) -> None:
    """Its config.json says n_layer and n_head, and nothing of widths."""
    base = builders.build(resolved("tiny-bloom"), trains=False, seed=5, device="cpu").model.eval()
    base.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    kept = {
        key: v for key, v in values.items() if key not in ("intermediate_size", "num_key_value_heads", "gated_feed_forward")
    }
    (tmp_path / "config.json").write_text(json.dumps(kept))
    assert "n_layer" in kept
    where = {"weights": "path", "location": str(tmp_path)}
    for stack in ((), (("fuximt", {"every": 2}),)):
        spec = replace(spec_of(*stack, mode="translate"), model=resolved("tiny-bloom", **where).model)
        assert builders.refusal(spec) is None and expected_memory(spec) is not None
        made = builders.build(spec, trains=False, seed=9, device="cpu").model.eval()
        with torch.inference_mode():
            assert torch.equal(made(input_ids=some_ids()).logits, base(input_ids=some_ids()).logits)
        found = context.layout(spec)
        assert found is not None and found.num_weights() == builders.params_total(made)


@pytest.mark.parametrize("technique", ["int8", "int4", "nf4"])
def test_packed_bloom_decodes_as_a_full_forward(technique: str) -> None:
    pytest.importorskip("torchao" if technique == "int4" else "bitsandbytes")
    session = session_of(("dense", {}), (technique, {}), mode="translate", prompt_tokens=16, new_tokens=8)
    session.check()
    session.step()


def test_a_wrong_expert_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from effbench.modules import inserted_experts

    right = inserted_experts.experts
    monkeypatch.setattr(inserted_experts, "experts", lambda *given, **more: right(*given, **more) * 1.001)
    with pytest.raises(CorrectnessError, match=r"the output of the experts is off by 0\.001"):
        session_of(arm()).check()


def test_flops_per_token_are_those_of_the_cost_model_and_flat_in_experts() -> None:
    found = {}
    for name, stack in (("few", arm(experts=4)), ("many", arm(experts=16)), ("one", arm(top_k=1)), ("dense", ("dense", {}))):
        session = session_of(stack, mode="translate")
        session.quality()
        found[name] = session.counted["flops_per_token"]
        model = builders.model_flops_per_token(session.model, context_len=16, training=False)
        assert found[name] == pytest.approx(model, rel=0.03)
    assert found["many"] / found["few"] == pytest.approx(1, abs=0.01)
    assert found["dense"] < found["one"] < found["few"]


# Plans and refusals


def test_the_order_of_the_data_is_part_of_the_case_and_of_nothing_else() -> None:
    one, other = spec_of(arm(order="curriculum")), spec_of(arm(order="shuffled"))
    assert one.spec_id != other.spec_id
    assert _fuximt.order_of(one) == "curriculum" and _fuximt.order_of(other) == "shuffled" == _fuximt.order_of(
        spec_of(("dense", {}))
    )


@pytest.mark.parametrize(
    ("stack", "model", "says"),
    [
        ([arm(every=5)], "tiny-bloom", "every 5 leaves none of the 4 layers with experts; choose every from 1 to 4"),
        ([arm(experts=1)], "tiny-bloom", "top_k is 2 and there are 1 experts"),
        ([arm()], "llama-3.2-1b", "experts go into layers of Bloom's form, and llama has another; choose bloomz-560m"),
        ([arm(), ("lora", {})], "tiny-bloom", "the experts alone train, and lora says what else would"),
        ([arm(), ("int8", {})], "tiny-bloom", "packed experts have no biases"),
        ([("moe", {})], "tiny-bloom", "feed-forward layers of model type 'bloom' have another form"),
        ([("dense", {})], "tiny-llama", "tiny-llama has 256 ids, and 256 bytes and 65 language tags need 321"),
        ([("mha", {})], "tiny-bloom", "a technique of axis attention changes nothing in fuximt"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_a_sentence(stack: Any, model: str, says: str) -> None:
    assert says in str(builders.refusal(spec_of(*stack, model=model)))


def test_a_loop_over_the_experts_is_not_captured() -> None:
    for params, device, refused in (
        ({"decode_engine": "cuda_graph"}, "cpu", True),
        ({"decode_engine": "auto"}, "cuda", True),
        ({"decode_engine": "auto"}, "cpu", False),
        ({"decode_engine": "eager"}, "cuda", False),
        ({"mode": "train"}, "cuda", False),
    ):
        spec = replace(spec_of(arm(experts_by="loop"), **{"mode": "translate", **params}), device=device)
        assert ("choose decode_engine eager" in str(builders.refusal(spec))) == refused


def test_fuximt_is_refused_in_other_workloads() -> None:
    for workload in ("pretrain", "generate"):
        spec = resolved("tiny-bloom", "fuximt", workload=workload)
        assert "part of the workload fuximt and changes nothing" in str(builders.refusal(spec))


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 3},
        {"top_k": 0},
        {"experts": 0},
        {"every": 0},
        {"form": "upcycled", "gate": "vector"},
        {"noise": -1},
        {"order": "x"},
    ],
    ids=str,
)
def test_bad_parameters_of_the_technique_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        registry.technique("fuximt").Params(**params)


@pytest.mark.parametrize(
    "params",
    [{"prompt_tokens": 30}, {"new_tokens": 4}, {"batch_size": 0}, {"skew": -1}, {"mode": "x"}, {"pass_steps": 0}],
    ids=str,
)
def test_bad_parameters_of_the_workload_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        FuxiMTWorkParams(**params)


@pytest.mark.parametrize("technique", registry.entries("technique"))
def test_every_technique_knows_what_to_say_of_bloom(technique: str) -> None:
    for name in (name for name in shape_names() if shape(name).model_type == "bloom"):
        for workload in ("generate", "finetune", "fuximt"):
            reason = builders.refusal(resolved(name, technique, workload=workload))
            assert reason is None or len(reason) > 20


def test_the_published_size_has_the_sizes_worked_out_by_hand() -> None:
    """FFN copies of 134,238,208 weights in layers 7, 15 and 23: 3.22 G weights more; 5.7 and 11.4 % more FLOPs a token."""
    layout = context.layout(spec_of(("fuximt", {}), model="bloomz-7b1"))
    assert layout is not None
    experts = [w for w in layout.weights if w.kind == "experts"]
    assert {w.count for w in experts} == {3}
    assert sum(w.size for w in experts) == 3 * 8 * 134_238_208
    trained = layout.num_weights(trained_only=True)
    assert trained == sum(w.size for w in experts) + 3 * 8 * 4096 + 3
    cost = FeedForwardCost(hidden=4096, width=16384, experts=8, top_k=1, matrices=2)
    more = 3 * (2 * cost.active_weights() - 2 * 8 * 4096) / (2 * shape("bloomz-7b1").num_parameters)
    assert more == pytest.approx(0.057, abs=0.001)


MEMORY = [
    ((("fuximt", {"every": 2}),), {}),
    ((("fuximt", {"every": 2, "form": "upcycled", "top_k": 1}), ("bf16", {})), {}),
    ((("fuximt", {"every": 2, "gate": "vector"}),), {}),
    ((("fuximt", {"every": 2, "experts_by": "loop"}),), {}),
    ((("dense", {}),), {}),
    ((("fuximt", {"every": 2}),), {"mode": "translate"}),
    ((("fuximt", {"every": 2}), ("bf16", {})), {"mode": "translate", "decode_engine": "static"}),
]  # fmt: skip


@pytest.mark.parametrize(("stack", "params"), MEMORY, ids=str)
def test_a_step_has_as_many_bytes_alive_as_expected(stack: Any, params: dict[str, Any]) -> None:
    assert compare(spec_of(*stack, **params)) == pytest.approx(1, abs=0.15)


def test_states_are_expected_in_training_alone() -> None:
    training, translating = (
        expected_memory(spec_of(("fuximt", {}), model="bloomz-560m", mode=m)) for m in ("train", "translate")
    )
    assert training is not None and translating is not None
    assert training.optimizer == pytest.approx(8 * 3 * 8 * 8_393_728, rel=0.01)
    assert translating.optimizer == 0


# The suites, and the claims on their rows


def test_both_suites_are_planned_without_a_refusal() -> None:
    for path, device in (("suites/fuximt.yaml", "cuda"), ("suites/cpu/fuximt.yaml", "cpu")):
        cases = plan(read_suite(Path(path)), Options(device=device))
        assert len(cases) >= 12
        assert {case.skip_reason for case in cases} == {None}
        assert all(expected_memory(case.spec) is not None for case in cases)


def test_the_cpu_suite_runs_and_its_rows_answer_the_claims(tmp_path: Path) -> None:
    results = tmp_path / "results"
    done = effbench("run", "suites/cpu/fuximt.yaml", "--protocol", "smoke", "--results", results, timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = Store(results).cases()
    assert {row.status for row in rows} == {"ok"}
    for row in rows:
        found, mode = {m.name: m for m in row.metrics}, json.loads(row.spec)["params"]["mode"]
        assert found["flops_per_token"].value > 1e6
        assert abs(found["tensor_peak_ratio"].value - 1) < ALLOWED, row.label
        timed = ("ttft_s", "tpot_s") if mode == "translate" else ("optimizer_params",)
        assert all(found[name].value > 0 for name in timed)
        if "fuximt" in row.techniques:
            assert found["moe_params"].value > 1e6
            assert found["tokens_per_s"].ratio > 0, "paired with the dense model"
        else:
            assert found["moe_params"].value == 0
            assert found["experts_touched"].reasons == ("no_such_part",)
    require_sound(results, tmp_path / "bundle.zip")
    told = effbench("claims", "--json", "--results", results)
    assert told.returncode == 0, told.stdout + told.stderr
    said = {claim["id"]: claim for claim in json.loads(told.stdout)["claims"]}
    assert said["F1"]["verdict"] == said["F2"]["verdict"] == "supported"
    assert said["F3"]["verdict"] == "not shown", "smoke rows claim no difference of time"
    assert "throughput against the dense model, to 20 %" in {part["part"] for part in said["F2"]["shown"]}
