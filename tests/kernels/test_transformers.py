"""Tiny models of the transformers library run on these kernels with unchanged logits and gradients."""

import copy
import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from effbench_kernels import activations
from effbench_kernels import transformers as ours
from transformers.activations import ACT2CLS, ACT2FN
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import OpenAIPrivacyFilterExperts

from tests.kernels.truth import error

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {"moe_intermediate_size": 12, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1, **LATENT}
MODELS = {
    "Mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "Olmoe": {"num_experts": 8, "num_experts_per_tok": 3},
    "Qwen2Moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
    },
    "Qwen3Moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "head_dim": 8},
    "DeepseekV2": DEEPSEEK | {"first_k_dense_replace": 1, "topk_method": "greedy", "num_key_value_heads": 4},
    "DeepseekV3": DEEPSEEK | {"first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "num_key_value_heads": 4},
    "GptOss": {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 8},
}
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-6}  # the models' norms round to float32 in float64 too


def build(name, implementation="eager", dtype=torch.float32):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE | MODELS[name])
    config._experts_implementation = implementation
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()


def tokens():
    return torch.randint(2, 97, (2, 11), generator=torch.Generator().manual_seed(1))


def step(model):
    """Logits, and the gradients of all parameters by name."""
    logits = model(tokens(), use_cache=False).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits.dtype)
    model.zero_grad()
    (logits * weight).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def experts_of(model):
    return [module for module in model.modules() if hasattr(module, "has_gate")]


def worst(model, dtype):
    """The largest error, relative to RMS, of logits and gradients on these kernels, by where it is."""
    model.set_experts_implementation("eager")
    want, wanted = step(model)
    model.set_experts_implementation("effbench")
    got, found = step(model)
    assert found.keys() == wanted.keys()
    errors = {"logits": error(got, want)} | {key: error(found[key], wanted[key]) for key in wanted}
    place = max(errors, key=errors.get)
    print(f"{dtype} logits {errors['logits']:.1e}, worst gradient {errors[place]:.1e} ({place})")
    return errors[place]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_all_gradients_are_unchanged(name, dtype):
    model = build(name, dtype=dtype)
    assert worst(model, dtype) <= LIMITS[dtype]
    assert all(hasattr(module, "_effbench_activation") for module in experts_of(model))


@pytest.mark.parametrize("name", MODELS)
def test_experts_matter_in_these_models(name):
    """So that the tests here cannot pass by experts that say nothing."""
    model = build(name, "effbench")
    want = model(tokens()).logits
    for module in experts_of(model):
        module.down_proj.data.mul_(1.01)
    assert error(model(tokens()).logits, want) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache_is_unchanged(name):
    model = build(name)
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    results = []
    for implementation in ("eager", "effbench"):
        model.set_experts_implementation(implementation)
        results.append(model.generate(tokens(), attention_mask=torch.ones_like(tokens()), **options))
    want, got = results
    assert torch.equal(got.sequences, want.sequences)
    assert error(torch.stack(got.logits), torch.stack(want.logits)) <= LIMITS[torch.float32]
    assert got.sequences.shape == (2, 19)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_a_saved_model_is_loaded_onto_these_kernels(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="effbench").eval()
    assert loaded.get_experts_implementation() == {"": "effbench"}
    assert error(loaded(tokens()).logits, model(tokens()).logits) <= LIMITS[torch.float32]
    loaded.save_pretrained(tmp_path / "again")
    assert "effbench" not in (tmp_path / "again" / "config.json").read_text()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("name", ["Mixtral", "DeepseekV3", "GptOss"])
def test_a_model_compiles_to_one_graph_and_trains(name):
    model = build(name, "effbench")
    want, wanted = step(model)
    fresh = build(name, "effbench")  # so that the activation is looked up while the graph is traced
    torch.compiler.reset()
    compiled = torch.compile(fresh, fullgraph=True, backend="aot_eager")
    got, found = step(compiled)
    assert error(got, want) <= LIMITS[torch.float32]
    assert max(error(found[f"_orig_mod.{key}"], wanted[key]) for key in wanted) <= LIMITS[torch.float32]


def experts_module(kind, dtype=torch.float64, act="silu", implementation="eager"):
    """An experts module by itself, 5 experts from 6 to 7 wide."""
    config = SimpleNamespace(
        num_local_experts=5,
        n_routed_experts=5,
        moe_num_experts=5,
        hidden_size=6,
        moe_hidden_size=6,
        intermediate_size=7,
        moe_intermediate_size=7,
        moe_latent_size=None,
        hidden_act=act,
        mlp_hidden_act=act,
        post_norm_eps=1e-6,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        _experts_implementation=implementation,
    )
    module = kind(config).to(dtype)
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return module


def layer_inputs(dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64) * scale
    index = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(40)])
    weight = torch.rand(40, 3, generator=generator, dtype=torch.float64)
    return x.to(dtype), index, weight.to(dtype)


def layer_step(module, implementation, x, index, weight):
    module.config._experts_implementation = implementation
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = module(x, index, weight)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, [x, weight, *module.parameters()], grad)]


