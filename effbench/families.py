"""The tensors of each model family of transformers, by its configuration. Torch-free.

Paths and shapes are those of the library's own modules; a test builds every shape of the catalogue without memory (torch's
meta device) and compares all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from effbench.costs import head_dim, key_value_heads, query_heads
from effbench.errors import ModelError
from effbench.layout import Kind, Layout, Weight

Config = Mapping[str, Any]
LAYER = "model.layers.*"


def layout(model_type: str, config: Config) -> Layout:
    """The tensors of a model as the library builds it. Raises ModelError for a family that is not known."""
    if model_type not in FAMILIES:
        raise ModelError(f"The model type {model_type!r} is not among {', '.join(FAMILIES)}.")
    return Layout(model_type=model_type, config=config, weights=[*_frame(config), *FAMILIES[model_type](config)])


def _frame(config: Config) -> Iterator[Weight]:
    """Embedding, last norm, head and the table of rotary frequencies."""
    vocabulary, hidden = int(config["vocab_size"]), int(config["hidden_size"])
    yield Weight(path="model.embed_tokens.weight", kind="embedding", shape=(vocabulary, hidden))
    yield Weight(path="model.norm.weight", kind="norm", shape=(hidden,))
    if not config.get("tie_word_embeddings"):
        yield Weight(path="lm_head.weight", kind="head", shape=(vocabulary, hidden), linear=True)


def _dense(config: Config, *, attention_bias: bool, mlp_bias: bool) -> Iterator[Weight]:
    """llama, mistral, qwen2: separate projections, a gated feed-forward layer, two norms."""
    layers, hidden, wide = (int(config[key]) for key in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    dim = head_dim(config)
    queries, keys = query_heads(config) * dim, key_value_heads(config) * dim
    for name, out in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield from linear(f"{LAYER}.self_attn.{name}", "attention", out, hidden, layers, bias=attention_bias)
    output_bias = bool(config.get("attention_bias"))  # of qwen2, which has none there, it says nothing
    yield from linear(f"{LAYER}.self_attn.o_proj", "attention", hidden, queries, layers, bias=output_bias)
    for name in ("gate_proj", "up_proj"):
        yield from linear(f"{LAYER}.mlp.{name}", "feed_forward", wide, hidden, layers, bias=mlp_bias)
    yield from linear(f"{LAYER}.mlp.down_proj", "feed_forward", hidden, wide, layers, bias=mlp_bias)
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


def linear(path: str, kind: Kind, out: int, into: int, count: int, *, bias: bool = False) -> Iterator[Weight]:
    """A linear layer's matrix, and its bias where it has one."""
    yield Weight(path=f"{path}.weight", kind=kind, shape=(out, into), count=count, linear=True)
    if bias:
        yield Weight(path=f"{path}.bias", kind=kind, shape=(out,), count=count)


def _norms(layers: int, hidden: int) -> Iterator[Weight]:
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield Weight(path=f"{LAYER}.{name}.weight", kind="norm", shape=(hidden,), count=layers)


def _llama(config: Config) -> Iterator[Weight]:
    return _dense(config, attention_bias=bool(config.get("attention_bias")), mlp_bias=bool(config.get("mlp_bias")))


def _mistral(config: Config) -> Iterator[Weight]:
    return _dense(config, attention_bias=False, mlp_bias=False)


def _qwen2(config: Config) -> Iterator[Weight]:
    return _dense(config, attention_bias=True, mlp_bias=False)


FAMILIES: dict[str, Callable[[Config], Iterator[Weight]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "phi3": _phi3,
    "qwen2": _qwen2,
}
