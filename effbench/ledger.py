"""The bytes that are alive while operators run and gradients come back, by kind, and what they were at their most. Torch-free.

Lifetimes are those of the Python objects here, as they are in PyTorch: a result lives until nothing refers to it, a node of the
backward pass holds what the formula of its gradient reads, and lets it go when it has run. Sizes are in elements; `item` is the
bytes of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from math import inf

_numbers = count()
Leaf = tuple[Hashable, float]  # a trained weight, and the bytes of its gradient


class Storage:
    """Bytes that count while this object lives."""

    __slots__ = ("kind", "ledger", "nbytes")

    def __init__(self, ledger: Ledger, nbytes: float, kind: str):
        self.ledger, self.nbytes, self.kind = ledger, nbytes, kind
        ledger.count(kind, nbytes)

    def __del__(self) -> None:
        self.ledger.count(self.kind, -self.nbytes)


class Node:
    """How a gradient goes on: `kept` is what the formula reads, `extra` the bytes it needs beside its results.

    `passes`: what goes on is the gradient itself or a view of it, without memory of its own, where the width stays.
    """

    __slots__ = ("again", "extra", "gradient_bytes", "inputs", "is_input", "item", "kept", "leaves", "number", "passes")

    def __init__(
        self,
        inputs: Sequence[Value],
        item: float,
        kept: Sequence[Storage] = (),
        *,
        extra: float = 0.0,
        passes: bool = False,
        leaves: Sequence[Leaf] = (),
    ):
        self.inputs = [(v.node, v.place, v.elements, v.item) for v in inputs if v.node is not None]
        self.item, self.kept, self.extra, self.passes, self.leaves = item, list(kept), extra, passes, leaves
        self.number = next(_numbers)
        self.again: Callable[[Storage], Storage | None] | None = None  # of a checkpoint: its input's gradient from its result's
        self.gradient_bytes = 0.0  # of weights, for layers that only count
        self.is_input = False  # whether it stands for an input, whose gradient is kept


class Value:
    """A tensor: its storage, which views share, and the node that its gradient goes to (None: it needs none)."""

    __slots__ = ("elements", "item", "node", "place", "storage")

    def __init__(self, storage: Storage, elements: float, item: float, node: Node | None = None, place: int = 0):
        self.storage, self.elements, self.item, self.node, self.place = storage, elements, item, node, place


class Ledger:
    """Counts storages. `peak_bytes`, and `at_peak` its parts by kind."""

    def __init__(self, *, grad: bool) -> None:
        self.grad, self.layer = grad, 0  # whether gradients are asked for, and the layer that runs
        self.now: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.total_bytes = self.peak_bytes = 0.0
        self.gradients: dict[Hashable, Storage] = {}
        self.used: dict[Hashable, float] = {}  # bytes of the gradients of the trained weights used since it was emptied

    def count(self, kind: str, nbytes: float) -> None:
        """Bytes that came to be, or with a minus went."""
        self.now[kind] += nbytes  # type: ignore[assignment]
        self.total_bytes += nbytes
        if self.total_bytes > self.peak_bytes:
            self.peak_bytes, self.at_peak = self.total_bytes, self.now.copy()

    def hold(self, nbytes: float, kind: str = "activations") -> Storage:
        """Bytes that are there as long as what is returned."""
        return Storage(self, nbytes, kind)

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """What is made here is there afterwards, but how it was made enters no peak."""
        before = self.peak_bytes, self.at_peak
        self.peak_bytes = inf
        try:
            yield
        finally:
            self.peak_bytes, self.at_peak = before
            self.count("cache", 0)

    def forward_ended(self) -> None:
        """Let go what is kept for a whole forward alone."""

    def stand_in(self, x: Value, kept_bytes: float, gradient_bytes: float) -> Value:
        """x behind layers that are not run: what they keep until the gradient comes by, and the gradients of their weights."""
        node = Node([x], x.item, [self.hold(kept_bytes)], passes=True)
        node.gradient_bytes = gradient_bytes
        return Value(x.storage, x.elements, x.item, node)

    def checkpoint(self, layer: Callable[[Value], Value], x: Value) -> Value:
        """The result of a layer of which only the input is kept; it runs again when its gradient is asked for."""
        self.grad = False
        out = layer(Value(x.storage, x.elements, x.item))
        self.grad = True
        if x.node or self.used:
            node = Node([x], x.item, [x.storage])
            start = Value(x.storage, x.elements, x.item, Node((), x.item) if x.node else None)
            node.again = partial(self._again, layer, self.layer, start)
            out.node = node
        return out

    def _again(self, layer: Callable[[Value], Value], index: int, start: Value, grad: Storage) -> Storage | None:
        """The gradient of the input of a layer that runs now; None where it needs none."""
        self.layer = index
        out = layer(start)
        self.forward_ended()
        assert out.node is not None
        node, place = out.node, out.place
        del out
        return self._back(node, place, grad, start.node)

    def backward(self, root: Value) -> None:
        """Go back from a scalar, or from a tensor whose gradient is there. What a node kept is freed when it has run."""
        assert root.node is not None, "nothing here is trained"
        node, place = root.node, root.place
        del root
        self._back(node, place, self.hold(0))

    def _back(self, root: Node, place: int, grad: Storage, until: Node | None = None) -> Storage | None:
        """The gradient of `until`, where there is such a node."""
        pending: dict[Node, dict[int, Storage]] = {root: {place: grad}}
        order = _reached(root)
        del root, grad
        while order:
            node = order.pop()
            if node is until:
                return pending[node][0]
            results = self._results(node, pending.pop(node))
            for target, where, _, _ in node.inputs:
                _accumulate(pending, target, where, results.pop(0))
        return None

    def _results(self, node: Node, grads: dict[int, Storage]) -> list[Storage]:
        """The gradients of the inputs of a node; those of its weights are kept here, and what the node kept is let go."""
        grad, extra = next(iter(grads.values())), self.hold(node.extra)
        for leaf in node.leaves:
            self._keep_gradient(*leaf)
        if node.is_input:
            self.gradients[-node.number, 0] = grad
        if node.gradient_bytes:  # of layers that do not run: what they kept goes as their gradients come
            node.kept.clear()
            self.gradients[-node.number, 0] = self.hold(node.gradient_bytes, "gradients")
        if node.again is not None:
            found = node.again(grad)
            results = [found] if found is not None else []
        else:
            results = [
                grad if node.passes and item == node.item else self.hold(elements * item)
                for _, _, elements, item in node.inputs
            ]
        node.kept.clear()
        node.again = None
        del extra
        return results

    def _keep_gradient(self, key: Hashable, nbytes: float) -> None:
        """The first gradient of a weight stays as it is; a later one is added in place."""
        self.gradients.setdefault(key, self.hold(nbytes, "gradients"))


def _accumulate(pending: dict[Node, dict[int, Storage]], target: Node, place: int, result: Storage) -> None:
    """Add a gradient to what a node has: in place where nothing else has that memory, else in new memory."""
    slots = pending.setdefault(target, {})
    old = slots.get(place)
    if old is None:
        slots[place] = result
    elif sum(other is old for entry in pending.values() for other in entry.values()) > 1:
        slots[place] = Storage(old.ledger, old.nbytes, old.kind)


def _reached(root: Node) -> list[Node]:
    """All nodes that a gradient at `root` reaches, in the order of their making."""
    seen, stack = {root}, [root]
    while stack:
        for target, *_ in stack.pop().inputs:
            if target not in seen:
                seen.add(target)
                stack.append(target)
    return sorted(seen, key=lambda node: node.number)
