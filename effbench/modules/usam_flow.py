"""U-SAM's parts as sizes on a tape: what each makes in which order, and what of it stays for the backward pass. Torch-free.

The encoders run without gradients. Shapes: B clips, T frames of the joined encoders, D their width, R = B·W windows of one query,
L text tokens, O width of the language model, E experts, K patches.
"""

from __future__ import annotations

from collections.abc import Mapping

from effbench.expert_forms import INDEX
from effbench.layout import Weight
from effbench.modules.usam_arms import ProjectorForm
from effbench.modules.usam_forms import (
    CED_MELS,
    MERT_HZ,
    QFORMER_LAYERS,
    STREAMS,
    WHISPER_FRAMES,
    WHISPER_MELS,
    WINDOW,
    EncoderSizes,
    mel_frames,
    mert_frames,
    num_frames,
)
from effbench.tape import Tape, Value

Weights = Mapping[str, Weight]  # by path, as `usam_forms` and the arms name them
LAYER_ROWS = (
    11  # widths of a token that a layer of an encoder has alive at its most: residual, norm, 4 and 4 of the MLP, the input
)


def sound_elements(batch: int, seconds: float) -> float:
    """Numbers of one set of inputs of the encoders."""
    return batch * (WHISPER_MELS * WHISPER_FRAMES + round(MERT_HZ * seconds) + mel_frames(seconds) * CED_MELS)


def encode(tape: Tape, sizes: EncoderSizes, batch: int, seconds: float) -> Value:
    """Joined frames (B, T, 3D); one encoder after the other, their sequences stretched to CED's length."""
    width, item, frames, half = batch * sizes.width, tape.item, num_frames(seconds), WHISPER_FRAMES // 2
    mert = mert_frames(seconds)
    _work(tape, LAYER_ROWS * (frames + 2) * width * item)
    ced = tape.hold((frames + 2) * width * item)
    _work(tape, max(2 * WHISPER_FRAMES, LAYER_ROWS * half) * width * item)
    last, whisper = tape.hold(half * width * item), tape.hold(frames * width * item)
    _work(tape, 2 * batch * sizes.conv_width * mert[0] * item)
    _work(tape, (sizes.layers + LAYER_ROWS) * mert[-1] * width * item)
    _work(tape, 2 * (sizes.layers + 1) * mert[-1] * width * item)
    del last
    stretched = tape.hold(frames * width * item)
    out = tape.new(STREAMS * frames * width)
    del ced, whisper, stretched
    return out


def _work(tape: Tape, nbytes: float) -> None:
    work = tape.hold(nbytes)
    del work


def qformer(tape: Tape, weights: Weights, frames: Value, batch: int, windows: int, width: int) -> Value:
    """(B, W, D) from joined frames."""
    rows = batch * windows
    layer_of = [weights[f"qformer.*.{n}"] for n in range(10)]
    vectors = weights["qformer.*.vectors"]
    read = STREAMS * width * rows * WINDOW
    whole = tape.copy(frames) if batch > 1 else frames
    whole = Value(whole.storage, read, whole.item, whole.node)
    x = _norm(tape, tape.op(rows * width, tape.item, (), leaves=[weights["qformer.query"]]), vectors)
    for layer in range(QFORMER_LAYERS):
        tape.layer = layer
        x = _attention(tape, x, x, width, [*layer_of[:4], vectors])
        x = _attention(tape, x, whole, width, [*(layer_of[n] for n in (4, 6, 7, 5)), vectors])
        inner = tape.function(_linear(tape, x, layer_of[8], 4 * rows * width))
        x = _norm(tape, tape.add(_linear(tape, inner, layer_of[9], rows * width), x), vectors)
        del inner
    tape.layer = 0
    return x


def _attention(tape: Tape, x: Value, over: Value, width: int, weights: list[Weight]) -> Value:
    query, key, value, back, vectors = weights
    rows = over.elements / (STREAMS * width if key.shape[1] != width else width)
    q = _linear(tape, x, query, x.elements)
    k, v = (_linear(tape, over, w, rows * width) for w in (key, value))
    mixed = tape.op(x.elements, x.item, (q, k, v), (q, k, v), keeps_result=True)
    del q, k, v
    return _norm(tape, tape.add(_linear(tape, mixed, back, x.elements), x), vectors)


