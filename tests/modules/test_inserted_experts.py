"""Experts before and in place of Bloom's feed-forward layers: the formula, both starts, what trains, kernels against the loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from effbench_kernels import Routing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from effbench import registry
from effbench.models import builders
from effbench.modules.inserted_experts import BiasedExperts, Choices, SparseFeedForward, by_loop, mixtures, own_parameters
from effbench.planning import techniques
from effbench.schema import Spec
from tests.factories import resolved

WEIGHTS = ("w_in", "b_in", "w_out", "b_out")


def spec_of(*stack: tuple[str, dict[str, Any]], model: str = "tiny-bloom", **params: Any) -> Spec:
    filled = registry.workload("fuximt").Params(**params).model_dump(mode="json")
    return replace(resolved(model, workload="fuximt"), params=filled, techniques=techniques(stack, "cpu"))


def arm(**changes: Any) -> tuple[str, dict[str, Any]]:
    return "fuximt", {"every": 2, "experts": 4, **changes}


def build(*stack: tuple[str, dict[str, Any]], seed: int = 1, trains: bool = False) -> Any:
    made = builders.build(spec_of(*stack, mode="train" if trains else "translate"), trains=trains, seed=seed, device="cpu")
    if trains:
        for part in made.techniques:
            part.trainable(made.model)
        builders.to_master_weights(made.model)
    return made.model


def some_ids(rows: int = 2, length: int = 24, seed: int = 7) -> torch.Tensor:
    return torch.randint(0, 321, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=ids_BT, use_cache=False).logits
    return found


def rms_error(found: torch.Tensor, true: torch.Tensor) -> float:
    found, true = found.detach().double(), true.detach().double()
    return float((found - true).square().mean().sqrt() / true.square().mean().sqrt())


def open_gates(model: Any, value: float = 0.7) -> None:
    with torch.no_grad():
        for mixture in mixtures(model):
            if mixture.gate is not None:
                mixture.gate.fill_(value)


# The two starts


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_closed_gate_is_the_frozen_model_bit_for_bit(seed: int, top_k: int, gate: str, precision: str) -> None:
    frozen = build(("dense", {}), (precision, {}), seed=seed)
    model = build(arm(top_k=top_k, gate=gate, noise=0.5), (precision, {}), seed=seed)
    ids_BT = some_ids(seed=seed)
    assert torch.equal(logits_of(model, ids_BT), logits_of(frozen, ids_BT))
    open_gates(model, 0.5)
    assert not torch.equal(logits_of(model, ids_BT), logits_of(frozen, ids_BT)), "the gate does something"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_0_of_training_is_the_frozen_model_bit_for_bit(precision: str) -> None:
    ids_BT, found = some_ids(), []
    for stack in ((("dense", {}),), (arm(),)):
        model = build(*stack, (precision, {}), trains=True)
        model.requires_grad_(False).to(builders.compute_dtype(model))  # the dense one too is frozen
        for mixture in mixtures(model):
            mixture.router.float()
        model.train()
        with torch.no_grad(), builders.mixed_precision(model):
            found.append(model(input_ids=ids_BT, use_cache=False).logits)
    assert torch.equal(*found)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("by", ["kernels", "loop"])
def test_upcycled_without_noise_is_the_dense_model_to_rounding(by: str, top_k: int) -> None:
    dense, model = build(("dense", {})).double(), build(arm(form="upcycled", noise=0.0, top_k=top_k, experts_by=by)).double()
    ids_BT = some_ids()
    # The library's gelu has 0.79788456 for √(2/π), which is the difference.
    assert rms_error(logits_of(model, ids_BT), logits_of(dense, ids_BT)) < 2e-9
    noisy = build(arm(form="upcycled", noise=0.1, top_k=top_k, experts_by=by)).double()
    assert rms_error(logits_of(noisy, ids_BT), logits_of(dense, ids_BT)) > 1e-4


@pytest.mark.parametrize("top_k", [1, 2])
def test_without_renormalised_weights_the_upcycled_model_is_another(top_k: int) -> None:
    dense, model = build(("dense", {})), build(arm(form="upcycled", noise=0.0, top_k=top_k, renorm=False))
    assert rms_error(logits_of(model, some_ids()), logits_of(dense, some_ids())) > 0.01


def test_experts_are_copies_with_noise_of_the_size_asked_for() -> None:
    dense, model = build(("dense", {})), build(arm(noise=0.05))
    for index, mixture in zip((1, 3), mixtures(model), strict=True):
        for name, layer in (("w_in", "dense_h_to_4h"), ("w_out", "dense_4h_to_h")):
            old = getattr(dense.transformer.h[index].mlp, layer).weight
            for expert in getattr(mixture.experts, name):
                assert rms_error(expert, old) == pytest.approx(0.05, rel=0.05)
    assert not torch.equal(mixture.experts.w_in[0], mixture.experts.w_in[1])


# The formula


def by_hand(mixture: SparseFeedForward, norm: Any, h_TD: torch.Tensor) -> torch.Tensor:
    """What the module's docstring says, token by token."""
    out = []
    for h_D in h_TD:
        x_D = norm(h_D)
        p_E = mixture.router(x_D).softmax(-1)
        best = p_E.argsort(descending=True)[: mixture.choices.top_k]
        weight_K = p_E[best] / (p_E[best].sum() if mixture.choices.renorm else 1)
        total_D = torch.zeros_like(h_D)
        for weight, expert in zip(weight_K, best, strict=True):
            w_in, b_in, w_out, b_out = (getattr(mixture.experts, name)[expert] for name in WEIGHTS)
            total_D = total_D + weight * (w_out @ F.gelu(w_in @ x_D + b_in, approximate="tanh") + b_out)
        h_D = h_D + (total_D if mixture.gate is None else mixture.gate * total_D)
        out.append(h_D if mixture.dense is None else mixture.dense(norm(h_D), h_D))
    return torch.stack(out)


