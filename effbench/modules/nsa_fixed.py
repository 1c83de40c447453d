"""Decoding with native sparse attention on memory that never moves, so that a step can be captured as a CUDA graph.

The same figures as the growing cache (nsa_cache.py), in buffers for a known number of tokens. The position is a tensor, every
shape is fixed, and nothing is asked of the device:

    selected     keys and values of every token                  slot = position
    compressed   one key and value per block                     slot = block; written when the block is whole, else left as it is
    recent       keys and values of the last w tokens            slot = position mod w
    raw          unrotated keys and values of the last l tokens  slot = position mod l; the newest block is compressed from it

A step compresses the newest block whether it is whole or not, which is what fixed shapes cost: φ runs every step and not
every d steps. Prompts have no padding here. Shapes: B requests, G groups, R query heads of a group, S tokens, D head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from effbench.costs import NSACost
from effbench.modules import nsa_paths as paths
from effbench.modules.nsa_blocks import num_compressed, select, visible_compressed

if TYPE_CHECKING:
    from effbench.modules.nsa_cache import NSALayer

Pair = tuple[torch.Tensor, torch.Tensor]


class NSAFixedLayer(CacheLayerMixin):
    """The cache of one layer for `max_tokens` tokens, filled from what a prefill grew."""

    is_compileable = True
    is_croppable = False
    is_sliding = False

    def __init__(self, cost: NSACost, max_tokens: int):
        super().__init__()
        self.cost, self.max_tokens = cost, max_tokens
        self.selected: Pair | None = None
        self.compressed: Pair | None = None
        self.recent: Pair | None = None
        self.raw: Pair | None = None

    def fill(self, grown: NSALayer) -> None:
        """Take over what a prefill left. Raises ValueError for a padded prompt or one that is too long."""
        cost, length = self.cost, grown.length
        if grown.padding is not None:
            raise ValueError("NSA decodes padded prompts with its growing cache; use the eager engine")
        if length > self.max_tokens:
            raise ValueError(f"the prompt has {length} tokens and the cache room for {self.max_tokens}")
        everything = grown.selected.view()
        if self.selected is None:
            blocks = max(1, num_compressed(self.max_tokens, cost.block, cost.stride))
            self.selected, self.compressed, self.recent, self.raw = (
                _like(everything, size) for size in (self.max_tokens, blocks, cost.window, cost.block)
            )
            self.is_initialized = True
        _write(self.selected, everything, 0, self.max_tokens)
        if grown.num_blocks():
            _write(self.compressed, grown.compressed.view(), 0, self.max_tokens)
        last = min(cost.window, length)
        recent = grown.selected if cost.shared else grown.recent
        keys, values = recent.view()
        _write(self.recent, (keys[:, :, -last:], values[:, :, -last:]), length - last, cost.window)
        if grown.tail.count:
            _write(self.raw, grown.tail.view(), length - grown.tail.count, cost.block)

    def attend(
        self, module: Any, q: torch.Tensor, rotated: torch.Tensor, new: tuple[Pair, Pair, Pair], position_1: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Outputs (B, G, R, 1, D) of the compressed, selected and window branch for one new token at `position_1`."""
        cost = self.cost
        raw, selected, recent = new
        _put(self.raw, raw, position_1 % cost.block)
        _put(self.selected, selected, position_1)
        _put(self.recent, recent, position_1 % cost.window)
        compressed = self._compress_newest(module, position_1)
        place_11 = position_1[None]
        visible = visible_compressed(place_11, compressed[0].shape[2], cost.block, cost.stride)
        out_cmp, p_cmp = paths.compressed_attention(q, *compressed, visible, module.scaling)
        chosen = select(p_cmp, place_11, cost, -(-self.max_tokens // cost.select_block))
        out_slc = paths.gathered(
            rotated, *_both(self.selected), chosen.index, chosen.valid, place_11, None, self.max_tokens, cost.select_block,
            module.scaling,
        )  # fmt: skip
        seen_W = torch.arange(cost.window, device=q.device) <= position_1
        out_win = paths.dense(rotated, *_both(self.recent), seen_W[None, None, None], module.scaling)
        return out_cmp, out_slc, out_win

    def _compress_newest(self, module: Any, position_1: torch.Tensor) -> Pair:
        """All compressed blocks, after the newest has been written if the token at `position_1` made it whole."""
        cost, blocks = self.cost, _both(self.compressed)
        newest_1 = ((position_1 + 1 - cost.block) // cost.stride).clamp(min=0)
        start_1 = newest_1 * cost.stride
        slot_L = (start_1 + torch.arange(cost.block, device=position_1.device)) % cost.block
        is_whole_1 = start_1 + cost.block == position_1 + 1
        compressors = (module.compress_keys, module.compress_values)
        for kept, source, compress in zip(blocks, _both(self.raw), compressors, strict=True):
            fresh = compress(source.index_select(2, slot_L)[:, :, None]).to(kept.dtype)
            kept.index_copy_(2, newest_1, torch.where(is_whole_1, fresh, kept.index_select(2, newest_1)))
        return blocks

    # What transformers asks of a layer. Lengths are those of the memory: the caller gives positions and masks.

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_tokens, 0

    def get_max_length(self) -> int:
        return self.max_tokens

    def reset(self) -> None:
        """Nothing to forget: `fill` writes what is read, and positions hide the rest."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise NotImplementedError("a cache of NSA is filled by its attention module")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("a cache of NSA is filled by its attention module")


def _like(pair: Pair, size: int) -> Pair:
    keys, values = (x.new_zeros(x.shape[0], x.shape[1], size, x.shape[3]) for x in pair)
    return keys, values


def _both(pair: Pair | None) -> Pair:
    assert pair is not None, "`fill` comes before the first step"
    return pair


def _write(buffer: Pair | None, pair: Pair, first: int, size: int) -> None:
    """Columns of `pair` to the slots of positions first, first + 1, … modulo `size`."""
    for kept, new in zip(_both(buffer), pair, strict=True):
        slots = torch.arange(first, first + new.shape[2], device=new.device) % size
        kept.index_copy_(2, slots, new.to(kept.dtype))


def _put(buffer: Pair | None, pair: Pair, slot_1: torch.Tensor) -> None:
    for kept, new in zip(_both(buffer), pair, strict=True):
        kept.index_copy_(2, slot_1, new.to(kept.dtype))
