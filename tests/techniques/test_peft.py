"""Fine-tuning techniques against their formulas, and against what they say of bytes, names and limits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from effbench import families, registry
from effbench.layout import Layout
from effbench.models import builders, context
from effbench.models.memory import expected_memory
from effbench.models.shapes import shape
from effbench.models.storage import stored
from effbench.modules.offload import HostAdamW
from effbench.planning import techniques
from effbench.schema import Spec
from effbench.technique import YES, Context, OptimizerArgs
from effbench.workload import BuildContext
from tests.factories import resolved

SMALL = {"r": 4, "lora_alpha": 8}
QUERY = {**SMALL, "target_modules": ["q_proj"]}
STEP = {"batch_size": 4, "seq_len": 64, "quality_steps": 0, "validation_tokens": 2048, "learning_rate": 5e-3}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = ("lora", "rslora", "dora", "lora_plus", "pissa")


def spec_of(model: str, *stack: tuple[str, dict[str, Any]], device: str = "cpu", workload: str = "finetune") -> Spec:
    spec = resolved(model, workload=workload, device=device)
    return replace(spec, techniques=techniques(stack, device))


def build(model: str, *stack: tuple[str, dict[str, Any]]) -> Any:
    """The model as a training session has it, in inference mode."""
    found = builders.build(spec_of(model, *stack), trains=True, seed=1, device="cpu")
    for technique in found.techniques:
        technique.trainable(found.model)
    builders.to_master_weights(found.model)
    return found.model.eval()


def session_of(model: str, *stack: tuple[str, dict[str, Any]], **params: Any) -> Any:
    spec = spec_of(model, *stack)
    workload = registry.workload("finetune")({**spec.params, **STEP, **params})
    return workload.build(
        BuildContext(spec=replace(spec, params=workload.params.model_dump()), seed=1, clock=time.perf_counter)
    )


def layout_of(model: str, *stack: tuple[str, dict[str, Any]], device: str = "cpu") -> Layout:
    found = context.layout(spec_of(model, *stack, device=device))
    assert found is not None
    return found


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def wake(model: nn.Module) -> None:
    """B starts at zero and would hide everything."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "lora_magnitude" in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)


def some_ids() -> torch.Tensor:
    return torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=some_ids()).logits
    return logits.float()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """RMS of the difference over RMS of the other."""
    return float((one - other).norm() / other.norm())


