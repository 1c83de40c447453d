"""Multi-head, grouped-query and multi-query attention in float64 loops, from arXiv 1706.03762 (section 3.2) and 2305.13245."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.modules.mla_reference import rope


def grouped_attention(module: Any, hidden_TE: torch.Tensor, heads: int, groups: int, dim: int, base: float) -> torch.Tensor:
    """Output (T, E) of one sequence; query head i reads the keys and values of group i · groups / heads, rounded down."""

    def project(layer: Any, h: torch.Tensor) -> torch.Tensor:
        out = layer.weight @ h
        return out if layer.bias is None else out + layer.bias

    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    outputs = []
    for t, h in enumerate(hidden_TE):
        q, k, v = (project(layer, h) for layer in (module.q_proj, module.k_proj, module.v_proj))
        keys.append(torch.stack([rope(k[g * dim : (g + 1) * dim], t, base) for g in range(groups)]))
        values.append(v.view(groups, dim))
        mixed = []
        for i in range(heads):
            g, query = i * groups // heads, rope(q[i * dim : (i + 1) * dim], t, base)
            scores = torch.stack([query @ keys[s][g] / math.sqrt(dim) for s in range(t + 1)])
            shares = torch.exp(scores - scores.max())
            shares = shares / shares.sum()
            mixed.append(sum(shares[s] * values[s][g] for s in range(t + 1)))
        outputs.append(project(module.o_proj, torch.cat(mixed)))
    return torch.stack(outputs)
