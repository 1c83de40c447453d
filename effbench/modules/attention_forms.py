"""Native sparse attention and the other ways to tell positions, as sizes on a tape (effbench/flow.py). Torch-free.

Each follows its module line by line: effbench/modules/nsa.py and nsa_paths.py, positions.py. Padding is left out.

Shapes: B sequences, T new tokens, S visible ones, H heads, G groups, D head dimension.
"""

from __future__ import annotations

from math import ceil

from effbench.costs import NSACost, query_heads
from effbench.expert_forms import INDEX
from effbench.forms import ATTENTION, Call, Form, attend, halves_rotated
from effbench.tape import Tape, Value

# Of native sparse attention, which takes some queries at a time.
SCORE_ELEMENTS = 1 << 24  # of scores that queries taken at once may have on a CPU
SCORE_ELEMENTS_CUDA = 1 << 27
MASKED_FACTOR = 8  # up to so many times n·l' columns the masked form is faster on a CPU (12 heads of 128 in 4 groups, fp32)
GATHER_ELEMENTS = 1 << 20  # of keys that the gather form collects at once on a CPU: what its caches hold
GATHER_ELEMENTS_CUDA = 1 << 26

Pair = tuple[Value, Value]


def sparse_attention(cost: NSACost, backend: str) -> Form:
    """Native sparse attention. Of the selected branch the form that `backend` names, or that "auto" chooses."""

    def form(tape: Tape, x: Value, call: Call) -> Value:
        rows, heads, dim = call.rows, cost.heads, cost.key_dim
        q = tape.linear(x, f"{ATTENTION}.q_proj")
        turned = halves_rotated(tape, q, call)
        keys, values = (tape.copy(tape.linear(x, f"{ATTENTION}.{name}_proj")) for name in "kv")
        size = rows * cost.groups * dim
        if cost.shared:
            raw = keys, values
            selected = recent = halves_rotated(tape, keys, call), values
        else:
            raw, selected, recent = ((tape.slice(keys, size), tape.slice(values, size)) for _ in range(3))
            selected, recent = ((halves_rotated(tape, k, call), v) for k, v in (selected, recent))
        if call.past:
            out = _decoded(tape, cost, call)
        else:
            compressed = _compressed(tape, cost, raw, call)
            if call.cache is not None:
                _kept(tape, cost, call)
            out = _attended(tape, cost, backend, x, (q, turned), (compressed, selected, recent), call)
        del turned, raw, selected, recent
        assert out.elements == rows * heads * cost.value_dim
        return tape.linear(tape.copy(out), f"{ATTENTION}.o_proj")

    return form