def _linear(tape: Tape, x: Value, weight: Weight, elements: float) -> Value:
    return tape.op(elements, tape.item, (x,), (x,), leaves=[weight])


def _norm(tape: Tape, x: Value, *leaves: Weight) -> Value:
    return tape.op(x.elements, x.item, (x,), (x,), leaves=leaves)


def project(tape: Tape, weights: Weights, form: ProjectorForm, audio: Value, prompts: float, width: int, out: int) -> Value:
    """(T, O) for the audio tokens, given `prompts` embedded prompt tokens."""
    tokens, stack = audio.elements / width, weights["projector.experts.weight"]
    if not form.routed:
        return tape.op(tokens * out, audio.item, (audio,), (audio,), leaves=[stack], extra=2 * out * width * audio.item)
    text = tape.new(prompts * out)
    down = _linear(tape, text, weights["projector.down.weight"], prompts * width)
    joint = tape.cat(audio, tape.op(audio.elements, audio.item, (down,)))
    logits = _linear(tape, tape.cast(joint, 4), weights["projector.router.weight"], tokens * form.experts)
    del text, down, joint
    pairs = tokens * form.run
    if form.kind == "top":
        return _sparse(tape, audio, logits, stack, pairs, tokens * out)
    gate = tape.cast(tape.function(logits, keeps_result=True), audio.item)
    if form.kind == "aliased":
        each = [tape.op(tokens * out, audio.item, (audio,), (audio,), leaves=[stack]) for _ in range(form.experts)]
        rows = tape.cat(*each)
        del each
    else:
        plan = tape.hold(5 * pairs * INDEX)
        gathered = tape.op(pairs * width, audio.item, (audio,), keep=(audio,))
        rows = tape.op(pairs * out, audio.item, (gathered,), (gathered,), leaves=[stack])
        del gathered, plan
    return tape.product(gate, rows, tokens * out)


def _sparse(tape: Tape, audio: Value, logits: Value, stack: Weight, pairs: float, elements: float) -> Value:
    """Routed, sorted, gathered, multiplied, put back, weighted and summed."""
    out = stack.shape[1]
    scores = tape.function(logits, keeps_result=True)
    weight = tape.cast(tape.op(pairs, scores.item, (scores,)), audio.item)
    plan = tape.hold(5 * pairs * INDEX)
    gathered = tape.op(pairs * stack.shape[2], audio.item, (audio,))
    rows = tape.op(pairs * out, audio.item, (gathered,), (gathered,), leaves=[stack])
    del gathered
    back = tape.copy(tape.op(rows.elements, rows.item, (rows,)))
    shares = tape.op(back.elements, back.item, (back, weight), (back, weight))
    del plan, back
    return tape.reduce(shares, elements)


def contrast(tape: Tape, weights: Weights, audio: Value, clips: int, text: int, out: int, patches: int) -> Value:
    """The contrastive loss of audio tokens (B, N, O) and `text` tokens of each clip."""
    narrow_in, narrow_out, wide, spread = (weights[f"contrastive.{n}"] for n in (0, 2, 5, 7))
    tokens, narrow = audio.elements / out, narrow_in.shape[0]
    importance = tape.function(_linear(tape, audio, narrow_in, tokens * narrow), keeps_result=True)
    score = _linear(tape, importance, narrow_out, tokens)
    likeness = [tape.op(tokens, audio.item, (audio,), (audio,), extra=2 * audio.elements * audio.item) for _ in range(2)]
    score = tape.add(tape.add(score, likeness[0]), likeness[1])
    kept = tape.op(audio.elements, audio.item, (audio,))
    inner = tape.function(_linear(tape, _norm(tape, kept), wide, tokens * out))
    share = tape.function(_linear(tape, inner, spread, tokens * patches), keeps_result=True)
    patch = tape.product(share, kept, clips * patches * out)
    del inner, share, kept, importance
    matches = [tape.op(clips * patches * text, patch.item, (patch,), ()) for _ in range(2)]
    best = [tape.op(clips * (patches + text), patch.item, (match,), (match,)) for match in matches]
    return tape.op(1, 4, (*best, score))
