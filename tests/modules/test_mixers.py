"""Attention-free mixers: as large as the transformer they stand for, causal, cached, trainable, and free of known traps."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch.nn import functional as F
from transformers import RwkvForCausalLM
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

from effbench.errors import ModelError
from effbench.models.shapes import shape, shape_names
from effbench.modules.mixer_costs import TOLERANCE, mamba_size, rwkv_size, transformer_parameters
from effbench.modules.mixers import CHUNK, MAMBA_CHUNK, wkv
from effbench.surgery import GROUPED_FAMILIES
from effbench.technique import Context, Technique
from effbench.techniques.mamba import Mamba, MambaParams
from effbench.techniques.rwkv import RWKV
from effbench.workloads._decode import EagerEngine, cache_bytes, can_be_fixed

KINDS: tuple[type[Technique], ...] = (Mamba, RWKV)
EACH = [pytest.param(kind, id=kind.name) for kind in KINDS]
SMALL = ("tiny-llama", "tiny-qwen2", "tiny-mistral", "small-llama")


def context(name: str = "tiny-llama", **changes: Any) -> Context:
    found = shape(name)
    plain = Context(config=found.config, model_type=found.model_type, device="cpu", trains=False, weights="random")
    return replace(plain, **changes)


def built(kind: type[Technique], name: str = "tiny-llama", *, seed: int = 1, dtype: str = "float32", **changes: Any) -> Any:
    torch.manual_seed(seed)
    technique = kind()
    config = SimpleNamespace()
    technique.configure(config)  # type: ignore[arg-type]
    config.dtype = dtype  # a precision technique comes after
    return technique.load(context(name, **changes)).eval()  # type: ignore[union-attr]


@cache
def shared(kind: type[Technique], name: str = "tiny-llama") -> Any:
    """A model that tests only read."""
    return built(kind, name)


def some_bytes(num_rows: int = 2, length: int = 24, seed: int = 7) -> torch.Tensor:
    return torch.randint(0, 256, (num_rows, length), generator=torch.Generator().manual_seed(seed))


def weights_of(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in shape_names() if shape(name).model_type in GROUPED_FAMILIES])
def test_transformer_parameters_are_those_of_the_catalogue(name: str) -> None:
    found = shape(name)
    assert transformer_parameters(found.model_type, found.config) == found.num_parameters


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("name", SMALL)
def test_small_shapes_are_met_within_the_tolerance(kind: type[Technique], name: str) -> None:
    model = shared(kind, name)
    ratio = weights_of(model) / shape(name).num_parameters
    print(f"{kind.name} {name}: {ratio:.4f} with {model.config.num_hidden_layers} layers")
    assert abs(ratio - 1) <= TOLERANCE
    assert model.parameter_ratio == pytest.approx(ratio)
    assert model.config.hidden_size == shape(name).config["hidden_size"]
    assert model.config.vocab_size == shape(name).config["vocab_size"]
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == shape(name).config["tie_word_embeddings"]


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-1.5b"])
def test_published_shapes_are_met_within_the_tolerance(kind: type[Technique], name: str) -> None:
    model = built(kind, name, device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    ratio = weights_of(model) / shape(name).num_parameters
    print(f"{kind.name} {name}: {ratio:.4f} with {model.config.num_hidden_layers} layers")
    assert abs(ratio - 1) <= TOLERANCE
    assert model.parameter_ratio == pytest.approx(ratio)


@pytest.mark.parametrize("name", [name for name in shape_names() if shape(name).model_type in GROUPED_FAMILIES])
def test_every_shape_of_the_catalogue_has_its_mixers(name: str) -> None:
    for kind in KINDS:
        assert kind().supports(context(name)).ok
    if shape(name).is_published:
        assert mamba_size(context(name), state=128, expand=2).state == 128, "whole layers are fine enough at these sizes"


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("name", SMALL[:3])
def test_forward_is_finite_and_of_the_right_shape(kind: type[Technique], name: str) -> None:
    ids_BT = some_bytes()
    with torch.inference_mode():
        logits_BTV = shared(kind, name)(input_ids=ids_BT, use_cache=False).logits
    assert logits_BTV.shape == (2, 24, 256)
    assert bool(torch.isfinite(logits_BTV).all())


@pytest.mark.parametrize("kind", EACH)
def test_training_lowers_the_loss(kind: type[Technique]) -> None:
    model, ids_BT, losses = built(kind, trains=True).train(), some_bytes(4, 33), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(4):
        out = model(input_ids=ids_BT[:, :-1])
        assert out.past_key_values is None, "training keeps no cache"
        loss = F.cross_entropy(out.logits.flatten(0, 1), ids_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("kind", EACH)
def test_training_works_in_mixed_precision_and_with_recomputation(kind: type[Technique]) -> None:
    ids_BT, norms = some_bytes(2, 20), []
    for recompute, half in ((False, False), (True, False), (False, True)):
        model = built(kind, trains=True).train()
        if recompute:
            model.activation_checkpointing_enable()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            logits = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.float().flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(norms[1], norms[0])
    assert float((norms[2] - norms[0]).norm() / norms[0].norm()) < 0.1


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("prompt", [1, 3, MAMBA_CHUNK + 3])
def test_cached_decode_is_the_full_forward(kind: type[Technique], prompt: int) -> None:
    """Rows of a batch must not meet, which the library's RWKV lets them; tokens come alone and several at once."""
    model, ids_BT = shared(kind), some_bytes(3, prompt + 2 * CHUNK)
    with torch.inference_mode():
        full_BTV = model(input_ids=ids_BT, use_cache=False).logits
        out = model(input_ids=ids_BT[:, :prompt], use_cache=True)
        parts, start = [out.logits], prompt
        for length in (1, 1, CHUNK + 1, 1, CHUNK - 4):
            out = model(input_ids=ids_BT[:, start : start + length], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
            start += length
    assert start == ids_BT.shape[1]
    torch.testing.assert_close(torch.cat(parts, dim=1), full_BTV, rtol=0, atol=3e-5 * float(full_BTV.std()) + 1e-6)


@pytest.mark.parametrize("kind", EACH)
def test_generate_engine_runs_it_and_counts_its_state(kind: type[Technique]) -> None:
    model, ids_BT = shared(kind), some_bytes(2, 16)
    engine = EagerEngine(model)
    with torch.inference_mode():
        tokens = engine.generate(ids_BT, 6, lambda: None)
        logits = model(input_ids=torch.cat([ids_BT, tokens], dim=1), use_cache=False).logits
        assert torch.equal(logits[:, 15:-1].argmax(-1), tokens)
        assert not can_be_fixed(model, ids_BT), "no preallocated key-value cache holds this state"
    layers, cost = model.config.num_hidden_layers, model.layer_cost
    assert cache_bytes(engine.cache) == 2 * layers * cost.cache_elements(22) * 4 == 2 * layers * cost.cache_bytes(22, 4)


@pytest.mark.parametrize("kind", EACH)
def test_state_bytes_in_half_precision_are_those_of_the_cost(kind: type[Technique]) -> None:
    model = built(kind, dtype="bfloat16")
    with torch.inference_mode():
        out = model(input_ids=some_bytes(3, 9), use_cache=True)
    assert model.config.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert bool(torch.isfinite(out.logits).all())
    assert cache_bytes(out.past_key_values) == 3 * model.config.num_hidden_layers * model.layer_cost.cache_bytes(9, 2)


@pytest.mark.parametrize("kind", EACH)
def test_half_precision_decode_stays_near_the_full_forward(kind: type[Technique]) -> None:
    model, ids_BT = built(kind, dtype="bfloat16"), some_bytes(2, 20)
    with torch.inference_mode():
        full = model(input_ids=ids_BT, use_cache=False).logits.float()
        out = model(input_ids=ids_BT[:, :16], use_cache=True)
        parts = [out.logits.float()]
        for t in range(16, 20):
            out = model(input_ids=ids_BT[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits.float())
    assert float((torch.cat(parts, dim=1) - full).abs().max() / full.std()) < 0.05


@pytest.mark.parametrize("kind", EACH)
def test_a_future_token_changes_nothing_before_it(kind: type[Technique]) -> None:
    model, ids_BT = shared(kind), some_bytes()
    other_BT = ids_BT.clone()
    other_BT[:, 13] = (other_BT[:, 13] + 1) % 256
    with torch.inference_mode():
        one, two = (model(input_ids=ids, use_cache=False).logits for ids in (ids_BT, other_BT))
    torch.testing.assert_close(one[:, :13], two[:, :13], rtol=0, atol=1e-6)
    assert not torch.allclose(one[:, 14:], two[:, 14:], atol=1e-5)


@pytest.mark.parametrize("kind", EACH)
def test_seed_decides_the_weights(kind: type[Technique]) -> None:
    one, same, other = (built(kind, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", EACH)
def test_turning_to_evaluation_and_back_changes_nothing(kind: type[Technique]) -> None:
    """RWKV of the library divides weights by powers of two in evaluation, from six layers on."""
    model, ids_BT = built(kind, "small-llama"), some_bytes(1, 12)
    assert model.config.num_hidden_layers >= 6
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        train, evaluated, again = (model.train(mode)(input_ids=ids_BT, use_cache=False).logits for mode in (True, False, True))
    assert torch.equal(train, evaluated)
    assert torch.equal(train, again)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", EACH)
def test_weights_are_saved_and_loaded(kind: type[Technique], tmp_path: Path) -> None:
    ids_BT = some_bytes()
    for name in ("tiny-llama", "tiny-qwen2"):
        model, other = shared(kind, name), built(kind, name, seed=2)
        save_model(model, str(tmp_path / "model.safetensors"))
        load_model(other, str(tmp_path / "model.safetensors"))
        with torch.inference_mode():
            assert torch.equal(model(input_ids=ids_BT).logits, other(input_ids=ids_BT).logits)
            assert torch.equal(copy.deepcopy(model)(input_ids=ids_BT).logits, other(input_ids=ids_BT).logits)


@pytest.mark.parametrize("kind", EACH)
def test_arguments_of_other_models_are_taken(kind: type[Technique]) -> None:
    model, ids_BT = shared(kind), some_bytes()
    with torch.inference_mode():
        full = model(input_ids=ids_BT).logits
        last = model(
            input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), position_ids=torch.arange(24)[None], logits_to_keep=1
        )
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids_BT)).logits
    torch.testing.assert_close(last.logits, full[:, -1:])
    torch.testing.assert_close(embedded, full)


def test_a_left_padded_row_of_mamba_is_the_row_alone() -> None:
    model, ids_BT = shared(Mamba), some_bytes()
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :5] = 0
    with torch.inference_mode():
        padded = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
        alone = model(input_ids=ids_BT[:1, 5:], use_cache=False).logits
    torch.testing.assert_close(padded[:1, 5:], alone, rtol=0, atol=1e-5)


