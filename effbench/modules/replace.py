"""Put another attention module in the place of a model's own, with new weights of the library's initialisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from effbench.surgery import replace_modules

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def replace_attention(model: PreTrainedModel, make: Callable[[PretrainedConfig, int], nn.Module]) -> tuple[str, ...]:
    """Replace every attention module by `make(config, layer index)`; return the names that changed.

    The new modules take device and dtype of what they replace. Linear weights are drawn from N(0, initializer_range), biases
    are 0 and norms 1; a module with parameters of another kind sets them in `reset_own_parameters(std)`.
    Raises ValueError when the model has no attention of the form that transformers' Llama has.
    """
    std = float(getattr(model.config, "initializer_range", 0.02))

    def make_one(name: str, old: nn.Module) -> nn.Module | None:
        if not all(isinstance(getattr(old, part, None), nn.Module) for part in PROJECTIONS):
            return None
        weight = next(old.parameters())
        with weight.device:
            new = make(model.config, int(old.layer_idx))
        initialise(new, std)
        return new.to(device=weight.device, dtype=weight.dtype)

    changed = replace_modules(model, make_one)
    if not changed:
        raise ValueError(f"{type(model).__name__} has no attention with {', '.join(PROJECTIONS)}")
    return changed


def initialise(module: nn.Module, std: float) -> None:
    """New weights the way transformers draws them."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.RMSNorm | nn.LayerNorm):
            part.reset_parameters()
        reset = getattr(part, "reset_own_parameters", None)
        if reset is not None:
            reset(std)
