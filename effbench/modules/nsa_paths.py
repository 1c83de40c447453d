"""The three attentions of native sparse attention, and the forms in which its selected one is computed.

    masked   scaled-dot-product attention over all columns under a mask of the selected blocks; best for short sequences
    gather   the selected blocks of each query are collected and attended to; work grows with n·l', not with the context
    flex     block-sparse flex attention, compiled, on CUDA; for training and prefill

A query in the padding of its row sees the padding before it, so that its output is finite; nothing real ever sees it.
Shapes: B requests, G groups, R query heads of a group, T queries, S columns, N compressed blocks, K selected ones, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from effbench.modules.attention_forms import GATHER_ELEMENTS, GATHER_ELEMENTS_CUDA
from effbench.modules.nsa_blocks import Selection, selected_blocks

FLEX_BLOCK = 128  # queries and columns of a block of flex attention


@dataclass(frozen=True)
class Queries:
    """Neighbouring queries of a batch: columns begin … end − 1, and what is known of their places."""

    begin: int
    end: int
    padding: torch.Tensor | None  # (B,) columns of padding per row; None: no row has any

    def columns(self, device: torch.device) -> torch.Tensor:
        return torch.arange(self.begin, self.end, device=device)

    def positions(self, device: torch.device) -> torch.Tensor:
        """(B or 1, T) counted from a row's first real token; negative in its padding."""
        column_1T = self.columns(device)[None]
        return column_1T if self.padding is None else column_1T - self.padding[:, None]


def compressed_attention(
    q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible_BTN: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, G, R, T, D) and probabilities (B, G, R, T, N); both exactly zero where no block is visible."""
    batch, groups, per_group, length, dim = q.shape
    num_blocks = key.shape[2]
    scores = torch.matmul((q * scale).reshape(batch, groups, per_group * length, dim), key.to(q.dtype).transpose(2, 3))
    scores = to_softmax_dtype(scores).view(batch, groups, per_group, length, num_blocks)
    hidden = ~visible_BTN[:, None, None]
    p = torch.softmax(scores.masked_fill(hidden, torch.finfo(scores.dtype).min), dim=-1).masked_fill(hidden, 0.0)
    out = torch.matmul(p.to(value.dtype).view(batch, groups, per_group * length, num_blocks), value)
    return out.view(batch, groups, per_group, length, dim), p


def window_attention(
    q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, first: int, at: Queries, window: int, scale: float
) -> torch.Tensor:
    """Attention over the last `window` columns, the query's own included; `key` begins at the column `first`."""
    begin = max(first, at.begin - window + 1)
    key, value = key[:, :, begin - first : at.end - first], value[:, :, begin - first : at.end - first]
    if at.end - at.begin == 1 and at.padding is None:
        return dense(q, key, value, None, scale)
    column_S = torch.arange(begin, at.end, device=q.device)
    column_T1 = at.columns(q.device)[:, None]
    mask = (column_S <= column_T1) & (column_S > column_T1 - window)
    if at.padding is None:
        return dense(q, key, value, mask[None, None], scale)
    padding_B11 = at.padding[:, None, None]
    return dense(q, key, value, (mask & ((column_S >= padding_B11) | (column_T1 < padding_B11)))[:, None], scale)


def masked_attention(
    q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, selection: Selection, at: Queries, select_block: int, scale: float
) -> torch.Tensor:
    """Selected branch over all columns up to the last query, under a mask."""
    key, value = key[:, :, : at.end], value[:, :, : at.end]
    return dense(q, key, value, selected_columns(selection, at, select_block, q.device), scale)


