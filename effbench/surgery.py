"""Find and change parts of models; what several techniques need and none may import from another. Torch-free at import.

Legend of shape suffixes: G key/value heads, H query heads, D head dimension, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from effbench import registry
from effbench.costs import AttentionCost, head_dim, key_value_heads, num_experts, query_heads, sliding_window
from effbench.technique import YES, Context, Cost, Support, no

if TYPE_CHECKING:
    import torch
    from torch import nn

# Families whose attention is q/k/v/o projections with `num_key_value_heads`; phi3 fuses q, k and v into one matrix.
GROUPED_FAMILIES = ("llama", "mistral", "phi3", "qwen2")
SEPARATE_PROJECTIONS = ("llama", "mistral", "qwen2")
SIGMOID_FAMILIES = ("deepseek_v3",)  # whose routers score by sigmoid; their configuration does not say
LAYER = "moe_layer"  # the model type of a shape that is only a layer of experts
# Activations of gated feed-forward layers, by transformers' name, and what the expert kernels call the gated form.
GATED_ACTIVATIONS = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"}


def replace_modules(model: nn.Module, make: Callable[[str, nn.Module], nn.Module | None]) -> tuple[str, ...]:
    """Replace every submodule for which `make(name, module)` returns another; return the names that changed.

    A replaced module is not searched further. The caller decides by type or by name.
    """
    changed: list[str] = []

    def walk(parent: nn.Module, prefix: str) -> None:
        for name, child in list(parent.named_children()):
            full = f"{prefix}{name}"
            new = make(full, child)
            if new is None or new is child:
                walk(child, f"{full}.")
            else:
                setattr(parent, name, new)
                changed.append(full)

    walk(model, "")
    return tuple(changed)


def supports_key_value_heads(context: Context, num_groups: int) -> Support:
    """Whether attention can be given `num_groups` key/value heads here."""
    if context.model_type not in GROUPED_FAMILIES:
        families = ", ".join(GROUPED_FAMILIES)
        return no(
            f"the key/value heads of model type {context.model_type!r} are not changed; choose a model of type {families}"
        )
    heads, native = query_heads(context.config), key_value_heads(context.config)
    if num_groups > heads or heads % num_groups:
        fits = ", ".join(str(g) for g in range(1, heads + 1) if heads % g == 0)
        return no(f"{heads} query heads cannot share {num_groups} key/value heads evenly; choose groups from {fits}")
    if context.weights in ("path", "hub") and native != num_groups:
        if context.model_type not in SEPARATE_PROJECTIONS:
            return no(f"key/value heads of loaded {context.model_type} weights are not converted; use random weights")
        if max(native, num_groups) % min(native, num_groups):
            return no(
                f"{native} key/value heads of the loaded weights convert only to a multiple or a divisor, not {num_groups}"
            )
    return YES


def convert_key_value_heads(
    state: Mapping[str, torch.Tensor], config: Mapping[str, Any], num_groups: int
) -> dict[str, torch.Tensor]:
    """A state dict of q/k/v/o attention with `num_groups` key/value heads.

    Fewer heads: the mean of each group of neighbouring heads, taken in fp32 (GQA, arXiv 2305.13245, section 2.1).
    More heads: each is repeated, which computes the same function. `config` describes `state`.
    """
    native, dim = key_value_heads(config), head_dim(config)
    return {
        name: _convert_heads(tensor, native, num_groups, dim) if _is_key_value(name) else tensor
        for name, tensor in state.items()
    }


def _is_key_value(name: str) -> bool:
    return name.rpartition(".")[0].endswith(("k_proj", "v_proj"))


def _convert_heads(rows: torch.Tensor, native: int, wanted: int, dim: int) -> torch.Tensor:
    """Weight (G·D, E) or bias (G·D,) with another G."""
    per_head = rows.reshape(native, dim, *rows.shape[1:])
    if wanted >= native:
        per_head = per_head.repeat_interleave(wanted // native, dim=0)
    else:
        grouped = per_head.reshape(wanted, native // wanted, dim, *rows.shape[1:])
        per_head = grouped.float().mean(dim=1).to(rows.dtype)
    return per_head.reshape(wanted * dim, *rows.shape[1:]).contiguous()


def attention_cost(context: Context, cost: AttentionCost) -> Cost:
    """What a technique's `cost` hook says of an attention layer, at the context length of the workload."""
    tokens = context_tokens(context.params)
    cached = max(tokens - 1, 1)  # the last new token is never fed back
    return Cost(
        flops_per_token=cost.projection_flops() + cost.mean_score_flops(tokens),
        decode_flops_per_token=cost.projection_flops() + cost.score_flops(cached, decode=True) if tokens else None,
        cache_elements_per_token=cost.cache_elements(cached) / cached,
        decode_read_elements=cost.read_elements(cached) if tokens else None,
        source=cost.source,
    )


def context_tokens(params: Mapping[str, Any]) -> int:
    """Tokens of one sequence of a workload, prompt and answer; 0 where its parameters name none."""
    return int(params.get("seq_len") or params.get("prompt_tokens", 0) + params.get("new_tokens", 0))


def supports_replaced_attention(context: Context) -> Support:
    """Whether the attention modules can be taken out and others put in their place."""
    if context.model_type not in SEPARATE_PROJECTIONS:
        families = ", ".join(SEPARATE_PROJECTIONS)
        return no(f"the attention of model type {context.model_type!r} has another form; choose a model of type {families}")
    window, tokens = sliding_window(context.config), longest_context(context)
    if window and window < tokens:
        return no(f"the model's sliding window of {window} is shorter than the context of {tokens}; choose a model without one")
    return YES


def supports_feed_forward(context: Context) -> Support:
    """Whether the feed-forward layers can be taken out and others put in their place."""
    experts = num_experts(context.config)
    if experts:
        return no(f"the model is a mixture of {experts} experts already; choose a dense model")
    if context.model_type not in SEPARATE_PROJECTIONS:
        families = ", ".join(SEPARATE_PROJECTIONS)
        return no(
            f"the feed-forward layers of model type {context.model_type!r} have another form; choose a model of type {families}"
        )
    if context.config.get("mlp_bias"):
        return no("the model's feed-forward layers have biases, which are not carried over; choose a model without them")
    act = context.config.get("hidden_act", "silu")
    if act not in GATED_ACTIVATIONS:
        return no(f"the activation {act!r} is not among {', '.join(GATED_ACTIVATIONS)}; choose a model with one of these")
    return YES


def written_out(context: Context) -> Support | None:
    """A refusal where the library has a family's attention in one plain form alone; None where there is a choice."""
    if context.model_type != "bloom":
        return None
    return no("the library has Bloom's attention in one plain form, without a kernel to choose; leave the attention kernel out")


def own_kernels(context: Context) -> Support | None:
    """A refusal where another technique of the stack brings attention kernels of its own, or the family has one form alone."""
    if plain := written_out(context):
        return plain
    own = next((name for name in context.stack if registry.technique(name).own_kernels), None)
    return no(f"{own} brings attention kernels of its own; leave the attention kernel out") if own else None


def stacked_weights(context: Context) -> str:
    """The technique of the stack that stacks the weights of experts; "" where none does."""
    return next((name for name in context.stack if registry.technique(name).stacked_weights), "")


def longest_context(context: Context) -> int:
    """Tokens of the longest sequence: the workload's, or what the model allows where the workload does not say."""
    return context_tokens(context.params) or int(context.config["max_position_embeddings"])
