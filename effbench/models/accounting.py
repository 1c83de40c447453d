"""What a model is and must do: original weights, stored bytes, model FLOPs and the bytes a decode must move.

FLOP model (a multiply-add is 2): a token costs 2 per active weight that is part of a matrix product, and attention
4 s H D per layer, s being the positions it attends to. The table of input embeddings is looked up, not multiplied, so it
counts only when it is tied to the output head. Training adds the same again for the gradient of the activations, and
for the gradient of the weights the share that is trained: 6 N + 3 × attention where everything is.
PaLM (arXiv 2204.02311, appendix B) is this with s = T; here causal attention counts the positions it may see, (T + 1) / 2.
Layers below the lowest trained one are counted as if the gradient passed through them.
Of experts (parameters below a module `experts`) a token uses k of E, and a forward over T tokens is expected to read
1 − (1 − k/E)^T of them: all, once there are tokens enough.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from effbench.costs import AttentionCost, native_cost, num_experts, touched_share
from effbench.models.storage import (
    Stored,
    bits_per_weight,
    stored,
    unquantised_bytes_by_kind,
    weight_bytes,
    weight_bytes_by_kind,
)

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


def model_facts(model: PreTrainedModel) -> dict[str, Any]:
    """Counts of original and of active weights, stored bytes, compute dtype as `hardware.DTYPES` calls it, attention backend."""
    return {
        "params_total": params_total(model),
        "params_active": params_active(model),
        "weight_bytes": weight_bytes(model),
        "weight_bytes_by_kind": weight_bytes_by_kind(model),
        "unquantised_bytes_by_kind": unquantised_bytes_by_kind(model),
        "bits_per_weight": bits_per_weight(model),
        "compute_dtype": dtype_name(compute_dtype(model)),
        "attention_backend": attention_backend(model),
    }


def dtype_name(dtype: torch.dtype) -> str:
    """A torch dtype as `hardware.DTYPES` calls it."""
    name = str(dtype).removeprefix("torch.")
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(name, name)


def attention_backend(model: nn.Module) -> str | None:
    """What computed attention: as a module of our own says, else the library's backend of the configuration."""
    own = next((used for m in model.modules() if (used := getattr(m, "backend_used", None))), None)
    return own or getattr(model.config, "_attn_implementation", None)


def params_total(model: nn.Module) -> int:
    """Number of original weights: tied ones once, packed ones by what they stand for, adapters not at all."""
    return sum(item.num_weights for item in stored(model) if item.kind != "adapter")


def params_active(model: PreTrainedModel) -> int:
    """Original weights that one token uses: of experts (stacked or listed under `experts`) the routed share."""
    return round(sum(item.num_weights * _active_share(model, item) for item in stored(model) if item.kind != "adapter"))


def model_flops_per_token(model: PreTrainedModel, *, context_len: int, training: bool) -> float:
    """Mean model FLOPs of one token of a causal sequence of `context_len` tokens."""
    forward, trained = _matrix_weights(model)
    attention = _prompt_attention_flops(model, context_len)
    if not training:
        return 2 * forward + attention
    return 2 * (2 * forward + trained) + 3 * attention


