"""What a step of a model does in which order, as sizes on a tape: the frame around the forms of its layers. Torch-free.

    flow = Flow(layout, device="cpu", trains=True)     # the layers as the library has them
    for technique in stack: technique.flow(flow)       # a technique puts a form of its own in their place
    flow.train(batch=8, tokens=128)
    flow.tape.peak_bytes

Of layers that are alike those at the ends of their row run, and the others count as so many of the first: what is alive grows and
shrinks evenly from layer to layer, so it is most at one of the ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from effbench.bloom_forms import bloom_layer, layer_norm
from effbench.costs import FeedForwardCost, MLACost, feed_forward_costs, head_dim
from effbench.expert_forms import INDEX
from effbench.forms import Call, Form, feed_forward, latent_attention, rms_norm, softmax_attention
from effbench.layout import Layout
from effbench.tape import Tape, Value

LAYER = "model.layers.*"


@dataclass(frozen=True)
class Row:
    """Neighbouring layers that are alike: the first, how many there are, and their feed-forward part."""

    first: int
    count: int
    cost: FeedForwardCost | None

    @property
    def last(self) -> int:
        return self.first + self.count - 1


class Flow:
    """The forms of one model; techniques change them in place through their `flow` hook.

    mixer       in the place of attention
    block       in the place of a whole layer, of which there are `num_layers`; None: norm, mixer, norm, feed-forward
    whole       the same where layers differ by their feed-forward part, which it is told
    added       what is added to the embeddings
    normed      the last norm
    mask        an additive mask over all scores, made before the first layer
    turned      channels of a head that are turned by position, 0: none
    """

    def __init__(self, layout: Layout, *, device: str, trains: bool = False):
        self.layout, self.tape = layout, Tape(layout, device=device, trains=trains)
        config = layout.config
        own = config.get("kv_lora_rank")
        self.mixer: Form = latent_attention(MLACost.of(config), own=False) if own else softmax_attention
        self.block: Form | None = None
        self.whole: Callable[[Tape, Value, FeedForwardCost, Call], Value] | None = None
        self.added: Callable[[Tape, Call], Value] | None = None
        self.normed: Callable[[Tape, Value], Value] = _last_norm
        self.mask: Callable[[Tape, Call], Value] | None = _plain_mask if config.get("_attn_implementation") == "eager" else None
        self.turned = int(config.get("qk_rope_head_dim") or (head_dim(config) if "num_attention_heads" in config else 0))
        self.num_layers = int(config.get("num_hidden_layers") or 1)
        self.embedding, self.head = "model.embed_tokens", "lm_head"
        if layout.model_type == "bloom":
            self.whole, self.normed, self.turned = bloom_layer, partial(layer_norm, path="transformer.ln_f"), 0
            self.mask, self.embedding = _plain_mask, "transformer.word_embeddings"

    # Steps.

    def train(self, batch: int, tokens: int, *, checkpointing: bool = False) -> None:
        """Forward, loss, backward and update of every trained weight."""
        tape = self.tape
        text = tape.hold(batch * (tokens + 1) * INDEX)
        loss = _cross_entropy(tape, self.logits(Call(batch, tokens), checkpointing=checkpointing))
        tape.forward_ended()
        tape.backward(loss)
        del loss, text
        if tape.device == "cpu":  # AdamW takes one weight at a time there and makes its denominator in two tensors
            largest = max((w.size / w.count for w in self.layout.weights if w.trained), default=0.0)
            update = tape.hold(2 * 4 * largest, "optimizer")
            del update
        tape.gradients.clear()

    def generate(self, batch: int, prompt: int, new: int, *, slots: int = 0) -> None:
        """Prefill and the last decode step. With `slots` the cache has room for so many tokens and lies beside the prompt's own."""
        call = Call(batch, prompt, cache={})
        cache = self._filled(batch, slots) if slots else {}
        self.logits(call, last=True)
        if not slots:
            call.cache = None
            cache = self._filled(batch, prompt + new - 2)
        self.logits(Call(batch, 1, past=prompt + new - 2, cache=cache, fixed=bool(slots)), last=True)

    def _filled(self, batch: int, tokens: int) -> dict[int, Any]:
        """A cache of so many tokens of each sequence."""
        cache: dict[int, Any] = {}
        with self.tape.unseen():
            self.logits(Call(batch, tokens, cache=cache), last=True)
        return cache

    # The frame.

    def logits(self, call: Call, *, last: bool = False, checkpointing: bool = False) -> Value:
        """Embedding, layers, norm and head; of every token, or of the last one of each sequence."""
        tape = self.tape
        x = embedded = self._embedded(call)  # the library's forward holds what it starts from to its end
        for row in self._rows():
            index = row.first
            while index <= row.last:
                x, index = self._run(row, index, x, call, checkpointing)
        tape.layer = self.num_layers
        x = self.normed(tape, x)
        call.mask = None
        call.beside.clear()
        del embedded
        tape.layer = 0
        if last:
            x = Value(x.storage, x.elements / call.tokens, x.item, x.node)
        return tape.linear(x, self.head if tape.find(f"{self.head}.weight") else self.embedding, kind="logits")

    def _run(self, row: Row, index: int, x: Value, call: Call, checkpointing: bool) -> tuple[Value, int]:
        """One layer, and what those up to the last of its row keep, without running them; the result and the next layer to run.

        The lowest layer that is trained has less to do for its gradient, so the one above it stands for the others.
        """
        tape, lowest = self.tape, self.tape.grad and x.node is None
        tape.layer, tape.used, before = index, {}, self.tape.total_bytes
        layer = partial(self._layer, cost=row.cost, call=call)
        out = tape.checkpoint(layer, x) if checkpointing and tape.grad else layer(x)
        call.lingering.clear()
        kept, between = tape.total_bytes - before, row.last - index - 1
        if between <= 0 or (lowest and out.node):
            return out, index + 1
        if out.node:
            return tape.stand_in(out, between * kept, between * sum(tape.used.values())), row.last
        if call.cache is not None and not call.past:
            kept -= out.storage.nbytes  # x is still here, and will not be
            call.cache[-1 - index] = tape.hold(between * kept, "cache")
        return out, row.last

    def _layer(self, x: Value, *, cost: FeedForwardCost | None, call: Call) -> Value:
        if self.block is not None:
            return self.block(self.tape, x, call)
        assert cost is not None
        if self.whole is not None:
            return self.whole(self.tape, x, cost, call)
        tape, width, residual = self.tape, int(self.layout.config["hidden_size"]), x
        x = rms_norm(tape, x, f"{LAYER}.input_layernorm", width)
        x = self.mixer(tape, x, call)
        x = residual = tape.add(residual, x)
        x = rms_norm(tape, x, f"{LAYER}.post_attention_layernorm", width)
        x = feed_forward(tape, x, cost)
        return tape.add(residual, x)

    def _embedded(self, call: Call) -> Value:
        """Embeddings, with what is added to them; cosines, sines and the mask lie beside them to the last layer."""
        tape, weight = self.tape, self.tape.weight(f"{self.embedding}.weight")
        x = tape.op(call.rows * weight.shape[1], tape.width(weight), (), leaves=[weight] if weight.trained else ())
        call.turned_item = x.item
        call.beside.append(tape.hold(2 * call.tokens * self.turned * x.item))
        if self.mask is not None:
            call.mask = self.mask(tape, call)
        return x if self.added is None else tape.add(x, self.added(tape, call))

    def _rows(self) -> list[Row]:
        """The layers in rows of equal ones: a row ends where the feed-forward part changes, or what of it is trained."""
        if self.block is not None:
            return [Row(0, self.num_layers, None)]
        costs, ends, rows = feed_forward_costs(self.layout.config), self.tape.boundaries(), list[Row]()
        for index, cost in enumerate(costs):
            if rows and rows[-1].cost == cost and index not in ends:
                rows[-1] = Row(rows[-1].first, rows[-1].count + 1, cost)
            else:
                rows.append(Row(index, 1, cost))
        return rows


def _plain_mask(tape: Tape, call: Call) -> Value:
    """0 and −∞ in the width of the activations, as the plain form adds them to scores."""
    return tape.new(call.batch * call.tokens * call.visible)


def _last_norm(tape: Tape, x: Value) -> Value:
    return rms_norm(tape, x, "model.norm", int(tape.layout.config["hidden_size"]))


def _cross_entropy(tape: Tape, logits: Value) -> Value:
    """In fp32: the log-probabilities are kept; their gradient is first one number a token, spread over zeros."""
    wide = tape.cast(logits, 4)
    logs = tape.op(wide.elements, 4, (wide,), keeps_result=True, kind="logits")
    return tape.op(1, 4, (logs,))
