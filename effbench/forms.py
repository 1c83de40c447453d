"""The forms that layers of decoders have, as sizes on a tape: what each makes in which order. Torch-free.

A form is a function of the tape, its input and the call, in the order of the module that it stands for; its names are those of the
layout. What it keeps for the backward pass, and what is alive at once, follow from that.

Shapes: B sequences, T new tokens of each, S visible ones, E hidden size, H heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from effbench.costs import FeedForwardCost, MLACost, SoftmaxCost
from effbench.expert_forms import mixture
from effbench.tape import Tape, Value

ATTENTION, FEED_FORWARD = "model.layers.*.self_attn", "model.layers.*.mlp"
DEEPSEEK = ("q_a_layernorm", "kv_a_layernorm", "kv_a_proj_with_mqa")


@dataclass
class Call:
    """One forward: T new tokens of B sequences after `past` ones."""

    batch: int
    tokens: int
    past: int = 0
    cache: dict[int, Any] | None = None  # what each layer keeps of the tokens, None: nothing is kept
    mask: Value | None = None  # added to all scores
    turned_item: float = 4.0  # bytes of an element of the cosines
    lingering: list[Value] = field(default_factory=list)  # results beside the layer's, alive to its end
    beside: list[Any] = field(default_factory=list)  # what all layers read
    fixed: bool = False  # whether the cache lies in memory that does not move

    @property
    def rows(self) -> int:
        """New tokens of all sequences."""
        return self.batch * self.tokens

    @property
    def visible(self) -> int:
        return self.past + self.tokens


Form = Callable[[Tape, Value, Call], Value]


def rms_norm(tape: Tape, x: Value, path: str, width: int) -> Value:
    """RMSNorm as the library's models write it, in fp32: weight · (x · rsqrt(mean(x²) + ε))."""
    wide, rows = tape.cast(x, 4), x.elements / width
    mean = tape.reduce(tape.function(wide), rows)
    scaled = tape.cast(tape.mul(wide, tape.function(mean, keeps_result=True)), x.item)
    weight = tape.weight(f"{path}.weight")
    item = max(scaled.item, tape.width(weight))
    if not weight.trained:
        return tape.op(scaled.elements, item, (scaled,))
    return tape.op(scaled.elements, item, (scaled,), (scaled,), extra=scaled.elements * item, leaves=[weight])


def rotated(tape: Tape, x: Value, call: Call) -> Value:
    """x · cos + rotate_half(x) · sin; the result has the wider of the two widths."""
    item = max(x.item, call.turned_item)
    straight = tape.op(x.elements, item, (x,))
    half = tape.scale(tape.slice(x, x.elements / 2))
    turned = tape.cat(half, tape.slice(x, x.elements / 2))
    del half
    across = tape.op(x.elements, item, (turned,))
    del turned
    return tape.add(straight, across)


def softmax_attention(tape: Tape, x: Value, call: Call) -> Value:
    """Queries, keys and values, turned and kept; scores; output. phi3 has one matrix for the three, some families norms on two."""
    cost = SoftmaxCost.of(tape.layout.config)
    if tape.find(f"{ATTENTION}.qkv_proj.weight"):
        all_three = tape.linear(x, f"{ATTENTION}.qkv_proj")
        sizes = (call.rows * n * cost.dim for n in (cost.heads, cost.groups, cost.groups))
        q, k, v = (tape.slice(all_three, size) for size in sizes)
        del all_three
    else:
        q, k, v = (tape.linear(x, f"{ATTENTION}.{name}_proj") for name in "qkv")
    if found := tape.find(f"{ATTENTION}.q_norm.weight"):
        q, k = (rms_norm(tape, y, f"{ATTENTION}.{name}", found.shape[0]) for name, y in (("q_norm", q), ("k_norm", k)))
    q, k = rotated(tape, q, call), rotated(tape, k, call)
    if call.cache is not None:
        k, v = remembered(tape, k, v, call, cost.window if cost.windowed == 1 else None)
    out = attend(tape, q, k, v, call, cost.heads, cost.groups)
    return tape.linear(out, f"{ATTENTION}.o_proj")


def remembered(tape: Tape, k: Value, v: Value, call: Call, window: int | None = None) -> tuple[Value, Value]:
    """Keys and values with those of the past, which the library's growing cache copies at every call; a window keeps its own."""
    assert call.cache is not None
    held: list[Value] = call.cache.setdefault(tape.layer, [])
    if call.fixed:
        return held[0], held[1]
    for place, new in enumerate((k, v)):
        if not call.past:
            held.append(tape.op(new.elements, new.item, (new,), kind="cache"))
        else:
            held[place] = tape.new(held[place].elements + new.elements, new.item, "cache")  # in the old one's place
    keys, values = held
    if window and call.visible > window:
        held[:] = (tape.new(y.elements * window / call.visible, y.item, "cache") for y in held)
    return keys, values


def halves_rotated(tape: Tape, x: Value, call: Call) -> Value:
    """As effbench/modules/rotation.py: both halves in one split, and back to the width of x."""
    item = max(x.item, call.turned_item)
    one, two = tape.split(x, x.elements / 2, x.elements / 2)
    straight = tape.op(x.elements, item, (x,))
    turned = tape.cat(tape.scale(two), one)
    across = tape.op(x.elements, item, (turned,))
    del turned
    return tape.cast(tape.add(straight, across), x.item)


