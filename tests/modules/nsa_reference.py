"""Native sparse attention written from the formulas of arXiv 2502.11089, one token and one head at a time, in plain loops.

Shares no code with effbench. One sequence without padding; everything in the dtype of what is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Sizes:
    """H, G, D, l, d, l', n, w and whether the branches share keys and values."""

    heads: int
    groups: int
    dim: int
    block: int
    stride: int
    select_block: int
    num_selected: int
    window: int
    shared: bool = False


def silu(x):
    return x / (1 + torch.exp(-x))


def attend(query, keys, values):
    """softmax(q·k/√D) over lists of keys and values; zero over none."""
    if not keys:
        return torch.zeros_like(query), []
    scores = torch.stack([(query * k).sum() for k in keys]) / query.shape[0] ** 0.5
    weights = torch.exp(scores - scores.max().detach())
    weights = weights / weights.sum()
    return sum(w * v for w, v in zip(weights, values, strict=True)), weights.tolist()


def turned(x, cos, sin):
    """RoPE of one vector: pairs (a, a + D/2) turned by the angle of a."""
    half = x.shape[0] // 2
    first = [x[a] * cos[a] - x[a + half] * sin[a] for a in range(half)]
    second = [x[a + half] * cos[a + half] + x[a] * sin[a + half] for a in range(half)]
    return torch.stack(first + second)


def compressed(vectors, state, name):
    """φ of l vectors."""
    x = torch.cat([v + state[f"{name}.position"][i] for i, v in enumerate(vectors)])
    x = silu(state[f"{name}.up_proj.weight"] @ x + state[f"{name}.up_proj.bias"])
    return state[f"{name}.down_proj.weight"] @ x + state[f"{name}.down_proj.bias"]


def importance_of(p_cmp, sizes, block):
    """Equation 9 by counting: every stride-sized piece of selection block `block` asks which compression blocks cover it."""
    total = 0.0
    for piece in range(block * sizes.select_block, (block + 1) * sizes.select_block, sizes.stride):
        for i, p in enumerate(p_cmp):
            if i * sizes.stride <= piece < i * sizes.stride + sizes.block:
                total += p
    return total


def paper_double_sum(p_cmp, sizes, block):
    """Equation 9 as printed, blocks and entries of p_cmp counted from one; `block` is counted from zero."""
    total = 0.0
    for m in range(sizes.select_block // sizes.stride):
        for n in range(sizes.block // sizes.stride):
            one_based = (sizes.select_block // sizes.stride) * (block + 1) - m - n
            if 1 <= one_based <= len(p_cmp):
                total += p_cmp[one_based - 1]
    return total


def chosen_blocks(importance, t, sizes):
    """Equations 10 and 11 with the first and the two local blocks forced."""
    own = t // sizes.select_block
    forced = sorted({0, own, max(0, own - 1)})
    others = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: -importance[j])
    return sorted(forced + others[: sizes.num_selected - len(forced)])


def linear(state, name, x):
    out = state[f"{name}.weight"] @ x
    return out + state[f"{name}.bias"] if f"{name}.bias" in state else out


def reference(hidden, cos, sin, state, sizes, selected=None):
    """(T, E) → (T, E) and the selected blocks {(t, group): list}; `selected` gives them instead of choosing."""
    H, G, D = sizes.heads, sizes.groups, sizes.dim
    length = hidden.shape[0]
    keys: dict = {}
    values: dict = {}
    for t in range(length):
        k, v = linear(state, "k_proj", hidden[t]), linear(state, "v_proj", hidden[t])
        for branch, name in enumerate(("cmp", "slc", "win")):
            for g in range(G):
                at = ((0 if sizes.shared else branch) * G + g) * D
                keys[name, g, t], values[name, g, t] = k[at : at + D], v[at : at + D]
                if name != "cmp":
                    keys[name, g, t] = turned(keys[name, g, t], cos[t], sin[t])
    block_keys: dict = {g: [] for g in range(G)}
    block_values: dict = {g: [] for g in range(G)}
    i = 0
    while i * sizes.stride + sizes.block <= length:
        tokens = range(i * sizes.stride, i * sizes.stride + sizes.block)
        for g in range(G):
            block_keys[g].append(compressed([keys["cmp", g, s] for s in tokens], state, "compress_keys"))
            block_values[g].append(compressed([values["cmp", g, s] for s in tokens], state, "compress_values"))
        i += 1

    chosen: dict = {}
    rows = []
    for t in range(length):
        q = linear(state, "q_proj", hidden[t])
        gate = linear(state, "gate_proj.2", silu(linear(state, "gate_proj.0", hidden[t])))
        gate = 1 / (1 + torch.exp(-gate))
        visible = [i for i in range(len(block_keys[0])) if i * sizes.stride + sizes.block - 1 <= t]
        out: list = [None] * H
        for g in range(G):
            group = range(g * H // G, (g + 1) * H // G)
            p_sum = [0.0] * len(visible)
            for h in group:
                head = q[h * D : (h + 1) * D]
                o, p = attend(head, [block_keys[g][i] for i in visible], [block_values[g][i] for i in visible])
                out[h] = gate[h] * o
                p_sum = [a + b for a, b in zip(p_sum, p, strict=True)]
            own = t // sizes.select_block
            importance = [importance_of(p_sum, sizes, j) for j in range(own + 1)]
            blocks = chosen_blocks(importance, t, sizes) if selected is None else selected[t, g]
            chosen[t, g] = blocks
            tokens = [s for j in blocks for s in range(j * sizes.select_block, (j + 1) * sizes.select_block) if s <= t]
            recent = range(max(0, t - sizes.window + 1), t + 1)
            for h in group:
                head = turned(q[h * D : (h + 1) * D], cos[t], sin[t])
                o, _ = attend(head, [keys["slc", g, s] for s in tokens], [values["slc", g, s] for s in tokens])
                out[h] = out[h] + gate[H + h] * o
                o, _ = attend(head, [keys["win", g, s] for s in recent], [values["win", g, s] for s in recent])
                out[h] = out[h] + gate[2 * H + h] * o
        rows.append(linear(state, "o_proj", torch.cat(out)))
    return torch.stack(rows), chosen
