"""Blocks of native sparse attention (arXiv 2502.11089): which there are, which a query sees, which it selects. Pure functions.

Positions are counted from the first real token of a row: with p tokens of left padding, column c of a batch is position c − p.

    compression block i   positions i·d … i·d + l − 1, seen by a query at t once it lies wholly at or before t
    selection block j     positions j·l' … (j + 1)·l' − 1, selected whole, causal inside

Equation 9 gives p_slc[j] = Σ_{m < l'/d} Σ_{n < l/d} p_cmp[(l'/d) j − m − n]. With blocks j and entries of p_cmp counted from
one, as the sum reads, j covers the strides (l'/d) j − m and the compression blocks that cover stride s are s − n: each block
counts as often as it shares a stride with j. Counted from zero, as everything here is, the index is (l'/d) j + m − n, and the
entries outside are 0. So the weight of i in j is their overlap in tokens, over d.

Shapes: B requests, G groups, R query heads of a group, T queries, N compression blocks, J selection blocks, K selected ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch.nn import functional as F

from effbench.costs import NSACost


@dataclass(frozen=True)
class Selection:
    """Selected blocks of each query: `index` (B or 1, G or 1, T, K), of which those count where `valid` says so."""

    index: torch.Tensor
    valid: torch.Tensor


def num_compressed(tokens: int, block: int, stride: int) -> int:
    """Whole compression blocks among so many tokens."""
    return max(0, (tokens - block) // stride + 1)


def visible_compressed(position_BT: torch.Tensor, num_blocks: int, block: int, stride: int) -> torch.Tensor:
    """(B, T, N): whether block i ends at or before the query."""
    last_N = torch.arange(num_blocks, device=position_BT.device) * stride + block - 1
    return last_N <= position_BT[..., None]


@cache
def overlap_weights(block: int, stride: int, select_block: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Weights of the compression blocks (l'/d) j − (l/d − 1) … (l'/d) j + l'/d − 1 in selection block j; the same for every j.

    Kept, so that it is copied to a device once.
    """
    pieces, covered = select_block // stride, block // stride
    shifts = [m - n for m in range(pieces) for n in range(covered)]
    return torch.tensor([shifts.count(shift) for shift in range(1 - covered, pieces)], dtype=dtype, device=device)


def importance(p_cmp: torch.Tensor, cost: NSACost, num_select: int) -> torch.Tensor:
    """Equation 9: (…, N) probabilities of compression blocks → (…, J) importance of selection blocks, in O(N)."""
    step, covered = cost.select_block // cost.stride, cost.block // cost.stride
    weights = overlap_weights(cost.block, cost.stride, cost.select_block, p_cmp.dtype, p_cmp.device)
    missing = num_select * step - p_cmp.shape[-1]
    return F.pad(p_cmp, (covered - 1, missing)).unfold(-1, len(weights), step) @ weights


def select(p_cmp: torch.Tensor | None, position_BT: torch.Tensor, cost: NSACost, num_select: int) -> Selection:
    """Equations 10 and 11: the n blocks of most importance, the initial and two local ones always among them.

    `p_cmp` (B, G, R, T, N) is summed over the heads of a group; it may be None where there are no more than n blocks.
    Blocks after the query's own are never valid. Nothing here carries a gradient.
    """
    block_J = torch.arange(num_select, device=position_BT.device)
    own_B1T1 = (position_BT // cost.select_block)[:, None, :, None]
    if num_select <= cost.num_selected:
        index = block_J.expand(*own_B1T1.shape[:3], num_select)
        return Selection(index, index <= own_B1T1)
    assert p_cmp is not None, "more blocks than are selected, so their importance is needed"
    with torch.no_grad():
        score_BGTJ = importance(p_cmp.detach().sum(dim=2), cost, num_select)
        forced = (block_J == 0) | (block_J == own_B1T1) | (block_J == own_B1T1 - 1)
        score_BGTJ = score_BGTJ.masked_fill(forced, torch.inf).masked_fill(block_J > own_B1T1, -1.0)
        best, index = score_BGTJ.topk(cost.num_selected, dim=-1)
        return Selection(index, best >= 0)


def selected_blocks(selection: Selection, num_select: int) -> torch.Tensor:
    """(B or 1, G or 1, T, J): whether a query selected a block."""
    empty = torch.zeros(*selection.index.shape[:3], num_select, dtype=torch.bool, device=selection.index.device)
    return empty.scatter(-1, selection.index, selection.valid)


def joined(selections: list[Selection], batch: int, groups: int) -> Selection:
    """The selections of neighbouring queries as one; a part with fewer blocks is filled with blocks that do not count."""
    widest = max(s.index.shape[-1] for s in selections)
    index, valid = [], []
    for s in selections:  # fewer than n blocks are all blocks in order, so the next numbers are free
        place_K = torch.arange(widest, device=s.index.device)
        missing = widest - s.index.shape[-1]
        filled = torch.cat([s.index, place_K[widest - missing :].expand(*s.index.shape[:3], missing)], dim=-1)
        index.append(filled.expand(batch, groups, -1, -1))
        valid.append(F.pad(s.valid, (0, missing)).expand(batch, groups, -1, -1))
    return Selection(torch.cat(index, dim=2), torch.cat(valid, dim=2))


def gather_blocks(x: torch.Tensor, start_RC: torch.Tensor, block: int) -> torch.Tensor:
    """Blocks of a tensor (R, G, S, D) that start in the columns (R, C): (R, G, C, l, D). Columns that are not there are its last."""
    column_RCL = start_RC[..., None] + torch.arange(block, device=x.device)
    column_RCL = column_RCL.clamp(min=0, max=x.shape[2] - 1)
    row_R11 = torch.arange(x.shape[0], device=x.device)[:, None, None]
    return x[row_R11, :, column_RCL].permute(0, 3, 1, 2, 4)


def left_padding(mask: torch.Tensor | None, batch: int, length: int, seen: int) -> tuple[int, ...] | None:
    """Padding tokens at the start of each row, from a causal mask as transformers makes it, or None where there are none.

    `mask` (B or 1, 1, T, S), bool (True: visible) or additive (0: visible), or (B, S) with True or 1 for real tokens; its T
    queries follow `seen` tokens. Padding at the end needs no care: it comes after every real token. Waits for the device.
    Raises ValueError for masks of another kind, such as those of packed sequences.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4) or mask.shape[-1] < seen + length:
        shape = tuple(mask.shape)
        raise ValueError(
            f"NSA reads a mask (B, 1, T, {seen + length} or more) or (B, {seen + length}), not one of shape {shape}"
        )
    if mask.dim() == 2:
        real = mask.bool()[:, None, None]
        place_S = torch.arange(mask.shape[-1], device=mask.device)
        mask = real & (place_S <= torch.arange(seen, seen + length, device=mask.device)[:, None])
    allowed = mask if mask.dtype == torch.bool else mask == 0
    first_BS, last_BS = allowed[:, 0, 0, : seen + length], allowed[:, 0, -1, : seen + length]
    padding_B = (last_BS.int().cumsum(-1) == 0).sum(-1)
    column_S = torch.arange(seen + length, device=mask.device)
    expected_BS = (column_S >= padding_B[:, None]) & (column_S <= seen)
    state = torch.cat([padding_B, (first_BS == expected_BS).all().long()[None]]).tolist()
    if not state[-1]:
        raise ValueError("NSA counts blocks from a row's first real token; packed sequences or another mask cannot be used")
    padding = tuple(state[:-1]) if len(state) - 1 == batch else tuple(state[:1]) * batch
    return padding if any(padding) else None
