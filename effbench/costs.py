"""What each form of attention and of feed-forward layer must do and keep, per layer and sequence, as formulas. Torch-free.

One object per form answers for both sides: a technique's `cost` hook shows it before anything is built, and the accounting
of a built model reads it from the module that runs. A multiply-add is 2 FLOPs; s is the number of cached positions that a
token may see, itself included. Symbols: E hidden size, H query heads, G key/value heads, D head dimension.
Source: DeepSeek-V2 (arXiv 2405.04434), Table 1 and section 2.1; NSA (arXiv 2502.11089), sections 3.2 and 5.2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def query_heads(config: Mapping[str, Any]) -> int:
    """H of a configuration; bloom's, once it is the library's, calls it n_head."""
    return int(config["num_attention_heads"] if "num_attention_heads" in config else config["n_head"])


def key_value_heads(config: Mapping[str, Any]) -> int:
    """G of a configuration; a configuration that does not say has one per query head."""
    return int(config.get("num_key_value_heads") or query_heads(config))


def head_dim(config: Mapping[str, Any]) -> int:
    """D of a configuration."""
    return int(config.get("head_dim") or config["hidden_size"] // query_heads(config))


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """Positions that the model's own attention sees, None: all (a Qwen2 configuration may carry a window that is off)."""
    window = config.get("sliding_window")
    return int(window) if window and config.get("use_sliding_window", True) else None


def _windowed_share(config: Mapping[str, Any]) -> float:
    kinds = config.get("layer_types")
    return kinds.count("sliding_attention") / len(kinds) if kinds and "full_attention" in kinds else 1.0


def num_experts(config: Mapping[str, Any]) -> int:
    """E of a configuration, as any of transformers' names has it; 0: dense."""
    return int(next((n for key in ("num_experts", "num_local_experts", "n_routed_experts") if (n := config.get(key))), 0))


def touched_share(experts: int, top_k: int, tokens: float) -> float:
    """Share of E experts that T tokens go to, the expectation under even routing: 1 − (1 − k/E)^T."""
    return float(1 - (1 - top_k / experts) ** tokens)


def mean_of_least(tokens: float, bound: float) -> float:
    """Mean of min(s, bound) over s = 1 … tokens."""
    if tokens <= bound:
        return (tokens + 1) / 2 if tokens else 0.0
    return bound * (1 - (bound - 1) / (2 * tokens))


