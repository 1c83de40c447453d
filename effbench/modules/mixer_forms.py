"""Mamba-2 and RWKV-4 layers as sizes on a tape (effbench/flow.py), line by line as the library and mixers.py have them. Torch-free.

Shapes: B sequences, T tokens, E hidden size, I inner width, H heads, P = I / H, N state size, l tokens of a chunk.
"""

from __future__ import annotations

from math import ceil

from effbench.flow import Flow
from effbench.forms import Call, rms_norm
from effbench.modules.mixer_costs import MambaSize, RWKVSize
from effbench.tape import Tape, Value

CHUNK = 8  # tokens of a chunk of the WKV recurrence: fewer steps in Python, C times the elementwise work
MAMBA_CHUNK = 64  # tokens of a chunk of Mamba-2's matrix form
MAMBA, RWKV = "backbone.layers.*", "rwkv.blocks.*"


def use_mamba(flow: Flow, size: MambaSize) -> None:
    """Put Mamba-2 layers of this size into a flow."""

    def block(tape: Tape, x: Value, call: Call) -> Value:
        return tape.add(x, _mamba_mixer(tape, rms_norm(tape, x, f"{MAMBA}.norm", size.hidden), size, call))

    flow.block, flow.num_layers, flow.turned = block, size.layers, 0
    flow.embedding, flow.head = "backbone.embeddings", "lm_head"
    flow.normed = lambda tape, x: rms_norm(tape, x, "backbone.norm_f", size.hidden)


def use_rwkv(flow: Flow, size: RWKVSize) -> None:
    """Put RWKV-4 layers of this size into a flow."""

    def block(tape: Tape, x: Value, call: Call) -> Value:
        if tape.layer == 0:
            x = _layer_norm(tape, x, "rwkv.blocks.0.pre_ln")
        x = tape.add(x, _time_mix(tape, _layer_norm(tape, x, f"{RWKV}.ln1"), size, call))
        return tape.add(x, _channel_mix(tape, _layer_norm(tape, x, f"{RWKV}.ln2"), call))

    flow.block, flow.num_layers, flow.turned = block, size.layers, 0
    flow.embedding, flow.head = "rwkv.embeddings", "head"
    flow.normed = lambda tape, x: _layer_norm(tape, x, "rwkv.ln_out")


def _mamba_mixer(tape: Tape, x: Value, size: MambaSize, call: Call) -> Value:
    rows, path = call.rows, f"{MAMBA}.mixer"
    projected = tape.linear(x, f"{path}.in_proj")
    gate, mixed, dt = tape.split(projected, rows * size.inner, rows * size.channels, rows * size.heads)
    del projected
    if call.cache is not None and not call.past:
        state = 4 * size.inner * size.state + tape.item * size.kernel * size.channels
        call.cache[tape.layer] = tape.hold(call.batch * state, "cache")
    if call.past:  # the recurrence of one token: decay, update and readout of the state in fp32
        work = tape.hold(3 * 4 * call.batch * size.inner * size.state)
        del work
        out = tape.new(rows * size.inner, 4)
    else:
        weight = tape.weight(f"{path}.conv1d.weight")
        longer = call.batch * size.channels * (call.tokens + size.kernel - 1)
        mixed = tape.op(longer, mixed.item, (mixed,), (mixed,), leaves=[weight] if weight.trained else ())
        mixed = tape.function(tape.slice(mixed, rows * size.channels))
        hidden, left, right = tape.split(mixed, rows * size.inner, rows * size.state, rows * size.state)
        del mixed
        out = _chunk_scan(tape, hidden, dt, (left, right), size, call)
        del hidden, left, right
    return tape.linear(_gated_norm(tape, out, gate, f"{path}.norm"), f"{path}.out_proj")


def _chunk_scan(tape: Tape, x: Value, dt: Value, pair: tuple[Value, Value], size: MambaSize, call: Call) -> Value:
    """Chunks of l tokens in fp32: the scores within a chunk (H·l for each token), states between chunks; B and C for every head."""
    chunks = ceil(call.tokens / MAMBA_CHUNK)
    rows = call.batch * chunks * MAMBA_CHUNK
    step = tape.function(tape.function(tape.add(dt, dt)))
    x = tape.cast(x, 4)
    left, right = (tape.op(call.rows * size.heads * size.state, 4, (tape.cast(y, 4),)) for y in pair)
    skip = tape.scale(_kept(tape, tape.copy(x)))
    x = tape.copy(tape.mul(x, step))
    left, right = tape.copy(left), tape.copy(right)
    scores = rows * size.heads * MAMBA_CHUNK
    decays = tape.scale(tape.scale(tape.new(scores, 4)))
    decays = tape.op(scores, 4, (step,), keeps_result=True)
    similar = _einsum(tape, right, left, scores)
    weights = tape.mul(similar, decays)
    within = _einsum(tape, weights, x, rows * size.inner)
    decayed = tape.op(left.elements, 4, (left, step), (left,))
    inside = call.batch * size.inner * size.state  # of one chunk's state
    states = tape.cat(tape.new(inside, 4), _einsum(tape, decayed, x, inside * chunks))
    starts = tape.slice(_einsum(tape, tape.new(0), states, inside * (chunks + 1)), inside * chunks)
    across = _einsum(tape, right, starts, rows * size.inner)
    across = tape.op(across.elements, 4, (across, step), (across,))
    return tape.add(tape.copy(tape.add(within, across)), skip)


