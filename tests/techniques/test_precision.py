"""Number formats: their rounding error, their bytes, what they leave alone, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from effbench import registry
from effbench.models import builders, context
from effbench.models.storage import stored, weight_bytes, weight_bytes_by_kind
from effbench.modules.quantisation import StoredFormat
from effbench.planning import techniques
from effbench.schema import Spec
from tests.factories import resolved

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("int8", {}),
    "int8-torchao": ("int8", {"library": "torchao"}),
    "nf4": ("nf4", {}),
    "nf4-double": ("nf4", {"double_quant": True}),
    "fp4": ("fp4", {}),
    "int4": ("int4", {}),
    "int4-128": ("int4", {"group": 128}),
}
# Relative error of the output of a layer with normally distributed weights: of the 4-bit floats as published, of the integers as
# their step says (the largest of 1,024 weights over 127, the range of a group over 15, each over √12).
ERRORS = {"int8": 0.009, "int8-torchao": 0.008, "nf4": 0.092, "nf4-double": 0.092, "fp4": 0.115, "int4": 0.079, "int4-128": 0.1}


def technique(key: str, **more: Any) -> StoredFormat:
    name, params = FORMATS[key]
    kind: Any = registry.technique(name)
    found: StoredFormat = kind(kind.Params(**params, **more))
    return found


def layer(out: int = 512, into: int = 1024, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    made = nn.Linear(into, out, dtype=dtype)
    nn.init.normal_(made.weight)
    return made


def spec_of(*stack: tuple[str, dict[str, Any]], shape: str = "tiny-llama", workload: str = "generate") -> Spec:
    return replace(resolved(shape, workload=workload), techniques=techniques(stack, "cpu"))


@pytest.mark.parametrize("key", FORMATS)
@torch.inference_mode()
def test_the_output_s_error_is_of_the_published_size(key: str) -> None:
    plain = layer()
    weight, bias = plain.weight.double(), plain.bias.double()
    x = torch.randn(64, 1024, dtype=torch.bfloat16)
    true = x.double() @ weight.T + bias
    block = nn.Sequential(plain)
    technique(key).quantise(block)
    found = block(x).double()
    error = float((found - true).square().mean().sqrt() / true.square().mean().sqrt())
    print(f"{key}: {error:.4f}")
    assert 0.8 * ERRORS[key] < error < 1.2 * ERRORS[key]


def test_the_levels_of_nf4_are_the_published_ones() -> None:
    levels = [
        -1,
        -0.6962,
        -0.5251,
        -0.3949,
        -0.2844,
        -0.1848,
        -0.0911,
        0,
        0.0796,
        0.1609,
        0.2461,
        0.3379,
        0.4407,
        0.5626,
        0.7230,
        1,
    ]
    block = nn.Sequential(layer())
    technique("nf4").quantise(block)
    torch.testing.assert_close(block[0].weight.quant_state.code, torch.tensor(levels, dtype=torch.float32), rtol=0, atol=5e-5)


@pytest.mark.parametrize(("key", "bits"), [("nf4", 4.5), ("nf4-double", 4.127), ("fp4", 4.5), ("int4", 5.0), ("int8", 8.016)])
def test_bits_a_weight_are_those_of_the_format_in_a_large_layer(key: str, bits: float) -> None:
    block = nn.Sequential(layer(2048, 2048).requires_grad_(False))
    block[0].bias = None
    technique(key).quantise(block)
    assert 8 * weight_bytes(block) / 2048**2 == pytest.approx(bits, rel=3e-3)


@pytest.mark.parametrize("key", FORMATS)
def test_bytes_are_the_same_after_the_first_steps_or_fewer(key: str) -> None:
    """bitsandbytes moves what belongs to an 8-bit weight from the parameter into the module's state, and may repack 4-bit ones."""
    block = nn.Sequential(layer().requires_grad_(False)).eval()
    technique(key).quantise(block)
    before = weight_bytes(block)
    with torch.inference_mode():
        for _ in range(2):
            block(torch.randn(4, 1024, dtype=torch.bfloat16))
    after = weight_bytes(block)
    assert 0.9 * before < after <= before
    if key.startswith("int8"):
        assert after == before