def selected_columns(selection: Selection, at: Queries, select_block: int, device: torch.device) -> torch.Tensor:
    """(B or 1, G or 1, T, S): the columns that each query attends to, S being those up to the last query."""
    column_S, column_T1 = torch.arange(at.end, device=device), at.columns(device)[:, None]
    num_select = -(-at.end // select_block)
    chosen = selected_blocks(selection, num_select)
    if at.padding is None:
        return chosen[..., column_S // select_block] & (column_S <= column_T1)
    position_BS = column_S - at.padding[:, None]
    block_BS = position_BS.clamp(min=0) // select_block
    batch = at.padding.shape[0]
    chosen = chosen.expand(batch, -1, -1, -1)
    allowed = chosen.gather(-1, block_BS[:, None, None].expand(-1, *chosen.shape[1:3], -1))
    allowed = allowed & (position_BS >= 0)[:, None, None] & (column_S <= column_T1)
    padded = (column_T1 < at.padding[:, None, None]) & (column_S <= column_T1)
    return allowed | padded[:, None]


def dense(q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Scaled-dot-product attention of (B, G, R, T, D) over (B, G, S, D), the mask (B or 1, G or 1, T, S) shared by a group's heads."""
    batch, groups, per_group, length, dim = q.shape
    if mask is not None and mask.shape[:2] != (1, 1):
        mask = mask.expand(batch, groups, -1, -1).reshape(batch * groups, 1, *mask.shape[2:])
    key, value = (x.reshape(batch * groups, 1, *x.shape[2:]).expand(-1, per_group, -1, -1).to(q.dtype) for x in (key, value))
    out = F.scaled_dot_product_attention(
        q.reshape(batch * groups, per_group, length, dim), key, value, attn_mask=mask, scale=scale
    )
    return out.view(batch, groups, per_group, length, -1)


def gather_attention(
    q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, selection: Selection, at: Queries, select_block: int, scale: float
) -> torch.Tensor:
    """Selected branch over the selected blocks alone. `key` and `value` are contiguous; columns from `at.end` on are not read.

    Some queries at a time, so that memory is bounded; a backward pass collects their blocks again.
    """
    batch, groups, _, length, dim = q.shape
    per_query = batch * groups * selection.index.shape[-1] * select_block * dim
    step = max(1, (GATHER_ELEMENTS_CUDA if q.is_cuda else GATHER_ELEMENTS) // per_query)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, key, value))
    attend: Callable[..., torch.Tensor] = gathered
    if grad:
        attend = partial(checkpoint, gathered, use_reentrant=False, preserve_rng_state=False)
    position_BT = at.positions(q.device).clamp(min=0)
    parts = []
    for begin in range(0, length, step):
        part = slice(begin, begin + step)
        index, valid = selection.index[:, :, part], selection.valid[:, :, part]
        args = (index, valid, position_BT[:, part], at.padding, at.end, select_block, scale)
        parts.append(attend(q[:, :, :, part], key, value, *args))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)


def gathered(
    q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, index: torch.Tensor, valid: torch.Tensor,
    position_BT: torch.Tensor, padding_B: torch.Tensor | None, end: int, select_block: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Attention of some queries over their selected blocks, collected; columns from `end` on are not read."""
    batch, groups, _, length, _ = q.shape
    device, capacity = q.device, key.shape[2]
    index, valid = (x.expand(batch, groups, -1, -1) for x in (index, valid))
    place_BGTM = (index[..., None] * select_block + torch.arange(select_block, device=device)).flatten(-2)
    allowed = valid.repeat_interleave(select_block, dim=-1) & (place_BGTM <= position_BT[:, None, :, None])
    column = place_BGTM if padding_B is None else place_BGTM + padding_B[:, None, None, None]
    row_BG11 = (torch.arange(batch * groups, device=device) * capacity).view(batch, groups, 1, 1)
    flat = (column.clamp(max=end - 1) + row_BG11).flatten()
    key, value = (
        x.view(batch * groups * capacity, -1).index_select(0, flat).view(batch, groups, length, place_BGTM.shape[-1], -1)
        for x in (key, value)
    )
    query = (q * scale).transpose(2, 3)  # (B, G, T, R, D)
    scores = to_softmax_dtype(torch.matmul(query, key.to(query.dtype).transpose(3, 4)))
    scores = scores.masked_fill(~allowed[:, :, :, None], torch.finfo(scores.dtype).min)
    return torch.matmul(torch.softmax(scores, dim=-1).to(value.dtype), value).transpose(2, 3)


def flex_attention(
    q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, selection: Selection, at: Queries, select_block: int, scale: float,
    attend: Callable[..., Any] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Selected branch by block-sparse flex attention: blocks that no query of a tile selected are skipped, others masked."""
    from torch.nn.attention.flex_attention import BlockMask

    batch, groups, per_group, length, _ = q.shape
    key, value = key[:, :, : at.end], value[:, :, : at.end]
    chosen = selected_blocks(selection, -(-at.end // select_block)).expand(batch, groups, -1, -1).contiguous()
    padding_B = at.padding if at.padding is not None else torch.zeros(batch, dtype=torch.long, device=q.device)
    begin = at.begin

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        place = kv_idx - padding_B[b]
        block = torch.clamp(place, min=0) // select_block
        return chosen[b, h // per_group, q_idx, block] & (place >= 0) & (kv_idx <= q_idx + begin)

    tiles = _tiles(chosen, padding_B, at, select_block).repeat_interleave(per_group, dim=1)
    count = tiles.sum(dim=-1, dtype=torch.int32)
    order = tiles.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    mask = BlockMask.from_kv_blocks(count, order, BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask_mod, seq_lengths=(length, at.end))
    out = (attend or _compiled_flex())(
        q.reshape(batch, groups * per_group, length, -1), key, value, block_mask=mask, scale=scale, enable_gqa=True
    )
    return out.view(batch, groups, per_group, length, -1)


def _tiles(chosen: torch.Tensor, padding_B: torch.Tensor, at: Queries, select_block: int) -> torch.Tensor:
    """(B, G, query tiles, column tiles): whether any query of a tile selected a column of the other."""
    length = at.end - at.begin
    num_q, num_kv = -(-length // FLEX_BLOCK), -(-at.end // FLEX_BLOCK)
    by_tile = F.pad(chosen, (0, 0, 0, num_q * FLEX_BLOCK - length)).unflatten(2, (num_q, FLEX_BLOCK)).any(dim=3)
    place_BS = torch.arange(num_kv * FLEX_BLOCK, device=chosen.device) - padding_B[:, None]
    block_BS = (place_BS.clamp(min=0) // select_block).clamp(max=chosen.shape[-1] - 1)
    by_column = by_tile.gather(-1, block_BS[:, None, None].expand(-1, *by_tile.shape[1:3], -1)) & (place_BS >= 0)[:, None, None]
    return by_column.unflatten(-1, (num_kv, FLEX_BLOCK)).any(dim=-1)


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention import flex_attention as library

    compiled: Callable[..., Any] = torch.compile(library.flex_attention, dynamic=True)
    return compiled


def to_softmax_dtype(scores: torch.Tensor) -> torch.Tensor:
    """Softmax is taken in fp32, in fp64 where that is asked for."""
    return scores if scores.dtype == torch.float64 else scores.float()
