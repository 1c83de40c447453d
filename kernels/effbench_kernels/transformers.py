"""The mixture-of-experts models of transformers on these kernels, with unchanged results, in training too.

    import effbench_kernels.transformers
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="effbench")  # or, on a model that is there:
    model.set_experts_implementation("effbench")

Importing this module registers the name "effbench" with the library's experts interface (transformers 5, integrations/moe.py).
It serves every experts module of that interface whose activation is one of ``ACTIVATIONS``: Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE,
DeepSeek-V2, DeepSeek-V3, gpt-oss and the others. No weight is copied or laid out anew: transposed weights are read through
views, and interleaved gates are parted after the first product.

Shapes: T tokens, K experts a token, E experts, D input width, P width before the activation (2F gated, else F), F hidden width.
"""

from typing import Any, NamedTuple

import torch

try:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
except ImportError as error:
    raise ImportError(
        "effbench_kernels.transformers needs transformers 5.17 or later: pip install 'transformers>=5.17'"
    ) from error

from effbench_kernels.activations import ACTIVATIONS, activate, is_gated
from effbench_kernels.layer import combine, experts, grouped_linear
from effbench_kernels.plan import sort
from effbench_kernels.quantised import QuantisedExperts, group_of, quantise, quantised_experts, quantised_linear

NAME = "effbench"


def experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """(T, D): the experts of one module of the library, weighted and summed by token; what the registered name calls.

    hidden_states (T, D); top_k_index (T, K), where ids from E upwards belong to other devices and are dropped; top_k_weights
    (T, K), in the type of hidden_states or float32. Where the weights of the experts have another type than hidden_states, the
    layer is computed in theirs, as in the library's own implementations.

    Raises NotImplementedError, naming the activation, for one that is not among ``ACTIVATIONS``.
    """
    act = activation_of(module)
    first = _first(module)
    w_in, w_out = getattr(module, first), module.down_proj
    b_in_EP = getattr(module, f"{first}_bias") if module.has_bias else None
    b_out_EO = module.down_proj_bias if module.has_bias else None
    quantised = isinstance(w_in, QuantisedExperts)
    x_TD = hidden_states if quantised else hidden_states.to(w_in.dtype)
    if module.is_transposed and not quantised:
        w_in, w_out = w_in.mT, w_out.mT
    weight_TK = top_k_weights if top_k_weights.dtype in (x_TD.dtype, torch.float32) else top_k_weights.to(x_TD.dtype)
    plan = sort(top_k_index, w_in.shape[0])
    if module.has_post_expert_norm:
        linear = quantised_linear if quantised else grouped_linear
        act_NF = activate(linear(x_TD, w_in, plan, b_in_EP), act)
        rows_NO = module.post_expert_norm(linear(act_NF, w_out, plan, b_out_EO, rows="sorted"))
        out_TO = combine(rows_NO.to(x_TD.dtype), plan, weight_TK)
    else:
        layer = quantised_experts if quantised else experts
        out_TO = layer(x_TD, w_in, w_out, plan, weight_TK, act, b_in_EP, b_out_EO)
    return out_TO.to(hidden_states.dtype)


class Converted(NamedTuple):
    """stacks: how many stacks of expert weights were converted; their bytes before and after, scales and zeros included."""

    stacks: int
    bytes_before: int
    bytes_after: int


def has_experts(model: Any) -> bool:
    """Whether a model, or a block of one, has stacked expert weights of the library that ``quantise_experts`` would convert."""
    return any(_has_stacks(module) for module in model.modules())


