"""RoPE as transformers' Llama turns it: halves of a head, not neighbouring pairs."""

from __future__ import annotations

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn (B, heads, T, R) by cos and sin (B or 1, T, R); the dtype stays."""
    one, two = x.chunk(2, dim=-1)
    return (x * cos[:, None] + torch.cat([-two, one], dim=-1) * sin[:, None]).to(x.dtype)
