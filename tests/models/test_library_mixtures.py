"""The library's own mixtures of experts, as reduced shapes of the catalogue: built, decoded, trained, counted, routed, refused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from effbench_kernels import route
from ruamel.yaml import YAML
from torch.nn import functional as F

from effbench import registry
from effbench.costs import MLACost
from effbench.models import builders, checkpoints, context, shapes
from effbench.models.shapes import shape
from effbench.planning import techniques
from effbench.schema import ModelRef, Spec
from effbench.workload import BuildContext
from effbench.workloads import _decode, _moe_layer
from tests.factories import resolved
from tests.test_families import tensors_in, tensors_of

COMMON: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.1, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
EIGHT = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
}  # fmt: skip
GROUPED = {**LATENT, "q_lora_rank": 20, "n_group": 4, "topk_group": 2}
WINDOW = 16
REDUCED: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral-8x7b", {"num_local_experts": 4}),
    "olmoe": ("olmoe-1b-7b", {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32}),
    "qwen2_moe": ("qwen1.5-moe-a2.7b", {**EIGHT, "shared_expert_intermediate_size": 48}),
    "qwen2_moe-no-bias": ("qwen1.5-moe-a2.7b", {**EIGHT, "shared_expert_intermediate_size": 48, "qkv_bias": False}),
    "qwen3_moe": ("qwen3-30b-a3b", {**EIGHT, "head_dim": 32}),
    "qwen3_moe-every-second": (
        "qwen3-30b-a3b",
        {**EIGHT, "head_dim": 32, "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    "deepseek_v2": ("deepseek-v2-lite", LATENT),
    "deepseek_v2-groups": ("deepseek-v2-lite", {**GROUPED, "topk_method": "group_limited_greedy", "attention_bias": True}),
    "deepseek_v3": ("deepseek-v3", GROUPED),
    "gpt_oss": (
        "gpt-oss-20b",
        {
            "num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 16, "intermediate_size": 48, "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}  # fmt: skip
VALUES = {key: {**shape(name).config, **COMMON, **changes} for key, (name, changes) in REDUCED.items()}
PROMPT, NEW = 40, 9  # more than a window
POSITIONS = PROMPT + NEW - 1
Stack = tuple[tuple[str, dict[str, Any]], ...]


@pytest.fixture(autouse=True, scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The reduced shapes in the place of the published ones."""
    folder = tmp_path_factory.mktemp("catalogue")
    for key, (name, _) in REDUCED.items():
        file = {"name": f"reduced-{key}", "family": "test", "source": "test", "model_type": shape(name).model_type}
        YAML().dump({**file, "num_parameters": 0, "config": VALUES[key]}, folder / f"reduced-{key}.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "CATALOGUE", folder)
        yield


def spec_of(key: str, *stack: tuple[str, dict[str, Any]], workload: str = "generate", **params: Any) -> Spec:
    spec = resolved(f"reduced-{key}", workload=workload)
    lengths = {"prompt_tokens": PROMPT, "new_tokens": NEW} if workload == "generate" else {}
    return replace(spec, techniques=techniques(stack, "cpu"), params={**spec.params, **lengths, **params})


def build(key: str, *stack: tuple[str, dict[str, Any]], trains: bool = False) -> Any:
    spec = spec_of(key, *stack, workload="finetune" if trains else "generate")
    assert builders.refusal(spec) is None
    found = builders.build(spec, trains=trains, seed=1, device="cpu")
    if trains:
        for technique in found.techniques:
            technique.trainable(found.model)
        builders.to_master_weights(found.model)
    return found.model.train(trains)


def some_bytes(rows: int = 2, length: int = POSITIONS) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("key", REDUCED)
def test_the_plan_s_tensors_and_bytes_are_the_model_s(key: str) -> None:
    model, layout = build(key), context.layout(spec_of(key))
    assert layout is not None
    assert tensors_in(layout) == tensors_of(model)
    assert builders.params_total(model) == layout.num_weights() == sum(p.numel() for p in model.parameters())
    stored = {kind: size for kind, size in builders.model_facts(model)["weight_bytes_by_kind"].items() if size}
    assert layout.stored_bytes_by_kind() == stored
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    num_experts, chosen = experts[0].shape[0], VALUES[key]["num_experts_per_tok"]
    resting = sum(p.numel() for p in experts) * (num_experts - chosen) // num_experts
    assert builders.params_active(model) == builders.params_total(model) - resting


@pytest.mark.parametrize("key", REDUCED)
def test_cached_decode_equals_a_full_forward(key: str) -> None:
    model, ids_BT = build(key), some_bytes()
    with torch.inference_mode():
        full_BTV = model(input_ids=ids_BT, use_cache=False).logits
        out = model(input_ids=ids_BT[:, :PROMPT], use_cache=True)
        parts = [out.logits]
        for at in range(PROMPT, POSITIONS):
            out = model(input_ids=ids_BT[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
    assert float((torch.cat(parts, dim=1) - full_BTV).abs().max() / full_BTV.std()) < 1e-5
    held = _decode.cache_bytes(out.past_key_values)
    expected = builders.expected_decode(model, POSITIONS)
    assert held == pytest.approx(2 * POSITIONS * expected["kv_cache_bytes_per_token"], rel=1e-12)
    planned = context.expected_cost(spec_of(key))
    assert planned["kv_cache_bytes_per_token"] == pytest.approx(expected["kv_cache_bytes_per_token"])
    assert planned["cache_read_bytes_per_token"] == pytest.approx(expected["cache_read_bytes"])


@pytest.mark.parametrize("key", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_engines_with_a_fixed_cache_give_the_tokens_of_the_growing_one_or_are_left_out(key: str) -> None:
    model, prompt = build(key), some_bytes(length=PROMPT)
    assert _decode.can_be_fixed(model, prompt) == (key != "gpt_oss"), "a sliding window's cache moves"
    if key == "gpt_oss":
        return
    with torch.inference_mode():
        grown = _decode.EagerEngine(model).generate(prompt, NEW, lambda: None)
        fixed = _decode.StaticEngine(model, 2, POSITIONS).generate(prompt, NEW, lambda: None)
    assert torch.equal(grown, fixed)


@pytest.mark.parametrize("key", REDUCED)
def test_counted_flops_of_a_decode_step_are_the_expected_ones(key: str) -> None:
    """Exactly, but for norms and biases, which are no products. Experts run one by one, which torch can count.

    Of DeepSeek the library expands every latent again.
    """
    model, values = build(key, ("expert_kernels", {"implementation": "eager"})), VALUES[key]
    counted = _decode.counted_flops(model, some_bytes(rows=1), POSITIONS)
    expected = builders.expected_decode(model, POSITIONS)["decode_flops"]
    if key.startswith("deepseek"):
        cost = MLACost.of(values)
        again = (POSITIONS - 1) * 2 * cost.kv_rank * cost.heads * (cost.dim + cost.value_dim)
        expected += values["num_hidden_layers"] * (
            again + cost.score_flops(POSITIONS) - cost.score_flops(POSITIONS, decode=True)
        )
    biases = [p for name, p in model.named_parameters() if name.endswith("_proj_bias")]  # of every expert, (E, width)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    vectors += sum(p[0].numel() * values["num_experts_per_tok"] for p in biases)
    assert counted == expected - 2 * vectors


@pytest.mark.parametrize("technique", ["full", "lora", "freeze"])
@pytest.mark.parametrize("key", REDUCED)
def test_fine_tuning_lowers_the_loss_and_trains_what_the_plan_says(key: str, technique: str) -> None:
    params = {"lora": {"r": 4}, "freeze": {"first": 1}}.get(technique, {})
    model, layout = (
        build(key, (technique, params), trains=True),
        context.layout(spec_of(key, (technique, params), workload="finetune")),
    )
    assert layout is not None
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == layout.num_weights(trained_only=True)
    assert any(".experts." in name for name in trained), "the experts take part"
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3)
    ids_BT, losses = some_bytes(), []
    for _ in range(4):
        logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("key", REDUCED)
def test_the_shape_s_router_is_the_library_s(key: str) -> None:
    """`moe_layer` draws the logits: routed by the values of the shape they must choose and weigh as the library's block does."""
    model = build(key)
    block = next(layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts"))
    seen: list[Any] = []
    block.experts.register_forward_pre_hook(
        lambda module, given, named: seen.extend((*given, *named.values())), with_kwargs=True
    )
    hidden, num_experts = VALUES[key]["hidden_size"], block.experts.down_proj.shape[0]
    x_BTD = torch.randn(1, 50, hidden, generator=torch.Generator().manual_seed(3))
    gate = getattr(block, "gate", None) or block.router
    with torch.inference_mode():
        block(x_BTD)
        logits_TE = F.linear(x_BTD[0], gate.weight, getattr(gate, "bias", None))
    _, chosen_TK, weight_TK = seen
    values, model_type = VALUES[key], shape(f"reduced-{key}").model_type
    own = route(logits_TE, values["num_experts_per_tok"], **_moe_layer._router(values, model_type))
    one, other = (torch.zeros(50, num_experts).scatter(1, *pair) for pair in ((chosen_TK, weight_TK), (own.expert, own.weight)))
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "effbench"])
@pytest.mark.parametrize("key", REDUCED)
def test_every_implementation_of_experts_gives_the_same_logits(key: str, implementation: str) -> None:
    plain, other = (build(key, ("expert_kernels", {"implementation": name})) for name in ("eager", implementation))
    with torch.inference_mode():
        one_BTV, other_BTV = (model(input_ids=some_bytes()).logits for model in (plain, other))
    assert float((one_BTV - other_BTV).abs().max() / one_BTV.std()) < 1e-5


@pytest.mark.parametrize("key", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_weights_in_8_bits_stay_near_and_their_bytes_are_planned(key: str) -> None:
    model, layout = build(key, ("int8", {})), context.layout(spec_of(key, ("int8", {})))
    assert layout is not None
    assert builders.weight_bytes(model) == pytest.approx(layout.stored_bytes(), rel=1e-6)
    kinds, num_experts = builders.model_facts(model)["weight_bytes_by_kind"], EIGHT["num_experts"]
    read = kinds["router"] + kinds.get("feed_forward", 0) + kinds["experts"] * VALUES[key]["num_experts_per_tok"] / num_experts
    planned = context.expected_cost(spec_of(key, ("int8", {}), batch_size=1))["ffn_read_bytes_per_step"]
    assert planned == pytest.approx(read, rel=1e-6)
    plain = build(key, ("bf16", {}))
    assert builders.weight_bytes(model) < 0.7 * builders.weight_bytes(plain)
    with torch.inference_mode():
        one_BTV, other_BTV = (m(input_ids=some_bytes()).logits.float() for m in (plain, model))
    assert float((one_BTV - other_BTV).square().mean().sqrt() / one_BTV.std()) < 0.2


@pytest.mark.parametrize("key", ["mixtral", "deepseek_v2", "gpt_oss"])
@pytest.mark.parametrize(("workload", "stack"), [("generate", ()), ("finetune", (("lora", {"r": 4}),)), ("pretrain", ())])
def test_workloads_run_and_pass_their_own_check(workload: str, stack: Stack, key: str) -> None:
    lengths = {} if workload == "generate" else {"seq_len": 32, "quality_steps": 0, "validation_tokens": 512}
    spec = spec_of(key, *stack, workload=workload, batch_size=2, **lengths)
    assert builders.refusal(spec) is None
    session = registry.workload(workload)(spec.params).build(BuildContext(spec=spec, seed=1, clock=time.perf_counter))
    session.check()
    session.step()
    assert session.step_work.model_flops > 0
    assert session.facts()["params_active"] < session.facts()["params_total"]


CHANGES = {
    "gqa": "are not changed", "mla": "another form", "nsa": "another form", "nope": "is not replaced", "mamba": "is not counted",
    "rwkv": "is not counted", "moe": "already; choose a dense model", "dense": "experts; leave dense out", "nf4": "choose int8",
}  # fmt: skip


@pytest.mark.parametrize("key", REDUCED)
@pytest.mark.parametrize("technique", CHANGES)
def test_a_technique_that_does_not_fit_is_refused_in_one_sentence(technique: str, key: str) -> None:
    reason = builders.refusal(spec_of(key, (technique, {})))
    assert reason is not None
    assert reason.startswith(f"{technique}: ")
    assert CHANGES[technique] in reason
    assert ". " not in reason


def test_a_checkpoint_of_a_mixture_is_read_back(tmp_path: Path) -> None:
    """Saved in the published form, one matrix for each expert; built from it by the same list of tensors, as the same function."""
    for key in ("mixtral", "deepseek_v3", "gpt_oss"):
        model, folder = build(key), tmp_path / key
        model.save_pretrained(folder)
        where = ModelRef(name=key, weights="path", location=str(folder))
        spec = replace(spec_of(key), model=replace(where, digest=checkpoints.content_digest(where)))
        assert builders.refusal(spec) is None
        read, layout = builders.build(spec, trains=False, seed=2, device="cpu").model.eval(), context.layout(spec)
        assert layout is not None
        assert tensors_in(layout) == tensors_of(read)
        with torch.inference_mode():
            torch.testing.assert_close(read(input_ids=some_bytes()).logits, model(input_ids=some_bytes()).logits)