def quantise_experts(model: Any, kind: str = "int4", group: int | None = None) -> Converted:
    """Put all expert weights of a model of the library in 4 or 8 bits, see ``quantise``, and set it to run on these kernels.

    A block of a model is converted too, and its model must then be set to this implementation by the caller. The weights get no gradient any more; biases and everything outside the experts stay as they are. Memory is freed layer by
    layer. Raises ValueError, before anything is changed, where the model has no stacked experts, has other stacked weights that
    would stay behind at 16 bits, or has a width that ``group`` does not divide; a layer is converted as a whole or not at all.
    """
    found = {name: module for name, module in model.named_modules() if _has_stacks(module)}
    left = []
    for name, module in model.named_modules():
        if name not in found and not isinstance(module, torch.nn.modules.conv._ConvNd):
            left += [f"{name}.{own}" for own, value in module.named_parameters(recurse=False) if value.dim() == 3]
    if not found or left:
        what = f"{', '.join(left)} would stay as they are" if left else "it has no stacked expert weights"
        raise ValueError(f"the experts of {type(model).__name__} cannot be quantised: {what}")
    for name, module in found.items():
        for own in (_first(module), "down_proj"):
            try:
                group_of(getattr(module, own).size(1 if module.is_transposed else 2), kind, group)
            except ValueError as error:
                raise ValueError(f"{name}.{own}: {error}") from None
    before = after = 0
    for module in found.values():
        weights = {own: getattr(module, own) for own in (_first(module), "down_proj")}
        new = {own: quantise(w.mT if module.is_transposed else w, kind, group) for own, w in weights.items()}
        before += sum(w.nbytes for w in weights.values())
        after += sum(q.nbytes for q in new.values())
        for own, q in new.items():
            delattr(module, own)
            setattr(module, own, q)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(NAME)
    return Converted(2 * len(found), before, after)


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _has_stacks(module: Any) -> bool:
    return hasattr(module, "is_transposed") and isinstance(getattr(module, "down_proj", None), torch.nn.Parameter)


def activation_of(module: Any) -> str:
    """The name of the activation between a module's two products, layout of the gate included.

    It is found by trying the module's own gate on a table of numbers, once, since a class may bring a gate of its own; and again
    when ``module.act_fn`` is another one than last time. Raises NotImplementedError if no activation agrees.
    """
    act_fn = getattr(module, "act_fn", None)
    known = getattr(module, "_effbench_activation", None)
    if known is None or known[0] is not act_fn:
        known = (act_fn, _recognise(module))
        module._effbench_activation = known
    return known[1]


def _recognise(module: Any) -> str:
    gated = bool(module.has_gate)
    own = module._apply_gate if gated else module.act_fn
    table_NP = _table(module.down_proj.device)
    limit_N1 = 1e-5 * table_NP.abs().amax(-1, keepdim=True).clamp(min=1)
    with torch.no_grad():
        want_NF = own(table_NP.clone())
        for act in ACTIVATIONS:
            if is_gated(act) == gated:
                got_NF = activate(table_NP, act)
                if got_NF.shape == want_NF.shape and bool(
                    ((got_NF - want_NF).abs() <= limit_N1.maximum(want_NF.abs() * 1e-5)).all()
                ):
                    return act
    act_fn = getattr(module, "act_fn", None)
    uses = f"the gate of {type(module).__name__}" + (f" with {act_fn}" if act_fn is not None else "") if gated else f"{act_fn}"
    have = ", ".join(act for act in ACTIVATIONS if is_gated(act) == gated)
    raise NotImplementedError(
        f"{uses} is none of the activations that these kernels have ({have}); "
        "model.set_experts_implementation('grouped_mm') or 'eager' runs this model"
    )


def _table(device: torch.device) -> torch.Tensor:
    """(8192, 4) float32 numbers of both signs from 1/64 to 2048: two pairs of gate and value to a row, in any layout."""
    generator = torch.Generator().manual_seed(0)
    power_NP = torch.rand(8192, 4, generator=generator, device="cpu") * 17 - 6
    sign_NP = torch.randint(0, 2, (8192, 4), generator=generator, device="cpu") * 2 - 1
    return (sign_NP * power_NP.exp2()).float().to(device)


torch.compiler.assume_constant_result(activation_of)
ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
