"""Attention-free mixers at the size of a transformer: their sizes, parameter counts and costs. Torch-free.

A size keeps the transformer's hidden width, vocabulary and tying, and meets its number of parameters:

    Mamba-2   number of layers; where no whole number comes near (small shapes), one more and a smaller state
    RWKV-4    same number of layers; the width of the channel mixing meets the rest

FLOPs of a recurrence count each multiplication, addition, division, maximum and exponential as one. Symbols: E hidden size,
I inner width, N state size, K width of the convolution, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from effbench import registry
from effbench.costs import AttentionCost, head_dim, key_value_heads, query_heads
from effbench.families import linear
from effbench.layout import Layout, Weight
from effbench.surgery import GROUPED_FAMILIES, attention_cost
from effbench.technique import YES, Context, Cost, Support, Technique, no

TOLERANCE = 0.02  # of the transformer's number of parameters: what equal parameters means here
AIM = 0.01  # a state size that comes this near is near enough
STATE_STEP = 8
REPLACED_AXES = ("attention", "position", "ffn")  # a mixer is the whole layer


def transformer_parameters(model_type: str, config: Mapping[str, Any]) -> int:
    """Number of weights of a Llama, Mistral, Qwen2 or Phi-3 shape."""
    hidden, inner, layers = (int(config[k]) for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    queries, keys = (heads(config) * head_dim(config) for heads in (query_heads, key_value_heads))
    layer = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * inner + 2 * hidden
    if model_type == "qwen2":
        layer += queries + 2 * keys
    if config.get("attention_bias"):
        layer += queries + 2 * keys + hidden
    if config.get("mlp_bias"):
        layer += 2 * inner + hidden
    return layers * layer + hidden + _embeddings(config)


@dataclass(frozen=True, kw_only=True)
class MambaSize:
    """A Mamba-2 model: one group of B and C, a gated norm, a depthwise convolution; no MLP between the layers."""

    hidden: int
    layers: int
    inner: int
    head_dim: int
    state: int
    embeddings: int  # weights of the embedding table and of the output head
    kernel: int = 4

    @property
    def heads(self) -> int:
        return self.inner // self.head_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner + 2 * self.state

    @property
    def parameters(self) -> int:
        projections = self.hidden * (self.inner + self.channels + self.heads) + self.inner * self.hidden
        convolution = self.channels * (self.kernel + 1)
        layer = projections + convolution + 3 * self.heads + self.inner + self.hidden
        return self.layers * layer + self.hidden + self.embeddings


@dataclass(frozen=True, kw_only=True)
class RWKVSize:
    """An RWKV-4 model: time mixing of width E, channel mixing of width I."""

    hidden: int
    layers: int
    inner: int
    embeddings: int

    @property
    def parameters(self) -> int:
        layer = 5 * self.hidden**2 + 2 * self.hidden * self.inner + 11 * self.hidden
        return self.layers * layer + 4 * self.hidden + self.embeddings


def mamba_size(context: Context | Layout, *, state: int, expand: int) -> MambaSize:
    """The Mamba-2 model that meets the parameters of the transformer of the context with a state as near to `state` as can be."""
    config, target = context.config, transformer_parameters(context.model_type, context.config)
    hidden = int(config["hidden_size"])
    inner = expand * hidden
    one = MambaSize(
        hidden=hidden, layers=1, inner=inner, head_dim=math.gcd(inner, 64), state=state, embeddings=_embeddings(config)
    )
    per_layer = one.parameters - hidden - one.embeddings
    depth = max(1, (target - hidden - one.embeddings) // per_layer)
    states = {state, *range(STATE_STEP, state, STATE_STEP)}
    sizes = [replace(one, layers=layers, state=n) for layers in (depth, depth + 1) for n in states]

    def badness(size: MambaSize) -> tuple[float, float]:
        miss = abs(size.parameters / target - 1)
        return max(miss, AIM), abs(math.log(size.state / state)) + miss

    return min(sizes, key=badness)


def rwkv_size(context: Context | Layout) -> RWKVSize:
    """The RWKV-4 model as deep and wide as the transformer of the context and with as many parameters."""
    config, target = context.config, transformer_parameters(context.model_type, context.config)
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    empty = RWKVSize(hidden=hidden, layers=layers, inner=0, embeddings=_embeddings(config))
    step = 64 if hidden >= 512 else 8
    inner = (target - empty.parameters) / (2 * hidden * layers)
    return replace(empty, inner=max(step, round(inner / step) * step))


def mamba_weights(size: MambaSize, vocabulary: int) -> Iterator[Weight]:
    """The tensors of the library's Mamba-2 model."""
    layer, count, hidden = "backbone.layers.*", size.layers, size.hidden
    mixer = f"{layer}.mixer"
    yield from _ends("backbone.embeddings.weight", "lm_head.weight", size, vocabulary)
    yield from linear(f"{mixer}.in_proj", "attention", size.inner + size.channels + size.heads, hidden, count)
    yield from linear(f"{mixer}.out_proj", "attention", hidden, size.inner, count)
    yield Weight(path=f"{mixer}.conv1d.weight", kind="attention", shape=(size.channels, 1, size.kernel), count=count)
    yield Weight(path=f"{mixer}.conv1d.bias", kind="attention", shape=(size.channels,), count=count)
    for name in ("dt_bias", "A_log", "D"):
        yield Weight(path=f"{mixer}.{name}", kind="attention", shape=(size.heads,), count=count)
    yield Weight(path=f"{mixer}.norm.weight", kind="norm", shape=(size.inner,), count=count)
    yield Weight(path=f"{layer}.norm.weight", kind="norm", shape=(hidden,), count=count)
    yield Weight(path="backbone.norm_f.weight", kind="norm", shape=(hidden,))