FORMS: list[dict[str, Any]] = [
    {"top_k": 1}, {"top_k": 2}, {"gate": "vector"}, {"renorm": False}, {"form": "upcycled"}, {"form": "upcycled", "top_k": 1},
    {"experts": 2}, {"experts": 1, "top_k": 1},
]  # fmt: skip


@pytest.mark.parametrize("by", ["kernels", "loop"])
@pytest.mark.parametrize("changes", FORMS, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()))
def test_a_layer_computes_its_formula(changes: dict[str, Any], by: str) -> None:
    model = build(arm(**changes, experts_by=by, noise=0.5)).double()
    open_gates(model)
    block, h_BTD = (
        model.transformer.h[1],
        torch.randn(2, 9, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(3)),
    )
    found = block.mlp(block.post_attention_layernorm(h_BTD), h_BTD)
    true = by_hand(block.mlp, block.post_attention_layernorm, h_BTD.view(-1, 128))
    assert rms_error(found.view(-1, 128), true) < 2e-9


def test_at_one_expert_a_token_weights_are_probabilities_where_inserted_and_one_where_upcycled() -> None:
    for form, is_one in (("inserted", False), ("upcycled", True)):
        mixture = mixtures(build(arm(form=form, top_k=1)))[0]
        weight_T1 = mixture._route(torch.randn(50, 128)).weight
        assert bool((weight_T1 == 1).all()) == is_one


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 40), experts=st.integers(1, 9), top_k=st.integers(1, 2), seed=st.integers(0, 99))
def test_kernels_equal_the_loop_in_output_and_gradients(tokens: int, experts: int, top_k: int, seed: int) -> None:
    torch.manual_seed(seed)
    top_k, choices = min(top_k, experts), None
    dense = torch.nn.Module()
    dense.dense_h_to_4h, dense.dense_4h_to_h = torch.nn.Linear(12, 48), torch.nn.Linear(48, 12)
    choices = Choices(
        form="inserted", experts=experts, top_k=top_k, renorm=True, gate="scalar", balance=0.0, noise=1.0, by="kernels"
    )
    bank = BiasedExperts(dense, choices).double()
    x_TD = torch.randn(tokens, 12, dtype=torch.float64, requires_grad=True)
    weight_TK = torch.rand(tokens, top_k, dtype=torch.float64, requires_grad=True)
    expert_TK = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    routing, grad_TD = Routing(expert_TK, weight_TK), torch.randn(tokens, 12, dtype=torch.float64)
    wanted = (x_TD, weight_TK, *(getattr(bank, name) for name in WEIGHTS))
    one, other = bank(x_TD, routing), by_loop(x_TD, wanted[2:], routing)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(out, wanted, grad_TD) for out in (one, other)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


# What trains


@pytest.mark.parametrize("changes", [{}, {"form": "upcycled"}, {"gate": "vector", "top_k": 1}], ids=str)
def test_gradients_and_states_are_of_what_was_added_alone(changes: dict[str, Any]) -> None:
    model = build(arm(**changes), trains=True).train()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    own = [p for mixture in mixtures(model) for p in own_parameters(mixture)]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in own} == {id(p) for p in trained}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):  # at the first step a closed gate keeps the experts' gradients at zero
        logits = model(input_ids=some_ids(), use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), some_ids(seed=8).flatten())
        (loss + sum(mixture.auxiliary_loss for mixture in mixtures(model))).backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        optimizer.step()
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained)
    assert {id(p) for p in optimizer.state} == {id(p) for p in trained}
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_the_balance_loss_is_left_in_training_only() -> None:
    model = build(arm(balance=0.5), trains=True)
    model.eval()(input_ids=some_ids(), use_cache=False)
    assert all(mixture.auxiliary_loss is None for mixture in mixtures(model))
    model.train()(input_ids=some_ids(), use_cache=False)
    for mixture in mixtures(model):
        assert mixture.auxiliary_loss is not None and 0.4 < mixture.auxiliary_loss.item() < 0.5 * 4


# Where, and what it costs


@pytest.mark.parametrize(("every", "layers"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2]), (4, [3])])
def test_layers_at_the_sparse_step_have_experts(every: int, layers: list[int]) -> None:
    model = build(arm(every=every))
    assert [i for i, block in enumerate(model.transformer.h) if isinstance(block.mlp, SparseFeedForward)] == layers


def flops(*stack: tuple[str, dict[str, Any]]) -> int:
    model, ids_BT = build(*stack).eval(), some_ids()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids_BT, use_cache=False)
    return counter.get_total_flops() // ids_BT.numel()


@pytest.mark.parametrize("by", ["kernels", "loop"])
def test_flops_are_flat_in_the_experts_and_grow_with_k(by: str) -> None:
    few, many, one = (flops(arm(experts_by=by, **c)) for c in ({"experts": 4}, {"experts": 16}, {"top_k": 1}))
    router, expert = 2 * 2 * 128, 2 * 2 * 2 * 128 * 512  # of two layers
    assert many - few == 12 * router
    assert few - one == expert
    assert one - flops(("dense", {})) == expert + 4 * router, "the dense layer stays behind inserted experts"
    assert flops(arm(experts_by=by, form="upcycled", top_k=1)) == flops(("dense", {})) + 4 * router