def generation_cost(model: PreTrainedModel, batch_size: int, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """(model FLOPs, bytes that must move) of one batch of requests: prefill, then new_tokens − 1 decode steps.

    The head is needed for the last prompt token only. Bytes: every forward reads each stored weight once (of an untied
    embedding table a few rows, left out; of experts those that a token goes to); a decode step reads the cached elements that
    its form of attention needs, and everything cached is written once.
    """
    weights, _ = _matrix_weights(model)
    head = model.get_output_embeddings().weight.numel()  # never packed
    contexts = [prompt_tokens + step for step in range(1, new_tokens)]
    prefill = prompt_tokens * (2 * (weights - head) + _prompt_attention_flops(model, prompt_tokens)) + 2 * head
    decode = sum(2 * weights + _attention_flops(model, context, decode=True) for context in contexts)
    layer, layers, width = layer_cost(model), int(model.config.num_hidden_layers), compute_dtype(model).itemsize
    kept = layer.cache_bytes(prompt_tokens + new_tokens - 1, width)
    moved = layers * batch_size * (kept + width * sum(layer.read_elements(context) for context in contexts))
    read = _read_bytes(model, batch_size * prompt_tokens) + (new_tokens - 1) * _read_bytes(model, batch_size)
    return batch_size * (prefill + decode), read + moved


def expected_decode(model: PreTrainedModel, positions: int, batch_size: int = 1) -> dict[str, float]:
    """What one decode step at `positions` cached tokens should cost, per sequence: FLOPs, bytes read, bytes kept.

    The weights are read once for the whole batch.
    """
    layer, layers, width = layer_cost(model), int(model.config.num_hidden_layers), compute_dtype(model).itemsize
    return {
        "decode_flops": 2 * _matrix_weights(model)[0] + _attention_flops(model, positions, decode=True),
        "cache_read_bytes": layers * width * layer.read_elements(positions),
        "kv_cache_bytes_per_token": layers * layer.cache_bytes(positions, width) / positions,
        "weight_read_bytes": (weight_bytes(model) - _untouched_bytes(model, batch_size)) / batch_size,
    }


def layer_cost(model: PreTrainedModel) -> AttentionCost:
    """The cost of the model's token mixer: what a module put in its place says, else softmax attention as configured."""
    own = getattr(model, "layer_cost", None) or next((c for m in model.modules() if (c := getattr(m, "cost", None))), None)
    return own if isinstance(own, AttentionCost) else native_cost(model.config.to_dict())


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype that matrix products run in: what the precision technique asked for, whatever the weights are stored as."""
    import torch

    dtype = model.config.dtype
    found = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    assert isinstance(found, torch.dtype)
    return found


def _active_share(model: PreTrainedModel, item: Stored) -> float:
    experts = num_experts(vars(model.config))
    return int(model.config.num_experts_per_tok) / experts if experts and item.is_expert else 1.0


def _untouched_bytes(model: PreTrainedModel, tokens: int) -> float:
    """Stored bytes of the experts that no one of `tokens` tokens is expected to go to."""
    experts = num_experts(vars(model.config))
    if not experts:
        return 0.0
    of_experts = sum(item.nbytes for item in stored(model) if item.is_expert)
    return of_experts * (1 - touched_share(experts, model.config.num_experts_per_tok, tokens))


def _matrix_weights(model: PreTrainedModel) -> tuple[float, float]:
    """(active weights in matrix products, those of them that are trained); adapters included.

    Tables that are looked up are left out, unless the output head multiplies them. Where a layer uses some of its weights
    less than once a token, its cost object says by how much.
    """
    head = model.get_output_embeddings().weight
    tables = {id(m.weight) for m in model.modules() if type(m).__name__.endswith("Embedding") and hasattr(m, "weight")}
    used = [
        (item.parameter, item.num_weights * _active_share(model, item))
        for item in stored(model)
        if item.parameter is head or id(item.parameter) not in tables
    ]
    rare = layer_cost(model).rarely_used_weights() * int(model.config.num_hidden_layers)
    trained = sum(n for p, n in used if p is not None and p.requires_grad)
    total = sum(n for _, n in used)
    return total - rare, trained - rare * trained / total


def _is_tied(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def _attention_flops(model: PreTrainedModel, positions: float, *, decode: bool = False) -> float:
    """Scores and weighted sum of one token over `positions`, all layers."""
    return layer_cost(model).score_flops(positions, decode=decode) * int(model.config.num_hidden_layers)


def _prompt_attention_flops(model: PreTrainedModel, tokens: float) -> float:
    """Scores and weighted sum of one token of a causal sequence, the mean over its tokens, all layers."""
    return layer_cost(model).mean_score_flops(tokens) * int(model.config.num_hidden_layers)


def _read_bytes(model: PreTrainedModel, tokens: int) -> float:
    """Stored bytes that one forward over `tokens` tokens is expected to read."""
    looked_up = 0 if _is_tied(model) else model.get_input_embeddings().weight.nbytes
    return weight_bytes(model) - looked_up - _untouched_bytes(model, tokens)
