"""The tensors of a model before there is one, against the model itself: every shape of the catalogue, every technique."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from effbench import families, registry
from effbench.errors import ModelError
from effbench.layout import Layout
from effbench.models import builders, context
from effbench.models.shapes import shape, shape_names
from effbench.planning import techniques
from tests.factories import resolved

SMALL = ("tiny-llama", "tiny-qwen2", "tiny-mixtral", "tiny-bloom")
# 10⁹ weights that a token uses, as published, and how many of the tables of embedding and head are left out of it.
ACTIVE = {
    "mixtral-8x7b": (12.9, 0),
    "olmoe-1b-7b": (1.3, 0),
    "qwen1.5-moe-a2.7b": (2.7, 0),
    "qwen3-30b-a3b": (3.3, 0),
    "deepseek-v2-lite": (2.4, 1),
    "deepseek-v3": (37, 1),
    "gpt-oss-20b": (3.61, 1),
}


@cache
def on_meta(name: str) -> Any:
    found = shape(name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(found.model_type, **found.config))


def tensors_of(model: Any) -> dict[tuple[str, tuple[int, ...], bool], int]:
    """(path with * for the number of the layer, shape, of a linear layer?) → how many."""
    found: dict[tuple[str, tuple[int, ...], bool], int] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        owner = model.get_submodule(name.rpartition(".")[0])
        path = re.sub(r"\b(layers|h)\.\d+\.", r"\1.*.", name).replace("original_inv_freq", "inv_freq")
        key = (path, tuple(tensor.shape), type(owner) is torch.nn.Linear and name.endswith("weight"))
        found[key] = found.get(key, 0) + 1
    return found


def tensors_in(layout: Layout) -> dict[tuple[str, tuple[int, ...], bool], int]:
    return {(w.path, w.shape, w.linear): w.count for w in layout.weights}


@pytest.mark.parametrize("name", shape_names())
def test_every_shape_has_the_tensors_of_the_library_s_model(name: str) -> None:
    found = shape(name)
    layout = families.layout(found.model_type, found.config)
    assert tensors_in(layout) == tensors_of(on_meta(name))
    assert layout.num_weights() == found.num_parameters


@pytest.mark.parametrize("name", ACTIVE)
def test_weights_of_one_token_are_the_published_ones(name: str) -> None:
    """To 2.5 %: two publications cut digits off (Qwen3: 3.35, DeepSeek-V2-Lite: 2.45)."""
    model, (published, tables) = on_meta(name), ACTIVE[name]
    left_out = tables * model.get_input_embeddings().weight.numel()
    assert builders.params_active(model) - left_out == pytest.approx(1e9 * published, rel=0.025)


def test_bytes_kept_of_a_token_are_the_published_ones() -> None:
    """In bf16, at 4096 tokens. DeepSeek-V3, arXiv 2505.09343, Table 1: 70.272 and 327.680 KB; by hand for gpt-oss, which keeps
    128 tokens in every second layer."""

    def kept(name: str) -> float:
        spec = resolved(name, "bf16")
        spec = replace(spec, params={**spec.params, "prompt_tokens": 4000, "new_tokens": 97})
        return float(context.expected_cost(spec)["kv_cache_bytes_per_token"])

    assert kept("deepseek-v3") == 70_272
    assert kept("qwen2.5-72b") == 327_680
    assert kept("gpt-oss-20b") == 2 * (2 * 8 * 64) * (12 + 12 * 128 / 4096)


def test_an_unknown_family_is_named_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match="'t5' is not among bloom, llama, mistral"):
        families.layout("t5", {})


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("technique", registry.entries("technique"))
def test_a_technique_changes_the_list_as_it_changes_the_model(technique: str, name: str) -> None:
    """Stored bytes and weights of the built model, before anything has run, by the list: exactly, in training and inference."""
    seen = 0
    for workload in ("generate", "finetune"):
        spec = resolved(name, technique, workload=workload)
        trains = workload == "finetune"
        if builders.refusal(spec) is not None:
            continue
        model = builders.build(spec, trains=trains, seed=1, device="cpu").model
        layout = context.layout(spec)
        assert layout is not None
        assert layout.num_weights() == builders.params_total(model)
        stored = {kind: size for kind, size in builders.model_facts(model)["weight_bytes_by_kind"].items() if size}
        assert layout.stored_bytes_by_kind() == pytest.approx(stored, rel=1e-6)
        seen += 1
    if not seen:
        pytest.skip("refused")


def test_stacks_add_up() -> None:
    for stack in (
        (("mla", {"kv_rank": 32}), ("moe", {"experts": 4, "shared": 2}), ("bf16", {})),
        (("nsa", {"groups": 2, "block": 8, "stride": 4, "select_block": 16, "num_selected": 4, "window": 32}), ("int8", {})),
        (("moe", {"every": 2}), ("int4", {})),
        (("gqa", {"groups": 2}), ("nf4", {"double_quant": True})),
    ):
        spec = resolved("tiny-llama", workload="generate")
        spec = replace(spec, techniques=techniques(stack, "cpu"))
        assert builders.refusal(spec) is None
        model = builders.build(spec, trains=False, seed=1, device="cpu").model
        layout = context.layout(spec)
        assert layout is not None
        assert layout.stored_bytes() == pytest.approx(builders.weight_bytes(model), rel=1e-6)
        assert layout.num_weights() == builders.params_total(model)
