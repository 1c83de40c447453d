"""Stored bytes of a model, from the storages behind its tensors: never from nominal ratios or a library's own footprint.

Packed weights, scales, zero points, absmax (nested ones too), buffers and adapters all count, each storage once. Quantising
libraries keep parts of a weight beside it: in a quantisation state (bitsandbytes 4-bit), on the parameter or, after the first
forward, in the module's state (bitsandbytes 8-bit), inside a tensor subclass (torchao), in buffers (our stacked experts).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, get_args

from effbench.layout import Kind

if TYPE_CHECKING:
    import torch
    from torch import nn

KINDS: tuple[Kind, ...] = get_args(Kind)
LAYER_NORMS = ("ln1", "ln2", "pre_ln", "ln_out", "ln_f")  # of RWKV, and Bloom's last
PLAIN = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """One parameter, buffer or stack of quantised experts: its name, what it stands for, the tensors that hold it."""

    name: str
    kind: Kind
    num_weights: int  # original ones; 0 for what is no weight (a buffer)
    tensors: tuple[torch.Tensor, ...]
    parameter: torch.nn.Parameter | None = None

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to the routed experts, adapters of theirs included."""
        return "experts" in self.name.split(".")

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, each storage once, views counted as what they show."""
        return sum({t.untyped_storage()._cdata: t.nbytes for t in self.tensors}.values())


def stored(model: nn.Module) -> Iterator[Stored]:
    """Everything that a model stores; tied parameters once, under their first name."""
    added, head = _adapters(model), _head(model)
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if _is_quantised_stack(module):
            buffers = tuple(module.buffers(recurse=False))
            seen |= {id(b) for b in buffers}
            yield Stored(name=prefix, kind="experts", num_weights=prod(module.shape), tensors=buffers)
            continue
        beside = tuple(_state_tensors({"state": getattr(module, "state", None)}))
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{prefix}.{own}" if prefix else own
            kind: Kind = "adapter" if id(parameter) in added else kind_of(name)
            kind = "head" if parameter is head and kind == "other" else kind
            yield Stored(
                name=name,
                kind=kind,
                num_weights=_num_weights(parameter),
                tensors=(*_plain_tensors(parameter), *beside),
                parameter=parameter,
            )
            beside = ()
        for own, buffer in module.named_buffers(recurse=False):
            if id(buffer) not in seen:
                seen.add(id(buffer))
                name = f"{prefix}.{own}" if prefix else own
                yield Stored(name=name, kind="other", num_weights=0, tensors=tuple(_plain_tensors(buffer)))


def weight_bytes_by_kind(model: nn.Module) -> dict[str, int]:
    """Bytes of all distinct storages by kind of module; their sum is `weight_bytes`."""
    return dict(_bytes_by(model, lambda item: item.kind))


def weight_bytes(model: nn.Module) -> int:
    """Σ bytes of all distinct storages behind parameters and buffers, quantisation state included."""
    return sum(weight_bytes_by_kind(model).values())


def unquantised_bytes_by_kind(model: nn.Module) -> dict[str, int]:
    """Bytes of what a model keeps as plain floating-point numbers, by kind; buffers and adapters apart."""
    items = (item for item in stored(model) if item.kind not in ("adapter", "other"))
    plain = (i for i in items if i.parameter is not None and len(i.tensors) == 1 and _dtype(i.tensors[0]) in PLAIN)
    found: Counter[str] = Counter()
    for item in plain:
        found[item.kind] += item.nbytes
    return dict(found)


def bits_per_weight(model: nn.Module) -> float:
    """8 · stored bytes / original weights, adapters left out on both sides."""
    size = weight_bytes(model) - weight_bytes_by_kind(model).get("adapter", 0)
    return 8 * size / sum(item.num_weights for item in stored(model) if item.kind != "adapter")


def kind_of(name: str) -> Kind:
    """The kind of a parameter by its name in transformers' models and in the modules of effbench."""
    parts = name.split(".")
    if "experts" in parts:
        return "experts"
    module = parts[-2] if len(parts) > 1 else ""
    if "norm" in module or module in LAYER_NORMS:
        return "norm"
    if "embed" in module or module == "positions":
        return "embedding"
    if module in ("gate", "router"):
        return "router"
    if any("attn" in part or part in ("attention", "self_attention", "mixer") for part in parts):
        return "attention"
    if any(part in ("mlp", "feed_forward") for part in parts):
        return "feed_forward"
    return "other"


def _bytes_by(model: nn.Module, key: Any) -> Counter[str]:
    found: Counter[str] = Counter()
    seen: set[int] = set()
    for item in stored(model):
        for tensor in item.tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                found[key(item)] += storage.nbytes()
    return found


def _adapters(model: nn.Module) -> set[int]:
    """Ids of the parameters that adapter layers added."""
    return {
        id(p)
        for layer in model.modules()
        for name in getattr(layer, "adapter_layer_names", ())
        if hasattr(getattr(layer, name, None), "parameters")
        for p in getattr(layer, name).parameters()
    }


def _head(model: nn.Module) -> Any:
    """The output matrix; None for a model that is none of the library's. A tied one is the embedding and comes first."""
    get = getattr(model, "get_output_embeddings", None)
    return getattr(get() if get else None, "weight", None)


def _is_quantised_stack(module: nn.Module) -> bool:
    return type(module).__name__ == "QuantisedExperts"


def _num_weights(parameter: torch.Tensor) -> int:
    """Weights a parameter stands for; a packed one knows its original shape."""
    state = getattr(parameter, "quant_state", None)
    return prod(state.shape) if state is not None else parameter.numel()


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold a tensor's bytes: parts of a wrapper subclass, and quantisation state kept beside it."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        for name in flatten()[0]:
            yield from _plain_tensors(getattr(tensor, name))
    else:
        yield tensor
    yield from _state_tensors(vars(tensor))


def _state_tensors(attributes: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Tensors among attributes, and inside a quantisation state (an object with `absmax`, which may nest another, or `SCB`)."""
    import torch

    for value in attributes.values():
        if isinstance(value, torch.Tensor):
            yield value
        elif hasattr(value, "absmax") or hasattr(value, "SCB"):
            yield from _state_tensors(vars(value))
