"""The tensors of each model family of transformers, by its configuration. Torch-free.

Paths and shapes are those of the library's own modules; a test builds every shape of the catalogue without memory (torch's
meta device) and compares all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from effbench.costs import FeedForwardCost, MLACost, NSACost, feed_forward_costs, head_dim, key_value_heads, query_heads
from effbench.errors import ModelError
from effbench.layout import Kind, Layout, Weight

Config = Mapping[str, Any]
LAYER, BLOOM_LAYER = "model.layers.*", "transformer.h.*"


def layout(model_type: str, config: Config) -> Layout:
    """The tensors of a model as the library builds it. Raises ModelError for a family that is not known."""
    if model_type not in FAMILIES:
        raise ModelError(f"The model type {model_type!r} is not among {', '.join(FAMILIES)}.")
    frame = [] if model_type == "bloom" else _frame(config)  # which has names of its own
    return Layout(model_type=model_type, config=config, weights=[*frame, *FAMILIES[model_type](config)])


def named(model_type: str, config: Config) -> Config:
    """The values of a checkpoint's configuration by the names that the catalogue has, with what a family always has."""
    if model_type != "bloom":
        return config
    names = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embed": "hidden_size"}
    values = {names.get(key, key): value for key, value in config.items()}
    hidden, heads = int(values["hidden_size"]), int(values["num_attention_heads"])
    trained_on = int(values.get("seq_length") or 2048)  # tokens; ALiBi has no limit of its own
    implied = {"num_key_value_heads": heads, "gated_feed_forward": False, "max_position_embeddings": trained_on}
    return {"intermediate_size": 4 * hidden, **implied, **values}


def _frame(config: Config) -> Iterator[Weight]:
    """Embedding, last norm, head and the table of rotary frequencies."""
    vocabulary, hidden = int(config["vocab_size"]), int(config["hidden_size"])
    yield Weight(path="model.embed_tokens.weight", kind="embedding", shape=(vocabulary, hidden))
    yield Weight(path="model.norm.weight", kind="norm", shape=(hidden,))
    yield rotary_table(int(config.get("qk_rope_head_dim") or head_dim(config)))
    if not config.get("tie_word_embeddings"):
        yield Weight(path="lm_head.weight", kind="head", shape=(vocabulary, hidden), linear=True)


