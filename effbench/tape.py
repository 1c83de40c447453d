"""What the operators of one pass through a model make and keep for the backward pass: sizes alone, no numbers. Torch-free.

A form of layer says what it does in the order in which it runs, and the tape counts bytes as PyTorch has them when it runs eagerly.
So a plan knows the peak of a step before there is a model. How bytes live and gradients come back: effbench/ledger.py.

    tape = Tape(layout, trains=True)
    out = tape.mul(tape.function(tape.linear(x, "mlp.gate_proj")), tape.linear(x, "mlp.up_proj"))
    tape.backward(out)
    tape.peak_bytes, tape.at_peak
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

from effbench.layout import Layout, Weight
from effbench.ledger import Leaf, Ledger, Node, Storage, Value

__all__ = ["Storage", "Tape", "Value", "expanded"]


class Tape(Ledger):
    """Operators on sizes. `peak_bytes`, and `at_peak` its parts by kind, leave out the weights, which are always there.

    `item` is the bytes of an element of the compute dtype; in training matrix products cast to it what is wider (autocast).
    """

    def __init__(self, layout: Layout, *, device: str = "cpu", trains: bool = False):
        super().__init__(grad=trains)
        self.layout, self.device, self.masters = layout, device, trains  # masters: trained weights are kept in fp32
        self.item = float(layout.item_bytes)
        self.autocast = trains and self.item < 4
        self.packed: Callable[[Tape, Value, float, float], Value] = expanded  # how packed weights are multiplied
        self.casts: dict[Hashable, Value] = {}  # autocast's copies of trained weights, kept to the end of a pass
        self._weights: dict[str, list[Weight]] = {}
        self._halves: dict[int, tuple[Weight, Weight, Weight | None]] = {}
        for weight in layout.weights:
            self._weights.setdefault(weight.path, []).append(weight)

    def new(self, elements: float, item: float | None = None, kind: str = "activations") -> Value:
        """A tensor that needs no gradient."""
        item = self.item if item is None else item
        return Value(Storage(self, elements * item, kind), elements, item)

    def input(self, elements: float, item: float | None = None) -> Value:
        """A tensor that the step is given, and in training its gradient is kept."""
        made = self.new(elements, item)
        if self.grad:
            made.node = Node((), made.item)
            made.node.is_input = True
        return made

    def op(
        self,
        elements: float,
        item: float,
        inputs: Sequence[Value],
        keep: Sequence[Value] = (),
        *,
        keeps_result: bool = False,
        extra: float = 0.0,
        passes: bool = False,
        leaves: Sequence[Weight] = (),
        kind: str = "activations",
    ) -> Value:
        """The result of an operator on `inputs` that keeps `keep`; see Node."""
        out = self.new(elements, item, kind)
        parts = [self._leaf(weight) for weight in leaves]
        self.used.update(parts)
        if self.grad and (parts or any(v.node for v in inputs)):
            kept = [v.storage for v in keep] + ([out.storage] if keeps_result else [])
            out.node = Node(inputs, item, kept, extra=extra, passes=passes, leaves=parts)
        return out

    def forward_ended(self) -> None:
        self.casts.clear()

    # Elementwise. A sum, a product with a constant and a change of width keep nothing.

    def add(self, x: Value, y: Value) -> Value:
        return self.op(max(x.elements, y.elements), max(x.item, y.item), (x, y), passes=True)

    def cast(self, x: Value, item: float) -> Value:
        return x if x.item == item else self.op(x.elements, item, (x,))

    def scale(self, x: Value) -> Value:
        return self.op(x.elements, x.item, (x,))

    def mul(self, x: Value, y: Value) -> Value:
        """Keeps each factor, where the other one needs a gradient."""
        keep = [other for one, other in ((x, y), (y, x)) if one.node]
        return self.op(max(x.elements, y.elements), max(x.item, y.item), (x, y), keep)

    def function(self, x: Value, *, keeps_result: bool = False, extra: float = 0.0) -> Value:
        """silu, exp, sigmoid …: keeps its argument, or its result where the derivative is written with that."""
        return self.op(x.elements, x.item, (x,), () if keeps_result else (x,), keeps_result=keeps_result, extra=extra)

    def reduce(self, x: Value, elements: float) -> Value:
        """A sum or mean: keeps nothing, its gradient has the size of x again."""
        return self.op(elements, x.item, (x,))

    # Shape. What is a view is the value itself; of these, the result or its gradient is not.

    def copy(self, x: Value) -> Value:
        return self.op(x.elements, x.item, (x,), passes=True)

    def cat(self, *parts: Value) -> Value:
        """Its gradients are views."""
        return self.op(sum(p.elements for p in parts), max(p.item for p in parts), parts, passes=True)

    def slice(self, x: Value, elements: float) -> Value:
        """A view, whose gradient has the size of x and is zero elsewhere."""
        node = Node([x], x.item) if self.grad and x.node else None
        return Value(x.storage, elements, x.item, node)

    def split(self, x: Value, *sizes: float) -> list[Value]:
        """Views, whose gradients are put together in one tensor of the size of x."""
        node = Node([x], x.item) if self.grad and x.node else None
        return [Value(x.storage, elements, x.item, node, place) for place, elements in enumerate(sizes)]

    # Matrix products.

    def matmul(self, x: Value, y: Value, elements: float) -> Value:
        """Keeps each side, where the other one needs a gradient."""
        return self.product(self.narrowed(x), self.narrowed(y), elements)

    def product(self, x: Value, y: Value, elements: float) -> Value:
        """The same without autocast."""
        keep = [other for one, other in ((x, y), (y, x)) if one.node]
        return self.op(elements, max(x.item, y.item), (x, y), keep)

    def linear(self, x: Value, path: str, *, kind: str = "activations") -> Value:
        """The linear layer at this path, with the adapter that the layout has on it."""
        weight = self.weight(f"{path}.weight")
        out, into = weight.shape[-2:]
        base = self.matrix(x, weight, x.elements / into * out, kind=kind)
        bias = self.find(f"{path}.bias")
        if bias is not None and bias.trained and self.grad:
            node = Node([base], base.item, passes=True, leaves=[self._leaf(bias)])
            base = Value(base.storage, base.elements, base.item, node)
        adapter = self.find(f"{path}.weight.adapter")
        return base if adapter is None else self._adapted(x, base, weight, adapter)

    def _adapted(self, x: Value, base: Value, weight: Weight, adapter: Weight) -> Value:
        """y + α · B(A(x)) as peft has it, in the adapter's width; DoRA's trained lengths scale both terms.

        DoRA needs W + α B A for its norms, which it makes from an identity, so that four tensors of the size of W are there at once.
        """
        out, into = weight.shape[-2:]
        down, up, lengths = self.halves(weight, adapter)
        x = self.cast(x, self.width(down))
        tokens = x.elements / into
        if lengths is None:
            high = self.scale(self.matrix(self.matrix(x, down, tokens * down.shape[0]), up, tokens * out))
            return self.cast(self.add(base, high), base.item)
        work = self.hold(into * (into + down.shape[0]) * self.width(down) + 3 * into * out * x.item)
        del work
        widened = self.hold(into * out * x.item if base.item != x.item else 0)  # a copy of W, there to the end
        high = self.matrix(self.matrix(x, down, tokens * down.shape[0]), up, tokens * out)
        one, other = (self.op(v.elements, max(v.item, 4.0), (v,), (v,), leaves=[lengths]) for v in (base, high))
        base = self.cast(self.add(base, self.add(one, self.scale(other))), base.item)
        del widened
        return base

    def halves(self, weight: Weight, adapter: Weight) -> tuple[Weight, Weight, Weight | None]:
        """A and B of an adapter, whose size the layout has as one number, and DoRA's lengths or None."""
        key = id(adapter)
        if key not in self._halves:
            stacks = weight.shape[0] if len(weight.shape) == 3 else 1
            out, into = weight.shape[-2:]
            rank, rest = divmod(adapter.size // adapter.count, stacks * (out + into))
            shapes = (stacks * rank, into), (out, stacks * rank), (out,)
            down, up, lengths = (replace(adapter, shape=shape) for shape in shapes)
            self._halves[key] = down, up, lengths if rest else None
        return self._halves[key]

    def matrix(self, x: Value, weight: Weight, elements: float, *, kind: str = "activations") -> Value:
        """Product with one weight; keeps x where the weight is trained."""
        x, size = self.narrowed(x), weight.size / weight.count
        if weight.bits is not None and weight.bits < 16:
            return self.packed(self, x, size, elements)
        keep = [x] if weight.trained else []
        cast = self.cast_weight(weight)
        if cast is None:
            return self.op(elements, x.item, (x,), keep, leaves=[weight] if weight.trained else (), kind=kind)
        return self.op(elements, x.item, (x, cast), [*keep, cast] if x.node else keep, kind=kind)

    def cast_weight(self, weight: Weight) -> Value | None:
        """Autocast's copy of a weight that has another width, None where it has none; of a trained one it stays to the end."""
        if not self.autocast or self.width(weight) == self.item:
            return None
        key = (id(weight), self.layer)
        made = self.casts.get(key)
        if made is None:
            made = self.op(weight.size / weight.count, self.item, (), leaves=[weight] if weight.trained else ())
            if weight.trained and self.grad:
                self.casts[key] = made
        return made

    def narrowed(self, x: Value) -> Value:
        """What autocast makes of the operand of a matrix product."""
        return self.cast(x, self.item) if self.autocast else x

    # Weights.

    def _leaf(self, weight: Weight) -> Leaf:
        """A trained weight of the layer that runs, and the bytes of its gradient."""
        layer = self.layer if "*" in weight.path else 0
        return (id(weight), layer), weight.size / weight.count * self.width(weight)

    def find(self, path: str) -> Weight | None:
        """The weight at a path in the layer that runs; where layers differ, the layout has several of them, in order."""
        found = self._weights.get(path, [])
        seen = 0
        for weight in found:
            seen += weight.count
            if self.layer < seen:
                return weight
        return found[-1] if found else None

    def weight(self, path: str) -> Weight:
        """The same, where there must be one. Raises KeyError."""
        found = self.find(path)
        if found is None:
            raise KeyError(path)
        return found

    def boundaries(self) -> set[int]:
        """The layers at which the layout has another weight at the same path."""
        found = set()
        for weights in self._weights.values():
            seen = 0
            for weight in weights[:-1]:
                seen += weight.count
                found.add(seen)
        return found

    def width(self, weight: Weight) -> float:
        """Bytes of an element of a weight as it lies in memory; trained ones are kept in fp32."""
        if weight.trained and self.masters:
            return 4.0
        return weight.bits / 8 if weight.bits is not None else float(self.layout.item_bytes)


def expanded(tape: Tape, x: Value, size: float, elements: float) -> Value:
    """The product with a packed weight of so many numbers, which is expanded for every use, forward and backward, and let go."""
    work = tape.hold(size * x.item)
    out = tape.op(elements, x.item, (x,), extra=size * x.item)
    del work
    return out
