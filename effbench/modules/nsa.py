"""Native sparse attention (NSA, arXiv 2502.11089) in the place of a decoder's own attention.

    o_t = Σ g_t^c · Attn(q_t, K^c, V^c)   over the branches c: compressed, selected, window          (equation 5)

    h ─ q_proj ─┬───────▶ compressed: φ of each block of l tokens, every d ──────────── p_cmp ─┐
                └ RoPE ─▶ selected: raw tokens of the n blocks that p_cmp finds important ◀────┘
                     └──▶ window: the last w tokens
    h ─ gate_proj ─ sigmoid ─▶ one gate per head and branch

Keys and values are projected for each branch on its own; `shared_kv` gives the form with one set that public kernels use.
What the paper leaves open, and what is done here:
    φ          for keys and for values one MLP each, l·D → D → D with SiLU, shared by the groups; its input has a learned
               (l, D) position encoding added
    positions  compression takes keys and queries without RoPE, since φ has positions of its own and a block has no single
               place; the other two branches have RoPE
    gates      MLP E → 3H → 3H with SiLU on the layer's input, then a sigmoid
    widths     keys and values both have the width D of the model
The choice of blocks carries no gradient, as in the paper. A cached prefix carries none either.
Dropout on attention weights is not done. Shapes: B requests, T new tokens, S columns (tokens and padding) up to the last of
them, E hidden, H heads, G groups, R = H / G, D head dim, N compressed blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from effbench.costs import NSACost
from effbench.modules import nsa_paths as paths
from effbench.modules.attention_forms import MASKED_FACTOR, SCORE_ELEMENTS, SCORE_ELEMENTS_CUDA
from effbench.modules.nsa_blocks import (
    gather_blocks,
    joined,
    left_padding,
    num_compressed,
    select,
    visible_compressed,
)
from effbench.modules.nsa_cache import NSALayer, layer_of
from effbench.modules.nsa_fixed import NSAFixedLayer
from effbench.modules.rotation import rotate

Pair = tuple[torch.Tensor, torch.Tensor]  # keys and values


class Compression(nn.Module):
    """φ: blocks of l keys or values (…, l, D) to one (…, D) each."""

    def __init__(self, block: int, dim: int):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(block, dim))
        self.up_proj = nn.Linear(block * dim, dim)
        self.down_proj = nn.Linear(dim, dim)

    def reset_own_parameters(self, std: float) -> None:
        nn.init.normal_(self.position, std=std)

    def forward(self, blocks: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.up_proj((blocks + self.position.to(blocks.dtype)).flatten(-2))
        compressed: torch.Tensor = self.down_proj(nn.functional.silu(x))
        return compressed


class NSAAttention(nn.Module):
    """One layer. `backend_used` names the form in which the selected branch of the last forward was computed."""

    is_causal = True

    def __init__(self, config: Any, layer_idx: int, params: Any):
        super().__init__()
        heads = int(config.num_attention_heads)
        dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        self.config, self.layer_idx, self.backend_used = config, layer_idx, ""
        self.backend: str = params.backend
        values = {"hidden_size": config.hidden_size, "num_attention_heads": heads, "head_dim": dim}
        self.cost = cost = NSACost.of(values, params)
        if heads % cost.groups or cost.block % cost.stride or cost.select_block % cost.stride or cost.block > cost.select_block:
            raise ValueError("NSA needs groups that divide the heads, and a stride that divides block ≤ select_block")
        self.scaling = dim**-0.5
        self.num_key_value_groups = heads // cost.groups
        is_qwen2 = config.model_type == "qwen2"  # which has biases on q, k and v without a setting that says so
        bias = bool(getattr(config, "attention_bias", False))
        sets = 1 if cost.shared else 3
        self.q_proj = nn.Linear(cost.hidden, heads * dim, bias=bias or is_qwen2)
        self.k_proj = nn.Linear(cost.hidden, sets * cost.groups * dim, bias=bias or is_qwen2)
        self.v_proj = nn.Linear(cost.hidden, sets * cost.groups * dim, bias=bias or is_qwen2)
        self.o_proj = nn.Linear(heads * dim, cost.hidden, bias=bias and not is_qwen2)
        self.gate_proj = nn.Sequential(nn.Linear(cost.hidden, 3 * heads), nn.SiLU(), nn.Linear(3 * heads, 3 * heads))
        self.compress_keys = Compression(cost.block, dim)
        self.compress_values = Compression(cost.block, dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """(B, T, E) → (B, T, E)."""
        batch, length, _ = hidden_states.shape
        layer = layer_of(past_key_values, self.layer_idx, self.cost)
        if isinstance(layer, NSAFixedLayer):
            return self._decode_fixed(layer, hidden_states, position_embeddings, kwargs["position_ids"]), None
        seen = layer.length if layer else 0
        is_known = layer is not None and layer.is_settled
        padding = layer.padding if layer and is_known else left_padding(attention_mask, batch, length, seen)
        at = paths.Queries(seen, seen + length, torch.tensor(padding, device=hidden_states.device) if padding else None)

        q = self.q_proj(hidden_states).view(batch, length, self.cost.heads, -1).transpose(1, 2)
        rotated = rotate(q, *position_embeddings)
        raw, selected, recent = self._projected(hidden_states, position_embeddings)
        compressed, selected, recent = self._remembered(layer, at, padding, raw, selected, recent)
        q, rotated = (x.unflatten(1, (self.cost.groups, -1)) for x in (q, rotated))  # (B, G, R, T, D)
        out_BHTD = self._attend(q, rotated, compressed, selected, recent, at, min(padding) if padding else 0, hidden_states)
        return self.o_proj(out_BHTD.transpose(1, 2).reshape(batch, length, -1)), None

    def _projected(
        self, hidden_BTE: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[Pair, Pair, Pair]:
        """New keys and values (B, G, T, D) of each branch; those of the compressed one are not rotated."""
        batch, length, _ = hidden_BTE.shape
        shape = (batch, length, -1, self.cost.groups, self.cost.key_dim)
        keys, values = (proj(hidden_BTE).view(shape).permute(2, 0, 3, 1, 4).contiguous() for proj in (self.k_proj, self.v_proj))
        if self.cost.shared:
            rotated = rotate(keys[0], *position_embeddings), values[0]
            return (keys[0], values[0]), rotated, rotated
        selected, recent = ((rotate(keys[branch], *position_embeddings), values[branch]) for branch in (1, 2))
        return (keys[0], values[0]), selected, recent

    def _remembered(
        self,
        layer: NSALayer | None,
        at: paths.Queries,
        padding: tuple[int, ...] | None,
        raw: Pair,
        selected: Pair,
        recent: Pair,
    ) -> tuple[Pair, Pair, Pair]:
        """Keys and values with those of the tokens before, which are kept in `layer`: compressed, selected and recent."""
        tokens = [at.end - p for p in padding] if padding else [at.end]
        totals = [num_compressed(n, self.cost.block, self.cost.stride) for n in tokens]
        if layer is None:
            return self._compressed(raw, 0, at.padding, [0] * len(totals), max(totals)), selected, recent
        layer.padding = padding
        is_first = layer.length == 0
        selected = layer.add_selected(*selected)
        recent = selected if self.cost.shared else layer.add_recent(*recent)
        new = self._compress_new(layer, raw, totals)
        layer.advance(*raw)
        return new if is_first and new else layer.compressed.view(), selected, recent

    def _compress_new(self, layer: NSALayer, raw: Pair, totals: list[int]) -> Pair | None:
        """Compress the blocks that the new tokens complete and keep them; the first call returns those of all rows."""
        batch, device = raw[0].shape[0], raw[0].device
        before = [layer.num_blocks(row) for row in range(len(totals))]
        rows = [row for row, (old, new) in enumerate(zip(before, totals, strict=True)) if new > old]
        if not rows and layer.length:
            return None
        first = layer.tail.first
        source = layer.with_tail(*raw)
        if layer.padding is None:
            blocks = self._compressed(source, first, None, before, totals[0])
            layer.compressed.append(*blocks)
            return blocks
        if layer.length == 0:
            rows = list(range(batch))  # the first time they are used as they are, so for every row
        most = max(totals[row] - before[row] for row in rows)
        padding_R = torch.tensor([layer.padding[row] for row in rows], device=device)
        before_R = [before[row] for row in rows]
        picked = source if len(rows) == batch else (source[0][rows], source[1][rows])
        blocks = self._compressed(picked, first, padding_R, before_R, max(before_R) + most)
        slots = torch.tensor(before_R, device=device)[:, None] + torch.arange(most, device=device)
        layer.add_compressed(*blocks, rows, slots, max(totals))
        return blocks

    def _compressed(self, source: Pair, first: int, padding_R: torch.Tensor | None, before: list[int], total: int) -> Pair:
        """φ of blocks that begin in the columns of `source`, the first of which is column `first`.

        Without padding blocks before[0] … total − 1 of all rows; else as many from before[r] on of each row.
        """
        block, stride = self.cost.block, self.cost.stride
        if padding_R is None:
            begin, count = before[0] * stride - first, total - before[0]
            keys, values = (
                x[:, :, begin : begin + max(0, count - 1) * stride + block].unfold(2, block, stride).transpose(-1, -2)
                if count
                else x.new_zeros(*x.shape[:2], 0, block, x.shape[3])
                for x in source
            )
        else:
            before_R1 = torch.tensor(before, device=padding_R.device)[:, None]
            number_C = torch.arange(total - max(before), device=padding_R.device)
            start_RC = (before_R1 + number_C) * stride + padding_R[:, None] - first
            keys, values = (gather_blocks(x, start_RC, block) for x in source)
        return self.compress_keys(keys), self.compress_values(values)

    def _attend(
        self, q: torch.Tensor, rotated: torch.Tensor, compressed: Pair, selected: Pair, recent: Pair, at: paths.Queries,
        least_padding: int, hidden_BTE: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Gated sum of the three branches, (B, H, T, D); queries are taken some at a time, each part over its own past."""
        cost = self.cost
        first = 0 if cost.shared else at.end - recent[0].shape[2]
        if selected[0] is recent[0]:
            recent = (recent[0][:, :, : at.end], recent[1][:, :, : at.end])
        self.backend_used = backend = self._backend(at, q)
        gate_cmp, gate_slc, gate_win = self._gates(hidden_BTE)
        parts, selections = [], []
        chunks = list(self._chunks(at, q, compressed[0].shape[2]))
        for part in chunks:
            here = slice(part.begin - at.begin, part.end - at.begin)
            position_BT = part.positions(q.device)
            tokens = part.end - least_padding
            num_blocks = min(compressed[0].shape[2], num_compressed(tokens, cost.block, cost.stride))
            visible = visible_compressed(position_BT, num_blocks, cost.block, cost.stride)
            args = (q[:, :, :, here], compressed[0][:, :, :num_blocks], compressed[1][:, :, :num_blocks], visible, self.scaling)
            if len(chunks) > 1 and torch.is_grad_enabled():
                out, p_cmp = checkpoint(paths.compressed_attention, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                out, p_cmp = paths.compressed_attention(*args)
            out = gate_cmp[:, :, :, here] * out
            num_select = -(-max(1, tokens) // cost.select_block)
            chosen = select(p_cmp, position_BT.clamp(min=0), cost, num_select)
            turned = rotated[:, :, :, here]
            if backend == "flex":
                selections.append(chosen)
            else:
                form = paths.masked_attention if backend == "masked" else paths.gather_attention
                out = out + gate_slc[:, :, :, here] * form(turned, *selected, chosen, part, cost.select_block, self.scaling)
            win = paths.window_attention(turned, *recent, first, part, cost.window, self.scaling)
            parts.append(out + gate_win[:, :, :, here] * win)
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)
        if backend == "flex":
            chosen = joined(selections, q.shape[0], cost.groups)
            whole = whole + gate_slc * paths.flex_attention(rotated, *selected, chosen, at, cost.select_block, self.scaling)
        return whole.flatten(1, 2)

    def _gates(self, hidden_BTE: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, G, R, T, 1) of the compressed, selected and window branch."""
        gates = torch.sigmoid(self.gate_proj(hidden_BTE)).view(*hidden_BTE.shape[:2], 3, self.cost.groups, -1, 1)
        return tuple(gates.permute(2, 0, 3, 4, 1, 5))

    def _decode_fixed(
        self,
        layer: NSAFixedLayer,
        hidden_B1E: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        position_ids: torch.Tensor,
    ) -> torch.Tensor:
        """One new token of each request, all at one position, on memory that does not move."""
        batch = hidden_B1E.shape[0]
        self.backend_used = "gather"
        q = self.q_proj(hidden_B1E).view(batch, 1, self.cost.heads, -1).transpose(1, 2)
        q, rotated = (x.unflatten(1, (self.cost.groups, -1)) for x in (q, rotate(q, *position_embeddings)))
        new = self._projected(hidden_B1E, position_embeddings)
        outputs = layer.attend(self, q, rotated, new, position_ids.flatten()[:1])
        out = torch.stack([g * o for g, o in zip(self._gates(hidden_B1E), outputs, strict=True)]).sum(dim=0)
        return self.o_proj(out.flatten(1, 2).transpose(1, 2).reshape(batch, 1, -1))

    def _backend(self, at: paths.Queries, q: torch.Tensor) -> str:
        """The form of the selected branch: as asked for, else block-sparse on CUDA, else what costs less."""
        length = at.end - at.begin
        most = self.cost.num_selected * self.cost.select_block
        can_flex = q.is_cuda and q.dtype != torch.float64
        if self.backend == "flex":
            if not can_flex:
                raise ValueError(f"NSA's flex backend runs on CUDA in fp32, bf16 or fp16, not on {q.device.type} in {q.dtype}")
            return "gather" if length == 1 else "flex"
        if self.backend != "auto":
            return self.backend
        if length == 1 or at.end <= most:
            return "masked" if at.end <= most else "gather"
        if can_flex and length >= paths.FLEX_BLOCK:
            return "flex"
        return "masked" if at.end <= MASKED_FACTOR * most else "gather"

    def _chunks(self, at: paths.Queries, q: torch.Tensor, num_blocks: int) -> Iterator[paths.Queries]:
        """Neighbouring queries, so many that their scores stay within bounds."""
        columns = at.end if self.backend_used == "masked" else max(num_blocks, self.cost.window)
        limit = SCORE_ELEMENTS_CUDA if q.is_cuda else SCORE_ELEMENTS
        step = max(16, limit // (q.shape[0] * self.cost.heads * columns))
        for begin in range(at.begin, at.end, step):
            yield paths.Queries(begin, min(begin + step, at.end), at.padding)
