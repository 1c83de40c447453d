"""What a model is and must do: original weights, stored bytes, model FLOPs and the bytes a decode must move.

FLOP model (a multiply-add is 2): a token costs 2 per active weight that is part of a matrix product, and attention
4 s H D per layer, s being the positions it attends to. The table of input embeddings is looked up, not multiplied, so it
counts only when it is tied to the output head. Training adds the same again for the gradient of the activations, and
for the gradient of the weights the share that is trained: 6 N + 3 × attention where everything is.
PaLM (arXiv 2204.02311, appendix B) is this with s = T; here causal attention counts the positions it may see, (T + 1) / 2.
Layers below the lowest trained one are counted as if the gradient passed through them.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any

from effbench.surgery import head_dim, key_value_heads, query_heads

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


def model_facts(model: PreTrainedModel) -> dict[str, Any]:
    """Counts of original and of active weights, stored bytes, compute dtype as `hardware.DTYPES` calls it, attention backend."""
    dtype = str(compute_dtype(model)).removeprefix("torch.")
    return {
        "params_total": params_total(model),
        "params_active": params_active(model),
        "weight_bytes": weight_bytes(model),
        "compute_dtype": {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(dtype, dtype),
        "attention_backend": getattr(model.config, "_attn_implementation", None),
    }


def params_total(model: nn.Module) -> int:
    """Number of original weights: tied ones once, packed ones by what they stand for, adapters not at all."""
    return sum(_num_weights(p) for _, p in _original(model))


def params_active(model: PreTrainedModel) -> int:
    """Original weights that one token uses: of experts (stacked or listed under `experts`) the routed share."""
    return round(sum(_num_weights(p) * _active_share(model, name) for name, p in _original(model)))


def weight_bytes(model: nn.Module) -> int:
    """Σ bytes of all distinct storages behind parameters and buffers, quantisation state included."""
    storages: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        for plain in _plain_tensors(tensor):
            storage = plain.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def model_flops_per_token(model: PreTrainedModel, *, context_len: int, training: bool) -> float:
    """Mean model FLOPs of one token of a causal sequence of `context_len` tokens."""
    forward, trained = _matrix_weights(model)
    attention = _attention_flops(model, (context_len + 1) / 2)
    if not training:
        return 2 * forward + attention
    return 2 * (2 * forward + trained) + 3 * attention


def generation_cost(model: PreTrainedModel, batch_size: int, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """(model FLOPs, bytes that must move) of one batch of requests: prefill, then new_tokens − 1 decode steps.

    The head is needed for the last prompt token only. Bytes: every forward reads each stored weight once (of an untied
    embedding table a few rows, left out); a decode step reads the keys and values of every position it attends to, and
    every token's are written once.
    """
    weights, _ = _matrix_weights(model)
    head = _num_weights(model.get_output_embeddings().weight)
    decode_steps = new_tokens - 1
    attended = sum(_visible(model, prompt_tokens + step) for step in range(1, new_tokens))
    prefill = prompt_tokens * (2 * (weights - head) + _attention_flops(model, (prompt_tokens + 1) / 2)) + 2 * head
    decode = decode_steps * 2 * weights + attended * _attention_flops(model, 1)
    moved_once = batch_size * (prompt_tokens + decode_steps + attended) * kv_bytes_per_token(model)
    return batch_size * (prefill + decode), new_tokens * _read_bytes(model) + moved_once


def kv_bytes_per_token(model: PreTrainedModel) -> float:
    """Bytes of keys and values that one token adds to a plain cache."""
    config = model.config.to_dict()
    elements = 2 * key_value_heads(config) * head_dim(config) * int(config["num_hidden_layers"])
    return float(elements * compute_dtype(model).itemsize)


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype that matrix products run in: what the precision technique asked for, whatever the weights are stored as."""
    import torch

    dtype = model.config.dtype
    found = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    assert isinstance(found, torch.dtype)
    return found


def _original(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, parameter) without those that adapter layers added; tied parameters once."""
    added = {
        id(p)
        for layer in model.modules()
        for name in getattr(layer, "adapter_layer_names", ())
        if hasattr(getattr(layer, name, None), "parameters")
        for p in getattr(layer, name).parameters()
    }
    return ((name, p) for name, p in model.named_parameters() if id(p) not in added)


def _num_weights(parameter: torch.Tensor) -> int:
    """Weights a parameter stands for; a packed one knows its original shape."""
    state = getattr(parameter, "quant_state", None)
    return prod(state.shape) if state is not None else parameter.numel()


def _active_share(model: PreTrainedModel, name: str) -> float:
    config = model.config
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return config.num_experts_per_tok / experts if experts and ".experts." in name else 1.0


def _matrix_weights(model: PreTrainedModel) -> tuple[float, float]:
    """(active weights in matrix products, those of them that are trained); adapters included."""
    looked_up = None if _is_tied(model) else model.get_input_embeddings().weight
    used = [(p, _num_weights(p) * _active_share(model, name)) for name, p in model.named_parameters() if p is not looked_up]
    return sum(n for _, n in used), sum(n for p, n in used if p.requires_grad)


def _is_tied(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def _attention_flops(model: PreTrainedModel, positions: float) -> float:
    """Scores and weighted sum of one token over `positions`, all layers."""
    config = model.config.to_dict()
    return 4 * _visible(model, positions) * query_heads(config) * head_dim(config) * int(config["num_hidden_layers"])


def _visible(model: PreTrainedModel, positions: float) -> float:
    window = getattr(model.config, "sliding_window", None)
    return min(positions, window) if window else positions


def _read_bytes(model: PreTrainedModel) -> float:
    """Stored bytes that one forward reads."""
    table = model.get_input_embeddings().weight
    return weight_bytes(model) - (0 if _is_tied(model) else sum(t.nbytes for t in _plain_tensors(table)))


def _plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold a tensor's bytes: parts of a wrapper subclass, and quantisation state kept beside it."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        for name in flatten()[0]:
            yield from _plain_tensors(getattr(tensor, name))
    else:
        yield tensor
    yield from _state_tensors(vars(tensor))


def _state_tensors(attributes: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Tensors among attributes, and inside a quantisation state (an object with `absmax`, which may nest another)."""
    import torch

    for value in attributes.values():
        if isinstance(value, torch.Tensor):
            yield value
        elif hasattr(value, "absmax"):
            yield from _state_tensors(vars(value))
