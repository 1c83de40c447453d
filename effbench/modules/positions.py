"""Ways to tell a decoder where a token stands, other than rotation: nothing, a table, sines, a bias on the scores.

Each takes a Llama, Mistral or Qwen2 model and changes it in place. The rotary module is replaced by one that rotates by the
angle zero; the new parts are modules under `model.model`, so they move, save, load and copy with it, and act through forward
hooks, so the names of all other weights stay. Activation checkpointing recomputes `forward` and runs no hook twice.

Legend of shape suffixes: B batch, T query tokens, S cached positions, H query heads, E hidden size, D head dimension.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask

from effbench.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Arguments of a decoder's forward, in order, for callers that pass them by position.
DECODER_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
MASKED_BACKENDS = ("eager", "sdpa")  # attention implementations that add a float mask to the scores


class NoRotation(nn.Module):
    """Stands where the rotary module stood: cosine 1 and sine 0 leave queries and keys exactly as they are."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each (B, T, D) in the dtype of `x`."""
        shape = (*position_ids.shape, self.dim)
        return x.new_ones(shape), x.new_zeros(shape)


class PositionEmbedding(nn.Embedding):
    """A learned row per absolute position, added to the hidden states before the first layer."""

    def add(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the first layer."""
        return _added(self(kwargs["position_ids"]), args), kwargs


class SinusoidalPositions(nn.Module):
    """Sines and cosines of the absolute position, added to the hidden states before the first layer.

    The paper adds them to embeddings multiplied by √E (its section 3.4). Here they are divided by √E instead, which keeps
    that proportion and leaves the scale of the residual stream as it is under the other ways.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """(B, T, E) in fp32; computed and not kept, so that no position is too far."""
        return sinusoids(position_ids, self.width) / math.sqrt(self.width)

    def add(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the first layer."""
        return _added(self(kwargs["position_ids"]), args), kwargs


class DistanceBiasEmbedding(nn.Embedding):
    """T5's bias: a number per head and bucket of distances, shared by all layers, added to the attention scores.

    It reaches every layer through one additive mask (B or 1, H, T, S), made once per forward.
    """

    def __init__(self, num_buckets: int, max_distance: int, num_heads: int, **kwargs: Any):
        super().__init__(num_buckets, num_heads, **kwargs)
        buckets = [bucket(distance, num_buckets, max_distance) for distance in range(max_distance + 1)]
        self.register_buffer("buckets", torch.tensor(buckets, device=self.weight.device), persistent=False)

    def forward(self, distance_TS: torch.Tensor) -> torch.Tensor:
        """Bias (1, H, T, S) of keys that lie `distance_TS` tokens before their query."""
        bucket_TS = self.buckets[distance_TS.clamp(0, len(self.buckets) - 1)]
        return super().forward(bucket_TS).permute(2, 0, 1)[None]

    def add(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the decoder: the mask that it would make, with the bias in it."""
        given = dict(zip(DECODER_ARGUMENTS, args, strict=False)) | kwargs
        cache, tokens = given.get("past_key_values"), given.get("inputs_embeds")
        num_rows, T = (given["input_ids"] if tokens is None else tokens).shape[:2]
        table = decoder.embed_tokens.weight
        mask = create_causal_mask(
            config=decoder.config,
            inputs_embeds=table.new_empty(num_rows, T, 0),  # read for shape, dtype and device only
            attention_mask=given.get("attention_mask"),
            past_key_values=cache,
            position_ids=given.get("position_ids"),
        )
        past = 0 if cache is None else cache.get_seq_length()
        S, first = (T, 0) if cache is None else cache.get_mask_sizes(T, 0)
        query_T = torch.arange(T, device=table.device) + past
        key_S = torch.arange(S, device=table.device) + first
        distance_TS = query_T[:, None] - key_S[None]
        given["attention_mask"] = _masked(self(distance_TS).to(table.dtype), mask, distance_TS >= 0)
        return (), given


def remove_rotation(model: PreTrainedModel) -> None:
    """Replace the rotary module by one that does nothing."""
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    model.model.rotary_emb = NoRotation(dim)


def add_learned_positions(model: PreTrainedModel, num_positions: int) -> None:
    """Give the model a learned table of `num_positions` rows instead of rotation."""
    remove_rotation(model)
    table = PositionEmbedding(num_positions, model.config.hidden_size, **_like(model))
    nn.init.normal_(table.weight, std=model.config.initializer_range)
    model.model.positions = table
    model.model.layers[0].register_forward_pre_hook(table.add, with_kwargs=True)


def add_sinusoidal_positions(model: PreTrainedModel) -> None:
    """Give the model sinusoids instead of rotation."""
    remove_rotation(model)
    model.model.positions = SinusoidalPositions(model.config.hidden_size)
    model.model.layers[0].register_forward_pre_hook(model.model.positions.add, with_kwargs=True)


def add_relative_bias(model: PreTrainedModel, num_buckets: int, max_distance: int) -> None:
    """Give the model a bias by distance instead of rotation. Raises ModelError where its attention takes no additive mask."""
    backend = model.config._attn_implementation
    if backend not in MASKED_BACKENDS:
        raise ModelError(f"A relative bias needs an additive mask, which attention {backend!r} does not take; use sdpa.")
    remove_rotation(model)
    bias = DistanceBiasEmbedding(num_buckets, max_distance, model.config.num_attention_heads, **_like(model))
    nn.init.normal_(bias.weight, std=model.config.initializer_range)
    model.model.positions = bias
    model.model.register_forward_pre_hook(bias.add, with_kwargs=True)


def sinusoids(position_ids: torch.Tensor, width: int) -> torch.Tensor:
    """(…, width) in fp32: sin(p / 10000^(2i / width)) at 2i and its cosine at 2i + 1 (arXiv 1706.03762, section 3.5)."""
    even = torch.arange(0, width, 2, device=position_ids.device, dtype=torch.float32)
    angle = position_ids[..., None].float() * torch.exp(even * (-math.log(10000.0) / width))
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)[..., :width]


def bucket(distance: int, num_buckets: int, max_distance: int) -> int:
    """T5's bucket of a causal distance: one each for the nearer half, logarithmic up to `max_distance`, the last for the rest."""
    exact = num_buckets // 2
    if distance < exact:
        return distance
    share = math.log(distance / exact) / math.log(max_distance / exact)
    return min(num_buckets - 1, exact + int(share * (num_buckets - exact)))


def _like(model: PreTrainedModel) -> dict[str, Any]:
    """Device and dtype that a new part of the model is made with."""
    table = model.model.embed_tokens.weight
    return {"device": table.device, "dtype": table.dtype}


def _added(positions_BTE: torch.Tensor, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A layer's positional arguments with positions added to the first, the hidden states."""
    return (args[0] + positions_BTE.to(args[0].dtype), *args[1:])


def _masked(bias_1HTS: torch.Tensor, mask: torch.Tensor | None, causal_TS: torch.Tensor) -> torch.Tensor:
    """The bias where attention is allowed, the lowest finite number elsewhere; `mask` None means plainly causal."""
    lowest = torch.finfo(bias_1HTS.dtype).min  # not −inf: a row of padding may see nothing and must stay a number
    if mask is not None and mask.dtype != torch.bool:
        return (bias_1HTS + mask).clamp(min=lowest).contiguous()
    visible = causal_TS if mask is None else mask
    return bias_1HTS.masked_fill(~visible, lowest).contiguous()
