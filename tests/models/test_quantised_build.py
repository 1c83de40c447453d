"""Models that are packed while they are made: the same weights, no more memory than one block, every source, experts too."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from effbench.models import builders, context, training, weights
from effbench.models.storage import KINDS, kind_of, stored
from effbench.models.text import text_of
from effbench.planning import techniques
from effbench.schema import Spec
from effbench.tensors import TensorTracker
from effbench.workloads._training import held_out
from tests.factories import resolved

TINY = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATENT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1, "n_group": 1,
    "first_k_dense_replace": 1, "kv_lora_rank": 32, "q_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32,
    "v_head_dim": 32, "topk_group": 1, "num_key_value_heads": 4,
}  # fmt: skip
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**ROUTED, "shared_expert_intermediate_size": 128},
    "qwen3_moe": {**ROUTED, "head_dim": 32},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "intermediate_size": 128},
}
MIXTURES = [family for family in FAMILIES if family not in ("llama", "phi3")]


def config_of(family: str, **changes: Any) -> Any:
    return AutoConfig.for_model(family, **{**TINY, **FAMILIES[family], **changes})


def spec_of(model: str, *stack: tuple[str, dict[str, Any]], **model_changes: Any) -> Spec:
    return replace(resolved(model, **model_changes), techniques=techniques(stack, "cpu"))


def by_path(folder: Path, *stack: tuple[str, dict[str, Any]]) -> Spec:
    return spec_of("mine", *stack, weights="path", location=str(folder))


def build(spec: Spec, seed: int = 1) -> Any:
    return builders.build(spec, trains=False, seed=seed, device="cpu").model


def logits(model: nn.Module) -> torch.Tensor:
    ids_BT = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=ids_BT).logits.float()
    return found


def tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


# Made block by block


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_made_block_by_block_has_the_weights_of_one_made_whole(family: str) -> None:
    order: list[str] = []

    def pack(block: nn.Module) -> None:
        assert not any(tensor.is_meta for _, tensor in tensors(block)), "the block is there when it is packed"
        order.append(type(block).__name__)

    for tied in (False, True):
        config = config_of(family, tie_word_embeddings=tied, dtype="bfloat16")
        spec = spec_of("tiny-llama", ("bf16", {}))
        torch.manual_seed(3)
        whole = weights.new_model(config, "cpu")
        torch.manual_seed(3)
        drawn = weights.load(spec, config, "cpu", (), [pack])
        assert [name for name, _ in tensors(drawn)] == [name for name, _ in tensors(whole)]
        assert all(
            torch.equal(a, b) and a.dtype == b.dtype for (_, a), (_, b) in zip(tensors(drawn), tensors(whole), strict=True)
        )
        assert (drawn.get_input_embeddings().weight is drawn.get_output_embeddings().weight) == tied
    assert len(order) == 2 * config.num_hidden_layers


@pytest.mark.parametrize(
    ("name", "params"),
    [("int4", {}), ("int8", {}), ("int8", {"library": "torchao"}), ("nf4", {"double_quant": True})],
    ids=["int4", "int8", "int8-torchao", "nf4"],
)
def test_making_a_packed_model_takes_its_packed_size_and_one_block(name: str, params: dict[str, Any]) -> None:
    """Peak of all tensor bytes, what the libraries need to pack a matrix included; made whole it would take 2 B a weight."""
    config = config_of("llama", num_hidden_layers=32, intermediate_size=352)
    spec = spec_of("tiny-llama", (name, params))
    [technique] = builders.stack(spec)
    technique.configure(config)
    weights.load(spec, config_of("llama", dtype="bfloat16"), "cpu", (), [technique.quantise])  # what is made once
    gc.collect()
    with TensorTracker() as alive:
        model = weights.load(spec, config, "cpu", (), [technique.quantise])
    final = builders.weight_bytes(model)
    assert alive.now_bytes == final
    block = 2 * sum(item.num_weights for item in stored(model.model.layers[0]))
    whole = 2 * builders.params_total(model)
    print(f"{name}: peak {alive.peak_bytes / final:.3f} of the final {final} B, a block has {block} B")
    assert alive.peak_bytes <= 1.15 * final + block < whole


def test_a_model_made_whole_and_then_packed_takes_more_than_that() -> None:
    """The control: the same measurement on the way that was not taken."""
    config = config_of("llama", num_hidden_layers=32, intermediate_size=352, dtype="bfloat16")
    [technique] = builders.stack(spec_of("tiny-llama", ("int4", {})))
    with TensorTracker() as alive:
        model = weights.new_model(config, "cpu")
        for block in weights.blocks(model):
            technique.quantise(block)
    of_block = 2 * sum(item.num_weights for item in stored(model.model.layers[0]))
    assert alive.peak_bytes > 1.15 * builders.weight_bytes(model) + of_block


def test_seed_decides_packed_weights() -> None:
    for name in ("int8", "nf4", "int4"):
        first, same, other = (
            [t.clone() for item in stored(build(spec_of("tiny-llama", (name, {})), seed)) for t in item.tensors]
            for seed in (1, 1, 2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# Loaded weights


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_packed_whole_and_means_the_same(family: str, tmp_path: Path) -> None:
    """Of every family: all matrices of the blocks and all experts, bytes as planned, outputs near those of plain weights."""
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config_of(family)).save_pretrained(tmp_path)
    plain = build(by_path(tmp_path, ("fp32", {})))
    true = logits(plain)
    for name, most in (("int8", 0.05), ("int4", 0.3)):
        spec = by_path(tmp_path, (name, {"compute": "fp32"}))
        model = build(spec)
        facts = builders.model_facts(model)
        layout = context.layout(spec)
        assert layout is not None
        assert facts["weight_bytes"] == layout.stored_bytes()
        assert facts["params_total"] == layout.num_weights() == builders.params_total(plain)
        assert facts["params_active"] == builders.params_active(plain)
        plain_ones = [
            i for i in stored(model)
            if i.parameter is not None and i.parameter.dim() > 1 and min(i.parameter.shape) >= 16 and len(i.tensors) == 1
        ]  # fmt: skip
        assert {kind_of(i.name) for i in plain_ones if i.tensors[0].is_floating_point()} <= {"embedding", "router", "other"}
        error = float((logits(model) - true).norm() / true.norm())
        print(f"{family} {name}: {error:.3f} of the logits")
        assert 1e-3 < error < most
    for name in ("nf4", "fp4"):
        refused = builders.refusal(by_path(tmp_path, (name, {})))
        assert (refused is not None) == (family in MIXTURES)
        assert refused is None or "choose int8 or int4" in refused


def test_experts_are_stored_in_the_bits_that_are_said() -> None:
    for stack in ([("moe", {"granularity": 1})], []):
        model_name = "tiny-llama" if stack else "tiny-mixtral"
        plain = builders.model_facts(build(spec_of(model_name, *stack, ("bf16", {}))))["weight_bytes_by_kind"]
        for name, share in (("int8", 8 / 16), ("int4", 4.5 / 16)):
            facts = builders.model_facts(build(spec_of(model_name, *stack, (name, {}))))
            assert facts["weight_bytes_by_kind"]["experts"] == pytest.approx(share * plain["experts"], rel=0.02)
            assert set(facts["unquantised_bytes_by_kind"]) == {"embedding", "head", "router", "norm"}
            assert facts["unquantised_bytes_by_kind"]["router"] == plain["router"]


def test_trained_weights_are_packed_with_their_quality(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path))
    short = training.Recipe(steps=30)
    for function in (training.trained_digest, training.trained_folder, training.train_once, weights.prepare):
        monkeypatch.setattr(function, "__defaults__", (short,))
    found = {}
    for name, params in (("bf16", {}), ("int8", {}), ("nf4", {}), ("fp4", {"double_quant": True}), ("int4", {})):
        spec = replace(spec_of("tiny-llama", (name, params), weights="trained"), threads=1)
        weights.prepare(spec)
        model = build(spec)
        found[name] = held_out(model, text_of(spec), "base", num_tokens=2048, batch_size=8, seq_len=128)["bits_per_byte"]
    print(found)
    assert found["bf16"] < 6.0, "it has learned something, where a uniform guess takes 8 bits"
    for name, most in (("int8", 0.001), ("nf4", 0.01), ("fp4", 0.01), ("int4", 0.01)):
        assert 0 < abs(found[name] - found["bf16"]) < most * found["bf16"]


# Counting


def test_bytes_by_kind_add_up_and_say_what_stays_plain() -> None:
    plain = builders.model_facts(build(spec_of("tiny-llama", ("bf16", {}))))
    assert plain["unquantised_bytes_by_kind"] == {k: v for k, v in plain["weight_bytes_by_kind"].items() if k != "other"}
    for name, params in (("int8", {}), ("int8", {"library": "torchao"}), ("nf4", {"double_quant": True}), ("int4", {})):
        model = build(spec_of("tiny-llama", (name, params)))
        for _ in range(2):
            facts = builders.model_facts(model)
            by_kind = facts["weight_bytes_by_kind"]
            assert sum(by_kind.values()) == facts["weight_bytes"]
            assert set(by_kind) <= set(KINDS)
            assert facts["params_total"] == plain["params_total"]
            assert facts["bits_per_weight"] == 8 * facts["weight_bytes"] / facts["params_total"]
            left = {kind: plain["weight_bytes_by_kind"][kind] for kind in ("embedding", "head", "norm")}
            assert facts["unquantised_bytes_by_kind"] == left
            assert by_kind["attention"] < 0.6 * plain["weight_bytes_by_kind"]["attention"]
            assert by_kind["feed_forward"] < 0.6 * plain["weight_bytes_by_kind"]["feed_forward"]
            logits(model)  # after which libraries may hold other tensors


def test_unlike_kinds_of_tensors_are_found_in_the_names_of_models() -> None:
    model = build(spec_of("tiny-llama", ("moe", {"experts": 4, "shared": 1, "granularity": 1}), ("bf16", {})))
    kinds = {item.name.rpartition(".layers.")[2]: item.kind for item in stored(model)}
    assert kinds["0.mlp.experts.w_in"] == "experts"
    assert kinds["0.mlp.router.weight"] == "router"
    assert kinds["0.mlp.shared.up_proj.weight"] == "feed_forward"
    assert kinds["0.self_attn.q_proj.weight"] == "attention"
    assert kinds["0.input_layernorm.weight"] == "norm"


def test_adapters_on_packed_weights_are_counted_apart() -> None:
    def facts(*stack: tuple[str, dict[str, Any]]) -> dict[str, Any]:
        spec = replace(resolved("tiny-llama", workload="finetune"), techniques=techniques(stack, "cpu"))
        return builders.model_facts(builders.build(spec, trains=bool(stack[1:]), seed=1, device="cpu").model)

    for name in ("int8", "nf4"):
        adapted = facts(("lora", {"r": 4}), (name, {}))
        alone = builders.model_facts(build(spec_of("tiny-llama", (name, {}))))
        assert adapted["weight_bytes_by_kind"].pop("adapter") > 0
        assert adapted["weight_bytes_by_kind"] == alone["weight_bytes_by_kind"]
        assert adapted["bits_per_weight"] == alone["bits_per_weight"]
        assert adapted["params_total"] == alone["params_total"]
