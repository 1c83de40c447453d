"""Number formats: their levels, rounding and bytes against definitions written out here, their refusals, their layers in use."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from effbench import hardware, registry
from effbench.layout import Weight
from effbench.models import builders, context
from effbench.models.storage import bits_per_weight, stored, weight_bytes
from effbench.modules import quantisation
from effbench.planning import techniques
from effbench.schema import Spec
from effbench.technique import Technique
from effbench.tensors import TensorTracker
from tests.factories import resolved

FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("int8", {}),
    ("int8", {"threshold": 0.0}),
    ("int8", {"library": "torchao"}),
    ("nf4", {}),
    ("nf4", {"double_quant": True}),
    ("fp4", {}),
    ("int4", {}),
    ("int4", {"group": 128}),
]
ALL = pytest.mark.parametrize(("name", "params"), FORMATS, ids=[f"{n}-{'-'.join(map(str, p.values()))}" for n, p in FORMATS])
WIDE = 256


def technique(name: str, params: dict[str, Any]) -> Technique:
    kind = registry.technique(name)
    return kind(kind.Params.model_validate(params))


def layer(name: str, params: dict[str, Any], out: int = WIDE, wide: int = WIDE, dtype: torch.dtype = torch.float32) -> Any:
    """(the plain weight (out, in), a block whose only layer has it in this format)."""
    plain = nn.Linear(wide, out, dtype=dtype).requires_grad_(False)
    plain.weight.data = torch.randn(out, wide, generator=torch.Generator().manual_seed(1)).to(dtype)
    block = nn.Sequential(plain)
    weight = plain.weight.detach().clone()
    technique(name, params).quantise(block)
    return weight, block.eval()


def read_back(block: Any, wide: int = WIDE) -> torch.Tensor:
    """The weights (out, in) as the layer multiplies them."""
    with torch.inference_mode():
        read: torch.Tensor = (block(torch.eye(wide)) - block[0].bias).T
    return read.clone()


def spec_of(model: str, *stack: tuple[str, dict[str, Any]], workload: str = "generate", device: str = "cpu") -> Spec:
    return replace(resolved(model, workload=workload, device=device), techniques=techniques(stack, device))


# What is stored


def normal_float_levels() -> torch.Tensor:
    """QLoRA, section 3: quantiles of N(0, 1), eight above zero and seven below, zero itself, scaled to end at ±1."""
    edge = 1 - (1 / 30 + 1 / 32) / 2
    halves = [torch.special.ndtri(torch.linspace(edge, 0.5, n, dtype=torch.float64)[:-1]) for n in (9, 8)]
    levels = torch.cat([halves[0], torch.zeros(1, dtype=torch.float64), -halves[1]]).sort().values
    return (levels / levels.max()).float()


def four_bit_float_levels() -> torch.Tensor:
    above = torch.tensor([1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1])
    return torch.cat([-above, torch.zeros(1), above]).sort().values


def test_the_levels_of_nf4_are_the_published_ones() -> None:
    half = [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]
    published = torch.tensor([-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0, *half])
    torch.testing.assert_close(normal_float_levels(), published, rtol=0, atol=6e-5)
    _, block = layer("nf4", {})
    torch.testing.assert_close(block[0].weight.quant_state.code, published, rtol=0, atol=6e-5)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_four_bit_weights_are_the_nearest_level_times_the_largest_of_64(name: str) -> None:
    """In fp32 and after a forward in inference, whatever the library would do on a CPU with matrix units for bf16."""
    levels = normal_float_levels() if name == "nf4" else four_bit_float_levels()
    weight, block = layer(name, {"compute": "fp32"})
    groups = weight.reshape(-1, 64)
    absmax = groups.abs().amax(dim=1, keepdim=True)
    nearest = levels[(groups / absmax).unsqueeze(-1).sub(levels).abs().argmin(-1)] * absmax
    read = read_back(block)
    assert len(torch.unique((read.reshape(-1, 64) / absmax).mul(1e4).round())) == len(levels), "every level is used"
    torch.testing.assert_close(read, nearest.reshape(weight.shape), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_weights_are_the_nearest_of_sixteen_even_steps_between_the_ends_of_their_group(group: int) -> None:
    weight, block = layer("int4", {"compute": "fp32", "group": group})
    groups = weight.reshape(-1, group)
    low, high = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
    step = (high - low) / 15
    nearest = low + step * ((groups - low) / step).round()
    off = (read_back(block).reshape(-1, group) - nearest).abs() / step
    assert float(off.max()) < 1.001, "a weight half way between two steps may go to either"
    assert float((off > 0.01).float().mean()) < 1e-3


def test_int8_weights_are_whole_steps_of_the_largest_of_their_output() -> None:
    for params in ({}, {"library": "torchao"}):
        weight, block = layer("int8", {"compute": "fp32", **params})
        step = weight.abs().amax(dim=1, keepdim=True) / 127
        off = (read_back(block) - weight).abs() / step
        assert 0.4 < float(off.max()) < 0.55, params


def test_llm_int8_multiplies_rounded_activations_but_for_the_large_ones() -> None:
    """Section 3 of the paper: x in 8 bits with a scale for each token; columns with a value above the threshold apart."""
    weight, block = layer("int8", {"compute": "fp32"})
    x = torch.randn(8, WIDE, generator=torch.Generator().manual_seed(2))
    x[3, 10], x[5, 77] = 40.0, -60.0
    outlier = (x.abs() >= 6).any(dim=0)

    def rounded(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = values.abs().amax(dim=1, keepdim=True) / 127
        return (values / scale).round(), scale

    (w_q, w_s), (x_q, x_s) = rounded(weight), rounded(torch.where(x.abs() >= 6, 0, x))
    expected = x_q.masked_fill(outlier, 0) @ w_q.T * x_s * w_s.T + x[:, outlier] @ (w_q * w_s)[:, outlier].T
    with torch.inference_mode():
        y = block(x) - block[0].bias
        plain = layer("int8", {"compute": "fp32", "threshold": 0.0})[1](x) - block[0].bias
    true = x @ weight.T
    assert float((y - expected).norm() / expected.norm()) < 2e-3, "its fp16 casts"
    assert float((y - true).norm() / true.norm()) < 0.012 < float((plain - true).norm() / true.norm())


# Relative error of the output of a layer with normally distributed weights: of the 4-bit floats as published, of the integers as
# their step says (the largest of 1,024 weights over 127, the range of a group over 15, each over √12; LLM.int8() rounds x as well).
ERRORS = {
    "int8": 0.011, "int8-torchao": 0.008, "nf4": 0.092, "nf4-True": 0.092, "fp4": 0.115, "int4": 0.079, "int4-128": 0.1,
}  # fmt: skip


@pytest.mark.parametrize(("key", "published"), ERRORS.items())
def test_rounding_is_of_the_published_size(key: str, published: float) -> None:
    name, params = next(f for f in FORMATS if "-".join([f[0], *map(str, f[1].values())]) == key)
    weight, block = layer(name, params, 512, 1024, torch.bfloat16)
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(3)).bfloat16()
    with torch.inference_mode():
        y, true = (block(x) - block[0].bias).float(), x.float() @ weight.float().T
    error = float((y - true).norm() / true.norm())
    print(f"{key}: {error:.4f}, published {published}")
    assert 0.8 * published < error < 1.25 * published


@pytest.mark.parametrize(
    ("name", "params", "bits"),
    [
        ("nf4", {}, 4.5),
        ("fp4", {}, 4.5),
        ("nf4", {"double_quant": True}, 4 + 8 / 64 + 32 / 64 / 256),
        ("int8", {}, 8 + 32 / 1024),
        ("int8", {"library": "torchao"}, 8 + 40 / 1024),
        ("int4", {}, 5.0),
        ("int4", {"group": 128}, 4.25),
        ("int4", {"compute": "fp32"}, 6.0),
    ],
)
def test_bits_a_weight_are_those_of_the_format(name: str, params: dict[str, Any], bits: float) -> None:
    dtype = getattr(torch, quantisation.DTYPES[params.get("compute", "bf16")])
    _, block = layer(name, params, 1024, 1024, dtype)
    matrix = next(item.nbytes for item in stored(block) if item.name.endswith("weight"))
    of_books = 8 * 4 * (16 + (257 if params.get("double_quant") else 0)) / 1024**2 if name in ("nf4", "fp4") else 0.0
    assert 8 * matrix / 1024**2 == pytest.approx(bits + of_books, rel=1e-6)
    said = technique(name, params).bits(Weight(path="a.b.weight", kind="attention", shape=(1024, 1024)), dtype.itemsize)  # type: ignore[attr-defined]
    assert said == pytest.approx(bits + of_books, rel=1e-6)
    assert sum(item.num_weights for item in stored(block)) == 1024**2 + 1024, "packed weights count as what they stand for"


@ALL
def test_counted_bytes_are_those_that_stay_alive(name: str, params: dict[str, Any]) -> None:
    """Of all tensors that a block leaves behind, seen from outside: when it is packed, and when it has run."""
    layer(name, params, dtype=torch.bfloat16)[1](torch.zeros(2, WIDE, dtype=torch.bfloat16))  # tables that a library keeps
    with TensorTracker() as alive:
        block = layer(name, params, dtype=torch.bfloat16)[1]
        gc.collect()
        assert alive.now_bytes == weight_bytes(block)
        for _ in range(2):
            with torch.inference_mode():
                block(torch.ones(3, WIDE, dtype=torch.bfloat16))
            gc.collect()
            assert alive.now_bytes == weight_bytes(block)
    assert bits_per_weight(block) == 8 * weight_bytes(block) / (WIDE * WIDE + WIDE)


# Layers in use


@ALL
@pytest.mark.parametrize("shape", [(16, 128), (48, 128), (64, 256)])
def test_layers_of_any_width_run_on_inputs_of_any_number_of_dimensions(
    name: str, params: dict[str, Any], shape: tuple[int, int]
) -> None:
    weight, block = layer(name, params, *shape, torch.bfloat16)
    x = torch.randn(2, 3, 5, shape[1], generator=torch.Generator().manual_seed(4)).bfloat16()
    with torch.inference_mode():
        y, true = (block(x) - block[0].bias).float(), x.float() @ weight.float().T
        one = (block(x[:1, :1, :1]) - block[0].bias).float()
    assert y.shape == (2, 3, 5, shape[0])
    assert float((y - true).norm() / true.norm()) < 0.15
    torch.testing.assert_close(one, y[:1, :1, :1], rtol=0.05, atol=0.05 * float(true.std()))


@pytest.mark.parametrize("shape", [(38, 64), (64, 24), (100, 100), (17, 128)])
def test_formats_without_groups_take_odd_widths(shape: tuple[int, int]) -> None:
    for name, params in FORMATS[:6]:
        weight, block = layer(name, params, *shape, torch.bfloat16)
        x = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(4)).bfloat16()
        with torch.inference_mode():
            y, true = (block(x) - block[0].bias).float(), x.float() @ weight.float().T
        assert float((y - true).norm() / true.norm()) < 0.2, (name, params)


NSA = ("nsa", {"groups": 2, "block": 8, "stride": 4, "select_block": 16, "num_selected": 4, "window": 32})


@pytest.mark.parametrize(
    ("name", "params", "allowed"),
    [("int8", {}, 0.3), ("int8", {"library": "torchao"}, 1e-5), ("nf4", {}, 1e-5), ("int4", {}, 1e-5)],
)
@pytest.mark.parametrize(
    "other", [("mla", {"q_rank": 64, "kv_rank": 32}), NSA, ("mqa", {}), ("moe", {"shared": 1, "granularity": 1})]
)
def test_decoding_is_the_full_forward_in_every_stack(
    name: str, params: dict[str, Any], allowed: float, other: tuple[str, dict[str, Any]]
) -> None:
    """In fp32, where the choice of experts does not turn on a last bit; 8-bit activations round to other steps."""
    spec = spec_of("tiny-llama", other, (name, {"compute": "fp32", **params}))
    reason = builders.refusal(spec)
    if reason:
        assert "whole groups" in reason or "whole tiles" in reason or "stacked weights" in reason
        return
    model = builders.build(spec, trains=False, seed=1, device="cpu").model
    assert builders.weight_bytes(model) == context.layout(spec).stored_bytes()  # type: ignore[union-attr]
    ids_BT = torch.randint(0, 256, (2, 44), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        full_BTV = model(input_ids=ids_BT, use_cache=False).logits
        out = model(input_ids=ids_BT[:, :40], use_cache=True)
        parts = [out.logits]
        for at in range(40, 44):
            out = model(input_ids=ids_BT[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
    assert float((torch.cat(parts, dim=1) - full_BTV).abs().max() / full_BTV.std()) < allowed


# Refusals


@pytest.mark.parametrize(
    ("model", "workload", "stack", "words"),
    [
        ("tiny-llama", "pretrain", [("nf4", {})], "weights in nf4 take no gradient; train an adapter on them, such as lora"),
        ("tiny-llama", "finetune", [("full", {}), ("int8", {})], "full: weights in int8 take no gradient; train an adapter"),
        ("tiny-llama", "finetune", [("lora", {}), ("int4", {})], "no backward pass here; fine-tune on nf4"),
        ("tiny-llama", "generate", [("int4", {"group": 256})], "self_attn.q_proj has 128 inputs, which are not whole groups of 256"),
        ("tiny-llama", "generate", [("mla", {"q_rank": 64, "kv_rank": 32}), ("int4", {})], "whole tiles of 16"),
        ("tiny-llama", "generate", [NSA, ("int4", {})], "self_attn.gate_proj.0 has 24 outputs, and torchao packs whole tiles of 16"),
        ("tiny-llama", "generate", [("moe", {}), ("nf4", {})], "choose int8 or int4, which have expert kernels"),
        ("tiny-mixtral", "generate", [("fp4", {})], "choose int8 or int4, which have expert kernels"),
        ("tiny-llama", "generate", [("moe", {}), ("int8", {}), ("expert_kernels", {})], "leave expert_kernels out"),
        ("tiny-llama", "generate", [("mamba", {}), ("nf4", {})], "choose a softmax model"),
        ("tiny-llama", "generate", [("fp8", {})], "compute capability 8.9"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_do_is_refused_with_what_would_work(
    model: str, workload: str, stack: list[tuple[str, dict[str, Any]]], words: str
) -> None:
    reason = str(builders.refusal(spec_of(model, *stack, workload=workload)))
    assert words in reason
    assert ". " not in reason, "one sentence"


def test_a_model_whose_tensors_are_not_known_is_refused() -> None:
    known = builders.context(spec_of("tiny-llama", ("nf4", {})))
    answer = technique("nf4", {}).supports(replace(known, model_type="t5", layout=None))
    assert "'t5' are not known" in answer.reason


@pytest.mark.parametrize(("name", "library"), [("int8", "bitsandbytes"), ("nf4", "bitsandbytes"), ("int4", "torchao")])
def test_a_missing_library_is_named_with_the_line_that_installs_it(
    name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantisation, "find_spec", lambda library: None)
    reason = builders.refusal(spec_of("tiny-llama", (name, {})))
    assert reason == f"{name}: {name} needs {library}, which is not installed; try: pip install 'effbench[quant]'"


def test_fp8_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of("tiny-llama", ("fp8", {}), device="cuda")
    for gpu, fits in (("NVIDIA A100-SXM4-40GB", False), ("NVIDIA H100 80GB HBM3", True), ("NVIDIA L4", True)):
        monkeypatch.setattr(hardware, "_driver_gpu_name", lambda gpu=gpu: gpu)
        reason = builders.refusal(spec)
        assert (reason is None) == fits
        assert fits or "8.9" in str(reason)
    training = spec_of("tiny-llama", ("lora", {}), ("fp8", {}), workload="finetune", device="cuda")
    assert "fine-tune on nf4 or int8" in str(builders.refusal(training))


def test_int4_on_a_gpu_computes_in_bf16() -> None:
    spec = spec_of("tiny-llama", ("int4", {"compute": "fp16"}), device="cuda")
    assert "compute in bf16 on CUDA" in str(builders.refusal(spec))


def test_nominal_bits_are_those_of_the_name() -> None:
    for name, bits in {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "fp8": 8, "nf4": 4, "fp4": 4, "int4": 4}.items():
        assert registry.technique(name).nominal_bits == bits
    assert {name for name in registry.entries("technique") if registry.technique(name).quantised} == {
        "int8", "fp8", "nf4", "fp4", "int4",
    }  # fmt: skip