def rotary_table(turned: int) -> Weight:
    """The frequencies that turn `turned` channels of a head, which the library keeps twice."""
    return Weight(path="model.rotary_emb.inv_freq", kind="other", shape=(turned // 2,), count=2, trained=False, bits=32)


def _dense(config: Config, *, attention_bias: bool, mlp_bias: bool) -> Iterator[Weight]:
    """llama, mistral, qwen2: separate projections, a gated feed-forward layer, two norms."""
    layers, hidden, wide = (int(config[key]) for key in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    dim = head_dim(config)
    queries, keys = query_heads(config) * dim, key_value_heads(config) * dim
    for name, out in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield from linear(f"{LAYER}.self_attn.{name}", "attention", out, hidden, layers, bias=attention_bias)
    output_bias = bool(config.get("attention_bias"))  # of qwen2, which has none there, it says nothing
    yield from linear(f"{LAYER}.self_attn.o_proj", "attention", hidden, queries, layers, bias=output_bias)
    yield from gated(f"{LAYER}.mlp", hidden, wide, layers, bias=mlp_bias)
    yield from _norms(layers, hidden)


def _phi3(config: Config) -> Iterator[Weight]:
    """One matrix for queries, keys and values, one for gate and up."""
    layers, hidden, wide = (int(config[key]) for key in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    dim = head_dim(config)
    queries, keys = query_heads(config) * dim, key_value_heads(config) * dim
    yield from linear(f"{LAYER}.self_attn.qkv_proj", "attention", queries + 2 * keys, hidden, layers)
    yield from linear(f"{LAYER}.self_attn.o_proj", "attention", hidden, queries, layers)
    yield from linear(f"{LAYER}.mlp.gate_up_proj", "feed_forward", 2 * wide, hidden, layers)
    yield from linear(f"{LAYER}.mlp.down_proj", "feed_forward", hidden, wide, layers)
    yield from _norms(layers, hidden)


def _softmax_mixture(config: Config, *, attention_bias: bool = False, query_norm: str = "") -> Iterator[Weight]:
    """Softmax attention and mixtures of experts: mixtral, olmoe, qwen2_moe, qwen3_moe, gpt_oss. `query_norm`: "head" or "all"."""
    layers, hidden, dim = int(config["num_hidden_layers"]), int(config["hidden_size"]), head_dim(config)
    queries, keys = query_heads(config) * dim, key_value_heads(config) * dim
    everywhere = bool(config.get("attention_bias"))
    for name, out in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield from linear(f"{LAYER}.self_attn.{name}", "attention", out, hidden, layers, bias=attention_bias or everywhere)
    yield from linear(f"{LAYER}.self_attn.o_proj", "attention", hidden, queries, layers, bias=everywhere)
    for name, width in (("q_norm", queries), ("k_norm", keys)) if query_norm else ():
        shape = (dim if query_norm == "head" else width,)
        yield Weight(path=f"{LAYER}.self_attn.{name}.weight", kind="norm", shape=shape, count=layers)
    yield from _experts(config)
    yield from _norms(layers, hidden)


def _experts(config: Config) -> Iterator[Weight]:
    """Of the sparse layers router, stacked experts and shared ones, by the library's names; of the dense ones three matrices."""
    cost, mlp = FeedForwardCost.of(config), f"{LAYER}.mlp"
    experts, hidden, width = cost.experts, cost.hidden, cost.width
    layers = _num_sparse(config)
    dense = int(config["num_hidden_layers"]) - layers
    if dense:
        yield from gated(mlp, hidden, int(config["intermediate_size"]), dense)
    if not layers:
        return
    yield Weight(path=f"{mlp}.gate.weight", kind="router", shape=(experts, hidden), count=layers)
    yield Weight(path=f"{mlp}.experts.gate_up_proj", kind="experts", shape=(experts, 2 * width, hidden), count=layers)
    yield Weight(path=f"{mlp}.experts.down_proj", kind="experts", shape=(experts, hidden, width), count=layers)
    if config.get("shared_expert_intermediate_size"):
        yield from gated(f"{mlp}.shared_expert", hidden, cost.shared_width, layers)
        yield from linear(f"{mlp}.shared_expert_gate", "feed_forward", 1, hidden, layers)
    elif cost.shared_width:
        yield from gated(f"{mlp}.shared_experts", hidden, cost.shared_width, layers)


def _gpt_oss(config: Config) -> Iterator[Weight]:
    """Transposed experts and a router with biases, and a learned sink for each head."""
    layers, heads = int(config["num_hidden_layers"]), query_heads(config)
    yield Weight(path=f"{LAYER}.self_attn.sinks", kind="attention", shape=(heads,), count=layers)
    for weight in _softmax_mixture(config):
        if weight.kind == "experts":
            number, out, into = weight.shape
            yield replace(weight, shape=(number, into, out), transposed=True)
            yield Weight(path=f"{weight.path}_bias", kind="experts", shape=(number, out), count=layers)
        elif weight.kind == "router":
            path = weight.path.replace("gate", "router")
            yield replace(weight, path=path)
            yield replace(weight, path=path.replace("weight", "bias"), shape=weight.shape[:1])
        else:
            yield weight


def _deepseek(config: Config, *, correction: bool) -> Iterator[Weight]:
    """Latent attention; the first layers dense, the others mixtures, in V3 with a correction bias of the router's choice."""
    layers, sparse, bias = int(config["num_hidden_layers"]), _num_sparse(config), bool(config.get("attention_bias"))
    yield from latent_attention(MLACost.of(config), layers, "q_a_layernorm", "kv_a_layernorm", bias=bias)
    yield from _experts(config)
    if correction and sparse:
        path, experts = f"{LAYER}.mlp.gate.e_score_correction_bias", int(config["n_routed_experts"])
        yield Weight(path=path, kind="other", shape=(experts,), count=sparse, trained=False)
    yield from _norms(layers, int(config["hidden_size"]))


def _num_sparse(config: Config) -> int:
    """How many layers of a mixture have experts."""
    return sum(bool(cost.experts) for cost in feed_forward_costs(config))


def latent_attention(cost: MLACost, layers: int, query_norm: str, key_norm: str, *, bias: bool = False) -> Iterator[Weight]:
    """Multi-head latent attention, by DeepSeek's names but those of the norms; without a query latent where its rank is 0.

    `bias`: of the projections from and to the hidden size, but not of the queries' where they have no latent.
    """
    attention, hidden = f"{LAYER}.self_attn", cost.hidden
    queries = cost.heads * (cost.dim + cost.rope_dim)
    if cost.q_rank:
        yield from linear(f"{attention}.q_a_proj", "attention", cost.q_rank, hidden, layers, bias=bias)
        yield Weight(path=f"{attention}.{query_norm}.weight", kind="norm", shape=(cost.q_rank,), count=layers)
        yield from linear(f"{attention}.q_b_proj", "attention", queries, cost.q_rank, layers)
    else:
        yield from linear(f"{attention}.q_proj", "attention", queries, hidden, layers)
    latent = f"{attention}.kv_a_proj" + ("" if key_norm == "kv_a_norm" else "_with_mqa")
    yield from linear(latent, "attention", cost.kv_rank + cost.rope_dim, hidden, layers, bias=bias)
    yield Weight(path=f"{attention}.{key_norm}.weight", kind="norm", shape=(cost.kv_rank,), count=layers)
    yield from linear(f"{attention}.kv_b_proj", "attention", cost.heads * (cost.dim + cost.value_dim), cost.kv_rank, layers)
    yield from linear(f"{attention}.o_proj", "attention", hidden, cost.heads * cost.value_dim, layers, bias=bias)


def sparse_attention(cost: NSACost, layers: int, *, bias: bool) -> Iterator[Weight]:
    """Native sparse attention as effbench/modules/nsa.py has it: three sets of keys and values, gates, two compressions."""
    attention, hidden, heads = f"{LAYER}.self_attn", cost.hidden, cost.heads
    sets = (1 if cost.shared else 3) * cost.groups
    for name, out in (("q_proj", heads * cost.key_dim), ("k_proj", sets * cost.key_dim), ("v_proj", sets * cost.value_dim)):
        yield from linear(f"{attention}.{name}", "attention", out, hidden, layers, bias=bias)
    yield from linear(f"{attention}.o_proj", "attention", hidden, heads * cost.value_dim, layers)
    for place, into in (("0", hidden), ("2", 3 * heads)):
        yield from linear(f"{attention}.gate_proj.{place}", "attention", 3 * heads, into, layers, bias=True)
    for name, dim in (("compress_keys", cost.key_dim), ("compress_values", cost.value_dim)):
        path = f"{attention}.{name}"
        yield Weight(path=f"{path}.position", kind="attention", shape=(cost.block, dim), count=layers)
        yield from linear(f"{path}.up_proj", "attention", dim, cost.block * dim, layers, bias=True)
        yield from linear(f"{path}.down_proj", "attention", dim, dim, layers, bias=True)


def mixture(cost: FeedForwardCost, layers: int) -> Iterator[Weight]:
    """`layers` mixtures of experts as effbench/modules/moe.py has them; the router is kept in fp32."""
    hidden, width, mlp = cost.hidden, cost.width, f"{LAYER}.mlp"
    yield Weight(path=f"{mlp}.router.weight", kind="router", shape=(cost.experts, hidden), count=layers, linear=True, bits=32)
    yield Weight(path=f"{mlp}.experts.w_in", kind="experts", shape=(cost.experts, 2 * width, hidden), count=layers)
    yield Weight(path=f"{mlp}.experts.w_out", kind="experts", shape=(cost.experts, hidden, width), count=layers)
    if cost.shared_width:
        yield from gated(f"{mlp}.shared", hidden, cost.shared_width, layers)


def gated(path: str, hidden: int, width: int, count: int, *, bias: bool = False) -> Iterator[Weight]:
    """A gated feed-forward layer of three matrices."""
    for name in ("gate_proj", "up_proj"):
        yield from linear(f"{path}.{name}", "feed_forward", width, hidden, count, bias=bias)
    yield from linear(f"{path}.down_proj", "feed_forward", hidden, width, count, bias=bias)


def linear(path: str, kind: Kind, out: int, into: int, count: int, *, bias: bool = False) -> Iterator[Weight]:
    """A linear layer's matrix, and its bias where it has one."""
    yield Weight(path=f"{path}.weight", kind=kind, shape=(out, into), count=count, linear=True)
    if bias:
        yield Weight(path=f"{path}.bias", kind=kind, shape=(out,), count=count)


def _norms(layers: int, hidden: int) -> Iterator[Weight]:
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield Weight(path=f"{LAYER}.{name}.weight", kind="norm", shape=(hidden,), count=layers)


def _bloom(config: Config) -> Iterator[Weight]:
    """One matrix for queries, keys and values; biases everywhere; norms with biases, one of them behind the embedding; tied head."""
    layers, hidden, wide = int(config["num_hidden_layers"]), int(config["hidden_size"]), int(config["intermediate_size"])
    yield Weight(path="transformer.word_embeddings.weight", kind="embedding", shape=(int(config["vocab_size"]), hidden))
    for path, count in (
        ("transformer.word_embeddings_layernorm", 1), ("transformer.ln_f", 1),
        (f"{BLOOM_LAYER}.input_layernorm", layers), (f"{BLOOM_LAYER}.post_attention_layernorm", layers),
    ):  # fmt: skip
        for name in ("weight", "bias"):
            yield Weight(path=f"{path}.{name}", kind="norm", shape=(hidden,), count=count)
    attention = f"{BLOOM_LAYER}.self_attention"
    yield from linear(f"{attention}.query_key_value", "attention", 3 * hidden, hidden, layers, bias=True)
    yield from linear(f"{attention}.dense", "attention", hidden, hidden, layers, bias=True)
    yield from bloom_feed_forward(f"{BLOOM_LAYER}.mlp", hidden, wide, layers)


def bloom_feed_forward(path: str, hidden: int, width: int, count: int) -> Iterator[Weight]:
    """Bloom's feed-forward layer: two matrices with biases."""
    yield from linear(f"{path}.dense_h_to_4h", "feed_forward", width, hidden, count, bias=True)
    yield from linear(f"{path}.dense_4h_to_h", "feed_forward", hidden, width, count, bias=True)


def inserted_mixture(cost: FeedForwardCost, layers: int, *, gate: int) -> Iterator[Weight]:
    """`layers` mixtures as effbench/modules/inserted_experts.py has them, with biases; router and gate are kept in fp32.

    `gate`: numbers of the gate of a mixture that stands before the dense layer, 0 for one in its place.
    """
    experts, hidden, width, mlp = cost.experts, cost.hidden, cost.width, f"{BLOOM_LAYER}.mlp"
    yield Weight(path=f"{mlp}.router.weight", kind="router", shape=(experts, hidden), count=layers, linear=True, bits=32)
    shapes = {
        "w_in": (experts, width, hidden),
        "b_in": (experts, width),
        "w_out": (experts, hidden, width),
        "b_out": (experts, hidden),
    }
    for name, shape in shapes.items():
        yield Weight(path=f"{mlp}.experts.{name}", kind="experts", shape=shape, count=layers)
    if gate:
        yield Weight(path=f"{mlp}.gate", kind="feed_forward", shape=(gate,), count=layers, bits=32)


def _llama(config: Config) -> Iterator[Weight]:
    return _dense(config, attention_bias=bool(config.get("attention_bias")), mlp_bias=bool(config.get("mlp_bias")))


def _mistral(config: Config) -> Iterator[Weight]:
    return _dense(config, attention_bias=False, mlp_bias=False)


def _qwen2(config: Config) -> Iterator[Weight]:
    return _dense(config, attention_bias=True, mlp_bias=False)


def _qwen2_moe(config: Config) -> Iterator[Weight]:
    return _softmax_mixture(config, attention_bias=bool(config.get("qkv_bias", True)))


FAMILIES: dict[str, Callable[[Config], Iterator[Weight]]] = {
    "bloom": _bloom,
    "llama": _llama,
    "mistral": _mistral,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "mixtral": _softmax_mixture,
    "olmoe": partial(_softmax_mixture, query_norm="all"),
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": partial(_softmax_mixture, query_norm="head"),
    "gpt_oss": _gpt_oss,
    "deepseek_v2": partial(_deepseek, correction=False),
    "deepseek_v3": partial(_deepseek, correction=True),
}
