"""What native sparse attention keeps of the tokens it has seen: one layer of a transformers cache.

    selected     keys and values of every token, columns as in the batch (padding included)
    compressed   one key and value per whole compression block, counted from a row's first real token
    recent       keys and values of the last w tokens; none where the branches share theirs
    tail         keys and values, not rotated, of the tokens that compression blocks to come still need

Memory grows in chunks, so a token costs the writing of its own entries, not the copy of a prefix. What is kept carries no
gradient. Shapes: B requests, G groups, S columns, D head dimension.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from effbench.costs import NSACost
from effbench.modules.nsa_blocks import num_compressed
from effbench.modules.nsa_fixed import NSAFixedLayer

LEAST_ROOM, ROOM_SHARE = 16, 32  # columns of room that new memory has beyond what is needed: 1/32 of it, at least 16


class Columns:
    """Keys and values (B, G, columns, D) of neighbouring columns; the oldest can be let go."""

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.first = 0  # the column that is kept in slot `begin`
        self.begin = 0
        self.count = 0

    def append(self, keys: torch.Tensor, values: torch.Tensor, keep: int | None = None) -> None:
        """Add columns at the end and keep the last `keep` of all, or all."""
        new = keys.shape[2]
        if keep is not None:
            if new > keep:
                self.first += self.count + new - keep
                self.begin = self.count = 0
                keys, values, new = keys[:, :, new - keep :], values[:, :, new - keep :], keep
            self.forget(max(0, self.count + new - keep))
        self.reserve(self.count + new, keys, values)
        assert self.keys is not None and self.values is not None
        end = self.begin + self.count
        self.keys[:, :, end : end + new] = keys.detach()
        self.values[:, :, end : end + new] = values.detach()
        self.count += new

    def reserve(self, columns: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Room for so many columns, like those of `keys` and `values`."""
        capacity = 0 if self.keys is None else self.keys.shape[2]
        if self.keys is not None and self.begin + columns <= capacity:
            return
        room = max(LEAST_ROOM, columns // ROOM_SHARE)
        if columns + room // 2 > capacity:  # else moving to the front makes room for long enough
            capacity = columns + room
        self.keys, self.values = self._moved(self.keys, keys, capacity), self._moved(self.values, values, capacity)
        self.begin = 0

    def _moved(self, old: torch.Tensor | None, like: torch.Tensor, capacity: int) -> torch.Tensor:
        """Memory of `capacity` columns with what is kept at its front."""
        if old is None:
            return like.new_zeros(like.shape[0], like.shape[1], capacity, like.shape[3])
        kept = old[:, :, self.begin : self.begin + self.count]
        if capacity == old.shape[2]:
            kept = kept.clone()  # source and destination may overlap
            new = old
        else:
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
        new[:, :, : self.count] = kept
        return new

    def forget(self, columns: int) -> None:
        """Let the oldest columns go."""
        self.first, self.begin, self.count = self.first + columns, self.begin + columns, self.count - columns

    def view(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What is kept, without a copy."""
        assert self.keys is not None and self.values is not None
        kept = slice(self.begin, self.begin + self.count)
        return self.keys[:, :, kept], self.values[:, :, kept]

    def select_rows(self, rows: torch.Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows.to(self.keys.device)], self.values[rows.to(self.values.device)]

    def used_bytes(self) -> int:
        if self.keys is None or self.values is None:
            return 0
        return sum(self.count * x[:, :, :1].numel() * x.element_size() for x in (self.keys, self.values))

    def allocated_bytes(self) -> int:
        return sum(x.nbytes for x in (self.keys, self.values) if x is not None)


class NSALayer(CacheLayerMixin):
    """The cache of one attention layer; `NSAAttention` puts it in place and fills it."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False
    is_sliding = False

    def __init__(self, cost: NSACost):
        super().__init__()
        self.cost = cost
        self._clear()

    def _clear(self) -> None:
        self.length = 0  # columns seen, padding included
        self.padding: tuple[int, ...] | None = None  # per row; None: no row has any
        self.selected, self.compressed, self.recent, self.tail = Columns(), Columns(), Columns(), Columns()
        self.is_initialized = False

    @property
    def is_settled(self) -> bool:
        """Whether every row has a real token, so that its padding is known for good."""
        return self.length > 0 and (self.padding is None or max(self.padding) < self.length)

    def num_blocks(self, row: int = 0) -> int:
        """Whole compression blocks of a row among the columns seen."""
        padding = self.padding[row] if self.padding else 0
        return num_compressed(self.length - padding, self.cost.block, self.cost.stride)

    def add_selected(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep new columns; keys and values of all columns, with unused room after them."""
        self.selected.append(keys, values)
        assert self.selected.keys is not None and self.selected.values is not None
        return (self.selected.keys, self.selected.values) if self.length else (keys, values)

    def add_recent(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep new columns; keys and values of these and of the w − 1 before them, or of all there are."""
        window = self.cost.window
        if keys.shape[2] == 1 and self.length:
            self.recent.append(keys, values, keep=window)
            return self.recent.view()
        together = self._after(self.recent, keys, values, window - 1)
        self.recent.append(keys, values, keep=window)
        return together

    def with_tail(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """New columns after those that were kept for them; they begin at column `tail.first`."""
        return self._after(self.tail, keys, values, self.tail.count)

    def _after(self, old: Columns, keys: torch.Tensor, values: torch.Tensor, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        last = min(last, old.count)
        if not last:
            return keys, values
        old_keys, old_values = (x[:, :, old.count - last :].to(keys.dtype) for x in old.view())
        return torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2)

    def add_compressed(
        self, keys: torch.Tensor, values: torch.Tensor, rows: list[int], slots: torch.Tensor, total: int
    ) -> None:
        """Write blocks (R, G, C, D) of some rows to the slots (R, C); `total` is then the number of the longest row's blocks.

        A slot beyond a row's own last block is never seen; the row writes it again when that block is whole.
        """
        store, batch = self.compressed, len(self.padding or rows)
        end = max(self.num_blocks(row) for row in rows) + keys.shape[2]
        store.reserve(end, keys[:1].expand(batch, -1, -1, -1), values[:1].expand(batch, -1, -1, -1))
        assert store.keys is not None and store.values is not None
        row_R1 = torch.tensor(rows, device=keys.device)[:, None]
        store.keys[row_R1, :, slots] = keys.detach().transpose(1, 2).to(store.keys.dtype)
        store.values[row_R1, :, slots] = values.detach().transpose(1, 2).to(store.values.dtype)
        store.count = total

    def advance(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """New columns, given as the compressed branch has them, have gone through every part: keep those it still needs."""
        self.length += keys.shape[2]
        self.is_initialized = True
        padding = self.padding or (0,)
        needed = min(padding[row] + self.num_blocks(row) * self.cost.stride for row in range(len(padding)))
        self.tail.append(keys, values, keep=max(0, self.length - needed))

    def fixed(self, max_tokens: int) -> NSAFixedLayer:
        """An empty layer of the same form on memory for so many tokens, for captured decode steps."""
        return NSAFixedLayer(self.cost, max_tokens)

    def used_bytes(self) -> int:
        """Bytes of the entries that are kept."""
        return sum(part.used_bytes() for part in self._parts())

    def allocated_bytes(self) -> int:
        """Bytes of the memory behind them, room to grow included."""
        return sum(part.allocated_bytes() for part in self._parts())

    def _parts(self) -> tuple[Columns, ...]:
        return self.selected, self.compressed, self.recent, self.tail

    # What transformers asks of a layer.

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._clear()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        for part in self._parts():
            part.select_rows(indices)
        if self.padding is not None:
            self.padding = tuple(self.padding[row] for row in indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.selected.keys is not None:
            rows = torch.arange(self.selected.keys.shape[0], device=self.selected.keys.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> NoReturn:
        raise NotImplementedError("a cache of NSA is filled by its attention module")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("a cache of NSA is filled by its attention module")

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError("NSA keeps only the last tokens of its window, so tokens cannot be taken back")

    def offload(self) -> None:
        raise NotImplementedError("a cache of NSA stays on its device")

    def prefetch(self) -> None:
        """Nothing was offloaded."""


def layer_of(past: Cache | None, layer_idx: int, cost: NSACost) -> NSALayer | NSAFixedLayer | None:
    """The NSA layer of a cache, put there at its first use in the place of an empty one that grows."""
    if past is None:
        return None
    while len(past.layers) <= layer_idx:
        past.layers.append(DynamicLayer())
    found = past.layers[layer_idx]
    if isinstance(found, NSALayer | NSAFixedLayer):
        return found
    if not isinstance(found, DynamicLayer) or found.get_seq_length():
        raise TypeError(
            f"NSA keeps its own cache; it can take the place of an empty DynamicLayer, not of {found!r} of layer {layer_idx}"
        )
    layer = NSALayer(cost)
    past.layers[layer_idx] = layer
    return layer
