"""Mixtures of experts as sizes on a tape: router, the code that runs the experts, shared experts. Torch-free.

Routing is taken as even. Shapes: T tokens, K experts of a token, N = T·K pairs, E experts, D hidden size, F width of an expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from effbench.costs import FeedForwardCost
from effbench.layout import Weight
from effbench.tape import Tape, Value

if TYPE_CHECKING:
    from collections.abc import Callable

INDEX = 8  # bytes of an index
MLP = "model.layers.*.mlp"
OWN = "effbench"
FEW_ROWS = 64  # of an expert


def mixture(tape: Tape, x: Value, cost: FeedForwardCost, gated: Callable[[Tape, Value, str], Value]) -> Value:
    """Σ_k weight · expert(x) + shared(x), in this project's form or the library's, which adds the shared experts afterwards."""
    own = tape.find(f"{MLP}.experts.w_in") is not None
    config = tape.layout.config
    kernels = str(config.get("expert_kernels") or (OWN if own else "grouped_mm"))
    weight = routed(tape, x, cost, own=own)
    shared = next(
        (name for name in ("shared", "shared_expert", "shared_experts") if tape.find(f"{MLP}.{name}.up_proj.weight")), ""
    )
    if own:
        w_in, w_out = tape.weight(f"{MLP}.experts.w_in"), tape.weight(f"{MLP}.experts.w_out")
        add = gated(tape, x, f"{MLP}.{shared}") if shared else None
        return experts(tape, x, weight, w_in, w_out, cost, kernels, add)
    w_in, w_out = tape.weight(f"{MLP}.experts.gate_up_proj"), tape.weight(f"{MLP}.experts.down_proj")
    out = experts(tape, x, weight, w_in, w_out, cost, kernels, None)
    return tape.add(out, gated(tape, x, f"{MLP}.{shared}")) if shared else out


def routed(tape: Tape, x: Value, cost: FeedForwardCost, *, own: bool) -> Value:
    """The routing weights (T, K), in fp32. In training this project's router keeps scores and logits for its two losses too."""
    rows = x.elements / cost.hidden
    scores = rows * cost.experts
    if own:
        x = tape.cast(x, 4)
        router = tape.weight(f"{MLP}.router.weight")
        logits = tape.op(scores, 4, (x,), (x,) if router.trained else (), leaves=[router] if router.trained else ())
    else:
        router = tape.find(f"{MLP}.gate.weight") or tape.weight(f"{MLP}.router.weight")
        logits = tape.matrix(x, router, scores)
    chosen = tape.op(scores, 4, (logits,), keeps_result=True)
    weight = tape.op(rows * cost.top_k, 4, (chosen,))
    if weight.node:
        weight.node.kept.append(tape.hold(rows * cost.top_k * (INDEX + 3 * 4)))
        if own:
            weight.node.kept += [logits.storage, tape.hold(2 * scores * 4)]
    return weight


def experts(
    tape: Tape, x: Value, weight: Value, w_in: Weight, w_out: Weight, cost: FeedForwardCost, kernels: str, add: Value | None
) -> Value:
    """The experts' weighted sum (T, D), with what the code that runs them makes on the way."""
    x = tape.narrowed(x)
    if w_in.bits is not None and w_in.bits < 16:
        return _packed(tape, x, weight, cost, add)
    stacks = [_stack(tape, w) for w in (w_in, w_out)]
    run = {"grouped_mm": _grouped, "batched_mm": _batched, "eager": _looped}.get(kernels, _own)
    return run(tape, x, weight, stacks, cost, add)


Stack = tuple[
    Weight, Value | None
]  # a stack of weights, and what stands in its place: a copy in another width, or an adapted one


def _stack(tape: Tape, weight: Weight) -> Stack:
    """One stack as the product reads it; peft adds B A to an adapted one, which is a copy of the whole."""
    adapter = tape.find(f"{weight.path}.adapter")
    if adapter is None:
        return weight, tape.cast_weight(weight)
    down, up, _ = tape.halves(weight, adapter)
    halves = [tape.op(half.size / half.count, 4, (), leaves=[half]) for half in (down, up)]
    narrow = [tape.cast(half, tape.width(weight)) for half in halves]
    return weight, tape.op(weight.size / weight.count, tape.width(weight), narrow, narrow)


def _of(stack: Stack) -> tuple[tuple[Value, ...], tuple[Weight, ...]]:
    """What a product with a stack takes as input, and the weights whose gradient it makes itself."""
    weight, instead = stack
    if instead is not None:
        return (instead,), ()
    return (), (weight,) if weight.trained else ()


def _own(tape: Tape, x: Value, weight: Value, stacks: list[Stack], cost: FeedForwardCost, add: Value | None) -> Value:
    """These kernels: one operator that keeps its input, the routing and the activations' arguments (N, 2F)."""
    pairs, item = weight.elements, x.item
    plan = tape.hold(4 * pairs * INDEX)
    inputs, leaves = [x, weight], list[Weight]()
    for stack in stacks:
        values, weights = _of(stack)
        inputs += values
        leaves += weights
    work = tape.hold(pairs * (cost.width + cost.hidden) * item)  # hidden rows (N, F) and products (N, D)
    # Backward: hidden rows and their gradient (N, F), the gradients of the arguments (N, 2F) and of the rows (N, D).
    extra = pairs * (4 * cost.width + cost.hidden) * item
    out = tape.op(x.elements, item, (*inputs, *(() if add is None else (add,))), inputs, leaves=leaves, extra=extra)
    if out.node:
        out.node.kept += [tape.hold(pairs * 2 * cost.width * item), tape.hold(2 * pairs * INDEX)]
    del work, plan
    return out


