"""Converting attention to another number of key/value heads, and replacing submodules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from effbench import surgery
from effbench.costs import SoftmaxCost
from effbench.models.shapes import shape
from effbench.technique import Context

FAMILIES = ("tiny-llama", "tiny-qwen2", "tiny-mistral")


def tiny(name: str, groups: int) -> PreTrainedModel:
    found = shape(name)
    torch.manual_seed(0)
    config = AutoConfig.for_model(found.model_type, **{**found.config, "num_key_value_heads": groups})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.1)  # qwen2 initialises biases to zero, which would hide them
    return model


def converted(model: PreTrainedModel, name: str, groups: int) -> PreTrainedModel:
    target = tiny(name, groups)
    target.load_state_dict(surgery.convert_key_value_heads(model.state_dict(), model.config.to_dict(), groups))
    return target


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids_BT = torch.arange(60).reshape(2, 30)
    with torch.inference_mode():
        return model(input_ids=ids_BT).logits


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("native", "wanted"), [(1, 8), (2, 8), (4, 8), (2, 4), (1, 2)])
def test_repeating_heads_computes_the_same_function(name: str, native: int, wanted: int) -> None:
    model = tiny(name, native)
    torch.testing.assert_close(logits(converted(model, name, wanted)), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_pooling_undoes_repeating_exactly(name: str) -> None:
    model = tiny(name, 2)
    there = surgery.convert_key_value_heads(model.state_dict(), model.config.to_dict(), 8)
    back = surgery.convert_key_value_heads(there, {**model.config.to_dict(), "num_key_value_heads": 8}, 2)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())


def test_pooling_takes_the_mean_of_neighbouring_heads() -> None:
    config = {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 8}  # D = 2
    weight = torch.arange(8.0)[:, None].expand(8, 8)  # row r holds r; head h has rows 2h, 2h + 1
    state = {"layers.0.self_attn.k_proj.weight": weight, "layers.0.self_attn.q_proj.weight": weight}
    pooled = surgery.convert_key_value_heads(state, config, 2)
    assert pooled["layers.0.self_attn.k_proj.weight"][:, 0].tolist() == [1.0, 2.0, 5.0, 6.0]
    assert pooled["layers.0.self_attn.q_proj.weight"] is weight


def test_pooling_half_precision_keeps_its_dtype() -> None:
    model = tiny("tiny-llama", 8).bfloat16()
    state = surgery.convert_key_value_heads(model.state_dict(), model.config.to_dict(), 1)
    assert {t.dtype for t in state.values()} == {torch.bfloat16}


def context(weights: str = "random", model_type: str = "llama", **config: Any) -> Context:
    values = {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 896, **config}
    return Context(config=values, model_type=model_type, device="cpu", trains=False, weights=weights)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("where", "groups", "reason"),
    [
        (context(), 4, "14 query heads cannot share 4 key/value heads evenly; choose groups from 1, 2, 7, 14"),
        (context(), 28, "choose groups from 1, 2, 7, 14"),
        (context(model_type="gpt2"), 1, "the key/value heads of model type 'gpt2' are not changed"),
        (context("path", "phi3"), 7, "loaded phi3 weights are not converted"),
        (context("hub", num_attention_heads=12, num_key_value_heads=4), 6, "convert only to a multiple or a divisor, not 6"),
    ],
)
def test_impossible_heads_are_refused_with_what_would_work(where: Context, groups: int, reason: str) -> None:
    answer = surgery.supports_key_value_heads(where, groups)
    assert not answer.ok
    assert reason in answer.reason


def test_possible_heads_are_accepted() -> None:
    assert surgery.supports_key_value_heads(context(), 7).ok
    assert surgery.supports_key_value_heads(context("path"), 14).ok
    assert surgery.supports_key_value_heads(context("path", "phi3"), 2).ok, "nothing to convert"


def test_cost_of_attention_is_that_of_the_worked_example() -> None:
    """32 heads of 128, 32 layers, bf16: 524,288 bytes a token for MHA, 131,072 for GQA-8, 16,384 for MQA."""
    where = context(num_attention_heads=32, num_key_value_heads=8, hidden_size=4096)
    found = {g: surgery.attention_cost(where, SoftmaxCost.of(where.config, g)) for g in (32, 8, 1)}
    cache_bytes = {g: (cost.cache_elements_per_token or 0) * 32 * 2 for g, cost in found.items()}
    assert cache_bytes == {32: 524_288, 8: 131_072, 1: 16_384}
    assert found[32].flops_per_token == 8 * 4096 * 32 * 128, "no context length given: projections only"


def test_grouping_never_changes_the_score_flops() -> None:
    def scores(groups: int) -> float:
        long, none = (
            surgery.attention_cost(
                Context(**{**vars(context()), "params": params}), SoftmaxCost.of(context().config, groups)
            ).flops_per_token
            for params in ({"seq_len": 1023}, {})
        )
        return long - none

    assert scores(14) == scores(2) == scores(1) == 4 * 512 * 896


def test_submodules_are_replaced_by_type_and_named() -> None:
    class Marked(nn.Module):
        pass

    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    changed = surgery.replace_modules(model, lambda name, module: Marked() if isinstance(module, nn.Linear) else None)
    assert changed == ("0", "1.0")
    assert [type(m).__name__ for m in model.modules()] == ["Sequential", "Marked", "Sequential", "Marked", "ReLU"]