KINDS = {
    MixtralExperts: "swiglu",
    GptOssExperts: "swiglu_clamped_interleaved",  # transposed, biased
    OpenAIPrivacyFilterExperts: "swiglu_clamped",  # transposed, biased
    AriaExperts: "swiglu",  # transposed
    NemotronHExperts: "silu",  # not gated
    MuseSparkExperts: "swiglu",  # a norm after each expert
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_of_experts_agrees_in_float64(kind):
    module = experts_module(kind)
    peer = "batched_mm" if kind is OpenAIPrivacyFilterExperts else "eager"  # its eager loop sums in float32
    wanted, found = layer_step(module, peer, *layer_inputs()), layer_step(module, "effbench", *layer_inputs())
    limit = 1e-6 if kind is MuseSparkExperts else 1e-13  # its norm computes in float32
    assert max(error(got, want) for got, want in zip(found, wanted, strict=True)) <= limit
    assert ours.activation_of(module) == KINDS[kind]


@pytest.mark.parametrize("kind", [MixtralExperts, GptOssExperts])
def test_bfloat16_is_as_near_the_truth_as_the_loop_of_the_library(kind):
    low = experts_module(kind, torch.bfloat16)
    x, index, weight = layer_inputs(torch.bfloat16)
    truth = layer_step(copy.deepcopy(low).double(), "eager", x.double(), index, weight.double())
    loop, found = layer_step(low, "eager", x, index, weight), layer_step(low, "effbench", x, index, weight)
    for want, naive, got in zip(truth, loop, found, strict=True):
        print(f"{error(got, want):.1e} here, {error(naive, want):.1e} in the loop")
        assert got.dtype == torch.bfloat16 and error(got, want) <= 1.5 * error(naive, want)


def test_weights_of_another_type_than_the_tokens_set_the_type_of_the_products():
    module = experts_module(MixtralExperts, torch.bfloat16)
    x, index, weight = layer_inputs(torch.float32)
    want = module(x.bfloat16(), index, weight.bfloat16())
    module.config._experts_implementation = "effbench"
    got = module(x, index, weight)
    assert got.dtype == torch.float32
    assert error(got, want) <= 1e-2


def test_experts_of_other_devices_cost_and_add_nothing():
    module = experts_module(MixtralExperts)
    module._is_expert_parallel = True
    x, index, weight = layer_inputs()
    index[::3, 0], index[1::4, 2], index[5] = 5, 5, 5
    weight = weight.masked_fill(index == 5, 0)
    wanted, found = layer_step(module, "batched_mm", x, index, weight), layer_step(module, "effbench", x, index, weight)
    assert max(error(got, want) for got, want in zip(found, wanted, strict=True)) <= 1e-13
    assert found[0][5].abs().max() == 0


def test_no_weight_is_copied(monkeypatch):
    seen = []
    real = ours.experts
    monkeypatch.setattr(
        ours, "experts", lambda x, w_in, w_out, *rest: seen.extend([w_in, w_out]) or real(x, w_in, w_out, *rest)
    )
    for kind in (MixtralExperts, GptOssExperts):
        module = experts_module(kind, implementation="effbench")
        module(*layer_inputs())
        assert [w.data_ptr() for w in seen] == [module.gate_up_proj.data_ptr(), module.down_proj.data_ptr()]
        seen.clear()


HAVE = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_python": "geglu"} | dict.fromkeys(
    ("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new", "gelu_fast", "gelu_accurate"), "geglu_tanh"
)
PLAIN = {name: act.replace("swiglu", "silu").replace("geglu", "gelu") for name, act in HAVE.items()} | {"relu": "relu"}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", sorted(set(ACT2CLS) - {"xielu"}))
def test_each_activation_of_the_library_is_known_for_what_it_is_or_refused(name):
    for kind, known in ((MixtralExperts, HAVE), (NemotronHExperts, PLAIN)):
        module = experts_module(kind, torch.float32, act=name, implementation="effbench")
        if name in known:
            assert ours.activation_of(module) == known[name]
        else:
            with pytest.raises(NotImplementedError, match=rf"{type(ACT2FN[name]).__name__}.*grouped_mm"):
                module(*layer_inputs(torch.float32))


@pytest.mark.parametrize(("alpha", "limit"), [(1.7, 7.0), (1.702, 6.9)])
def test_another_clamp_is_refused(alpha, limit):
    module = experts_module(GptOssExperts, implementation="effbench")
    module.alpha, module.limit = alpha, limit
    with pytest.raises(NotImplementedError, match="the gate of GptOssExperts is none of the activations"):
        module(*layer_inputs())


def test_a_new_activation_on_the_same_module_is_noticed():
    module = experts_module(MixtralExperts, implementation="effbench")
    module(*layer_inputs())
    module.act_fn = ACT2FN["gelu"]
    wanted, found = layer_step(module, "eager", *layer_inputs()), layer_step(module, "effbench", *layer_inputs())
    assert error(found[0], wanted[0]) <= 1e-13


def test_a_wrong_activation_would_be_caught(monkeypatch):
    """By the lookup where an activation does not compute what its name says, and by these tests where the lookup is wrong."""
    module = experts_module(MixtralExperts, implementation="effbench")
    with monkeypatch.context() as patch:
        patch.setitem(activations._FORWARD, "silu", torch.nn.functional.mish)
        with pytest.raises(NotImplementedError, match="MixtralExperts with SiLUActivation"):
            ours.activation_of(module)
    model = build("Mixtral")
    monkeypatch.setattr(ours, "activation_of", lambda module: "geglu")
    assert worst(model, torch.float32) > 100 * LIMITS[torch.float32]


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    monkeypatch.delitem(sys.modules, "effbench_kernels.transformers")
    with pytest.raises(ImportError, match="pip install 'transformers"):
        importlib.import_module("effbench_kernels.transformers")
