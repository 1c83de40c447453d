"""Bloom's layers as sizes on a tape (effbench/flow.py), in the order of the library's modules and of inserted_experts.py. Torch-free.

Attention has no fused kernel: scores carry the biases of ALiBi. Autocast runs norms in fp32.
Shapes: T tokens, N = T·K pairs of token and expert, D hidden size, F width of an expert.
"""

from __future__ import annotations

from effbench.costs import FeedForwardCost, query_heads
from effbench.forms import Call, remembered
from effbench.layout import Weight
from effbench.tape import Tape, Value

LAYER = "transformer.h.*"
LOOP = "eager"  # the value of `expert_kernels` that stands for a loop over the experts
MLP, INDEX = f"{LAYER}.mlp", 8


def bloom_layer(tape: Tape, x: Value, cost: FeedForwardCost, call: Call) -> Value:
    """Norm, attention, norm, feed-forward layer with or without experts; the first one also norms the embeddings."""
    if tape.layer == 0:
        x = layer_norm(tape, x, "transformer.word_embeddings_layernorm")
    h = tape.add(_attention(tape, layer_norm(tape, x, f"{LAYER}.input_layernorm"), call), x)
    del x
    normed = layer_norm(tape, h, f"{LAYER}.post_attention_layernorm")
    if not cost.experts:
        return tape.add(h, _dense(tape, normed, MLP))
    out = _mixture(tape, normed, h, cost)
    if tape.find(f"{MLP}.gate") is None:
        return out
    again = layer_norm(tape, out, f"{LAYER}.post_attention_layernorm")
    return tape.add(out, _dense(tape, again, f"{MLP}.dense"))


def layer_norm(tape: Tape, x: Value, path: str) -> Value:
    """LayerNorm; keeps its input and two numbers a row."""
    weight = tape.weight(f"{path}.weight")
    if tape.autocast:
        x = tape.cast(x, 4)
    leaves = [weight, tape.weight(f"{path}.bias")] if weight.trained else []
    out = tape.op(x.elements, x.item, (x,), (x,), leaves=leaves)
    if out.node:
        out.node.kept.append(tape.hold(2 * 4 * x.elements / weight.shape[0]))
    return out


def _attention(tape: Tape, x: Value, call: Call) -> Value:
    path = f"{LAYER}.self_attention"
    every = tape.linear(x, f"{path}.query_key_value")
    q, k, v = tape.split(every, *[every.elements / 3] * 3)
    q = tape.copy(q)
    if call.cache is not None:
        k, v = remembered(tape, k, v, call)
        if call.fixed:  # its places for tokens lie apart, and products read them together
            k, v = tape.copy(k), tape.copy(v)
    else:
        k, v = tape.copy(k), tape.copy(v)
    scores = tape.matmul(q, k, call.batch * query_heads(tape.layout.config) * call.tokens * call.visible)
    weights = tape.add(scores, call.mask) if call.mask is not None else scores
    probs = tape.cast(tape.op(weights.elements, 4, (weights,), keeps_result=True), q.item)
    call.lingering.append(probs)
    out = tape.copy(tape.matmul(probs, v, q.elements))
    return tape.linear(out, f"{path}.dense")


def _dense(tape: Tape, x: Value, path: str) -> Value:
    """Two matrices and Bloom's own gelu, which is written out and keeps its argument alone."""
    hidden = tape.linear(x, f"{path}.dense_h_to_4h")
    work = tape.hold(4 * hidden.elements * hidden.item)
    del work
    hidden = tape.function(hidden, extra=5 * hidden.elements * hidden.item)
    return tape.linear(hidden, f"{path}.dense_4h_to_h")


def _mixture(tape: Tape, x: Value, h: Value, cost: FeedForwardCost) -> Value:
    """h + Σ_k weight · expert(x), the gate in the weights; a gate for each channel keeps the experts' sum besides."""
    rows = x.elements / cost.hidden
    scores, pairs = rows * cost.experts, rows * cost.top_k
    wide, router = tape.cast(x, 4), tape.weight(f"{MLP}.router.weight")
    trained = router.trained and tape.grad
    logits = tape.op(scores, 4, (wide,), (wide,) if trained else (), leaves=[router] if trained else ())
    chosen = tape.op(scores, 4, (logits,), keeps_result=True)
    weight = tape.op(pairs, 4, (chosen,))
    if weight.node:  # the choice, and what the balance loss keeps
        weight.node.kept += [logits.storage, tape.hold(pairs * (INDEX + 3 * 4) + 2 * scores * 4)]
    gate = tape.find(f"{MLP}.gate")
    apart = gate is not None and gate.shape[0] > 1
    if gate is not None and not apart:
        weight = tape.op(pairs, 4, (weight,), (weight,), leaves=[gate] if gate.trained and tape.grad else ())
    x = tape.narrowed(x)
    total = _experts(tape, x, weight, cost, None if apart or h.item != x.item else h)
    if gate is not None and apart:
        leaves = [gate] if gate.trained and tape.grad else []
        total = tape.op(total.elements, h.item, (total,), (total,), leaves=leaves)
    return total if not apart and h.item == x.item else tape.add(h, total)


def _experts(tape: Tape, x: Value, weight: Value, cost: FeedForwardCost, add: Value | None) -> Value:
    """The kernels: one operator that keeps its input, the routing and the arguments of the activation (N, F)."""
    stacks = [tape.weight(f"{MLP}.experts.{name}") for name in ("w_in", "b_in", "w_out", "b_out")]
    casts = [(stack, tape.cast_weight(stack)) for stack in stacks]
    values = [cast for _, cast in casts if cast is not None]
    leaves: list[Weight] = [stack for stack, cast in casts if cast is None and stack.trained]
    pairs, item = weight.elements, x.item
    if tape.layout.config.get("expert_kernels") == LOOP:
        return _looped(tape, x, weight, casts, cost, add)
    plan = tape.hold(4 * pairs * INDEX)
    work = tape.hold(pairs * (cost.width + cost.hidden) * item)  # hidden rows (N, F) and products (N, D)
    extra = pairs * (3 * cost.width + cost.hidden) * item  # hidden rows, their gradient and that of the arguments; rows (N, D)
    inputs = [x, weight, *values]
    out = tape.op(x.elements, item, (*inputs, *(() if add is None else (add,))), inputs, leaves=leaves, extra=extra)
    if out.node:
        out.node.kept += [tape.hold(pairs * cost.width * item), tape.hold(2 * pairs * INDEX)]
    del work, plan
    return out


def _looped(
    tape: Tape, x: Value, weight: Value, casts: list[tuple[Weight, Value | None]], cost: FeedForwardCost, add: Value | None
) -> Value:
    """The loop in plain torch, one expert after the other; in training all experts' rows stay.

    The experts' gradients are there one by one before they are put together in those of the stacks.
    """
    values = [cast for _, cast in casts if cast is not None]
    leaves = [stack for stack, cast in casts if cast is None and stack.trained]
    pairs = weight.elements if tape.grad else weight.elements / cost.experts
    item, stacks = x.item, sum(stack.size / stack.count for stack, _ in casts) * x.item
    hidden, wide = pairs * cost.width * item, pairs * cost.hidden
    # The rows, the activation's argument and its result, the products, and these weighted in fp32.
    work = tape.hold(2 * hidden + wide * (2 * item + 4))
    out = tape.op(x.elements, item, (x, weight, *values), (x, weight, *values), leaves=leaves, extra=stacks)
    if out.node:
        out.node.kept.append(tape.hold(2 * hidden + 2 * wide * item + 4 * pairs * INDEX))
    del work
    return out if add is None else tape.add(add, out)
