"""The linear layer of LLM.int8() (bitsandbytes), on inputs of any number of dimensions.

The library's own takes two or three and fails on four, which latent attention and the compression of NSA have.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn


class Linear8bitLt(bnb.nn.Linear8bitLt):  # by this name are such layers told
    """A layer (out, in) in 8 bits, each output with its scale, made from plain weights that lie on their device."""

    def __init__(self, layer: nn.Linear, threshold: float):
        weight = layer.weight
        super().__init__(
            layer.in_features, layer.out_features, bias=False, has_fp16_weights=False, threshold=threshold, device="meta"
        )
        packed: Any = bnb.nn.Int8Params(weight.data, requires_grad=False, has_fp16_weights=False)
        self.weight, self.bias = packed.to(weight.device), layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = super().forward(x.flatten(0, -2))
        return rows.unflatten(0, x.shape[:-1])