def test_padding_of_rwkv_is_refused_and_not_read() -> None:
    mask_BT = torch.ones(2, 24, dtype=torch.long)
    mask_BT[0, 0] = 0
    with pytest.raises(ModelError, match="padding"):
        shared(RWKV)(input_ids=some_bytes(), attention_mask=mask_BT)


def test_a_tied_table_of_rwkv_starts_as_an_output_head() -> None:
    tied, head = shared(RWKV, "tiny-qwen2").get_output_embeddings().weight, shared(RWKV, "tiny-llama").head.weight
    assert tied.shape == head.shape
    assert tied.std().item() == pytest.approx(head.std().item(), rel=0.05)


def test_rwkv_is_the_librarys_where_that_is_right() -> None:
    """Same weights, full forward: same logits; the library names the weights."""
    ours, ids_BT = shared(RWKV), some_bytes()
    theirs = RwkvForCausalLM(copy.deepcopy(ours.config)).eval()
    theirs.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        expected = theirs(input_ids=ids_BT, use_cache=False).logits
        torch.testing.assert_close(ours(input_ids=ids_BT, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, 3 * CHUNK + 2])
@pytest.mark.parametrize("with_state", [False, True])
def test_wkv_in_chunks_is_the_librarys_loop(length: int, with_state: bool) -> None:
    """Values, gradients and the state that is left; keys large enough to overflow without the running maximum."""
    generator, B, E = torch.Generator().manual_seed(5), 2, 6

    def draw(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * scale).requires_grad_()

    inputs = [draw(E), draw(E), draw(B, length, E, scale=40.0), draw(B, length, E)]
    state = (draw(B, E), draw(B, E).abs() + 1, draw(B, E, scale=10.0)) if with_state else None
    found, after = wkv(*inputs, state)
    expected, kept = rwkv_linear_attention_cpu(*inputs, state=state, return_state=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for (num, den, top), (num2, den2, top2) in [(after, kept)]:
        torch.testing.assert_close(top, top2, rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(num / den, num2 / den2, rtol=1e-4, atol=1e-4)
    one, two = (torch.autograd.grad(out.square().sum(), inputs, allow_unused=True) for out in (found, expected))
    for a, b in zip(one, two, strict=True):
        if b is not None:  # one token does not decay
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_costs_do_not_grow_with_the_position() -> None:
    for kind in KINDS:
        cost = shared(kind).layer_cost
        assert cost.score_flops(1) == cost.score_flops(10**6, decode=True) > 0
        assert cost.cache_elements(1) == cost.read_elements(10**6) > 0
        plan = kind().cost(context())
        assert plan is not None and plan.source
        layers, of_shape = shared(kind).config.num_hidden_layers, shape("tiny-llama").config["num_hidden_layers"]
        assert plan.flops_per_token * of_shape == pytest.approx((cost.projection_flops() + cost.score_flops(0)) * layers)
        generation = kind().cost(context(params={"prompt_tokens": 60, "new_tokens": 5}))
        assert generation is not None
        assert generation.decode_read_elements == pytest.approx(cost.read_elements(64) * layers / of_shape)
        assert generation.cache_elements_per_token == pytest.approx(cost.cache_elements(64) * layers / of_shape / 64)


def test_projection_flops_are_the_matrices_of_a_layer() -> None:
    mamba, rwkv = shared(Mamba).backbone.layers[0].mixer, shared(RWKV).rwkv.blocks[0].attention
    matrices = (mamba.in_proj, mamba.out_proj, mamba.conv1d)
    assert shared(Mamba).layer_cost.projection_flops() == 2 * sum(m.weight.numel() for m in matrices)
    linear = (rwkv.key, rwkv.value, rwkv.receptance, rwkv.output)
    assert shared(RWKV).layer_cost.projection_flops() == 2 * sum(m.weight.numel() for m in linear)


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"weights": "hub"}, "hub"),
        ({"weights": "path"}, "random"),
        ({"stack": ("gqa",)}, "gqa"),
    ],
)
def test_what_cannot_work_is_refused_with_the_value(kind: type[Technique], changes: dict[str, Any], says: str) -> None:
    changes = {**changes, "stack": (*changes.get("stack", ()), kind.name)}
    answer = kind().supports(context(**changes))
    assert not answer.ok
    assert says in answer.reason


