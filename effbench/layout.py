"""Which tensors a model is made of, before there is one: from its configuration, as each technique changes it. Torch-free.

    layout = families.layout(model_type, config)     # the tensors of a model as the library builds it
    for technique in stack: technique.layout(layout)
    layout.num_weights(), layout.stored_bytes()

A `Weight` stands for `count` tensors of one shape at one place, "*" being the number of the layer. Plans stand on this: what
fits a device, what adapters and quantised formats would take hold of, and how many bytes are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

Kind = Literal["embedding", "head", "attention", "feed_forward", "experts", "router", "norm", "adapter", "other"]
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Weight:
    """`count` parameters or buffers of one shape. A matrix is (out, in), a stack of experts (experts, out, in)."""

    path: str  # of the parameter, as the library names it: model.layers.*.self_attn.q_proj.weight
    kind: Kind
    shape: tuple[int, ...]
    count: int = 1
    linear: bool = False  # the matrix of a linear layer, which adapters and quantised formats take hold of
    trained: bool = True
    transposed: bool = False  # a stack of experts that is stored (experts, in, out)
    bits: float | None = None  # stored bits a weight, scales included; None: those of the model's dtype

    @property
    def size(self) -> int:
        """Number of original weights, all of `count` tensors."""
        return self.count * prod(self.shape)

    @property
    def inputs(self) -> int:
        """Input width of a matrix or a stack of them."""
        return self.shape[-2] if self.transposed else self.shape[-1]

    @property
    def module(self) -> str:
        """Name of the module that holds it: q_proj."""
        return self.path.split(".")[-2]


@dataclass
class Layout:
    """The tensors of one model. Techniques change `weights` in place through their `layout` hook."""

    model_type: str
    config: Mapping[str, Any]
    weights: list[Weight] = field(default_factory=list)
    state_bytes: float = 8.0  # of the optimizer on the device, a trained weight: AdamW's two moments in fp32

    @property
    def item_bytes(self) -> int:
        """Bytes of one weight in the dtype of the configuration."""
        return ITEM_BYTES[str(self.config.get("dtype") or "float32")]

    def change(self, which: Callable[[Weight], bool], **values: Any) -> int:
        """Change fields of the weights that `which` picks; the number of tensors changed."""
        found = [which(w) for w in self.weights]
        self.weights = [replace(w, **values) if hit else w for w, hit in zip(self.weights, found, strict=True)]
        return sum(w.count for w, hit in zip(self.weights, found, strict=True) if hit)

    def remove(self, which: Callable[[Weight], bool]) -> None:
        """Leave out the weights that `which` picks."""
        self.weights = [w for w in self.weights if not which(w)]

    def linears(self) -> Iterator[Weight]:
        """Matrices of the linear layers but the output head: what "all-linear" means to adapters and quantised formats."""
        return (w for w in self.weights if w.linear and w.kind != "head")

    def num_weights(self, *, trained_only: bool = False) -> int:
        """Original weights, tied ones once, adapters and buffers left out unless they are trained and that is asked."""
        if trained_only:
            return sum(w.size for w in self.weights if w.trained)
        return sum(w.size for w in self.weights if w.kind not in ("adapter", "other"))

    def stored_bytes(self) -> float:
        """Bytes of all tensors as they are stored for inference."""
        return sum(self.bytes_of(w) for w in self.weights)

    def stored_bytes_by_kind(self) -> dict[Kind, float]:
        """The same by kind."""
        found: dict[Kind, float] = {}
        for weight in self.weights:
            found[weight.kind] = found.get(weight.kind, 0.0) + self.bytes_of(weight)
        return found

    def bytes_of(self, weight: Weight) -> float:
        """Stored bytes of all `count` tensors of one weight."""
        return weight.size * (weight.bits / 8 if weight.bits is not None else self.item_bytes)