class AttentionCost(ABC):
    """Cost of one layer's token mixer."""

    source: str

    @abstractmethod
    def projection_flops(self) -> float:
        """Projections of one token, the output's included."""

    @abstractmethod
    def score_flops(self, positions: float, *, decode: bool = False) -> float:
        """Scores and weighted sum of one token over `positions`; `decode` is the form used with a cache."""

    def mean_score_flops(self, tokens: float) -> float:
        """Mean of the scores and weighted sums of the tokens of a causal sequence; of none of them for 0 tokens."""
        return self.score_flops(mean_of_least(tokens, tokens))

    @abstractmethod
    def cache_elements(self, positions: float) -> float:
        """Elements kept for a sequence of `positions` tokens."""

    @abstractmethod
    def read_elements(self, positions: float) -> float:
        """Cached elements that one decode step at `positions` tokens must read."""

    def cache_bytes(self, positions: float, item_bytes: int) -> float:
        """Bytes kept for a sequence, an element of the compute dtype having `item_bytes`."""
        return item_bytes * self.cache_elements(positions)

    def rarely_used_weights(self) -> float:
        """Weights of the layer less those that a token uses: what a count of 2 FLOPs per weight and token has too many."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class SoftmaxCost(AttentionCost):
    """Multi-head, grouped-query and multi-query attention: only G differs, so the score FLOPs are the same."""

    hidden: int
    heads: int
    groups: int
    dim: int
    window: int | None = None  # sliding window of the model, None: all positions
    windowed: float = 1.0  # share of the layers that have the window (gpt-oss: every second)
    source = "DeepSeek-V2 (arXiv 2405.04434), Table 1, for the cache; matrix shapes for the FLOPs"

    @classmethod
    def of(cls, config: Mapping[str, Any], groups: int | None = None) -> SoftmaxCost:
        """Of a configuration, or of it with another number of key/value heads."""
        return cls(
            hidden=int(config["hidden_size"]),
            heads=query_heads(config),
            groups=groups or key_value_heads(config),
            dim=head_dim(config),
            window=sliding_window(config),
            windowed=_windowed_share(config),
        )

    def projection_flops(self) -> float:
        return 2 * self.hidden * self.dim * (2 * self.heads + 2 * self.groups)

    def score_flops(self, positions: float, *, decode: bool = False) -> float:
        return 4 * self._visible(positions) * self.heads * self.dim

    def cache_elements(self, positions: float) -> float:
        return 2 * self.groups * self.dim * self._visible(positions)

    def read_elements(self, positions: float) -> float:
        return self.cache_elements(positions)

    def mean_score_flops(self, tokens: float) -> float:
        inside, whole = (4 * mean_of_least(tokens, w) * self.heads * self.dim for w in (self.window or tokens, tokens))
        return self.windowed * inside + (1 - self.windowed) * whole

    def _visible(self, positions: float) -> float:
        """Positions that a token sees, the mean over the layers."""
        if not self.window:
            return positions
        return self.windowed * min(positions, self.window) + (1 - self.windowed) * positions


@dataclass(frozen=True, kw_only=True)
class MLACost(AttentionCost):
    """Multi-head latent attention: expanded keys and values where many tokens come at once, absorbed ones in decode."""

    hidden: int
    heads: int
    dim: int  # d_h, of a head's part without position
    value_dim: int
    q_rank: int  # d_q
    kv_rank: int  # d_c
    rope_dim: int  # d_R

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> MLACost:
        """Of a model that has it by itself (DeepSeek-V2 and V3).

        The library keeps the same latents, but expands all of them again at every token that it decodes: work that need not be,
        and is not counted.
        """
        return cls(
            hidden=int(config["hidden_size"]), heads=query_heads(config), dim=int(config["qk_nope_head_dim"]),
            value_dim=int(config["v_head_dim"]), q_rank=int(config.get("q_lora_rank") or 0),
            kv_rank=int(config["kv_lora_rank"]), rope_dim=int(config["qk_rope_head_dim"]),
        )  # fmt: skip

    source = "DeepSeek-V2 (arXiv 2405.04434), section 2.1 and Table 1; absorption from its section 2.1.2"

    def projection_flops(self) -> float:
        heads = self.heads * (self.dim + self.rope_dim)
        query = self.hidden * self.q_rank + self.q_rank * heads if self.q_rank else self.hidden * heads
        latent = self.hidden * (self.kv_rank + self.rope_dim)
        expansion = self.kv_rank * self.heads * (self.dim + self.value_dim)  # absorbed: the same, on the query's side
        return 2 * (query + latent + expansion + self.heads * self.value_dim * self.hidden)

    def score_flops(self, positions: float, *, decode: bool = False) -> float:
        width = 2 * self.kv_rank + self.rope_dim if decode else self.dim + self.rope_dim + self.value_dim
        return 2 * positions * self.heads * width

    def cache_elements(self, positions: float) -> float:
        return (self.kv_rank + self.rope_dim) * positions

    def read_elements(self, positions: float) -> float:
        return self.cache_elements(positions)


@dataclass(frozen=True, kw_only=True)
class NSACost(AttentionCost):
    """Native sparse attention: compressed blocks, selected blocks and a window, each with keys and values of its own."""

    hidden: int
    heads: int
    groups: int
    key_dim: int
    value_dim: int
    block: int  # l, tokens of a compression block
    stride: int  # d, between compression blocks
    select_block: int  # l', tokens of a selection block
    num_selected: int  # n
    window: int  # w
    shared: bool = False  # one set of keys and values for the three branches
    source = "NSA (arXiv 2502.11089), equations 5 to 12; memory access as in its section 5.2"

    @classmethod
    def of(cls, config: Mapping[str, Any], params: Any) -> NSACost:
        """Of a configuration and the parameters of the technique `nsa`."""
        return cls(
            hidden=int(config["hidden_size"]), heads=query_heads(config), groups=params.groups, key_dim=head_dim(config),
            value_dim=head_dim(config), block=params.block, stride=params.stride, select_block=params.select_block,
            num_selected=params.num_selected, window=params.window, shared=params.shared_kv,
        )  # fmt: skip

    @property
    def _width(self) -> int:
        return self.key_dim + self.value_dim

    def num_blocks(self, positions: float) -> float:
        """Whole compression blocks among `positions` tokens."""
        return max(0.0, (positions - self.block) // self.stride + 1)

    def attended(self, positions: float) -> float:
        """Compressed, selected and recent entries that a token at `positions` attends to: N of the paper."""
        selected = min(positions, self.num_selected * self.select_block)
        return self.num_blocks(positions) + selected + min(positions, self.window)

    def projection_flops(self) -> float:
        """Queries, keys and values of each branch, output, gates (E → 3H → 3H), a token's share of compression (l·D → D → D)."""
        sets = 1 if self.shared else 3
        linear = self.hidden * (self.heads * self.key_dim + sets * self.groups * self._width + 3 * self.heads)
        gates = (3 * self.heads) ** 2  # the second matrix; the first is in `linear`
        output = self.heads * self.value_dim * self.hidden
        return 2 * (linear + gates + output + self.compression_weights() * self.groups / self.stride)

    def compression_weights(self) -> float:
        """Multiply-adds of compressing one block of one head, keys and values."""
        return sum(self.block * dim * dim + dim * dim for dim in (self.key_dim, self.value_dim))

    def cache_bytes(self, positions: float, item_bytes: int) -> float:
        """Bytes kept for a sequence, an element of the compute dtype having `item_bytes`."""
        return item_bytes * self.cache_elements(positions)

    def rarely_used_weights(self) -> float:
        """A token is in one block of every stride, for each group."""
        return self.compression_weights() * (1 - self.groups / self.stride)

    def mean_score_flops(self, tokens: float) -> float:
        whole = max(0, int(tokens) - self.block + 1)  # positions at which there is a block
        rounds, rest = divmod(whole, self.stride)
        blocks = (whole + self.stride * rounds * (rounds - 1) / 2 + rest * rounds) / max(tokens, 1)
        selected, recent = (mean_of_least(tokens, b) for b in (self.num_selected * self.select_block, self.window))
        return 2 * (blocks + selected + recent) * self.heads * self._width

    def score_flops(self, positions: float, *, decode: bool = False) -> float:
        return 2 * self.attended(positions) * self.heads * self._width

    def cache_elements(self, positions: float) -> float:
        """Selected branch whole, compressed blocks, the window's last w and the tokens that blocks to come still need."""
        tail = positions - self.num_blocks(positions) * self.stride  # fewer than l, once there are l
        recent = 0.0 if self.shared else min(positions, self.window)
        return self.groups * self._width * (positions + self.num_blocks(positions) + recent + tail)

    def read_elements(self, positions: float) -> float:
        return self.groups * self._width * self.attended(positions)