def _einsum(tape: Tape, x: Value, y: Value, elements: float) -> Value:
    """A batched product, for which both sides are laid out anew."""
    return tape.product(tape.copy(x), tape.copy(y), elements)


def _kept(tape: Tape, x: Value) -> Value:
    """x, kept for the gradient of a trained factor."""
    if x.node:
        x.node.kept.append(x.storage)
    return x


def _gated_norm(tape: Tape, x: Value, gate: Value, path: str) -> Value:
    """RMSNorm of x · silu(gate), in fp32."""
    item = gate.item
    x = tape.mul(tape.cast(x, 4), tape.function(tape.cast(gate, 4)))
    weight = tape.weight(f"{path}.weight")
    mean = tape.reduce(tape.function(x), x.elements / weight.shape[0])
    scaled = tape.cast(tape.mul(x, tape.function(mean, keeps_result=True)), item)
    width = max(item, tape.width(weight))
    return tape.op(scaled.elements, width, (scaled,), (scaled,), leaves=[weight] if weight.trained else ())


def _layer_norm(tape: Tape, x: Value, path: str) -> Value:
    weight = tape.weight(f"{path}.weight")
    return tape.op(x.elements, x.item, (x,), (x,), leaves=[weight, tape.weight(f"{path}.bias")] if weight.trained else ())


def _mixed(tape: Tape, x: Value, shifted: Value, path: str) -> Value:
    """x · share + shifted · (1 − share), the share of each channel being trained."""
    share = tape.weight(path)
    leaves = [share] if share.trained else ()
    item = max(x.item, tape.width(share))
    one, two = (tape.op(y.elements, item, (y,), (y,) if leaves else (), leaves=leaves) for y in (x, shifted))
    return tape.add(one, two)


def _shifted(tape: Tape, x: Value) -> Value:
    """Every token's predecessor."""
    return tape.cat(tape.slice(x, x.elements))


def _time_mix(tape: Tape, x: Value, size: RWKVSize, call: Call) -> Value:
    path = f"{RWKV}.attention"
    if call.cache is not None and not call.past:
        call.cache[tape.layer] = tape.hold((3 * 4 + 2 * tape.item) * call.batch * size.hidden, "cache")
    shifted = _shifted(tape, x)
    key = tape.linear(_mixed(tape, x, shifted, f"{path}.time_mix_key"), f"{path}.key")
    value = tape.linear(_mixed(tape, x, shifted, f"{path}.time_mix_value"), f"{path}.value")
    gate = tape.linear(_mixed(tape, x, shifted, f"{path}.time_mix_receptance"), f"{path}.receptance")
    gate = tape.function(gate, keeps_result=True)
    return tape.linear(tape.mul(gate, _wkv(tape, key, value, call)), f"{path}.output")


def _wkv(tape: Tape, key: Value, value: Value, call: Call) -> Value:
    """The recurrence in chunks, in fp32: for each token and channel the weights of C tokens, four sums, and three numbers a chunk."""
    chunk = min(CHUNK, call.tokens)
    weights = call.batch * chunk * chunk * key.elements / call.rows * 4
    work = tape.hold(4 * weights)
    del work
    leaves = [w for name in ("time_decay", "time_first") if (w := tape.weight(f"{RWKV}.attention.{name}")).trained]
    key, value = tape.cast(key, 4), tape.cast(value, 4)
    parts = tape.op(key.elements, 4, (key, value), (value,), leaves=leaves, extra=4 * weights)
    if parts.node:
        parts.node.kept.append(tape.hold(key.elements * 4 * (chunk + 4 + 3 / chunk)))
    return tape.cast(tape.cat(parts), tape.item)


def _channel_mix(tape: Tape, x: Value, call: Call) -> Value:
    path = f"{RWKV}.feed_forward"
    shifted = _shifted(tape, x)
    key = tape.linear(_mixed(tape, x, shifted, f"{path}.time_mix_key"), f"{path}.key")
    key = tape.function(tape.function(key, keeps_result=True))
    gate = tape.linear(_mixed(tape, x, shifted, f"{path}.time_mix_receptance"), f"{path}.receptance")
    return tape.mul(tape.function(gate, keeps_result=True), tape.linear(key, f"{path}.value"))