def _kept(tape: Tape, cost: NSACost, call: Call) -> None:
    """What a layer's cache takes: every branch in memory with room to grow (nsa_cache.py), at least 16 columns or 1 in 32."""
    assert call.cache is not None
    blocks = cost.num_blocks(call.tokens)
    tail = call.tokens - blocks * cost.stride
    parts = [call.tokens, blocks, tail] if cost.shared else [call.tokens, blocks, min(call.tokens, cost.window), tail]
    columns = sum(n + max(16, n // 32) for n in parts if n > 0)
    call.cache[tape.layer] = tape.hold(
        call.batch * cost.groups * columns * (cost.key_dim + cost.value_dim) * tape.item, "cache"
    )


def _decoded(tape: Tape, cost: NSACost, call: Call) -> Value:
    """One token: of every branch the entries it reads are copied once, or scored where they lie."""
    read = call.batch * cost.groups * cost.attended(call.visible) * (cost.key_dim + cost.value_dim)
    work = tape.hold(read * tape.item + 2 * call.batch * cost.heads * cost.attended(call.visible) * 4)
    del work
    return tape.new(call.rows * cost.heads * cost.value_dim)


def _compressed(tape: Tape, cost: NSACost, raw: Pair, call: Call) -> Pair:
    """φ of every block: the blocks overlap, so with the positions added they are a copy l/d times as large."""
    blocks = call.batch * cost.groups * max(0.0, cost.num_blocks(call.tokens))
    found = []
    for name, x in zip(("compress_keys", "compress_values"), raw, strict=True):
        path = f"{ATTENTION}.{name}"
        position = tape.weight(f"{path}.position")
        width = cost.block * (x.elements / (call.rows * cost.groups))
        placed = tape.op(blocks * width, x.item, (x,), leaves=[position] if position.trained else ())
        found.append(tape.linear(tape.function(tape.linear(placed, f"{path}.up_proj")), f"{path}.down_proj"))
        del placed
    return found[0], found[1]


def _attended(
    tape: Tape, cost: NSACost, backend: str, x: Value, queries: Pair, branches: tuple[Pair, Pair, Pair], call: Call
) -> Value:
    """The gated sum of the three branches."""
    (q, turned), (compressed, selected, recent) = queries, branches
    gates = tape.function(
        tape.linear(tape.function(tape.linear(x, f"{ATTENTION}.gate_proj.0")), f"{ATTENTION}.gate_proj.2"), keeps_result=True
    )
    gates = tape.narrowed(gates) if gates.item > q.item else gates
    gate = tape.split(gates, *(gates.elements / 3,) * 3)
    most = cost.num_selected * cost.select_block
    masked = backend == "masked" or (backend == "auto" and call.tokens <= MASKED_FACTOR * most)
    blocks = cost.num_blocks(call.tokens)
    columns = call.tokens if masked else max(blocks, cost.window)
    limit = SCORE_ELEMENTS_CUDA if tape.device == "cuda" else SCORE_ELEMENTS
    at_once = min(call.tokens, max(16, int(limit // (call.batch * cost.heads * columns))))
    out = tape.mul(gate[0], _over_blocks(tape, cost, q, compressed, call, at_once))
    if tape.device == "cuda" and backend in ("auto", "flex") and call.tokens > most:
        one = attend(tape, turned, *selected, call, cost.heads, cost.groups)
    elif masked:
        one = _masked(tape, turned, selected, call, cost.heads, call.batch * cost.groups)
    else:
        one = _gathered(tape, cost, turned, selected, call)
    out = tape.add(out, tape.mul(gate[1], one))
    del one
    two = _masked(tape, turned, recent, call, cost.heads, 1)
    return tape.add(out, tape.mul(gate[2], two))


def _over_blocks(tape: Tape, cost: NSACost, q: Value, compressed: Pair, call: Call, at_once: int) -> Value:
    """Attention over the compressed blocks: scores, masked scores, their softmax and that under the mask, in fp32; then the choice.

    Where not all queries are taken at once, none of it is kept: it is made again for the backward pass.
    """
    keys, values = compressed
    pairs = call.batch * cost.heads * at_once * cost.num_blocks(call.tokens)
    if at_once < call.tokens:
        work = tape.hold(pairs * 3 * 4)
        del work
        return tape.op(q.elements, q.item, (q, keys, values), (q, keys, values), extra=pairs * 4 * 4)
    scores = tape.cast(tape.matmul(tape.copy(tape.scale(q)), keys, pairs), 4)
    p = tape.scale(tape.op(pairs, 4, (tape.scale(scores),), keeps_result=True))
    out = tape.matmul(tape.cast(p, values.item), values, q.elements)
    del scores
    importance = tape.hold(4 * pairs * 4 / (cost.heads / cost.groups))  # summed over a group, padded, in overlapping parts
    del importance
    return out


def _masked(tape: Tape, q: Value, pair: Pair, call: Call, heads: int, masks: float) -> Value:
    """A fused kernel over all columns under a mask, which it reads as numbers."""
    q = tape.narrowed(tape.copy(q))
    k, v = (tape.narrowed(y) for y in pair)
    allowed = tape.hold(masks * call.tokens * call.visible)
    mask = tape.new(masks * call.tokens * call.visible, q.item)
    sums = tape.hold(call.rows * heads * 4)
    out = tape.op(q.elements, q.item, (q, k, v), (q, k, v, mask), keeps_result=True)
    if out.node:
        out.node.kept.append(sums)
    del allowed
    return out


def _gathered(tape: Tape, cost: NSACost, q: Value, selected: Pair, call: Call) -> Value:
    """The selected blocks of some queries at a time, collected; in training they are collected again."""
    keys, values = selected
    limit = GATHER_ELEMENTS_CUDA if tape.device == "cuda" else GATHER_ELEMENTS
    blocks = min(cost.num_selected, ceil(call.tokens / cost.select_block))
    columns = blocks * cost.select_block
    per_query = call.batch * cost.groups * columns * cost.key_dim
    step = min(call.tokens, max(1, limit // per_query))
    scores = call.batch * cost.heads * step * columns
    index = call.batch * cost.groups * step * columns
    work = step * per_query * 2 * q.item + scores * (3 * 4 + q.item) + index * (2 * INDEX + 1)
    beside = tape.hold(work)
    del beside
    chosen = tape.hold(call.batch * cost.groups * call.tokens * blocks * (INDEX + 1))
    parts = tape.op(q.elements, q.item, (q, keys, values), (q, keys, values), extra=2 * work)
    if parts.node:
        parts.node.kept.append(chosen)
    return tape.copy(parts) if step < call.tokens else parts


def bias_mask(tape: Tape, call: Call) -> Value:
    """T5's bias by distance as one additive mask (1, H, T, S) of all layers: looked up, laid out by head, masked."""
    heads, scores = query_heads(tape.layout.config), call.tokens * call.visible
    weight = tape.weight("model.positions.weight")
    index = tape.hold(scores * INDEX)
    looked_up = tape.op(heads * scores, tape.width(weight), (), leaves=[weight] if weight.trained else ())
    if looked_up.node:
        looked_up.node.kept.append(index)
    return tape.copy(tape.op(heads * scores, looked_up.item, (looked_up,)))


def learned_rows(tape: Tape, call: Call) -> Value:
    """A learned row for every position, the same for all sequences."""
    weight = tape.weight("model.positions.weight")
    return tape.op(call.tokens * weight.shape[1], tape.width(weight), (), leaves=[weight] if weight.trained else ())


def sinusoidal_rows(tape: Tape, call: Call) -> Value:
    """Angles, sines and cosines in fp32, and the rows that they make."""
    size = call.tokens * int(tape.layout.config["hidden_size"])
    work = tape.hold(2 * size * 4)
    rows = tape.new(size, 4)
    del work
    return rows
