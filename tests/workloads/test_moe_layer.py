"""The workload `moe_layer`: shapes and their sources, the drawn load, the correctness gate, the work of a step, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from effbench_kernels import Groups, native

from effbench import registry
from effbench.costs import FeedForwardCost
from effbench.errors import CorrectnessError, UnknownName
from effbench.models import builders
from effbench.models.context import expected_cost
from effbench.models.shapes import layer_names, shape, shape_names
from effbench.planning import Options, plan, techniques
from effbench.schema import ModelRef, Spec
from effbench.suite import read_suite
from effbench.workload import BuildContext
from effbench.workloads import _moe_layer
from tests.factories import resolved

SMALL = "deepseek-v2-lite-8th"  # shared experts, weights not renormalised
PUBLISHED = {
    # hidden, width of an expert, experts, k, shared width, score, renormalised, groups, scale: the model's configuration
    "mixtral-8x7b": (4096, 14336, 8, 2, 0, "softmax", True, None, 1.0),
    "olmoe-1b-7b": (2048, 1024, 64, 8, 0, "softmax", False, None, 1.0),
    "qwen1.5-moe-a2.7b": (2048, 1408, 60, 4, 5632, "softmax", False, None, 1.0),
    "qwen3-30b-a3b": (2048, 768, 128, 8, 0, "softmax", True, None, 1.0),
    "deepseek-v2-lite": (2048, 1408, 64, 6, 2816, "softmax", False, None, 1.0),
    "deepseek-v3": (7168, 2048, 256, 8, 2048, "sigmoid", True, Groups(8, 4, "top2"), 2.5),
    "gpt-oss-20b": (2880, 2880, 32, 4, 0, "softmax", True, None, 1.0),
}


def spec_of(model: str = SMALL, *stack: tuple[str, dict[str, Any]], **params: Any) -> Spec:
    spec = resolved("tiny-llama", workload="moe_layer")
    given = registry.workload("moe_layer").Params(**{"tokens": 24, **params}).model_dump(mode="json")
    where = ModelRef(name=model, digest=shape(model).digest)
    return replace(spec, model=where, techniques=techniques(stack, "cpu"), params=given)


def session_of(model: str = SMALL, *stack: tuple[str, dict[str, Any]], **params: Any) -> Any:
    spec = spec_of(model, *stack, **params)
    assert builders.refusal(spec) is None
    return registry.workload("moe_layer")(spec.params).build(BuildContext(spec=spec, seed=1, clock=lambda: 0.0))


# Shapes


def test_published_layers_have_the_published_values() -> None:
    for name, values in PUBLISHED.items():
        found = shape(name)
        cost, router = FeedForwardCost.of(found.config), _moe_layer._router(dict(found.config), found.model_type)
        sizes = (cost.hidden, cost.width, cost.experts, cost.top_k, cost.shared_width)
        assert (*sizes, router["score"], router["renorm"], router["groups"], router["scale"]) == values, name


def test_a_scaled_layer_is_its_model_s_with_widths_divided() -> None:
    for name in layer_names():
        whole, _, part = name.rpartition("-")
        by, (scaled, model) = int(part.removesuffix("th")), (shape(n) for n in (name, whole))
        one, other = FeedForwardCost.of(scaled.config), FeedForwardCost.of(model.config)
        assert (one.hidden * by, one.width * by, one.shared_width * by) == (other.hidden, other.width, other.shared_width)
        assert (one.experts, one.top_k) == (other.experts, other.top_k)
        routers = (_moe_layer._router(dict(found.config), found.model_type) for found in (scaled, model))
        assert next(routers) == next(routers)


@pytest.mark.parametrize("name", layer_names())
def test_a_layer_s_file_is_named_like_it_counts_its_weights_and_says_its_source(name: str) -> None:
    found = shape(name)
    assert found.name == name
    assert found.model_type == "moe_layer"
    assert found.num_parameters == FeedForwardCost.of(found.config).weights()
    assert found.source.startswith("https://huggingface.co/") or "of this project" in found.source


def test_layers_and_models_share_no_name_and_are_found_by_the_same_function() -> None:
    assert not set(layer_names()) & set(shape_names())
    with pytest.raises(UnknownName, match="olmoe-1b-7b"):
        shape("olmo-1b-7b")


def test_the_case_is_another_for_another_shape_or_implementation() -> None:
    ids = {
        spec.spec_id
        for spec in (
            spec_of(),
            spec_of("olmoe-1b-7b-8th"),
            spec_of(SMALL, ("expert_kernels", {})),
            spec_of(SMALL, ("expert_kernels", {"implementation": "eager"})),
            spec_of(tokens=25),
        )
    }
    assert len(ids) == 5


# The load


def test_the_load_is_drawn_from_the_distribution_that_is_asked_for() -> None:
    torch.manual_seed(0)
    first = {
        kind: torch.bincount(_moe_layer.logits_of(kind, 20_000, 8).argmax(-1), minlength=8) / 20_000
        for kind in ("uniform", "zipf", "one_hot")
    }
    rank = 1 / torch.arange(1.0, 9.0)
    torch.testing.assert_close(first["uniform"], torch.full((8,), 0.125), rtol=0.1, atol=0)
    torch.testing.assert_close(first["zipf"], rank / rank.sum(), rtol=0.1, atol=0)
    assert first["one_hot"].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]


def test_one_hot_sends_every_token_to_the_same_k_experts() -> None:
    session = session_of(routing="one_hot")
    facts = session.facts()
    assert facts["experts_touched"] == session.cost.top_k == 6
    assert facts["largest_expert_load_share"] == 1.0
    assert facts["expert_backend"] == ("torch" if native.why_not() else "c")


# The gate


@pytest.mark.parametrize("implementation", ["effbench", "eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_every_implementation_passes_the_gate(mode: str, precision: str, implementation: str) -> None:
    stack = (("expert_kernels", {"implementation": implementation}), (precision, {}))
    session = session_of(SMALL, *stack, mode=mode)
    session.check()
    session.step()
    errors = session.facts()["check_errors"]
    print(f"{implementation} {precision}: {errors}")
    gradients = {f"gradient of {name}" for name in ("x", "weight", "w_in", "w_out")}
    assert set(errors) == {"output", *(gradients if mode == "train" else ())}
    assert all(error > 0 for error in errors.values()) or implementation == "eager"


def test_a_wrong_result_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from effbench.modules import moe

    right = moe.run_experts
    monkeypatch.setattr(moe, "run_experts", lambda *given: right(*given) * 1.001)
    with pytest.raises(CorrectnessError, match=r"effbench: the output is off by 0\.001"):
        session_of().check()


def test_a_wrong_gradient_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from effbench.modules import moe

    right = moe.run_experts

    def wrong(kernels: str, x_TD: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, *rest: Any) -> torch.Tensor:
        return right(kernels, x_TD, w_in, w_out.detach() * 0.999 + w_out * 0.001, *rest)  # the value is right

    monkeypatch.setattr(moe, "run_experts", wrong)
    with pytest.raises(CorrectnessError, match="the gradient of w_out is off"):
        session_of(mode="train").check()


# The work


@pytest.mark.parametrize(("mode", "passes"), [("forward", 1), ("train", 3)])
def test_flops_are_those_of_the_products(mode: str, passes: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    session = session_of(SMALL, ("expert_kernels", {"implementation": "eager"}), mode=mode)
    with FlopCounterMode(display=False) as counter:
        session.step()
    assert session.step_work.tokens == 24
    assert session.step_work.model_flops == counter.get_total_flops()
    cost = session.cost
    assert session.step_work.model_flops == passes * 24 * (cost.flops_per_token() - 2 * cost.hidden * cost.experts)


def test_bytes_are_those_of_inputs_outputs_and_the_experts_that_are_touched() -> None:
    session = session_of("olmoe-1b-7b-8th", ("bf16", {}), routing="one_hot")
    assert session.step_work.model_bytes == 2 * (2 * 24 * 256 + 8 * 3 * 256 * 128)
    assert session.facts()["weight_bytes"] == 2 * 64 * 3 * 256 * 128


def test_a_dense_model_with_the_technique_moe_has_a_layer_too() -> None:
    session = session_of("qwen2.5-0.5b", ("moe", {"experts": 4, "granularity": 8}), tokens=2)
    cost = session.cost
    assert (cost.hidden, cost.width, cost.experts, cost.top_k) == (896, 608, 4, 2)
    session.check()


def test_the_plan_shows_one_layer_and_no_mixer() -> None:
    found = expected_cost(spec_of("qwen2.5-0.5b", ("moe", {"granularity": 1})))
    assert found["mixer_flops_per_token"] is None
    assert found["ffn_weights"] == 3 * 896 * 4864 * 8 + 896 * 8
    assert found["ffn_read_bytes_per_step"] == pytest.approx(4 * (3 * 896 * 4864 * 8 * (1 - 0.75**24) + 896 * 8))


# Refusals


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (spec_of("tiny-llama"), "tiny-llama has no experts; add the technique moe, or choose from deepseek-v2-lite"),
        (spec_of(SMALL, ("sdpa", {})), "sdpa is about attention and changes nothing in a layer of experts"),
        (spec_of("tiny-llama", ("moe", {}), ("gqa", {})), "gqa: a technique of axis attention changes nothing in moe_layer"),
        (spec_of(SMALL, ("mha", {})), "mha: a technique of axis attention changes nothing in moe_layer"),
        (spec_of(SMALL, ("lora", {}), mode="train"), "lora: a technique of axis peft changes nothing in moe_layer"),
        (spec_of(SMALL, ("moe", {})), "moe: the model is a mixture of 64 experts already"),
        (
            spec_of("mixtral-8x7b", ("expert_kernels", {"implementation": "batched_mm"}), tokens=8),
            "weights of 16 pairs of token and expert, 11.3 GB",
        ),
        (replace(spec_of(), workload="generate", params={}), "is the shape of one layer and generate runs whole models"),
        (
            replace(spec_of("tiny-llama", ("expert_kernels", {})), workload="generate", params={}),
            "no experts whose kernels can be chosen in a llama model",
        ),
        (replace(spec_of(), model=ModelRef(name=SMALL, weights="trained")), "weights 'trained' would change nothing"),
    ],
)
def test_what_cannot_be_is_refused_with_what_would_work(spec: Spec, words: str) -> None:
    assert words in str(builders.refusal(spec))


@pytest.mark.parametrize("technique", registry.entries("technique"))
def test_every_technique_is_taken_or_refused_on_a_layer(technique: str) -> None:
    reason = builders.refusal(spec_of(SMALL, (technique, {})))
    kind = registry.technique(technique)
    assert (reason is None) == ((kind.axis == "precision" and not kind.quantised) or technique == "expert_kernels")


# Suites


@pytest.mark.parametrize("path", ["suites/moe.yaml", "suites/cpu/moe.yaml"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_suites_plan_without_a_refusal(path: str, device: str) -> None:
    cases = plan(read_suite(Path(path)), Options(device=device))
    assert [case.skip_reason for case in cases if case.skip_reason] == []
    assert len({case.case_id for case in cases}) == len(cases)
    assert all(json.dumps(case.spec.to_json()) for case in cases)


def test_the_paper_s_grid_is_in_the_suite() -> None:
    """EfficientLLM: dense 1.5B and 3B, 0.5B×8 and 1.5B×8, top-2, with experts of full width."""
    found = set()
    for case in plan(read_suite(Path("suites/moe.yaml")), Options(device="cuda")):
        for ref in case.spec.techniques:
            if case.spec.workload in ("pretrain", "generate") and ref.axis == "ffn":
                full = ref.name == "moe" and (ref.params["granularity"], ref.params["top_k"], ref.params["experts"])
                found.add((case.spec.workload, case.spec.model.name, ref.name, full))
    for workload in ("pretrain", "generate"):
        assert {(workload, f"qwen2.5-{size}", "dense", False) for size in ("1.5b", "3b")} <= found
        assert {(workload, f"qwen2.5-{size}", "moe", (1, 2, 8)) for size in ("0.5b", "1.5b")} <= found
