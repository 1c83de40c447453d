"""Attention-free models from the library, with the interface of its transformers: Mamba-2 and RWKV-4.

Both take and return `past_key_values`, a cache of constant size, so workloads run them unchanged. `layer_cost` is the cost of
one layer, `parameter_ratio` what the model has over the transformer that it stands for. What differs from the library's own:

Mamba-2   nothing but the names of arguments. Without the mamba_ssm kernels it runs its chunked matrix form in PyTorch.
RWKV-4    - decoding a batch: the library broadcasts the shifted state (B, E) against (B, 1, E) and mixes the rows
          - `rescale_every` is 0: else evaluation divides weights in place and training multiplies them back, for fp16 only
          - the recurrence runs in chunks: the library's loop over tokens writes into one output, whose backward is quadratic
          - decay and bonus stay fp32; padding is refused, since the library ignores a mask silently
          - the CUDA kernel, which the library would download, is not asked for
          - a table tied to the output head is initialised like the head: RWKV's near-zero rows are for a table that is only
            looked up, and as a head they hold training up

Legend of shape suffixes: B batch, T tokens, C tokens of a chunk, E hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Mamba2Config, Mamba2ForCausalLM, PretrainedConfig, RwkvConfig, RwkvForCausalLM
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.rwkv import modeling_rwkv
from transformers.models.rwkv.modeling_rwkv import RwkvFeedForward, RwkvSelfAttention

from effbench.errors import ModelError
from effbench.modules.mixer_costs import MambaCost, MambaSize, RWKVCost, RWKVSize, parameter_ratio
from effbench.modules.mixer_forms import CHUNK, MAMBA_CHUNK
from effbench.technique import Context


class MambaLM(Mamba2ForCausalLM):
    """Mamba-2 that is called like a transformer."""

    layer_cost: MambaCost
    parameter_ratio: float

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **ignored: Any,
    ) -> CausalLMOutputWithPast:
        """`attention_mask` (B, T) marks padding with 0; positions play no part."""
        out = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            cache_params=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_dict=True,
        )
        return CausalLMOutputWithPast(loss=out.loss, logits=out.logits, past_key_values=out.cache_params)


class RWKVCache:
    """What RWKV keeps of a sequence: five tensors (B, E, layers), changed in place by every call."""

    def __init__(self, state: list[torch.Tensor]):
        self.state = state


class RWKVLM(RwkvForCausalLM):
    """RWKV-4 that is called like a transformer."""

    layer_cost: RWKVCost
    parameter_ratio: float

    def __init__(self, config: RwkvConfig):
        with _no_kernel_download():
            super().__init__(config)
            for number, block in enumerate(self.rwkv.blocks):
                block.attention, block.feed_forward = TimeMix(config, number), ChannelMix(config, number)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: RWKVCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **ignored: Any,
    ) -> CausalLMOutputWithPast:
        """Raises ModelError for a mask with padding, which RWKV cannot leave out."""
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ModelError("RWKV reads padding as text; give sequences of one length, without padding")
        out = super().forward(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            state=None if past_key_values is None else past_key_values.state,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_dict=True,
        )
        cache = past_key_values
        if cache is None and out.state is not None:
            cache = RWKVCache(out.state)
        return CausalLMOutputWithPast(loss=out.loss, logits=out.logits, past_key_values=cache)


class TimeMix(RwkvSelfAttention):
    """RWKV-4's time mixing with rows kept apart and the recurrence in chunks; weights as in the library."""

    def forward(
        self, hidden: torch.Tensor, state: list[torch.Tensor] | None = None, use_cache: bool = False
    ) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        own = None if state is None else [s[:, :, self.layer_id] for s in state]
        shifted = _shifted(hidden, None if own is None else own[1])
        key = self.key(_mixed(hidden, shifted, self.time_mix_key))
        value = self.value(_mixed(hidden, shifted, self.time_mix_value))
        receptance = torch.sigmoid(self.receptance(_mixed(hidden, shifted, self.time_mix_receptance)))
        before = None if own is None else (own[2], own[3], own[4])
        mixed, after = wkv(self.time_decay, self.time_first, key, value, before)
        if state is not None:
            state[1][:, :, self.layer_id] = hidden[:, -1].to(state[1].dtype)
            for kept, new in zip(state[2:], after, strict=True):
                kept[:, :, self.layer_id] = new
        return self.output(receptance * mixed), state