def latent_attention(cost: MLACost, *, own: bool = True) -> Form:
    """Multi-head latent attention with one cached latent for all heads: this project's, or DeepSeek's as the library has it.

    This project's decodes on the latents themselves; the library's makes keys and values of all of them again for every token.
    """
    query_norm, key_norm, latents = ("q_a_norm", "kv_a_norm", "kv_a_proj") if own else DEEPSEEK

    def form(tape: Tape, x: Value, call: Call) -> Value:
        rows, heads = call.rows, cost.heads
        if cost.q_rank:
            q = tape.linear(x, f"{ATTENTION}.q_a_proj")
            q = tape.linear(rms_norm(tape, q, f"{ATTENTION}.{query_norm}", cost.q_rank), f"{ATTENTION}.q_b_proj")
        else:
            q = tape.linear(x, f"{ATTENTION}.q_proj")
        straight, turned = tape.split(q, rows * heads * cost.dim, rows * heads * cost.rope_dim)
        both = tape.linear(x, f"{ATTENTION}.{latents}")
        latent, key = tape.split(both, rows * cost.kv_rank, rows * cost.rope_dim)
        del both
        turned, key = halves_rotated(tape, turned, call), halves_rotated(tape, key, call)
        kept = tape.cat(rms_norm(tape, latent, f"{ATTENTION}.{key_norm}", cost.kv_rank), key)
        if call.cache is not None:
            kept, _ = remembered(tape, kept, Value(kept.storage, 0, kept.item), call)
        decodes = own and call.past
        out = _absorbed(tape, cost, call) if decodes else _expanded(tape, cost, straight, turned, kept, call)
        return tape.linear(out, f"{ATTENTION}.o_proj")

    return form


def _expanded(tape: Tape, cost: MLACost, straight: Value, turned: Value, kept: Value, call: Call) -> Value:
    """Keys and values of every visible token; values as wide as keys for a fused kernel."""
    visible, heads = call.batch * call.visible, cost.heads
    latent, key = tape.split(kept, visible * cost.kv_rank, visible * cost.rope_dim)
    expanded = tape.linear(latent, f"{ATTENTION}.kv_b_proj")
    keys, values = tape.split(expanded, visible * heads * cost.dim, visible * heads * cost.value_dim)
    q = tape.cat(straight, turned)
    width = cost.dim + cost.rope_dim
    k = tape.op(visible * heads * width, max(keys.item, key.item), (keys, key), passes=True)
    v = values
    if tape.layout.config.get("_attn_implementation") != "eager" and width > cost.value_dim:
        v = tape.op(visible * heads * width, values.item, (values,))
    out = attend(tape, q, k, v, call, heads, heads)
    return tape.copy(tape.slice(out, call.rows * heads * cost.value_dim)) if v is not values else out


def _absorbed(tape: Tape, cost: MLACost, call: Call) -> Value:
    """Scores and weighted sums over the latents; small beside the cache for one token."""
    rows, heads = call.rows, cost.heads
    query = tape.new(2 * rows * heads * (cost.kv_rank + cost.rope_dim))
    scores = tape.new(2 * call.batch * heads * call.tokens * call.visible, 4)
    mixed = tape.new(rows * heads * cost.kv_rank)
    out = tape.new(rows * heads * cost.value_dim)
    del query, scores, mixed
    return out


def attend(tape: Tape, q: Value, k: Value, v: Value, call: Call, heads: int, groups: int, *, value_share: float = 1.0) -> Value:
    """softmax(q · k) v. A fused kernel keeps its operands, its result and a number for each query; the plain form keeps scores."""
    out = q.elements
    if call.mask is not None and call.mask.node is not None:  # no fused kernel has a gradient for its mask
        q, k = tape.scale(q), tape.scale(k)
        weights = tape.add(tape.matmul(q, k, call.batch * heads * call.tokens * call.visible), call.mask)
        return tape.copy(tape.matmul(tape.op(weights.elements, weights.item, (weights,), keeps_result=True), v, out))
    if tape.layout.config.get("_attn_implementation") != "eager":
        q, k, v = (tape.narrowed(y) for y in (q, k, v))
        sums = tape.hold(call.rows * heads * 4)
        result = tape.op(out, q.item, (q, k, v), (q, k, v), keeps_result=True)
        if result.node:
            result.node.kept.append(sums)
            if call.mask is not None:
                result.node.kept.append(call.mask.storage)
        return result
    scores = call.batch * heads * call.tokens * call.visible
    if groups < heads:
        k, v = (tape.op(y.elements * heads / groups, y.item, (y,)) for y in (k, v))
    raw = tape.matmul(q, k, scores)
    weights = tape.scale(raw)
    del raw
    if call.mask is not None:
        weights = tape.add(weights, call.mask)
    weights = tape.op(scores, 4, (weights,), keeps_result=True)
    weights = tape.cast(weights, q.item)
    call.lingering.append(weights)
    return tape.copy(tape.matmul(weights, v, out))


def gated(tape: Tape, x: Value, path: str) -> Value:
    """down(act(gate(x)) · up(x)); phi3 has one matrix for gate and up."""
    if tape.find(f"{path}.gate_up_proj.weight"):
        both = tape.linear(x, f"{path}.gate_up_proj")
        gate, up = tape.split(both, both.elements / 2, both.elements / 2)
        up = tape.mul(up, tape.function(gate))
        return tape.linear(up, f"{path}.down_proj")
    return tape.linear(
        tape.mul(tape.function(tape.linear(x, f"{path}.gate_proj")), tape.linear(x, f"{path}.up_proj")), f"{path}.down_proj"
    )


def feed_forward(tape: Tape, x: Value, cost: FeedForwardCost) -> Value:
    """The layer that a cost describes: dense, or a mixture of experts of this project's or of the library's form."""
    if not cost.experts:
        return gated(tape, x, FEED_FORWARD)
    return mixture(tape, x, cost, gated)