def test_adapters_are_refused_where_they_do_not_fit() -> None:
    assert "lora" in Mamba().supports(context(stack=("mamba", "lora"))).reason
    assert Mamba().supports(context(stack=("mamba", "full", "bf16"))).ok
    assert RWKV().supports(context(stack=("rwkv", "lora", "bf16"))).ok


def test_lora_runs_on_rwkv_and_peft_refuses_mamba() -> None:
    from effbench.techniques.lora import LoRA

    model, ids_BT = LoRA().apply(built(RWKV)), some_bytes(2, 9)
    model(input_ids=ids_BT, use_cache=False).logits.sum().backward()
    assert any(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
    with pytest.raises(ValueError, match="out_proj"):
        LoRA().apply(built(Mamba))


def test_shapes_that_cannot_be_met_are_refused() -> None:
    flat = {**shape("tiny-llama").config, "num_hidden_layers": 1}
    assert "1" in RWKV().supports(context(config=flat)).reason
    narrow = {**shape("tiny-llama").config, "intermediate_size": 16}
    assert "parameters" in RWKV().supports(context(config=narrow)).reason
    wide = Mamba(MambaParams(expand=8, state_size=1024))
    assert "parameters" in wide.supports(context(config=flat)).reason


@pytest.mark.parametrize("kind", EACH)
def test_baseline_is_the_shape_with_attention(kind: type[Technique]) -> None:
    assert kind().baseline(None) is None  # type: ignore[arg-type]
    assert not kind().is_reference


def test_sizes_keep_the_width_and_rwkv_the_depth() -> None:
    for name in shape_names():
        config = shape(name).config
        size = rwkv_size(context(name))
        assert (size.hidden, size.layers) == (config["hidden_size"], config["num_hidden_layers"])
        assert mamba_size(context(name), state=128, expand=2).hidden == config["hidden_size"]


def test_declarations_load_no_torch() -> None:
    program = (
        "import sys\n"
        "from effbench.techniques import mamba, rwkv\n"
        "from effbench.models.shapes import shape\n"
        "from effbench.technique import Context\n"
        "s = shape('tiny-llama')\n"
        "c = Context(config=s.config, model_type=s.model_type, device='cpu', trains=True, weights='random')\n"
        "assert all(t().supports(c).ok and t().cost(c) for t in (mamba.Mamba, rwkv.RWKV))\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