class ChannelMix(RwkvFeedForward):
    """RWKV-4's channel mixing with rows kept apart; weights as in the library."""

    def forward(
        self, hidden: torch.Tensor, state: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        shifted = _shifted(hidden, None if state is None else state[0][:, :, self.layer_id])
        key = torch.square(torch.relu(self.key(_mixed(hidden, shifted, self.time_mix_key))))
        receptance = torch.sigmoid(self.receptance(_mixed(hidden, shifted, self.time_mix_receptance)))
        if state is not None:
            state[0][:, :, self.layer_id] = hidden[:, -1].to(state[0].dtype)
        return receptance * self.value(key), state


def wkv(
    decay_E: torch.Tensor,
    first_E: torch.Tensor,
    key_BTE: torch.Tensor,
    value_BTE: torch.Tensor,
    state: tuple[torch.Tensor, ...] | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """RWKV's weighted mean (arXiv 2305.13048, equation 16) and its state afterwards: numerator, denominator, exponent.

    A token's weights are exp(u + k) for itself and exp(k + age · w) for earlier ones, w = −exp(decay). Sums are kept divided by
    exp(a maximum); the maximum cancels, so no gradient is needed through it.
    """
    w_E, u_E = -decay_E.float().exp(), first_E.float()
    if state is None:
        numerator = denominator = key_BTE.new_zeros(key_BTE.shape[0], key_BTE.shape[2], dtype=torch.float32)
        top = torch.full_like(numerator, -1e38)
    else:
        numerator, denominator, top = state
    outputs, lag_CCE = [], w_E.new_empty(0, 0)
    for key_BCE, value_BCE in zip(key_BTE.float().split(CHUNK, dim=1), value_BTE.float().split(CHUNK, dim=1), strict=True):
        length = key_BCE.shape[1]
        step_C1 = torch.arange(length, device=key_BCE.device)[:, None]
        if lag_CCE.shape[0] != length:
            lag_CCE = _lags(w_E, u_E, length)
        own_BCCE, kept_BCE = lag_CCE + key_BCE[:, None], top[:, None] + step_C1 * w_E
        peak_BCE = torch.maximum(own_BCCE.amax(2), kept_BCE).detach()
        weight_BCCE, kept_BCE = (own_BCCE - peak_BCE[:, :, None]).exp(), (kept_BCE - peak_BCE).exp()
        above = (weight_BCCE * value_BCE[:, None]).sum(2) + kept_BCE * numerator[:, None]
        below = weight_BCCE.sum(2) + kept_BCE * denominator[:, None]
        outputs.append(above / below)

        own_BCE, kept_BE = key_BCE + (length - 1 - step_C1) * w_E, top + length * w_E
        top = torch.maximum(own_BCE.amax(1), kept_BE).detach()
        weight_BCE, kept_BE = (own_BCE - top[:, None]).exp(), (kept_BE - top).exp()
        numerator = (weight_BCE * value_BCE).sum(1) + kept_BE * numerator
        denominator = weight_BCE.sum(1) + kept_BE * denominator
    return torch.cat(outputs, dim=1).to(value_BTE.dtype), (numerator, denominator, top)


def build_mamba(size: MambaSize, context: Context, dtype: Any) -> MambaLM:
    """A Mamba-2 model with new weights on the context's device."""
    config = Mamba2Config(
        **_common(context),
        num_hidden_layers=size.layers,
        expand=size.inner // size.hidden,
        num_heads=size.heads,
        head_dim=size.head_dim,
        state_size=size.state,
        conv_kernel=size.kernel,
        n_groups=1,
        chunk_size=MAMBA_CHUNK,
        layer_norm_epsilon=context.config.get("rms_norm_eps", 1e-5),
        initializer_range=context.config.get("initializer_range", 0.02),
        rescale_prenorm_residual=True,
        dtype=dtype,
    )
    model: MambaLM = _new(MambaLM, config, context.device)
    model.layer_cost, model.parameter_ratio = MambaCost.of(size), parameter_ratio(context, size)
    return model


def build_rwkv(size: RWKVSize, context: Context, dtype: Any) -> RWKVLM:
    """An RWKV-4 model with new weights on the context's device."""
    config = RwkvConfig(
        **_common(context),
        num_hidden_layers=size.layers,
        intermediate_size=size.inner,
        context_length=context.config.get("max_position_embeddings", 1024),
        rescale_every=0,
        dtype=dtype,
    )
    model: RWKVLM = _new(RWKVLM, config, context.device)
    if config.tie_word_embeddings and context.device != "meta":
        _start_as_head(model.rwkv.embeddings.weight)
    for block in model.rwkv.blocks:
        for parameter in (block.attention.time_decay, block.attention.time_first):
            parameter.data = parameter.data.float()
    model.layer_cost, model.parameter_ratio = RWKVCost.of(size), parameter_ratio(context, size)
    return model


def _common(context: Context) -> dict[str, Any]:
    """What a mixer has of the transformer's configuration."""
    names = ("vocab_size", "hidden_size", "bos_token_id", "eos_token_id", "pad_token_id")
    return {
        **{name: context.config.get(name) for name in names},
        "tie_word_embeddings": bool(context.config.get("tie_word_embeddings")),
        "use_cache": not context.trains,
    }


def _new(kind: type[nn.Module], config: PretrainedConfig, device: str) -> Any:
    """A model made on the device in `config.dtype` and initialised once."""
    with torch.device(device):
        with no_init_weights():
            model = kind._from_config(config)
        model.init_weights()
    return model


def _start_as_head(table_VE: nn.Parameter) -> None:
    """Initialise a tied table as the library does an output head."""
    rows, width = table_VE.shape
    start = torch.empty(rows, width, device=table_VE.device)
    nn.init.orthogonal_(start, gain=0.5 * math.sqrt(max(1.0, rows / width)))
    with torch.no_grad():
        table_VE.copy_(start)


def _shifted(hidden_BTE: torch.Tensor, last_BE: torch.Tensor | None) -> torch.Tensor:
    """Every token's predecessor; of the first, what the state kept, or zero."""
    first = torch.zeros_like(hidden_BTE[:, :1]) if last_BE is None else last_BE[:, None].to(hidden_BTE.dtype)
    return torch.cat((first, hidden_BTE[:, :-1]), dim=1)


def _mixed(hidden: torch.Tensor, shifted: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    return hidden * share + shifted * (1 - share)


def _lags(w_E: torch.Tensor, u_E: torch.Tensor, length: int) -> torch.Tensor:
    """(C, C, E): what is added to the key of token j in the output of token i: its decay, the bonus, or −∞ for the future."""
    step = torch.arange(length, device=w_E.device)
    age_CC1 = (step[:, None] - 1 - step[None])[..., None]
    past = torch.where(age_CC1 < 0, u_E, age_CC1.clamp(min=0) * w_E)
    return past.masked_fill(age_CC1 < -1, -torch.inf)


@contextmanager
def _no_kernel_download() -> Iterator[None]:
    """The library asks the network for a CUDA kernel while it builds; it goes on without when that fails."""
    original = modeling_rwkv.load_wkv_cuda_kernel

    def refuse(context_length: int) -> None:
        raise ImportError("the kernel is not used")

    modeling_rwkv.load_wkv_cuda_kernel = refuse
    try:
        yield
    finally:
        modeling_rwkv.load_wkv_cuda_kernel = original
