"""mha, gqa and mqa as the techniques build them: against float64 loops, against the library, padded, in half precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from effbench.models import builders
from effbench.models.shapes import shape
from effbench.schema import TechniqueRef
from tests.factories import resolved
from tests.modules.grouped_reference import grouped_attention

FAMILIES = ("tiny-llama", "tiny-qwen2", "tiny-mistral")
VARIANTS = (("mha", 8), ("gqa", 4), ("gqa", 2), ("mqa", 1))


def build(family: str, technique: str, groups: int) -> Any:
    spec = resolved(family)
    ref = TechniqueRef(name=technique, axis="attention", params={"groups": groups} if technique == "gqa" else {})
    model = builders.build(replace(spec, techniques=(ref, *spec.techniques)), trains=False, seed=1, device="cpu").model.eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(3))  # qwen2 starts with zeros, which would hide them
    return model


def turned(model: Any, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin in float64: the library computes them in fp32."""
    dim, base = model.config.hidden_size // model.config.num_attention_heads, model.config.rope_parameters["rope_theta"]
    inv = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * inv
    both = torch.cat([angles, angles], dim=-1)[None]
    return both.cos(), both.sin()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("technique", "groups"), VARIANTS)
@pytest.mark.parametrize("length", [1, 7])
def test_forward_and_gradients_are_those_of_the_formulas(family: str, technique: str, groups: int, length: int) -> None:
    model = build(family, technique, groups)
    module: nn.Module = model.model.layers[0].self_attn.double()
    config = model.config
    x = torch.randn(2, length, config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x.requires_grad_()
    out = module(x, position_embeddings=turned(model, length), attention_mask=None)[0]
    dim, base = config.hidden_size // config.num_attention_heads, config.rope_parameters["rope_theta"]
    expected = torch.stack([grouped_attention(module, row, config.num_attention_heads, groups, dim, base) for row in x])
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    wanted = [x, *module.parameters()]
    got, right = (torch.autograd.grad((o * weight).sum(), wanted) for o in (out, expected))
    for one, two in zip(got, right, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)


@torch.inference_mode()
def test_mha_is_gqa_with_all_heads_is_the_library() -> None:
    ids = torch.arange(40).reshape(2, 20)
    found = shape("tiny-llama")
    config = AutoConfig.for_model(found.model_type, **found.config)
    config.dtype = "float32"
    torch.manual_seed(1)
    library = AutoModelForCausalLM.from_config(config).eval()
    one, two = build("tiny-llama", "mha", 8), build("tiny-llama", "gqa", 8)
    assert torch.equal(one(input_ids=ids).logits, two(input_ids=ids).logits)
    library.load_state_dict(one.state_dict())
    torch.testing.assert_close(one(input_ids=ids).logits, library(input_ids=ids).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("technique", "groups"), VARIANTS)
@torch.inference_mode()
def test_a_future_token_changes_nothing_before_it(family: str, technique: str, groups: int) -> None:
    model, ids = build(family, technique, groups), torch.arange(21)[None]
    other = ids.clone()
    other[:, 13] = 200
    one, two = model(input_ids=ids).logits, model(input_ids=other).logits
    torch.testing.assert_close(one[:, :13], two[:, :13], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(one[:, 13], two[:, 13])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("technique", "groups"), VARIANTS)
@torch.inference_mode()
def test_left_padding_changes_nothing(family: str, technique: str, groups: int) -> None:
    model = build(family, technique, groups)
    ids_BT = torch.randint(0, 256, (2, 14), generator=torch.Generator().manual_seed(2))
    real_BT = torch.ones(2, 14, dtype=torch.long)
    real_BT[1, :5] = 0
    places_BT = (real_BT.cumsum(1) - 1).clamp(min=0)
    alone = model(input_ids=ids_BT[1:, 5:], use_cache=False).logits
    whole = model(input_ids=ids_BT, attention_mask=real_BT, position_ids=places_BT, use_cache=False).logits
    torch.testing.assert_close(whole[1:, 5:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("technique", "groups"), VARIANTS)
@torch.inference_mode()
def test_half_precision_stays_near_float64(technique: str, groups: int) -> None:
    """bf16 keeps 8 bits: outputs differ by less than 1 % of their size (root mean square)."""
    model = build("tiny-llama", technique, groups)
    x = torch.randn(2, 33, model.config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    places = turned(model, 33)
    expected = model.model.layers[0].self_attn.double()(x, position_embeddings=places, attention_mask=None)[0]
    half = model.model.layers[0].self_attn.bfloat16()
    out = half(x.bfloat16(), position_embeddings=tuple(p.bfloat16() for p in places), attention_mask=None)[0]
    error = float((out.double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())
    print(f"{technique} {groups}: {error:.4f}")
    assert error < 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_saves_and_loads(family: str, tmp_path: Path) -> None:
    model = build(family, "gqa", 2)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
