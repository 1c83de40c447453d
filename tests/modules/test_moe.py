"""Mixture-of-experts layers: the formula, upcycling, the router's losses, counts and costs, implementations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from effbench import registry
from effbench.costs import FeedForwardCost, feed_forward_costs, touched_share
from effbench.models import builders, training, weights
from effbench.models.accounting import layer_cost
from effbench.models.context import expected_cost
from effbench.modules.expert_kernels import run_experts
from effbench.modules.losses import auxiliary_loss, modules_with_losses
from effbench.modules.moe import MoEFeedForward
from effbench.modules.replace import initialise
from effbench.planning import techniques
from effbench.schema import ModelRef
from effbench.workload import BuildContext
from effbench.workloads import _decode
from tests.factories import resolved
from tests.mixtures import GRIDS, HIDDEN, SHAPES, WIDE, build, layers_of, some_ids, spec_of


def rms_error(found: torch.Tensor, true: torch.Tensor) -> float:
    found, true = found.detach().double(), true.detach().double()
    return float((found - true).square().mean().sqrt() / true.square().mean().sqrt())


def layer(**changes: Any) -> MoEFeedForward:
    cost = FeedForwardCost(hidden=24, width=12, experts=6, top_k=2, **{k: v for k, v in changes.items() if k == "shared_width"})
    cost = replace(cost, top_k=changes.get("top_k", 2))
    options = {"score": "softmax", "renorm": True, "balance": 0.01, "z": 0.001, "kernels": "effbench"}
    options |= {k: v for k, v in changes.items() if k in options}
    torch.manual_seed(0)
    made = MoEFeedForward(cost, changes.get("act", "swiglu"), **options)
    initialise(made, 0.3)
    return made


def by_hand(made: MoEFeedForward, x_TD: torch.Tensor) -> torch.Tensor:
    """The layer as its docstring says it, token by token, in float64."""
    made = made.double()
    out = []
    for x_D in x_TD.double():
        score_E = made.router(x_D).softmax(-1) if made.score == "softmax" else made.router(x_D).sigmoid()
        best = score_E.argsort(descending=True)[: made.top_k]
        weight_K = score_E[best] / (score_E[best].sum() if made.renorm else 1)
        y_D = made.shared(x_D[None])[0] if made.shared is not None else torch.zeros_like(x_D)
        for weight, expert in zip(weight_K, best, strict=True):
            gate, value = (made.experts.w_in[expert] @ x_D).chunk(2)
            y_D = y_D + weight * (made.experts.w_out[expert] @ (F.silu(gate) * value))
        out.append(y_D)
    return torch.stack(out)


@pytest.mark.parametrize("kernels", ["effbench", "eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"renorm": False}, {"score": "sigmoid"}, {"shared_width": 20}, {"top_k": 6}, {"top_k": 1}],
    ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "plain",
)
def test_a_layer_computes_its_formula(changes: dict[str, Any], kernels: str) -> None:
    made, x_BTD = layer(**changes, kernels=kernels), torch.randn(3, 11, 24)
    found = made(x_BTD)
    error = rms_error(found.view(-1, 24), by_hand(made, x_BTD.view(-1, 24)))
    print(f"{kernels} {changes}: {error:.1e}")
    assert found.shape == x_BTD.shape
    assert error < 1e-6


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_router_stays_in_single_precision(precision: str) -> None:
    model = build(spec_of("tiny-llama", {}, precision))
    dtype = builders.compute_dtype(model)
    for made in layers_of(model):
        assert made.router.weight.dtype == torch.float32
        assert {p.dtype for p in made.experts.parameters()} == {dtype}


def test_every_nth_layer_is_replaced() -> None:
    model = build(spec_of("small-llama", {"every": 3}))
    kinds = [isinstance(block.mlp, MoEFeedForward) for block in model.model.layers]
    assert kinds == [False, False, True, False, False, True]


# Upcycling


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for shape in SHAPES:
        folders[shape] = tmp_path_factory.mktemp(shape)
        builders.build(resolved(shape), trains=False, seed=5, device="cpu").model.save_pretrained(folders[shape])
    return folders


EXACT: list[dict[str, Any]] = [
    {"granularity": 1},
    {"granularity": 1, "experts": 5, "top_k": 5},
    {"granularity": 1, "score": "sigmoid"},
    {},  # two parts to a copy, both of one copy used
    {"experts": 16, "top_k": 4, "granularity": 2},  # both parts of two copies
    {"experts": 4, "top_k": 4},  # one copy, all of it
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("params", EXACT, ids=lambda p: "-".join(f"{k}={v}" for k, v in p.items()) or "default")
def test_an_upcycled_model_starts_as_the_dense_one(params: dict[str, Any], shape: str, checkpoints: dict[str, Path]) -> None:
    where = {"weights": "path", "location": str(checkpoints[shape])}
    dense = builders.build(resolved(shape, **where), trains=False, seed=1, device="cpu").model.eval()
    spec = spec_of(shape, {**params, "upcycle": True}, **where)
    assert builders.new_weights(spec) == ""
    mixture = build(spec).eval()
    with torch.inference_mode():
        error = rms_error(mixture(input_ids=some_ids()).logits, dense(input_ids=some_ids()).logits)
    print(f"{shape} {params}: {error:.1e}")
    assert error < 1e-6
    own, part = dense.config.intermediate_size, mixture.config.moe_intermediate_size
    for made in layers_of(mixture):
        rows = made.router.weight.unique(dim=0)
        assert len(rows) == mixture.config.num_experts // (own // part), "one router row for each copy"


def test_without_upcycling_the_feed_forward_part_of_a_checkpoint_starts_anew(checkpoints: dict[str, Path]) -> None:
    where = {"weights": "path", "location": str(checkpoints["tiny-llama"])}
    spec = spec_of("tiny-llama", {}, **where)
    assert builders.new_weights(spec) == "feed-forward"
    dense = builders.build(resolved("tiny-llama", **where), trains=False, seed=1, device="cpu").model
    mixture = build(spec)
    torch.testing.assert_close(mixture.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    with torch.inference_mode():
        assert rms_error(mixture(input_ids=some_ids()).logits, dense(input_ids=some_ids()).logits) > 0.1


def test_trained_weights_are_those_of_the_dense_model_when_upcycled_and_of_the_mixture_when_not() -> None:
    dense = resolved("tiny-llama", weights="trained").model.digest

    def digest(**params: Any) -> str:
        return weights.weights_digest(spec_of("tiny-llama", params, weights="trained"))

    assert digest(upcycle=True) == dense
    assert digest() != dense
    assert digest() != digest(top_k=4)


def test_trained_weights_are_upcycled_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path))
    short = training.Recipe(steps=4, warm_up_steps=2, seq_len=64, validation_tokens=512)
    for function in (training.trained_digest, training.trained_folder, training.train_once, weights.prepare):
        monkeypatch.setattr(function, "__defaults__", (short,))
    dense = resolved("tiny-llama", weights="trained")
    weights.prepare(dense)
    mixture = build(spec_of("tiny-llama", {"upcycle": True}, weights="trained")).eval()
    plain = builders.build(dense, trains=False, seed=1, device="cpu").model.eval()
    with torch.inference_mode():
        assert rms_error(mixture(input_ids=some_ids()).logits, plain(input_ids=some_ids()).logits) < 1e-6


# The router's losses


def test_a_forward_in_training_leaves_the_losses_of_the_router_once() -> None:
    made, x_TD = layer(balance=0.5, z=0.25), torch.randn(40, 24)
    made(x_TD)
    logits_TE = x_TD @ made.router.weight.T
    share_E = F.one_hot(logits_TE.topk(2).indices, 6).sum((0, 1)) / 80
    balance = 6 * (share_E * logits_TE.softmax(-1).mean(0)).sum()
    expected = 0.5 * balance + 0.25 * logits_TE.logsumexp(-1).square().mean()
    found = auxiliary_loss(modules_with_losses(made))
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert auxiliary_loss(modules_with_losses(made)) == 0.0, "taken"
    made.eval()(x_TD)
    assert auxiliary_loss(modules_with_losses(made)) == 0.0
    free = layer(balance=0.0, z=0.0)
    free(x_TD)
    assert auxiliary_loss(modules_with_losses(free)) == 0.0


def test_the_losses_reach_the_router_also_under_activation_checkpointing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build(spec_of("tiny-llama", {"balance": 1.0, "z": 0.1}, workload="pretrain"), trains=True).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        logits_BTV = model(input_ids=some_ids()).logits
        (logits_BTV.logsumexp(-1).mean() * 1e-3 + auxiliary_loss(modules_with_losses(model))).backward()
        gradients.append([made.router.weight.grad for made in layers_of(model)])
    for plain, recomputed in zip(*gradients, strict=True):
        assert float(plain.abs().max()) > 1e-3, "far more than the task's share"
        assert rms_error(recomputed, plain) < 1e-5


def session_of(**params: Any) -> Any:
    spec = spec_of("tiny-llama", params, workload="pretrain")
    given = {**spec.params, "batch_size": 2, "seq_len": 32, "quality_steps": 0}
    spec = replace(spec, params=given)
    return registry.workload("pretrain")(given).build(BuildContext(spec=spec, seed=1, clock=lambda: 0.0))


def largest_load(model: Any) -> float:
    """Share of the pairs that go to the busiest expert, the mean over the layers."""
    found = []
    handles = [
        made.router.register_forward_hook(lambda _, __, logits_TE: found.append(logits_TE.topk(2).indices))
        for made in layers_of(model)
    ]
    with torch.no_grad():
        model.eval()(input_ids=some_ids(8))
    for handle in handles:
        handle.remove()
    return sum(float(torch.bincount(index.flatten(), minlength=8).max()) / index.numel() for index in found) / len(found)


def test_training_evens_out_the_load_and_reports_its_loss_without_the_router_s() -> None:
    """From routers that send every token to the same two experts."""
    shares, first = {}, {}
    for balance in (0.0, 1.0):
        session = session_of(balance=balance, z=0.0)
        with torch.no_grad():
            for made in layers_of(session.model):
                made.router.weight[2:] = made.router.weight[:2].mean(0)
                made.router.weight[:2] *= 3
        for _ in range(30):
            session.step()
        first[balance] = session.losses[0]
        shares[balance] = largest_load(session.model)
    assert first[0.0] == first[1.0]
    print(f"largest share of an expert without and with the balance loss: {shares}")
    assert shares[1.0] < shares[0.0]


# Counts and costs


@pytest.mark.parametrize("params", GRIDS, ids=lambda p: "-".join(f"{k}={v}" for k, v in p.items()) or "default")
def test_weights_and_bytes_are_counted_by_what_a_token_and_a_step_use(params: dict[str, Any]) -> None:
    spec = spec_of("tiny-llama", params)
    model = build(spec)
    dense = builders.build(resolved("tiny-llama"), trains=False, seed=1, device="cpu").model
    given = spec.techniques[0].params
    experts, top_k, shared = given["experts"], given["top_k"], given["shared"]
    width = WIDE // (given["granularity"] or top_k + shared)
    replaced = 2 // given["every"]

    def total(used: float) -> float:
        change = 3 * HIDDEN * width * (used + shared) + HIDDEN * experts - 3 * HIDDEN * WIDE
        return builders.params_total(dense) + replaced * change

    assert builders.params_total(model) == total(experts)
    assert builders.params_active(model) == total(top_k)
    assert builders.weight_bytes(model) - builders.weight_bytes(dense) == 4 * (total(experts) - builders.params_total(dense))
    for batch in (1, 3, 10_000):
        found = builders.expected_decode(model, 50, batch)["weight_read_bytes"] * batch
        read = total(experts * (1 - (1 - top_k / experts) ** batch))
        assert found == pytest.approx(builders.weight_bytes(dense) + 4 * (read - builders.params_total(dense)))


@pytest.mark.parametrize("params", GRIDS, ids=lambda p: "-".join(f"{k}={v}" for k, v in p.items()) or "default")
@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-qwen2"])
def test_counted_flops_of_a_decode_step_are_the_expected_ones(params: dict[str, Any], shape: str) -> None:
    model = build(spec_of(shape, params))
    counted = _decode.counted_flops(model, some_ids(1, 40), 100)
    expected = builders.expected_decode(model, 100)["decode_flops"]
    print(f"{shape} {params}: counted {counted}, expected {expected:.0f}")
    assert counted == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("params", GRIDS, ids=lambda p: "-".join(f"{k}={v}" for k, v in p.items()) or "default")
def test_the_plan_says_what_the_built_model_says(params: dict[str, Any]) -> None:
    spec = spec_of("tiny-llama", params)
    model, planned = build(spec), expected_cost(spec)
    inside = {id(p) for block in model.model.layers for p in block.mlp.parameters()}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    assert planned["ffn_weights"] == builders.params_total(model) - rest
    assert planned["ffn_active_weights"] == builders.params_active(model) - rest
    assert planned["ffn_flops_per_token"] == 2 * planned["ffn_active_weights"]
    batch = spec.params["batch_size"]
    read = builders.expected_decode(model, 50, batch)["weight_read_bytes"] * batch
    assert planned["ffn_read_bytes_per_step"] == pytest.approx(read - builders.weight_bytes(model) + 4 * planned["ffn_weights"])


def test_model_flops_of_training_are_three_forwards_over_active_weights() -> None:
    model = build(spec_of("tiny-llama", {}, workload="pretrain"), trains=True)
    embeddings = model.model.embed_tokens.weight.numel()
    attention = 2 * layer_cost(model).mean_score_flops(64)
    expected = 6 * (builders.params_active(model) - embeddings) + 3 * attention
    assert builders.model_flops_per_token(model, context_len=64, training=True) == pytest.approx(expected)


def test_experts_that_are_touched_are_those_of_a_simulation() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(4000, 12, 16, generator=generator).topk(3).indices  # 12 tokens, 3 of 16 experts
    seen = torch.zeros(4000, 16).scatter_(1, draws.flatten(1), 1.0).mean()
    assert touched_share(16, 3, 12) == pytest.approx(float(seen), rel=0.01)


def test_layers_without_experts_are_counted_as_dense() -> None:
    config = {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 4}
    mixed = {**config, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 2}
    assert [cost.experts for cost in feed_forward_costs(mixed)] == [0, 4, 0, 4]
    assert [cost.width for cost in feed_forward_costs(config)] == [32] * 4


# Kernels


@pytest.mark.parametrize("kernels", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("act", ["swiglu", "geglu", "geglu_tanh"])
def test_implementations_agree(kernels: str, act: str) -> None:
    from effbench_kernels import route

    torch.manual_seed(0)
    x_TD, w_in, w_out = torch.randn(30, 16), torch.randn(6, 24, 16) / 4, torch.randn(6, 16, 12) / 4
    routing, add = route(torch.randn(30, 6), 2), torch.randn(30, 16)
    ours, theirs = (run_experts(name, x_TD, w_in, w_out, routing, act, add) for name in ("effbench", kernels))
    assert rms_error(theirs, ours) < 1e-6


def test_a_loaded_dense_model_cannot_be_widened(checkpoints: dict[str, Path]) -> None:
    where = ModelRef(name="tiny-llama", weights="path", location=str(checkpoints["tiny-llama"]))
    spec = replace(resolved("tiny-llama"), model=where, techniques=techniques((("dense", {"width": 2}),), "cpu"))
    assert "cannot be made 2 times as wide" in str(builders.refusal(spec))
