"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) in the place of a decoder's own attention.

    h ─ W_DQ ─ norm ─ c_Q ─ W_UQ ─▶ q_C per head, q_R per head ─ RoPE
    h ─ W_DKV ─┬ norm ─ c_KV ─ W_UK, W_UV ─▶ k_C, v per head         cached: c_KV and k_R, nothing else
               └ RoPE ─ k_R, one vector for all heads

Scores are (q_C·k_C + q_R·k_R) / √(d_h + d_R). Two forms compute the same:
    expanded   k_C and v are made for every token; for training, prefill, and any call with many queries
    absorbed   q_C W_UK is scored on the latents and the weighted sum of latents goes through W_UV; decode expands nothing

Shapes: B requests, T new tokens, S tokens visible in the cache, E hidden, H heads, N = d_h, R = d_R, V = d_v, C = d_c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from effbench.costs import MLACost
from effbench.modules.rotation import rotate


class MLAAttention(nn.Module):
    """One layer. `position_embeddings` are cos and sin for a width of d_R."""

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: Any, layer_idx: int, cost: MLACost):
        super().__init__()
        self.config, self.layer_idx, self.cost = config, layer_idx, cost
        self.scaling = (cost.dim + cost.rope_dim) ** -0.5
        heads, eps = cost.heads, config.rms_norm_eps
        self.q_a_proj = nn.Linear(cost.hidden, cost.q_rank, bias=False)
        self.q_a_norm = nn.RMSNorm(cost.q_rank, eps=eps)
        self.q_b_proj = nn.Linear(cost.q_rank, heads * (cost.dim + cost.rope_dim), bias=False)
        self.kv_a_proj = nn.Linear(cost.hidden, cost.kv_rank + cost.rope_dim, bias=False)
        self.kv_a_norm = nn.RMSNorm(cost.kv_rank, eps=eps)
        self.kv_b_proj = nn.Linear(cost.kv_rank, heads * (cost.dim + cost.value_dim), bias=False)
        self.o_proj = nn.Linear(heads * cost.value_dim, cost.hidden, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """(B, T, E) → (B, T, E). The cache holds (B, 1, S, C + R) as keys and nothing as values."""
        cost = self.cost
        batch, length, _ = hidden_states.shape
        q_BTH = self.q_b_proj(self.q_a_norm(self.q_a_proj(hidden_states)))
        q_BHT = q_BTH.view(batch, length, cost.heads, cost.dim + cost.rope_dim).transpose(1, 2)
        q_BHTN, q_BHTR = q_BHT.split([cost.dim, cost.rope_dim], dim=-1)
        latent_BTC, key_BTR = self.kv_a_proj(hidden_states).split([cost.kv_rank, cost.rope_dim], dim=-1)
        cos, sin = position_embeddings
        q_BHTR, key_B1TR = rotate(q_BHTR, cos, sin), rotate(key_BTR[:, None], cos, sin)
        kept = torch.cat([self.kv_a_norm(latent_BTC)[:, None], key_B1TR], dim=-1)
        if past_key_values is not None:
            kept, _ = past_key_values.update(kept, kept[..., :0], self.layer_idx)
        if self._absorbs(length, kept.shape[-2], attention_mask):
            out_BTHV = self._absorbed(q_BHTN, q_BHTR, kept[:, 0], attention_mask)
        else:
            out_BTHV = self._expanded(q_BHTN, q_BHTR, kept, attention_mask, **kwargs)
        return self.o_proj(out_BTHV.reshape(batch, length, -1)), None

    def _absorbs(self, length: int, visible: int, mask: Any) -> bool:
        """With a cached prefix, when scoring on latents costs less than expanding all of the prefix."""
        cost = self.cost
        understood = mask is None or (isinstance(mask, torch.Tensor) and mask.dim() in (2, 4))
        extra = length * (2 * cost.kv_rank - cost.dim - cost.value_dim)
        return visible > length and understood and extra < cost.kv_rank * (cost.dim + cost.value_dim)

    def _expanded(
        self, q_BHTN: torch.Tensor, q_BHTR: torch.Tensor, kept: torch.Tensor, mask: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Keys and values of every visible token, through the model's attention backend; (B, T, H, V)."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        from transformers.models.llama.modeling_llama import eager_attention_forward

        cost = self.cost
        batch, _, visible, _ = kept.shape
        latent_B1SC, key_B1SR = kept.split([cost.kv_rank, cost.rope_dim], dim=-1)
        expanded = self.kv_b_proj(latent_B1SC[:, 0]).view(batch, visible, cost.heads, cost.dim + cost.value_dim)
        key_BHSN, value_BHSV = expanded.transpose(1, 2).split([cost.dim, cost.value_dim], dim=-1)
        query = torch.cat([q_BHTN, q_BHTR], dim=-1)
        key = torch.cat([key_BHSN, key_B1SR.expand(-1, cost.heads, -1, -1)], dim=-1)
        backend = self.config._attn_implementation
        # Fused kernels want keys and values of one width: values are padded with zeros, which come out as zeros.
        wider = key.shape[-1] - cost.value_dim if backend != "eager" else 0
        value = F.pad(value_BHSV, (0, wider)) if wider > 0 else value_BHSV
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
        out_BTHV = attend(self, query, key, value, mask, dropout=0.0, scaling=self.scaling, **kwargs)[0]
        return out_BTHV[..., : cost.value_dim]

    def _absorbed(self, q_BHTN: torch.Tensor, q_BHTR: torch.Tensor, kept_BSK: torch.Tensor, mask: Any) -> torch.Tensor:
        """Attention over the latents themselves; (B, T, H, V)."""
        cost = self.cost
        batch, heads, length, _ = q_BHTN.shape
        up_HNC, up_HVC = self._up_weights(q_BHTN.dtype)
        q_BHTC = torch.einsum("bhtn,hnc->bhtc", q_BHTN, up_HNC)
        query = torch.cat([q_BHTC, q_BHTR], dim=-1).reshape(batch, heads * length, -1)
        scores = torch.matmul(query * self.scaling, kept_BSK.transpose(1, 2)).view(batch, heads, length, -1)
        weights = softmax_visible(scores, mask).view(batch, heads * length, -1).to(kept_BSK.dtype)
        mixed_BHTC = torch.matmul(weights, kept_BSK[..., : cost.kv_rank]).view(batch, heads, length, -1)
        return torch.einsum("bhtc,hvc->bthv", mixed_BHTC, up_HVC)

    def _up_weights(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """W_UK (H, N, C) and W_UV (H, V, C), also where the layer has become an adapter or a quantised one."""
        cost = self.cost
        if type(self.kv_b_proj) is nn.Linear and type(self.kv_b_proj.weight) is nn.Parameter:
            weight = self.kv_b_proj.weight
        else:
            eye_CC = torch.eye(cost.kv_rank, dtype=dtype, device=self.kv_a_norm.weight.device)
            weight = self.kv_b_proj(eye_CC).T
        both = weight.to(dtype).view(cost.heads, cost.dim + cost.value_dim, cost.kv_rank)
        return both[:, : cost.dim], both[:, cost.dim :]


def softmax_visible(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Softmax in fp32 or wider over the positions that a mask of any of transformers' plain forms lets through.

    `scores` (B, H, T, S); `mask` None (T newest tokens, causal), bool (B, S) of real tokens, or bool or additive (B, 1, T, S).
    """
    length, visible = scores.shape[-2:]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is not None and mask.dim() == 4 and mask.dtype != torch.bool:
        return torch.softmax(scores + mask[..., :visible], dim=-1)
    if mask is None or mask.dim() == 2:
        allowed = None if mask is None else mask[:, None, None, -visible:].bool()
        if length > 1:
            newest = torch.arange(visible - length, visible, device=scores.device)
            causal = torch.arange(visible, device=scores.device) <= newest[:, None]
            allowed = causal if allowed is None else causal & allowed
    else:
        allowed = mask[..., :visible]
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1)
