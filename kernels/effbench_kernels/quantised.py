"""Expert layers whose weights are stored in 4 or 8 bits, in groups along the input width, for every expert by itself.

q_in, q_out = quantise(w_in_EPD, "int4"), quantise(w_out_EOF, "int4")
y_TO = quantised_experts(x_TD, q_in, q_out, sort(routing.expert, E), routing.weight, act="swiglu")

Weights are turned back into numbers inside the product, one expert at a time. They get no gradient; x, the biases, the routing
weights and ``add`` do, so adapters can be trained on top (QLoRA, arXiv 2305.14314).

Shapes: T tokens, K experts a token, E experts, N = T·K pairs, D input width, P width before the activation (2F gated, else F),
F hidden width, O output width. The stored layout is in ``quantised_torch``.
"""

from typing import Any

import torch

from effbench_kernels import quantised_torch
from effbench_kernels.activations import activate
from effbench_kernels.checks import check_experts, check_linear
from effbench_kernels.layer import collect, combine
from effbench_kernels.plan import Plan

KINDS = ("int4", "int8")
_LINEAR = "effbench_kernels::quantised_linear"
_EXPERTS = "effbench_kernels::quantised_experts"  # for inference; training goes through two linear products


class QuantisedExperts(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """The weights of E experts, (E, O, D), in 4 or 8 bits: two buffers, so it moves and is saved with its model.

    ``codes`` and ``scales`` as in ``quantised_torch``; both hold integers, so ``model.to(dtype)`` changes neither. The layout is
    the same on every device. To load a saved model, quantise one of the same shape in the same way and load the state into it.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, group: int) -> None:
        """group: how many weights along D share a scale."""
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.group = group

    @property
    def kind(self) -> str:
        """ "int4" or "int8"."""
        return "int8" if self.codes.dtype == torch.int8 else "int4"

    @property
    def shape(self) -> torch.Size:
        """(E, O, D)."""
        return torch.Size((self.codes.size(0), self.codes.size(1), self.scales.size(2) * self.group))

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of memory behind the buffers: codes, scales and zeros."""
        return sum(buffer.untyped_storage().nbytes() for buffer in (self.codes, self.scales))

    def dequantise(self, expert: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights (O, D) of one expert, as the products use them."""
        return quantised_torch.unpack(self.codes[expert], self.scales[expert], self.group, dtype)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"{tuple(self.shape)}, {self.kind}, group={self.group}, {self.nbytes / 2**20:.1f} MiB"


def quantise(w: torch.Tensor, kind: str = "int4", group: int | None = None) -> QuantisedExperts:
    """Round the weights (E, O, D) of E experts to 4 or 8 bits, by expert; strides do not matter.

    group: how many weights along D share a scale; it must divide D. None takes 64 for "int4" and all of D for "int8", which
    are the fast ones on a CPU, as is every multiple of 32. "int4" stores a scale and a zero, 16 bits each: 4 + 32 / group bits a
    weight, 0.281 of bfloat16 at 64. "int8" stores a scale: 8 + 16 / group bits, 0.501 of bfloat16 at 1024. No weight moves by more
    than half a step, (max - min) / 30 of its group for "int4" and max |w| / 254 for "int8", and the rounding of scale and zero to
    bfloat16.

    Raises ValueError for an unknown kind, another shape, a group that does not divide D and weights that are not finite.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if w.dim() != 3 or not w.is_floating_point() or not w.numel():
        raise ValueError(f"w must hold floating weights (experts, out, in), got {w.dtype} {tuple(w.shape)}")
    group = group_of(w.size(2), kind, group)
    w = w.detach()
    codes, scales = None, None
    for expert in range(w.size(0)):
        if not torch.isfinite(w[expert]).all():
            raise ValueError(f"the weights of expert {expert} hold NaN or infinity")
        one_codes, one_scales = quantised_torch.pack(w[expert], kind, group)
        if codes is None or scales is None:
            codes = one_codes.new_empty(w.size(0), *one_codes.shape)
            scales = one_scales.new_empty(w.size(0), *one_scales.shape)
        codes[expert], scales[expert] = one_codes, one_scales
    assert codes is not None and scales is not None
    return QuantisedExperts(codes, scales, group)


def group_of(depth: int, kind: str, group: int | None) -> int:
    """The group for weights of an input width, None being the default of the kind. Raises ValueError where it does not divide."""
    if group is None:
        group = depth if kind == "int8" else 64
    if group < 1 or depth % group:
        fit = [size for size in (32, 64, 128, 256) if depth % size == 0] or [depth]
        raise ValueError(f"group must divide the input width {depth}, got {group}; {', '.join(map(str, fit))} would")
    return group


def quantised_linear(
    x: torch.Tensor, q: QuantisedExperts, plan: Plan, bias: torch.Tensor | None = None, rows: str = "gather"
) -> torch.Tensor:
    """(N, O): ``grouped_linear`` with quantised weights. Differentiable once, in x and bias (E, O)."""
    check_linear(x, _stand_in("w", q, x), plan, bias, rows)
    x_ND = collect(x, plan) if rows == "gather" else x
    return torch.ops.effbench_kernels.quantised_linear(x_ND, q.codes, q.scales, bias, plan.offsets, q.group)


def quantised_experts(
    x: torch.Tensor,
    q_in: QuantisedExperts,
    q_out: QuantisedExperts,
    plan: Plan,
    weight: torch.Tensor,
    act: str = "swiglu",
    b_in: torch.Tensor | None = None,
    b_out: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
) -> torch.Tensor:
    """``experts`` with quantised weights, q_in (E, P, D) and q_out (E, O, F): (T, O). Differentiable once, in all but those."""
    check_experts(x, _stand_in("w_in", q_in, x), _stand_in("w_out", q_out, x), plan, weight, act, b_in, b_out, add, "pre")
    inputs = (x, weight, b_in, b_out, add)
    if not (torch.is_grad_enabled() and any(item is not None and item.requires_grad for item in inputs)):
        own = (q_in.codes, q_in.scales, q_in.group, q_out.codes, q_out.scales, q_out.group)
        route = (plan.offsets, plan.token, plan.inverse, act)
        return torch.ops.effbench_kernels.quantised_experts(x, *own, b_in, b_out, weight, add, *route)
    pre_NP = quantised_linear(x, q_in, plan, b_in)
    return combine(quantised_linear(activate(pre_NP, act), q_out, plan, b_out, rows="sorted"), plan, weight, add)


def _stand_in(name: str, q: QuantisedExperts, x: torch.Tensor) -> torch.Tensor:
    """One number that has the shape of the weights, for the checks of shapes."""
    if q.device != x.device:
        raise ValueError(f"{name} is on {q.device}, x on {x.device}")
    return x.new_empty(()).expand(q.shape)


def _linear(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor, group: int
) -> torch.Tensor:
    return quantised_torch.linear_forward(x, codes, scales, bias, offsets, group)


def _linear_fake(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor, group: int
) -> torch.Tensor:
    return x.new_empty(x.size(0), codes.size(1))


def _linear_backward(
    grad: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor, group: int, need: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    return quantised_torch.linear_backward(grad, codes, scales, offsets, group, need)


def _linear_backward_fake(
    grad: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor, group: int, need: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = ((grad.size(0), scales.size(2) * group), (codes.size(0), grad.size(1)))
    dx, db = (grad.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, need, strict=True))
    return dx, db


def _context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _x, codes, scales, _bias, offsets, ctx.group = inputs
    ctx.save_for_backward(codes, scales, offsets)


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    need = [ctx.needs_input_grad[0], ctx.needs_input_grad[3]]
    dx, db = torch.ops.effbench_kernels.quantised_linear_backward(grad, *ctx.saved_tensors, ctx.group, need)
    return dx if need[0] else None, None, None, db if need[1] else None, None, None


def _experts(
    x: torch.Tensor,
    in_codes: torch.Tensor,
    in_scales: torch.Tensor,
    in_group: int,
    out_codes: torch.Tensor,
    out_scales: torch.Tensor,
    out_group: int,
    b_in: torch.Tensor | None,
    b_out: torch.Tensor | None,
    weight: torch.Tensor,
    add: torch.Tensor | None,
    offsets: torch.Tensor,
    token: torch.Tensor,
    inverse: torch.Tensor,
    act: str,
) -> torch.Tensor:
    q_in, q_out = (in_codes, in_scales, in_group), (out_codes, out_scales, out_group)
    return quantised_torch.experts_forward(x, q_in, q_out, b_in, b_out, weight, add, offsets, token, inverse, act)


def _experts_fake(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    out_codes: torch.Tensor = rest[3]
    return x.new_empty(x.size(0), out_codes.size(1))


def _register() -> None:
    library = torch.library
    call = "Tensor x, Tensor codes, Tensor scales, Tensor? bias, Tensor offsets, int group"
    library.custom_op(_LINEAR, _linear, mutates_args=(), schema=f"({call}) -> Tensor")
    library.register_fake(_LINEAR, _linear_fake)
    call = "Tensor grad, Tensor codes, Tensor scales, Tensor offsets, int group, bool[] need"
    library.custom_op(f"{_LINEAR}_backward", _linear_backward, mutates_args=(), schema=f"({call}) -> (Tensor, Tensor)")
    library.register_fake(f"{_LINEAR}_backward", _linear_backward_fake)
    call = (
        "Tensor x, Tensor in_codes, Tensor in_scales, int in_group, Tensor out_codes, Tensor out_scales, int out_group, "
        "Tensor? b_in, Tensor? b_out, Tensor weight, Tensor? add, Tensor offsets, Tensor token, Tensor inverse, str act"
    )
    library.custom_op(_EXPERTS, _experts, mutates_args=(), schema=f"({call}) -> Tensor")
    library.register_fake(_EXPERTS, _experts_fake)
    library.register_autograd(_LINEAR, _gradient, setup_context=_context)


_register()
