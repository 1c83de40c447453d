"""Loss terms that a model's own modules ask for, beside the loss of its task."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def modules_with_losses(model: nn.Module) -> list[nn.Module]:
    """The modules that leave terms: found once, since a walk over all modules is work in every step."""
    return [module for module in model.modules() if "auxiliary_loss" in vars(module)]


def auxiliary_loss(modules: Iterable[nn.Module]) -> torch.Tensor | float:
    """Σ of what these modules left in `auxiliary_loss` at the last forward in training mode, taken from them; 0.0 where none did.

    A training loop adds it to the loss that it goes backward through, and reports its own loss without it. Being a term of the
    loss it is scaled, accumulated and clipped as the rest is, which a gradient put in by hand would not be under fp16.
    """
    total: torch.Tensor | float = 0.0
    for module in modules:
        term = module.auxiliary_loss
        if term is not None:
            total = total + term
            module.auxiliary_loss = None
    return total