def native_cost(config: Mapping[str, Any]) -> AttentionCost:
    """The form of attention that a model has by itself."""
    return MLACost.of(config) if config.get("kv_lora_rank") else SoftmaxCost.of(config)


@dataclass(frozen=True, kw_only=True)
class FeedForwardCost:
    """A feed-forward layer, dense or a mixture of experts: matrices of D × F each, gated two in and one out, else one and one.

    Biases, which few families have, are left out.
    """

    hidden: int
    width: int  # of an expert, or of the dense layer
    experts: int = 0  # routed ones; 0: dense
    top_k: int = 0
    shared_width: int = 0  # of all shared experts together
    matrices: int = 3  # of a layer or an expert: 3 gated, 2 not

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> FeedForwardCost:
        """The layers with experts of a configuration, or where it names none its dense layers."""
        experts, hidden = num_experts(config), int(config["hidden_size"])
        matrices = 3 if config.get("gated_feed_forward", True) else 2
        if not experts:
            return cls(hidden=hidden, width=int(config["intermediate_size"]), matrices=matrices)
        width = int(config.get("moe_intermediate_size") or config["intermediate_size"])
        shared = config.get("shared_expert_intermediate_size") or width * int(config.get("n_shared_experts") or 0)
        return cls(
            hidden=hidden, width=width, experts=experts, top_k=int(config["num_experts_per_tok"]), shared_width=int(shared),
            matrices=matrices,
        )  # fmt: skip

    def weights(self) -> int:
        """Weights of the layer, router included."""
        return self._matrices(self.width * (self.experts or 1)) + self._besides()

    def active_weights(self) -> int:
        """Those that one token uses."""
        return self._matrices(self.width * (self.top_k or 1)) + self._besides()

    def flops_per_token(self) -> float:
        """Forward FLOPs of the matrix products of one token."""
        return 2.0 * self.active_weights()

    def read_weights(self, tokens: float) -> float:
        """Weights that a step over `tokens` tokens is expected to read: of the experts those that a token goes to."""
        if not self.experts:
            return self.weights()
        touched = self.experts * touched_share(self.experts, self.top_k, tokens)
        return self._matrices(self.width) * touched + self._besides()

    def _matrices(self, width: int) -> int:
        return self.matrices * self.hidden * width

    def _besides(self) -> int:
        """Router and shared experts, which every token uses."""
        return self.hidden * self.experts + self._matrices(self.shared_width)


def feed_forward_costs(config: Mapping[str, Any]) -> list[FeedForwardCost]:
    """One per layer of a model. Of a mixture's layers these are dense: the first `first_k_dense_replace`, those that
    `mlp_only_layers` names, and all but every `decoder_sparse_step`-th."""
    layers, every = int(config.get("num_hidden_layers") or 1), int(config.get("decoder_sparse_step") or 1)
    first, named = int(config.get("first_k_dense_replace") or 0), config.get("mlp_only_layers") or ()
    sparse = FeedForwardCost.of(config)
    if (every == 1 and not first and not named) or not sparse.experts:
        return [sparse] * layers
    dense = FeedForwardCost(hidden=sparse.hidden, width=int(config["intermediate_size"]), matrices=sparse.matrices)
    mixed = ((n + 1) % every == 0 and n >= first and n not in named for n in range(layers))
    return [sparse if is_sparse else dense for is_sparse in mixed]