def rwkv_weights(size: RWKVSize, vocabulary: int) -> Iterator[Weight]:
    """The tensors of the library's RWKV-4 model."""
    block, count, hidden = "rwkv.blocks.*", size.layers, size.hidden
    yield from _ends("rwkv.embeddings.weight", "head.weight", size, vocabulary)
    for name in ("key", "value", "receptance", "output"):
        yield from linear(f"{block}.attention.{name}", "attention", hidden, hidden, count)
    for name in ("time_decay", "time_first", "time_mix_key", "time_mix_value", "time_mix_receptance"):
        yield Weight(path=f"{block}.attention.{name}", kind="attention", shape=(hidden,), count=count)
    for name, out, into in (("key", size.inner, hidden), ("receptance", hidden, hidden), ("value", hidden, size.inner)):
        yield from linear(f"{block}.feed_forward.{name}", "feed_forward", out, into, count)
    for name in ("time_mix_key", "time_mix_receptance"):
        yield Weight(path=f"{block}.feed_forward.{name}", kind="feed_forward", shape=(hidden,), count=count)
    for place, number in ((f"{block}.ln1", count), (f"{block}.ln2", count), ("rwkv.blocks.0.pre_ln", 1), ("rwkv.ln_out", 1)):
        for part in ("weight", "bias"):
            yield Weight(path=f"{place}.{part}", kind="norm", shape=(hidden,), count=number)


def _ends(table: str, head: str, size: MambaSize | RWKVSize, vocabulary: int) -> Iterator[Weight]:
    """The embedding, and the output head where it is not the same matrix."""
    yield Weight(path=table, kind="embedding", shape=(vocabulary, size.hidden))
    if size.embeddings > vocabulary * size.hidden:
        yield Weight(path=head, kind="head", shape=(vocabulary, size.hidden), linear=True)


def parameter_ratio(context: Context, size: MambaSize | RWKVSize) -> float:
    """Parameters of the mixer over those of the transformer."""
    return size.parameters / transformer_parameters(context.model_type, context.config)


