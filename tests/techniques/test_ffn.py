"""The techniques of the feed-forward axis: baselines, adapters on experts, the choice of kernels, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from effbench import registry
from effbench.costs import feed_forward_costs
from effbench.models import builders
from effbench.models.context import configured, expected_cost
from effbench.planning import techniques
from tests.factories import resolved
from tests.mixtures import GRIDS, build, layers_of, some_ids, spec_of

# Baselines


@pytest.mark.parametrize(
    "params",
    [*GRIDS, {"experts": 6, "top_k": 3, "granularity": 2, "every": 2}],
    ids=lambda p: "-".join(f"{k}={v}" for k, v in p.items()) or "default",
)
def test_the_baseline_has_as_many_active_weights_but_for_the_router(params: dict[str, Any]) -> None:
    spec = spec_of("small-llama", params)
    name, given = next(t for t in builders.stack(spec) if t.name == "moe").baseline(spec)
    assert name == "dense"
    dense = replace(spec, techniques=techniques(((name, dict(given)),), "cpu"))
    assert builders.refusal(dense) is None
    routers = sum(cost.hidden * cost.experts for cost in feed_forward_costs(configured(spec)))
    assert expected_cost(dense)["ffn_weights"] == expected_cost(spec)["ffn_active_weights"] - routers


def test_an_upcycled_model_is_compared_with_the_one_it_starts_from() -> None:
    spec = spec_of("tiny-llama", {"granularity": 1, "upcycle": True}, weights="trained")
    assert builders.stack(spec)[0].baseline(spec) == ("dense", {})


def test_a_wider_dense_model_is_built_and_compared_with_the_model_s_own() -> None:
    spec = replace(resolved("tiny-llama"), techniques=techniques((("dense", {"width": 1.5}),), "cpu"))
    model = build(spec)
    assert model.model.layers[0].mlp.gate_proj.weight.shape == (768, 128)
    own = builders.stack(spec)[0]
    assert own.baseline(spec) == ("dense", {})
    assert not own.is_reference


# Adapters


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lora_adapts_experts_and_shared_experts_and_leaves_the_router(precision: str) -> None:
    params = {"shared": 1, "granularity": 1}
    model = build(spec_of("tiny-llama", params, precision, "lora", workload="finetune"), trains=True)
    builders.to_master_weights(model)
    plain = build(spec_of("tiny-llama", params, precision, workload="finetune"), trains=True)
    assert builders.params_total(model) == builders.params_total(plain)
    assert builders.params_active(model) == builders.params_active(plain)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    inside = [name for name in adapters if "layers.1.mlp" in name]
    assert {part for part in ("router", "experts", "shared") if any(f".{part}." in n for n in inside)} == {"experts", "shared"}
    assert sum(p.numel() for name, p in adapters.items() if ".experts." in name) == 2 * 16 * 8 * ((1024 + 128) + (128 + 512)), (
        "rank 16 for each of 8 experts and both matrices, in both layers"
    )
    for part, p in adapters.items():
        if "lora_B" in part:
            nn.init.normal_(p, std=0.02)
    with builders.mixed_precision(model):
        loss = model(input_ids=some_ids()).logits.float().logsumexp(-1).mean()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in adapters.values())


def test_dropout_on_the_adapters_of_experts_is_refused() -> None:
    spec = spec_of("tiny-llama", {}, workload="finetune")
    stack = (("moe", {}), ("lora", {"lora_dropout": 0.1}))
    reason = builders.refusal(replace(spec, techniques=techniques(stack, "cpu")))
    assert reason is not None
    assert "experts are adapted by their weights" in reason
    assert "lora_dropout 0" in reason


# Kernels


def test_kernels_are_chosen_by_the_technique() -> None:
    spec = spec_of("tiny-llama", {}, "expert_kernels")
    assert {made.experts.kernels for made in layers_of(build(spec))} == {"grouped_mm"}
    assert {made.experts.kernels for made in layers_of(build(spec_of("tiny-llama", {})))} == {"effbench"}


# Refusals


@pytest.mark.parametrize(
    ("params", "model", "words"),
    [
        ({"top_k": 9}, {}, ["top_k is 9", "8 experts", "from 1 to 8"]),
        ({"top_k": 3}, {}, ["width of 512", "3 equal parts", "1, 2, 4, 8, 16, 32, 64"]),
        ({"every": 3}, {}, ["every 3", "2 layers"]),
        ({"upcycle": True}, {}, ["weights are random", "trained, path or hub"]),
        ({"upcycle": True, "renorm": False}, {"weights": "trained"}, ["sum to 1", "renorm"]),
        ({"upcycle": True, "shared": 1, "granularity": 1}, {"weights": "trained"}, ["1 shared", "shared: 0"]),
        ({"upcycle": True, "experts": 9}, {"weights": "trained"}, ["9 experts", "multiples of 2"]),
        ({"upcycle": True, "granularity": 4}, {"weights": "trained"}, ["top_k 2", "multiples of 4"]),
    ],
)
def test_impossible_parameters_are_refused_with_what_would_work(
    params: dict[str, Any], model: dict[str, Any], words: list[str]
) -> None:
    reason = builders.refusal(spec_of("tiny-llama", params, **model))
    assert reason is not None
    assert reason.startswith("moe: ")
    assert [word for word in words if word not in reason] == []


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_local_experts": 8}, "mixture of 8 experts already"),
        ({"n_routed_experts": 64}, "mixture of 64 experts already"),
        ({"mlp_bias": True}, "have biases"),
        ({"hidden_act": "relu2"}, "'relu2' is not among silu, gelu, gelu_pytorch_tanh"),
    ],
)
def test_models_whose_layers_have_another_form_are_refused(config: dict[str, Any], words: str) -> None:
    known = builders.context(spec_of("tiny-llama", {}))
    answer = registry.technique("moe")().supports(replace(known, config={**known.config, **config}))
    assert not answer.ok
    assert words in answer.reason


def test_models_of_another_family_are_refused() -> None:
    assert "have another form" in str(builders.refusal(spec_of("phi-4", {})))
    mixer = replace(spec_of("tiny-llama", {}), techniques=techniques((("moe", {}), ("mamba", {})), "cpu"))
    assert "nothing for moe" in str(builders.refusal(mixer))
