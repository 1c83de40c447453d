"""The projectors of Llama-SMoP as tensors of a plan and as sizes on a tape. Torch-free.

Routing is taken as even. Shapes: N tokens of both streams, K experts of a token, M = N·K pairs; D, H, O as in `projector_arms`.
"""

from __future__ import annotations

from collections.abc import Sequence

from effbench.expert_forms import INDEX
from effbench.layout import Weight
from effbench.ledger import Node
from effbench.modules.projector_arms import STREAMS, ProjectorForm
from effbench.tape import Tape, Value

WIDE = 4  # bytes of fp32


def layout_of(form: ProjectorForm) -> list[Weight]:
    """The tensors of a projector; a router is in fp32 whatever the dtype."""
    many, dense = form.banked, form.kind == "dense"
    stack = () if dense else (many,)
    count, where = (STREAMS, "projector.experts.*") if dense else (1, "projector.experts")
    found = [
        Weight(path=f"{where}.{name}", kind="experts", shape=(*stack, *shape), count=count)
        for name, shape in (
            ("w_in", (form.hidden, form.inputs)), ("b_in", (form.hidden,)), ("w_out", (form.outputs, form.hidden)),
            ("b_out", (form.outputs,)), ("gain", (form.outputs,)), ("shift", (form.outputs,)),
        )
    ]  # fmt: skip
    if not dense:
        router = (form.routers, form.experts, form.inputs)
        found.append(Weight(path="projector.router.weight", kind="router", shape=router, bits=8 * WIDE))
    return found


def project(tape: Tape, form: ProjectorForm, tokens: Sequence[int]) -> Value:
    """Pooling and projector; `tokens` of each stream, all recordings. In training the two losses hang on the result."""
    streams = [tape.new(n * form.inputs) for n in tokens]
    weights = {w.path.rpartition(".")[2]: w for w in layout_of(form)}
    if form.kind == "dense":
        return _dense(tape, form, streams, weights)
    return _mixture(tape, form, streams, weights)


def _dense(tape: Tape, form: ProjectorForm, streams: list[Value], weights: dict[str, Weight]) -> Value:
    made = []
    for number, x in enumerate(streams):
        tape.layer = number
        rows = x.elements / form.inputs
        hidden = _linear(tape, x, weights, "in", rows * form.hidden)
        hidden = tape.function(hidden, keeps_result=True)
        made.append(_norm(tape, _linear(tape, hidden, weights, "out", rows * form.outputs), weights))
    tape.layer = 0
    return tape.cat(*made)


def _linear(tape: Tape, x: Value, weights: dict[str, Weight], which: str, elements: float) -> Value:
    leaves = [weights[f"w_{which}"], weights[f"b_{which}"]]
    return tape.op(elements, x.item, (x,), (x,), leaves=leaves)


def _norm(tape: Tape, x: Value, weights: dict[str, Weight]) -> Value:
    return tape.op(x.elements, x.item, (x,), (x,), leaves=[weights["gain"], weights["shift"]])


def _mixture(tape: Tape, form: ProjectorForm, streams: list[Value], weights: dict[str, Weight]) -> Value:
    rows = sum(x.elements for x in streams) / form.inputs
    pairs = rows * form.top_k
    weight = _routed(tape, form, streams, weights["weight"], rows)
    x = tape.cat(*streams)
    if form.kind == "loop":
        return _looped(tape, form, x, weight, weights)
    plan = tape.hold(4 * pairs * INDEX)
    work = tape.hold(2 * pairs * form.hidden * x.item)  # before and after the activation
    stacks = [weights[name] for name in ("w_in", "b_in", "w_out", "b_out")]
    extra = pairs * 3 * form.hidden * x.item  # backward: hidden rows, their gradient and that of their arguments
    out = tape.op(pairs * form.outputs, x.item, (x,), (x,), leaves=stacks, extra=extra)
    if out.node:
        out.node.kept.append(tape.hold(pairs * form.hidden * x.item))  # arguments of ReLU
    del work
    # The norm in fp32 with gain and shift of each row's expert, the rows back in the order of the tokens, weighted, summed.
    unit = tape.function(tape.cast(out, WIDE))
    scaled = _by_row(tape, unit, weights["gain"], product=True)
    del unit
    normed = tape.cast(_by_row(tape, scaled, weights["shift"], product=False), x.item)
    del scaled
    back = tape.copy(normed)
    back = tape.copy(back)
    shares = tape.op(back.elements, max(back.item, weight.item), (back, weight), (back, weight))
    del back
    summed = tape.cast(tape.reduce(shares, rows * form.outputs), x.item)
    del plan, out, normed
    return summed


def _routed(tape: Tape, form: ProjectorForm, streams: list[Value], router: Weight, rows: float) -> Value:
    x = tape.cast(tape.cat(*streams), WIDE)
    logits = tape.op(rows * form.experts, WIDE, (x,), (x,), leaves=[router])
    del x
    scores = tape.op(logits.elements, WIDE, (logits,), keeps_result=True)
    weight = tape.op(rows * form.top_k, WIDE, (scores,))
    if weight.node:
        weight.node.kept += [tape.hold(rows * form.top_k * (INDEX + 3 * WIDE)), tape.hold(3 * scores.elements * WIDE)]
    return weight


def _by_row(tape: Tape, x: Value, weight: Weight, *, product: bool) -> Value:
    """x times, or plus, a row of (X, O) for each pair, gathered."""
    gathered = tape.op(x.elements, tape.item, (), leaves=[weight])
    return tape.mul(x, gathered) if product else tape.add(x, gathered)


def _looped(tape: Tape, form: ProjectorForm, x: Value, weight: Value, weights: dict[str, Weight]) -> Value:
    """One expert's rows at a time; in training all of them stay, and the experts' gradients are put together to stacks."""
    rows, item = x.elements / form.inputs, x.item
    pairs = rows * form.top_k if tape.grad else rows * form.top_k / form.banked
    w_in, w_out = (_unbound(tape, weights[name]) for name in ("w_in", "w_out"))
    total = tape.new(rows * form.outputs)
    taken = tape.op(pairs * form.inputs, item, (x,))
    hidden = tape.op(pairs * form.hidden, item, (taken, w_in), (taken,))
    hidden = tape.function(hidden, keeps_result=True)
    rows_out = tape.op(pairs * form.outputs, item, (hidden, w_out), (hidden,))
    out = _norm(tape, rows_out, weights)
    del taken, hidden, rows_out
    share = tape.op(out.elements, item, (out, weight), (out, weight))
    del total  # in place
    return tape.op(rows * form.outputs, item, (share,), passes=True)


def _unbound(tape: Tape, weight: Weight) -> Value:
    """A stack taken apart without a copy: the experts' gradients are as large as it, beside the stack that is made of them."""
    leaf = ((id(weight), 0), weight.size * tape.item)
    return Value(tape.hold(0), weight.size, tape.item, Node((), tape.item, leaves=[leaf]) if tape.grad else None)