# Formulas


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-qwen2"])  # without and with a bias
@pytest.mark.parametrize("technique", ["lora", "rslora", "lora_plus", "dora"])
def test_an_adapted_layer_computes_the_paper_s_formula(technique: str, model: str) -> None:
    """In float64: y = W x + s B A x + b, and for DoRA m ⊙ (W + s B A) x / ‖W + s B A‖ + b with no gradient through the norm."""
    scale = {"rslora": 8 / 4**0.5}.get(technique, 8 / 4)
    found = build(model, (technique, QUERY))
    wake(found)
    layer = found.base_model.model.model.layers[1].self_attn.q_proj.double()
    x_ND = torch.randn(5, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    toward_NO = torch.randn(5, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y_NO = layer(x_ND)
    (y_NO * toward_NO).sum().backward()

    W, bias = layer.base_layer.weight.detach(), layer.base_layer.bias
    A, B = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
    assert A.shape == (4, 128) and B.shape == (128, 4)
    own = [p.detach().clone().requires_grad_() for p in (A, B)]
    changed = W + scale * own[1] @ own[0]
    if technique == "dora":
        m = layer.lora_magnitude_vector["default"].weight
        own.append(m.detach().clone().requires_grad_())
        changed = own[2][:, None] * changed / changed.norm(dim=1, keepdim=True).detach()
        assert m.grad is not None
    expected_NO = x_ND @ changed.T + (0 if bias is None else bias.detach())
    (expected_NO * toward_NO).sum().backward()
    assert (bias is not None) == (model == "tiny-qwen2")
    assert apart(y_NO.detach(), expected_NO.detach()) < 1e-12
    theirs = [A.grad, B.grad, *([m.grad] if technique == "dora" else [])]
    assert [apart(a, b.grad) < 1e-12 for a, b in zip(theirs, own, strict=True)] == [True] * len(own)


def test_dora_starts_with_the_model_s_own_function_and_lengths() -> None:
    found, plain = build("tiny-llama", ("dora", SMALL)), build("tiny-llama", ("full", {}))
    layer = found.base_model.model.model.layers[0].mlp.down_proj
    assert apart(layer.lora_magnitude_vector["default"].weight.detach(), layer.base_layer.weight.norm(dim=1)) < 1e-6
    assert apart(logits_of(found), logits_of(plain)) < 1e-5


@pytest.mark.parametrize("niter", [None, 16])
def test_pissa_starts_from_the_largest_singular_vectors_and_changes_no_output(niter: int | None) -> None:
    """Weights whose singular values halve, as far as fp32 goes: random ones are all but equal, and the fast way mixes those."""
    plain = build("tiny-llama", ("full", {}))
    names = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
    largest: dict[str, torch.Tensor] = {}
    for name in names:
        weight = plain.get_submodule(name).weight
        U, S, V = torch.linalg.svd(weight.detach().double(), full_matrices=False)
        S = S.max() * 0.5 ** torch.arange(len(S), dtype=torch.float64)
        weight.data = (U * S @ V).float()
        largest[name] = (U[:, :4] * S[:4]) @ V[:4]
    before = {name: plain.get_submodule(name).weight.detach().double() for name in names}
    logits = logits_of(plain)
    kind = registry.technique("pissa")
    found = kind(kind.Params(**SMALL, niter=niter)).apply(plain)
    assert apart(logits_of(found), logits) < 1e-5
    for name in names:
        layer = found.get_submodule(f"base_model.model.{name}")
        A, B = (getattr(layer, part)["default"].weight.detach().double() for part in ("lora_A", "lora_B"))
        assert apart(2.0 * B @ A, largest[name]) < 1e-5
        assert apart(layer.base_layer.weight.detach().double(), before[name] - largest[name]) < 1e-5
        assert apart(A @ A.T, B.T @ B) < 1e-4, "√S goes to both"


def test_pissa_in_bf16_rounds_what_is_left_of_the_weights() -> None:
    bf16 = ("bf16", {})
    difference = apart(
        logits_of(build("tiny-llama", ("pissa", SMALL), bf16)), logits_of(build("tiny-llama", ("lora", SMALL), bf16))
    )
    print(f"outputs at step 0 differ by {difference:.2%}")
    assert 1e-3 < difference < 3e-2


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-mixtral"])
def test_lora_plus_gives_b_its_own_learning_rate(model: str) -> None:
    found = build(model, ("lora_plus", {**SMALL, "ratio": 16.0}))
    technique = registry.technique("lora_plus")()
    optimizer = technique.optimizer(found, OptimizerArgs(learning_rate=1e-3, weight_decay=0.1, betas=(0.8, 0.95)))
    assert optimizer is not None
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {(g["betas"], g["weight_decay"]) for g in optimizer.param_groups} == {((0.8, 0.95), 0.1)}
    names = trained(found)
    assert len(rates) == len(names) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert {rates[id(p)] for name, p in names.items() if "lora_A" in name} == {1e-3}
    assert {rates[id(p)] for name, p in names.items() if "lora_B" in name} == {1e-3 * 16}


@pytest.mark.parametrize("technique", ADAPTERS)
def test_merged_weights_give_the_outputs_of_the_adapters(technique: str) -> None:
    found = build("tiny-llama", (technique, SMALL))
    wake(found)
    before, untouched = logits_of(found), logits_of(build("tiny-llama", ("full", {})))
    merged = found.merge_and_unload()
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    assert apart(logits_of(merged), before) < 1e-5
    assert apart(before, untouched) > 0.01


@pytest.mark.parametrize("stack", [(), (("moe", {"experts": 4, "shared": 1, "granularity": 1}),)], ids=["library", "ours"])
def test_every_expert_gets_a_change_of_rank_r(stack: tuple[tuple[str, dict[str, Any]], ...]) -> None:
    model = "tiny-llama" if stack else "tiny-mixtral"
    found, plain = build(model, *stack, ("lora", SMALL)), build(model, *stack, ("full", {}))
    wake(found)
    before = logits_of(found)
    merged = found.merge_and_unload()
    assert apart(logits_of(merged), before) < 1e-5
    stacks = {name: p for name, p in plain.named_parameters() if ".experts." in name and p.dim() == 3}
    assert len(stacks) == 4
    for name, p in stacks.items():
        change = (merged.get_parameter(name) - p).detach()
        assert set(torch.linalg.matrix_rank(change, rtol=1e-4).tolist()) == {4}, name


# What trains


def expected_names(technique: str, params: dict[str, Any]) -> set[str]:
    """Names of the trained parameters of tiny-llama's two layers, by hand."""
    base, layers = "base_model.model.", [f"model.layers.{i}." for i in (0, 1)]
    inside = [f"self_attn.{n}" for n in LINEARS[:4]] + [f"mlp.{n}" for n in LINEARS[4:]]
    if technique in ADAPTERS:
        wanted = params.get("target_modules") or LINEARS
        parts = ["lora_A.default", "lora_B.default", *(["lora_magnitude_vector.default"] if technique == "dora" else [])]
        adapted = [n for n in inside if n.rpartition(".")[2] in wanted]
        return {f"{base}{at}{n}.{part}.weight" for at in layers for n in adapted for part in parts}
    norms = ["input_layernorm", "post_attention_layernorm"]
    whole = {at: {f"{at}{n}.weight" for n in inside + norms} for at in layers}
    if technique == "full":
        return {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}.union(*whole.values())
    return whole[layers[1]] | ({"model.norm.weight", "lm_head.weight"} if "first" in params else set())


@pytest.mark.parametrize(
    ("technique", "params"),
    [
        *((name, SMALL) for name in ADAPTERS),
        ("lora", {**SMALL, "target_modules": ["q_proj", "v_proj"]}),
        ("dora", {**SMALL, "target_modules": ["down_proj"]}),
        ("freeze", {"first": 1}),
        ("freeze", {"last": 1}),
        ("full", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_only_what_should_train_changes_and_its_states_are_eight_bytes_a_weight(technique: str, params: dict[str, Any]) -> None:
    session = session_of("tiny-llama", (technique, params), weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in session.model.named_parameters()}
    for _ in range(2):  # A has no gradient while B is zero
        session.step()
    changed = {name for name, p in session.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(trained(session.model)) == expected_names(technique, params)
    facts, layout = session.facts(), layout_of("tiny-llama", (technique, params))
    assert facts["params_trainable"] == layout.num_weights(trained_only=True)
    assert facts["trained_layers"] == ([1] if technique == "freeze" else [0, 1])
    assert (facts["decomposition_s"] is not None) == (technique == "pissa")
    moments = [t for state in session.optimizer.state.values() for name, t in state.items() if name != "step"]
    assert sum(t.nbytes for t in moments) == layout.state_bytes * facts["params_trainable"] == 8 * facts["params_trainable"]


MIXTURE = ("moe", {"every": 2, "experts": 16, "shared": 1, "granularity": 4})  # a router of 16 outputs could be adapted


@pytest.mark.parametrize(
    ("model", "stack"),
    [
        ("tiny-mixtral", [("lora", SMALL)]),
        ("tiny-mixtral", [("freeze", {"first": 1})]),
        ("tiny-mixtral", [("dora", {**SMALL, "target_modules": ["q_proj", "o_proj"]}), ("bf16", {})]),
        ("tiny-llama", [MIXTURE, ("lora", SMALL)]),
        ("tiny-llama", [MIXTURE, ("freeze", {"last": 1})]),
        ("tiny-llama", [MIXTURE, ("freeze", {"first": 1})]),
        ("tiny-llama", [("learned_positions", {}), ("freeze", {"first": 1})]),
        ("tiny-llama", [("mla", {"kv_rank": 32}), ("dora", SMALL)]),
        ("tiny-llama", [("rwkv", {}), ("rslora", SMALL)]),
        ("tiny-qwen2", [("gqa", {"groups": 2}), ("freeze", {"first": 1})]),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(name for name, _ in value),
)
def test_the_plan_knows_what_trains_in_other_models(model: str, stack: list[tuple[str, dict[str, Any]]]) -> None:
    session = session_of(model, *stack)
    session.check()
    facts, layout = session.facts(), layout_of(model, *stack)
    assert facts["params_trainable"] == layout.num_weights(trained_only=True)
    assert facts["weight_bytes_by_kind"].get("adapter", 0) == layout.stored_bytes_by_kind().get("adapter", 0)
    routers = [name for name in trained(session.model) if name.split(".")[-2] in ("gate", "router") or ".router." in name]
    assert bool(routers) == (stack[-1][0] == "freeze" and (model == "tiny-mixtral" or MIXTURE in stack)), (
        "adapters leave routers"
    )


@cache
def on_meta(name: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    found = shape(name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(found.model_type, **found.config))


@pytest.mark.parametrize("params", [{"first": 8}, {"last": 2}], ids=["first", "last"])
@pytest.mark.parametrize("name", ["llama-3.2-1b", "deepseek-v2-lite", "gpt-oss-20b", "phi-4", "qwen1.5-moe-a2.7b"])
def test_freezing_a_published_model_leaves_the_weights_that_the_plan_says(name: str, params: dict[str, Any]) -> None:
    technique = registry.technique("freeze")
    model = on_meta(name)
    technique(technique.Params(**params)).trainable(model)
    expected = layout_of(name, ("freeze", params)).num_weights(trained_only=True)
    assert sum(p.numel() for p in trained(model).values()) == expected


FAMILIES = (
    "llama-3.2-1b",
    "phi-4",
    "mixtral-8x7b",
    "olmoe-1b-7b",
    "qwen1.5-moe-a2.7b",
    "qwen3-30b-a3b",
    "deepseek-v2-lite",
    "gpt-oss-20b",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_adapts_in_a_published_model_what_the_plan_says(name: str) -> None:
    """The first layers, up to a mixture of experts where there is one, at full width and without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    found = shape(name)
    layers = int(found.config.get("first_k_dense_replace") or 0) + 1
    config = {**found.config, "num_hidden_layers": layers}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    technique, layout = registry.technique("lora")(), families.layout(found.model_type, config)
    technique.layout(layout)
    with torch.device("meta"):
        model = technique.apply(AutoModelForCausalLM.from_config(AutoConfig.for_model(found.model_type, **config)))
    assert sum(p.numel() for p in trained(model).values()) == layout.num_weights(trained_only=True) > 0
    experts = any(".experts." in name for name in trained(model))
    assert experts == any(w.kind == "experts" for w in layout.weights)


@pytest.mark.parametrize(
    ("name", "count"), [("llama-3.1-8b", 41_943_040), ("mistral-7b-v0.3", 41_943_040), ("qwen2.5-7b", 40_370_176)]
)
def test_rank_16_on_every_linear_layer_has_the_published_number_of_weights(name: str, count: int) -> None:
    """As peft prints it for these models (print_trainable_parameters)."""
    assert layout_of(name, ("lora", {"r": 16})).num_weights(trained_only=True) == count


# Packed weights


def packed_of(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {item.name: item for item in stored(model) if item.kind in ("attention", "feed_forward")}
    return {f"{name}.{i}": t.detach().clone() for name, item in found.items() for i, t in enumerate(item.tensors)}


@pytest.mark.parametrize(
    "stack",
    [
        [("lora", SMALL), ("nf4", {})],
        [("rslora", SMALL), ("fp4", {"double_quant": True})],
        [("lora_plus", {**SMALL, "ratio": 4.0}), ("int8", {})],
        [("dora", SMALL), ("nf4", {"double_quant": True})],
    ],
    ids=lambda stack: "+".join(name for name, _ in stack),
)
def test_training_adapters_on_packed_weights_lowers_the_loss_on_held_out_text(stack: list[tuple[str, dict[str, Any]]]) -> None:
    session = session_of("tiny-llama", *stack, quality_steps=15)
    session.check()
    before = packed_of(session.model)
    assert any(t.dtype in (torch.uint8, torch.int8) for t in before.values())
    session.quality()
    first, last = (session.figures[name] for name in ("validation_loss_before", "validation_loss"))
    print(f"held-out loss {first:.3f} → {last:.3f} nat/token in 15 steps")
    assert last < first - 1.0
    after = packed_of(session.model)
    integers = [name for name, t in before.items() if t.dtype in (torch.uint8, torch.int8) and name in after]
    assert integers and all(torch.equal(before[name], after[name]) for name in integers)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    with builders.mixed_precision(model):
        model(input_ids=some_ids()).logits.float().logsumexp(-1).mean().backward()
    return {name: p.grad.flatten().clone() for name, p in trained(model).items() if p.grad is not None}


@pytest.mark.parametrize(
    ("precision", "allowed"),
    [(("int8", {}), 0.99), (("int8", {"library": "torchao"}), 0.99), (("nf4", {}), 0.7), (("fp4", {}), 0.6)],
    ids=["int8", "int8 of torchao", "nf4", "fp4"],
)
def test_gradients_through_packed_weights_point_where_plain_ones_do(
    precision: tuple[str, dict[str, Any]], allowed: float
) -> None:
    """Of the first layer, whose gradient comes through the second; cosine of each with that of a bf16 base."""
    found, plain = (build("tiny-llama", ("lora", SMALL), p) for p in (precision, ("bf16", {})))
    for model in (found, plain):
        wake(model)
    own, reference = gradients(found), gradients(plain)
    first = [name for name in own if ".layers.0." in name]
    assert len(first) == 14
    worst = min(float(torch.cosine_similarity(own[name], reference[name], dim=0)) for name in first)
    print(f"{precision[0]}: cosine {worst:.3f}")
    assert worst > allowed


@pytest.mark.parametrize("precision", [("nf4", {}), ("fp4", {"double_quant": True})], ids=lambda p: p[0])
def test_a_look_at_held_out_text_leaves_the_gradients_as_they_were(precision: tuple[str, dict[str, Any]]) -> None:
    """bitsandbytes repacks 4-bit weights at a forward in inference mode, on some CPUs into a form that no gradient passes."""
    found = build("tiny-llama", ("lora", SMALL), precision)
    wake(found)
    before = gradients(found)
    with builders.mixed_precision(found.eval()):
        logits_of(found)
    after = gradients(found)
    assert before.keys() == after.keys() == trained(found).keys()
    assert [name for name, gradient in before.items() if not torch.equal(gradient, after[name])] == []


def test_adapters_next_to_packed_experts_train_when_only_linear_layers_are_named() -> None:
    session = session_of("tiny-mixtral", ("lora", {**SMALL, "target_modules": ["q_proj", "v_proj"]}), ("int8", {}))
    session.check()
    session.step()
    assert all("self_attn" in name for name in trained(session.model))


# Refusals, each beside the proof that the library still cannot


def test_the_library_still_fails_on_dora_over_8_bits_from_the_second_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.technique("int8"), "readable", True)
    session = session_of("tiny-llama", ("dora", SMALL), ("int8", {}))
    session.step()
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        session.step()


def test_the_library_still_fails_on_pissa_over_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.technique("pissa"), "reads_weights", "never")
    with pytest.raises(TypeError, match="under float32, float16, or bfloat16"):
        build("tiny-llama", ("pissa", SMALL), ("nf4", {}))


@pytest.mark.parametrize("technique", ["dora", "pissa"])
def test_the_library_still_has_no_such_adapters_for_stacked_experts(technique: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.technique(technique), "reads_weights", "never")
    with pytest.raises((ValueError, AttributeError)):
        build("tiny-mixtral", (technique, SMALL))


@pytest.mark.parametrize(
    ("model", "stack", "words"),
    [
        ("tiny-llama", [("lora", {"r": 129})], ["r is 129", "q_proj is 128 × 128", "up to 128"]),
        ("tiny-mixtral", [("lora", {"r": 65})], ["k_proj is 64 × 128", "up to 64", "target_modules without it"]),
        (
            "tiny-llama",
            [("dora", {"target_modules": ["q_prj"]})],
            ["q_prj matches no layer", "Did you mean: q_proj", "Choose from"],
        ),
        ("tiny-llama", [("lora", {"target_modules": []})], ["no name matches no layer", "Choose from down_proj"]),
        ("tiny-llama", [("lora", {"target_modules": ["experts"]})], ["experts matches no layer"]),
        ("tiny-mixtral", [("lora", {"target_modules": ["gate"]})], ["gate matches no layer", "experts, k_proj"]),
        (
            "tiny-mixtral",
            [("lora", {"lora_dropout": 0.1})],
            ["dropout of 0.1", "lora_dropout 0", "target_modules without experts"],
        ),
        ("tiny-mixtral", [("dora", {})], ["no dora for stacked experts", "[q_proj, v_proj]"]),
        ("tiny-llama", [("moe", {}), ("pissa", {})], ["no pissa for stacked experts", "use lora"]),
        ("tiny-mixtral", [("lora", {}), ("int8", {})], ["experts in int8 are packed", "[q_proj, v_proj]"]),
        ("tiny-llama", [("dora", {}), ("int8", {})], ["reads the frozen weights at every step", "int8", "use nf4, or lora"]),
        ("tiny-llama", [("pissa", {}), ("nf4", {})], ["singular vectors", "nf4 packs them", "16-bit format, or lora"]),
        ("tiny-llama", [("full", {}), ("nf4", {})], ["weights in nf4 take no gradient", "lora"]),
        ("tiny-llama", [("freeze", {"first": 1}), ("int8", {})], ["weights in int8 take no gradient", "lora"]),
        ("tiny-llama", [("freeze", {})], ["first 8 freezes all of the 2", "up to 1"]),
        ("tiny-llama", [("freeze", {"last": 3})], ["2 decoder layers and last is 3", "up to 2"]),
        ("tiny-llama", [("rwkv", {}), ("freeze", {"first": 1})], ["attention-free", "use full"]),
        ("tiny-llama", [("full", {"offload": True})], ["from a GPU to the host", "leave it out"]),
    ],
    ids=lambda value: "+".join(name for name, _ in value) if isinstance(value, list) and isinstance(value[0], tuple) else None,
)
def test_what_cannot_work_is_refused_with_what_would(
    model: str, stack: list[tuple[str, dict[str, Any]]], words: list[str]
) -> None:
    reason = context.refusal(spec_of(model, *stack))
    assert reason is not None
    assert reason.startswith(f"{next(name for name, _ in stack if registry.technique(name).axis == 'peft')}: ")
    assert [word for word in words if word not in reason] == []


@pytest.mark.parametrize("technique", [*ADAPTERS, "freeze", "full"])
def test_inference_has_nothing_to_fine_tune(technique: str) -> None:
    params = registry.technique(technique).small_params
    assert "choose a training workload such as finetune" in str(
        context.refusal(spec_of("tiny-llama", (technique, dict(params)), workload="generate"))
    )


def test_freezing_takes_one_of_its_two_numbers() -> None:
    with pytest.raises(ValueError, match="first or last, not both"):
        registry.technique("freeze").Params(first=1, last=1)


def test_a_method_is_compared_with_lora_of_the_same_rank() -> None:
    spec = spec_of("tiny-llama", ("pissa", {**QUERY, "niter": 4}))
    name, params = next(t for t in builders.stack(spec) if t.name == "pissa").baseline(spec) or ("", {})
    assert name == "lora"
    assert {**params, "target_modules": list(params["target_modules"])} == {**QUERY, "lora_dropout": 0.0}
    assert registry.technique("lora")().baseline(spec) == ("full", {})
    assert registry.technique("freeze")().baseline(spec) == ("full", {})


# AdamW on the host


def some_weights(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    return [nn.Parameter(torch.randn(n, 8, generator=generator).to(dtype)) for n in (3, 5)]


def steps(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> Iterator[None]:
    for step in range(4):
        for i, p in enumerate(weights):
            p.grad = None if step == 2 and i == 0 else torch.full_like(p, 0.1 * (step + 1)) * p.detach().sign()
        optimizer.step()
        optimizer.zero_grad()
        yield


def test_adamw_on_the_host_does_what_torch_s_does_and_keeps_all_fp32_there() -> None:
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    plain, moved, low = some_weights(torch.float32), some_weights(torch.float32), some_weights(torch.bfloat16)
    reference, host = torch.optim.AdamW(plain, **options), HostAdamW(dict.fromkeys(moved, torch.float32), **options)
    for p in low:
        p.data = p.data.float()  # as a session makes them
    rounded = HostAdamW(dict.fromkeys(low, torch.bfloat16), **options)
    for _ in zip(steps(reference, plain), steps(host, moved), steps(rounded, low), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, moved, strict=True))
    assert {p.dtype for p in low} == {torch.bfloat16}
    assert all(apart(a.detach().float(), b.detach()) < 1e-2 for a, b in zip(low, plain, strict=True))
    for optimizer in (host, rounded):
        moments = [t for state in optimizer._adamw.state.values() for name, t in state.items() if name != "step"]
        assert {(t.device.type, t.dtype) for t in moments} == {("cpu", torch.float32)}
        assert sum(t.nbytes for t in moments) == 8 * sum(p.numel() for p in plain)
        assert not optimizer.state, "nothing beside the parameters"


EVERY_EXPERT = ("moe", {"experts": 4, "top_k": 4})  # so that rounding cannot route a token elsewhere and part two trainings


@pytest.mark.parametrize("stack", [(), (EVERY_EXPERT,)], ids=["dense", "with fp32 routers"])
def test_full_fine_tuning_with_its_states_on_the_host_learns_as_without(
    stack: tuple[tuple[str, dict[str, Any]], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.technique("full"), "supports", lambda self, known: YES)  # which asks for a GPU
    plain, moved = (session_of("tiny-llama", *stack, ("full", {"offload": there}), ("bf16", {})) for there in (False, True))
    for session in (plain, moved):
        session.check()
        for _ in range(8):
            session.step()
    assert {p.dtype for p in trained(plain.model).values()} == {torch.float32}
    assert {p.dtype for name, p in trained(moved.model).items() if "router" not in name} == {torch.bfloat16}
    assert {p.dtype for name, p in trained(moved.model).items() if "router" in name} <= {torch.float32}
    assert moved.losses == pytest.approx(plain.losses, rel=0.02)
    assert moved.losses[-1] < moved.losses[0] - 1.0


def test_offloaded_states_are_planned_on_the_host() -> None:
    plain, moved = (layout_of("llama-3.2-1b", ("full", {"offload": offload}), device="cuda") for offload in (False, True))
    assert (plain.state_bytes, moved.state_bytes) == (8.0, 0.0)
    masters, halves = (expected_memory(spec_of("llama-3.2-1b", ("full", {"offload": o}), device="cuda")) for o in (False, True))
    assert masters is not None
    assert halves is not None
    count = 1_235_814_400
    assert masters.weights - halves.weights == pytest.approx(2 * count, rel=1e-3), "fp32 and bf16 weights on the device"
    assert masters.optimizer - halves.optimizer == pytest.approx(8 * count, rel=1e-3)
    known = context.context(spec_of("tiny-llama", ("full", {"offload": True}), ("fp16", {}), device="cuda"))
    answer = registry.technique("full")(registry.technique("full").Params(offload=True)).supports(known)
    assert isinstance(known, Context)
    assert "choose bf16" in answer.reason