@dataclass(frozen=True, kw_only=True)
class MambaCost(AttentionCost):
    """One Mamba-2 layer, as a recurrence: state = decay · state + (Δ x) Bᵀ, output = state · C + D x."""

    hidden: int
    inner: int
    heads: int
    state: int
    kernel: int
    source = "Mamba-2 (arXiv 2405.21060), equation 1 and section 7; matrix shapes for the projections"

    @classmethod
    def of(cls, size: MambaSize) -> MambaCost:
        return cls(hidden=size.hidden, inner=size.inner, heads=size.heads, state=size.state, kernel=size.kernel)

    @property
    def channels(self) -> int:
        return self.inner + 2 * self.state

    def projection_flops(self) -> float:
        """Input and output projections and the convolution."""
        return 2 * (self.hidden * (self.inner + self.channels + self.heads + self.inner) + self.kernel * self.channels)

    def score_flops(self, positions: float, *, decode: bool = False) -> float:
        """Decay (1), outer product added (2) and readout (2) per element of the state; Δ x and D x per channel."""
        return 5 * self.inner * self.state + 3 * self.inner

    def cache_elements(self, positions: float) -> float:
        """State and the last K inputs of the convolution, whatever the position."""
        return self.inner * self.state + self.kernel * self.channels

    def read_elements(self, positions: float) -> float:
        return self.cache_elements(positions)

    def cache_bytes(self, positions: float, item_bytes: int) -> float:
        """Bytes per sequence and layer: the state is kept in fp32 whatever the compute dtype."""
        return 4 * self.inner * self.state + item_bytes * self.kernel * self.channels


@dataclass(frozen=True, kw_only=True)
class RWKVCost(AttentionCost):
    """The time mixing of one RWKV-4 layer, as a recurrence; channel mixing is the layer's feed-forward part."""

    hidden: int
    source = "RWKV (arXiv 2305.13048), equations 11 to 18 and appendix D; matrix shapes for the projections"

    @classmethod
    def of(cls, size: RWKVSize) -> RWKVCost:
        return cls(hidden=size.hidden)

    def projection_flops(self) -> float:
        return 2 * 4 * self.hidden**2

    def score_flops(self, positions: float, *, decode: bool = False) -> float:
        """Per channel: 12 for the output, 11 for numerator, denominator and running maximum, 1 for the receptance."""
        return 24 * self.hidden

    def cache_elements(self, positions: float) -> float:
        """Last inputs of both mixings, numerator, denominator, running maximum."""
        return 5 * self.hidden

    def read_elements(self, positions: float) -> float:
        return self.cache_elements(positions)

    def cache_bytes(self, positions: float, item_bytes: int) -> float:
        """Bytes per sequence and layer: the recurrence is kept in fp32 whatever the compute dtype."""
        return (3 * 4 + 2 * item_bytes) * self.hidden


def plan_cost(context: Context, size: MambaSize | RWKVSize, cost: MambaCost | RWKVCost) -> Cost:
    """The same for the `cost` hook, which speaks of a layer of the shape: a mixer with other layers costs so many times as much."""
    found, share = attention_cost(context, cost), size.layers / int(context.config["num_hidden_layers"])

    def scaled(value: float | None) -> float | None:
        return None if value is None else value * share

    return Cost(
        flops_per_token=found.flops_per_token * share,
        decode_flops_per_token=scaled(found.decode_flops_per_token),
        cache_elements_per_token=scaled(found.cache_elements_per_token),
        decode_read_elements=scaled(found.decode_read_elements),
        source=found.source,
    )


def supports_mixer(context: Context, name: str) -> Support:
    """Whether the whole model can be built from a mixer here."""
    if context.model_type not in GROUPED_FAMILIES:
        families = ", ".join(GROUPED_FAMILIES)
        return no(f"the size of model type {context.model_type!r} is not counted; choose a shape of type {families}")
    if context.weights not in ("random", "trained"):
        return no(f"{name} is built with new weights and cannot take {context.weights} ones; use random or trained weights")
    for other in context.stack:
        kind = None if other == name else registry.technique(other)
        if kind is None:
            continue
        if kind.axis in REPLACED_AXES:
            return no(
                f"{name} replaces the whole layer, so there is nothing for {other} (axis {kind.axis}) to change; leave it out"
            )
        if kind.load is not Technique.load:
            return no(f"{other} builds the weights itself, and so does {name}; use one of them")
    return YES


def _embeddings(config: Mapping[str, Any]) -> int:
    """Weights of the embedding table and of the output head."""
    return int(config["vocab_size"]) * int(config["hidden_size"]) * (1 if config.get("tie_word_embeddings") else 2)
