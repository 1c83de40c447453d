"""Building a model from a spec: seeds, dtypes, counts, bytes, FLOPs, master weights, refusals."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from effbench import registry
from effbench.errors import ModelError, UnknownName
from effbench.models import builders
from effbench.models.shapes import shape, shape_names
from effbench.schema import ModelRef, Spec, TechniqueRef
from effbench.surgery import GROUPED_FAMILIES
from tests.factories import resolved


def build(spec: Spec, trains: bool = False, seed: int = 1) -> builders.Built:
    return builders.build(spec, trains=trains, seed=seed, device="cpu")


def test_stack_is_in_axis_order_whatever_the_spec_says() -> None:
    spec = resolved("tiny-llama", "gqa", "lora", "bf16", workload="finetune")
    backwards = replace(spec, techniques=spec.techniques[::-1])
    assert [t.name for t in builders.stack(backwards)] == ["gqa", "lora", "bf16"]


def test_context_carries_shape_stack_and_what_the_workload_does() -> None:
    found = builders.context(resolved("tiny-qwen2", "gqa", workload="finetune"))
    assert found.model_type == "qwen2"
    assert found.config["hidden_size"] == 128
    assert found.stack == ("gqa", "fp32")
    assert found.trains
    assert not builders.context(resolved("tiny-qwen2")).trains


def test_first_refusal_is_said_with_its_technique() -> None:
    spec = resolved("qwen2.5-0.5b", "gqa", "lora")
    assert str(builders.refusal(spec)).startswith("gqa: 14 query heads cannot share 4")
    with pytest.raises(ModelError, match="gqa: 14 query heads"):
        build(spec)


def test_several_processes_are_for_work_that_shares_them() -> None:
    together = replace(resolved("tiny-llama"), nproc=2)
    assert builders.refusal(together) == "generate is the work of one process, and nproc is 2; leave it out"
    assert together.spec_id != resolved("tiny-llama").spec_id


def test_a_part_of_another_workload_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.technique("gqa"), "workloads", ("pretrain", "finetune"))
    refusal = builders.refusal(resolved("tiny-llama", "gqa"))
    assert refusal == "gqa: it is part of the workload pretrain or finetune and changes nothing in generate; leave it out"


def test_unknown_model_is_refused_by_name() -> None:
    spec = replace(resolved("tiny-llama"), model=ModelRef(name="tiny-lama"))
    with pytest.raises(UnknownName, match="tiny-llama"):
        builders.refusal(spec)


def test_asking_for_refusals_of_the_whole_catalogue_loads_no_torch() -> None:
    program = (
        "import sys; from tests.factories import resolved; from effbench.models import builders, shapes\n"
        "for name in shapes.shape_names():\n"
        "    for stack in ([], ['mha'], ['gqa'], ['mqa', 'bf16'], ['lora']): builders.refusal(resolved(name, *stack))\n"
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [name for name in shape_names() if shape(name).model_type in GROUPED_FAMILIES])
def test_default_attention_techniques_fit_every_shape_or_say_what_fits(name: str) -> None:
    for technique in ("mha", "mqa"):
        assert builders.refusal(resolved(name, technique)) is None
    reason = builders.refusal(resolved(name, "gqa"))
    assert (reason is None) == (shape(name).config["num_attention_heads"] % 4 == 0)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_are_built_in_the_dtype_of_the_precision(precision: str, dtype: torch.dtype) -> None:
    model = build(resolved("tiny-llama", precision)).model
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert builders.compute_dtype(model) == model.config.dtype == dtype
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32, "rotary frequencies stay exact"


@pytest.mark.parametrize(("technique", "heads"), [("mha", 8), ("gqa", 4), ("mqa", 1)])
def test_attention_techniques_set_the_key_value_heads(technique: str, heads: int) -> None:
    built = build(resolved("tiny-mistral", technique))
    assert built.config.num_key_value_heads == heads
    assert built.model.model.layers[0].self_attn.k_proj.weight.shape == (heads * 16, 128)


def test_initialisation_is_that_of_transformers() -> None:
    """One pass on the device gives what from_config gives: same spread, zero biases, unit norms, tied head."""
    ours = build(resolved("tiny-qwen2")).model
    found = shape("tiny-qwen2")
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(found.model_type, **found.config))
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert a.shape == b.shape
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.05, abs=1e-6), name
        assert a.mean().item() == pytest.approx(b.mean().item(), abs=0.01), name
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    torch.testing.assert_close(ours.model.rotary_emb.inv_freq, theirs.model.rotary_emb.inv_freq)


def test_seed_decides_the_weights() -> None:
    first, same, other = (build(resolved("tiny-llama"), seed=seed).model.lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_built_random_model_matches_the_catalogue_count() -> None:
    for name in ("tiny-llama", "tiny-qwen2", "tiny-mistral", "small-llama"):
        model = build(resolved(name)).model
        assert builders.params_total(model) == builders.params_active(model) == shape(name).num_parameters
        assert builders.weight_bytes(model) - 4 * shape(name).num_parameters < 200, "weights and rotary buffers"


def test_adapters_are_not_original_weights_but_are_stored_bytes() -> None:
    plain = build(resolved("tiny-llama", "full", workload="finetune"), trains=True).model
    lora = build(resolved("tiny-llama", "lora", workload="finetune"), trains=True).model
    assert builders.params_total(lora) == builders.params_total(plain)
    adapters = sum(p.numel() for name, p in lora.named_parameters() if "lora_" in name)
    assert adapters == sum(p.numel() for p in lora.parameters() if p.requires_grad) > 0
    assert builders.weight_bytes(lora) == builders.weight_bytes(plain) + 4 * adapters


def test_tied_and_shared_storages_are_counted_once() -> None:
    model = nn.Module()
    model.one = nn.Parameter(torch.zeros(100))
    model.two = model.one
    model.register_buffer("view", model.one.detach()[10:20])
    assert builders.weight_bytes(model) == 400


def test_bytes_of_packed_tensors_include_scales_and_nested_state() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    class State:
        def __init__(self, nested: State | None = None):
            self.absmax, self.nested, self.shape = torch.zeros(8), nested, (16, 32)

    model = nn.Module()
    model.wrapped = nn.Parameter(TwoTensor(torch.zeros(10), torch.zeros(10)), requires_grad=False)
    model.packed = nn.Parameter(torch.zeros(256, dtype=torch.uint8), requires_grad=False)
    model.packed.quant_state = State(State())
    assert builders.weight_bytes(model) == 80 + 256 + 64
    assert builders.params_total(model) == 10 + 16 * 32, "a packed parameter counts the weights it stands for"


def test_routed_experts_count_by_their_share() -> None:
    model = nn.Module()
    model.config = AutoConfig.for_model("mixtral", num_local_experts=8, num_experts_per_tok=2)
    model.mlp = nn.Module()
    model.mlp.experts = nn.Linear(10, 80, bias=False)
    model.attention = nn.Linear(10, 10, bias=False)
    assert builders.params_total(model) == 900
    assert builders.params_active(model) == 300


def test_training_flops_are_three_forwards_where_everything_is_trained() -> None:
    model = build(resolved("tiny-llama"), trains=False).model
    forward = builders.model_flops_per_token(model, context_len=127, training=False)
    matrices = shape("tiny-llama").num_parameters - 256 * 128  # without the table of input embeddings
    assert forward == 2 * matrices + 4 * 64 * 128 * 2
    assert builders.model_flops_per_token(model, context_len=127, training=True) == 3 * forward


def test_frozen_weights_need_no_weight_gradient() -> None:
    full = build(resolved("tiny-llama", "full", workload="finetune"), trains=True).model
    lora = build(resolved("tiny-llama", "lora", workload="finetune"), trains=True).model
    adapters = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    attention = 3 * 4 * 64 * 128 * 2
    base = (builders.model_flops_per_token(full, context_len=127, training=True) - attention) / 6
    assert builders.model_flops_per_token(lora, context_len=127, training=True) == 4 * base + 6 * adapters + attention


def test_generation_cost_is_the_sum_over_its_tokens() -> None:
    model = build(resolved("tiny-mistral", "bf16")).model
    batch, prompt, new = 3, 10, 4
    config = shape("tiny-mistral").config
    head, total = 256 * 128, shape("tiny-mistral").num_parameters
    flops = prompt * 2 * (total - 2 * head) + 2 * head
    flops += sum(4 * (p + 1) * 128 * 2 for p in range(prompt))
    flops += sum(2 * (total - head) + 4 * (prompt + step) * 128 * 2 for step in range(1, new))
    kv = 2 * config["num_key_value_heads"] * 16 * 2 * 2
    assert builders.expected_decode(model, 12)["kv_cache_bytes_per_token"] == kv
    assert builders.expected_decode(model, 12)["cache_read_bytes"] == 12 * kv
    moved = new * (builders.weight_bytes(model) - head * 2)
    moved += batch * kv * (prompt + (new - 1) + sum(prompt + step for step in range(1, new)))
    assert builders.generation_cost(model, batch, prompt, new) == pytest.approx((batch * flops, moved))


def test_one_new_token_needs_no_decode_step() -> None:
    model = build(resolved("tiny-llama")).model
    one, two = (builders.generation_cost(model, 1, 8, new) for new in (1, 2))
    assert one[0] < two[0]
    assert one[1] < two[1]


def test_master_weights_are_fp32_where_trained_and_untouched_where_frozen() -> None:
    model = build(resolved("tiny-llama", "lora", "bf16", workload="finetune"), trains=True).model
    builders.to_master_weights(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    with builders.mixed_precision(model):
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_master_weights_keep_tied_weights_tied() -> None:
    model = build(resolved("tiny-qwen2", "full", "bf16", workload="finetune"), trains=True).model
    builders.to_master_weights(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32
    assert builders.compute_dtype(model) == torch.bfloat16


def test_single_precision_needs_no_autocast() -> None:
    model = build(resolved("tiny-llama", "fp32")).model
    with builders.mixed_precision(model):
        assert not torch.is_autocast_enabled("cpu")


def test_training_builds_without_a_cache() -> None:
    assert build(resolved("tiny-llama", "full", workload="finetune"), trains=True).config.use_cache is False
    assert build(resolved("tiny-llama")).config.use_cache is True


def test_spec_without_a_precision_is_built_in_single_precision() -> None:
    spec = replace(resolved("tiny-llama"), techniques=())
    assert build(spec).model.dtype == torch.float32


def test_parameters_of_a_technique_reach_the_model() -> None:
    spec = resolved("tiny-llama")
    spec = replace(spec, techniques=(TechniqueRef(name="gqa", axis="attention", params={"groups": 2}), *spec.techniques))
    assert build(spec).config.num_key_value_heads == 2


def test_preload_reads_models_and_text() -> None:
    builders.preload()
    assert "transformers.models.qwen2.modeling_qwen2" in sys.modules
    assert "peft" in sys.modules