def _packed(tape: Tape, x: Value, weight: Value, cost: FeedForwardCost, add: Value | None) -> Value:
    """These kernels on 8- or 4-bit stacks, which take no gradient: where no expert can have many rows, products as the codes lie.

    Else an expert's weights are made numbers, one expert at a time, and the rows are weighted in fp32.
    """
    pairs, item, width = weight.elements, x.item, cost.width
    plan = tape.hold(4 * pairs * INDEX)
    if pairs <= FEW_ROWS:
        work = tape.hold(pairs * (width + cost.hidden) * item)
    else:
        work = tape.hold(pairs * (2 * width + 2 * cost.hidden) * item + pairs * cost.hidden * 4 + x.elements * 4)
    out = tape.op(x.elements, item, (x, weight), (x,), extra=3 * width * cost.hidden * item)
    del work, plan
    return out if add is None else tape.add(out, add)


def _grouped(tape: Tape, x: Value, weight: Value, stacks: list[Stack], cost: FeedForwardCost, add: Value | None) -> Value:
    """The library's grouped products: rows are collected (N, D), multiplied, gated, multiplied, weighted and put back."""
    pairs, hidden, width = weight.elements, cost.hidden, cost.width
    index = tape.hold(4 * pairs * INDEX)
    rows = _kept_beside(tape, tape.op(pairs * hidden, x.item, (x,)), pairs * INDEX)
    both = _product(tape, rows, stacks[0], pairs * 2 * width)
    gate, value = tape.split(both, pairs * width, pairs * width)
    inner = tape.mul(tape.function(gate), value)
    del both, gate, value
    out = _product(tape, inner, stacks[1], pairs * hidden)
    del inner
    return _put_back(tape, out, weight, x, add, index=index, sorts=True)


def _product(tape: Tape, rows: Value, stack: Stack, elements: float, *, extra: float = 0.0) -> Value:
    values, leaves = _of(stack)
    return tape.op(elements, rows.item, (rows, *values), (rows, *values), leaves=leaves, extra=extra)


def _put_back(
    tape: Tape, out: Value, weight: Value, x: Value, add: Value | None, *, index: object = None, sorts: bool = False
) -> Value:
    """Rows times their weights, in the order of the tokens, summed."""
    scaled = tape.op(out.elements, max(out.item, weight.item), (out, weight), (out, weight))
    del out
    if sorts:
        scaled = _kept_beside(tape, tape.op(scaled.elements, scaled.item, (scaled,)), weight.elements * INDEX)
    summed = tape.cast(tape.reduce(scaled, x.elements), x.item)
    return summed if add is None else tape.add(summed, add)


def _batched(tape: Tape, x: Value, weight: Value, stacks: list[Stack], cost: FeedForwardCost, add: Value | None) -> Value:
    """One product for each pair of token and expert, with a copy of that expert's weights."""
    pairs, hidden, width = weight.elements, cost.hidden, cost.width
    rows = tape.op(pairs * hidden, x.item, (x,))
    copies = _copies(tape, stacks[0], pairs * 2 * width * hidden, x.item)
    both = tape.product(rows, copies, pairs * 2 * width)
    gate, value = tape.split(both, pairs * width, pairs * width)
    inner = tape.mul(tape.function(gate), value)
    copies = _copies(tape, stacks[1], pairs * width * hidden, x.item)
    out = tape.product(inner, copies, pairs * hidden)
    return _put_back(tape, out, weight, x, add)


def _copies(tape: Tape, stack: Stack, elements: float, item: float) -> Value:
    values, leaves = _of(stack)
    return tape.op(elements, item, values, leaves=leaves)


def _looped(tape: Tape, x: Value, weight: Value, stacks: list[Stack], cost: FeedForwardCost, add: Value | None) -> Value:
    """The library's loop, one expert after the other: a mask (E, K, T) of indices; in training all experts' rows stay.

    The gradient of one expert's weights is a whole stack, zero elsewhere, and is added to the others' in another one.
    """
    wholes = [2 * w.size / w.count * x.item for w, _ in stacks]
    mask = tape.hold(weight.elements * cost.experts * INDEX)
    total = tape.new(x.elements, x.item)
    pairs = weight.elements if tape.grad else weight.elements / cost.experts
    rows = _kept_beside(tape, tape.op(pairs * cost.hidden, x.item, (x,)), 2 * pairs * INDEX)
    both = _product(tape, rows, stacks[0], pairs * 2 * cost.width, extra=wholes[0])
    gate, value = tape.split(both, pairs * cost.width, pairs * cost.width)
    out = _product(tape, tape.mul(tape.function(gate), value), stacks[1], pairs * cost.hidden, extra=wholes[1])
    scaled = tape.op(out.elements, max(out.item, weight.item), (out, weight), (out, weight))
    total = tape.op(total.elements, total.item, (scaled,), passes=True)
    del mask
    return total if add is None else tape.add(total, add)


def _kept_beside(tape: Tape, x: Value, nbytes: float) -> Value:
    if x.node:
        x.node.kept.append(tape.hold(nbytes))
    return x