@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-mixtral"])
@pytest.mark.parametrize("key", FORMATS)
def test_a_model_is_packed_but_for_what_is_said_to_stay(key: str, shape: str) -> None:
    spec = spec_of(FORMATS[key], shape=shape)
    reason = builders.refusal(spec)
    if reason is not None:
        pytest.skip(reason)
    model = builders.build(spec, trains=False, seed=1, device="cpu").model
    plain = builders.build(spec_of(("bf16", {}), shape=shape), trains=False, seed=1, device="cpu").model
    facts, whole = builders.model_facts(model), weight_bytes_by_kind(plain)
    assert set(facts["unquantised_bytes_by_kind"]) <= {"embedding", "head", "norm", "router"}
    assert sum(facts["weight_bytes_by_kind"].values()) == facts["weight_bytes"] == weight_bytes(model)
    assert facts["params_total"] == builders.params_total(plain)
    for kind in ("attention", "feed_forward", "experts"):
        if kind in whole:
            assert facts["weight_bytes_by_kind"][kind] < 0.6 * whole[kind], kind


@pytest.mark.parametrize("key", ["int8", "nf4"])
def test_packed_weights_are_those_that_the_same_seed_draws_unpacked(key: str) -> None:
    model, plain = (builders.build(spec_of(s), trains=False, seed=5, device="cpu").model for s in (FORMATS[key], ("bf16", {})))
    with torch.inference_mode():
        ids = torch.arange(48).reshape(2, 24)
        one, other = (m(input_ids=ids).logits.float() for m in (model, plain))
    assert float((one - other).square().mean() / other.square().mean()) < 0.3, "close, or it would be about 2"


def test_unlike_kinds_of_tensors_are_found_in_the_names_of_models() -> None:
    model = builders.build(
        spec_of(("moe", {"experts": 4, "shared": 2}), ("bf16", {})), trains=False, seed=1, device="cpu"
    ).model
    kinds = {item.name.rpartition(".layers.")[2]: item.kind for item in stored(model)}
    assert kinds["0.mlp.experts.w_in"] == "experts"
    assert kinds["0.mlp.router.weight"] == "router"
    assert kinds["0.mlp.shared.up_proj.weight"] == "feed_forward"
    assert kinds["0.self_attn.q_proj.weight"] == "attention"
    assert kinds["0.input_layernorm.weight"] == "norm"


REFUSED = [
    ([("nf4", {})], "tiny-llama", "pretrain", "take no gradient; train an adapter"),
    ([("full", {}), ("int8", {})], "tiny-llama", "finetune", "take no gradient; train an adapter"),
    ([("int4", {}), ("lora", {})], "tiny-llama", "finetune", "no backward pass here; fine-tune on nf4"),
    ([("fp8", {})], "tiny-llama", "generate", "capability 8.9"),
    ([("nf4", {})], "tiny-mixtral", "generate", "choose int8 or int4, which have expert kernels"),
    ([("moe", {}), ("fp4", {})], "tiny-llama", "generate", "choose int8 or int4, which have expert kernels"),
    ([("mamba", {}), ("int8", {})], "tiny-llama", "generate", "choose a softmax model"),
    ([("int4", {"group": 256})], "tiny-llama", "generate", "not whole groups of 256"),
    ([("moe", {}), ("expert_kernels", {}), ("int8", {})], "tiny-llama", "generate", "leave expert_kernels out"),
]


@pytest.mark.parametrize(("stack", "shape", "workload", "words"), REFUSED)
def test_what_cannot_be_is_refused_with_what_would_work(stack: Any, shape: str, workload: str, words: str) -> None:
    reason = builders.refusal(spec_of(*stack, shape=shape, workload=workload))
    assert reason is not None
    assert words in reason
    assert ". " not in reason, "one sentence"


def test_a_library_that_is_not_there_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effbench.modules.quantisation.find_spec", lambda name: None)
    for name, library in (("nf4", "bitsandbytes"), ("int4", "torchao")):
        reason = builders.refusal(spec_of((name, {})))
        assert reason == f"{name}: {name} needs {library}, which is not installed; try: pip install 'effbench[quant]'"


def test_the_plan_s_bytes_are_those_of_the_model() -> None:
    for shape in ("tiny-qwen2", "tiny-mixtral"):
        for key in ("int8", "int8-torchao", "int4", "nf4-double"):
            spec = spec_of(FORMATS[key], shape=shape)
            if builders.refusal(spec) is None:
                layout = context.layout(spec)
                assert layout is not None
                built = weight_bytes(builders.build(spec, trains=False, seed=1, device="cpu").model)
                assert layout.stored_bytes() == pytest.approx(built, rel=1e-6)
