"""Loss terms that a model's own modules ask for, beside the loss of its task."""

from __future__ import annotations

import torch
from torch import nn


def auxiliary_loss(model: nn.Module) -> torch.Tensor | float:
    """Σ of what modules left in `auxiliary_loss` at the last forward in training mode, taken from them; 0.0 where none did.

    A training loop adds it to the loss that it goes backward through, and reports its own loss without it. Being a term of the
    loss it is scaled, accumulated and clipped as the rest is, which a gradient put in by hand would not be under fp16.
    """
    total: torch.Tensor | float = 0.0
    for module in model.modules():
        term = vars(module).get("auxiliary_loss")
        if term is not None:
            total = total + term
            module.auxiliary_loss = None
    return total
