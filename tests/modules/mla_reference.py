"""Multi-head latent attention in float64 loops, written from DeepSeek-V2 (arXiv 2405.04434), equations 9 to 19."""

from __future__ import annotations

import math
from typing import Any

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def rope(x: torch.Tensor, position: int, base: float) -> torch.Tensor:
    """One vector of even width turned to its position; pairs are (i, i + half), as transformers' Llama has them."""
    half = len(x) // 2
    out = []
    for i in range(len(x)):
        angle = position * base ** (-2.0 * (i % half) / len(x))
        other = -x[i + half] if i < half else x[i - half]
        out.append(x[i] * math.cos(angle) + other * math.sin(angle))
    return torch.stack(out)


def latent_attention(module: Any, hidden_TE: torch.Tensor, base: float) -> torch.Tensor:
    """Output (T, E) of one sequence with the weights of `module`."""
    cost, eps = module.cost, module.q_a_norm.eps
    heads, n, r, v = cost.heads, cost.dim, cost.rope_dim, cost.value_dim
    keys: list[list[torch.Tensor]] = []
    values: list[list[torch.Tensor]] = []
    outputs = []
    for t, h in enumerate(hidden_TE):
        c_q = rms_norm(module.q_a_proj.weight @ h, module.q_a_norm.weight, eps)
        q = module.q_b_proj.weight @ c_q
        joint = module.kv_a_proj.weight @ h
        c_kv = rms_norm(joint[: cost.kv_rank], module.kv_a_norm.weight, eps)
        k_rope = rope(joint[cost.kv_rank :], t, base)
        up = module.kv_b_proj.weight @ c_kv
        keys.append([torch.cat([up[i * (n + v) : i * (n + v) + n], k_rope]) for i in range(heads)])
        values.append([up[i * (n + v) + n : (i + 1) * (n + v)] for i in range(heads)])
        mixed = []
        for i in range(heads):
            own = q[i * (n + r) : (i + 1) * (n + r)]
            query = torch.cat([own[:n], rope(own[n:], t, base)])
            scores = torch.stack([query @ keys[s][i] / math.sqrt(n + r) for s in range(t + 1)])
            shares = torch.exp(scores - scores.max())
            shares = shares / shares.sum()
            mixed.append(sum(shares[s] * values[s][i] for s in range(t + 1)))
        outputs.append(module.o_proj.weight @ torch.cat(mixed))
    return torch.stack(outputs)
