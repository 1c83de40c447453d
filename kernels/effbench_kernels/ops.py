"""The grouped products as custom operators with shapes for tracing and gradients, so that ``torch.compile`` keeps them whole.

Shapes: T tokens, K experts a token, E experts, N = T·K pairs, D input width, P width before the activation (2F gated, else F),
F hidden width, O output width.

Backward keeps the inputs, the routing and, if asked, the pre-activations (N, P); nothing else. The operators are differentiable
once. Each carries the name of its backend, so the registration is shared.
"""

from typing import Any

import torch

from effbench_kernels.backends import load

_LINEAR = "effbench_kernels::grouped_linear"
_EXPERTS = "effbench_kernels::experts"
_PLAN = "Tensor offsets, Tensor token, Tensor inverse, bool dense, str act"
_WEIGHTS = "Tensor x, Tensor w_in, Tensor w_out, Tensor? b_in, Tensor? b_out, Tensor? weight"
Tensors = tuple[torch.Tensor, ...]


def _linear(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor, dense: bool, backend: str
) -> torch.Tensor:
    return load(backend).linear_forward(x, w, bias, offsets, dense)


def _linear_fake(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor, dense: bool, backend: str
) -> torch.Tensor:
    return x.new_empty(x.size(0), w.size(1))


def _linear_backward(
    grad: torch.Tensor, x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor, dense: bool, backend: str, need: list[bool]
) -> Tensors:
    return load(backend).linear_backward(grad, x, w, offsets, dense, need)


def _linear_backward_fake(
    grad: torch.Tensor, x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor, dense: bool, backend: str, need: list[bool]
) -> Tensors:
    shapes = (x.shape, w.shape, w.shape[:2])
    return tuple(x.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, need, strict=True))


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, w, _bias, offsets, ctx.dense, ctx.backend = inputs
    ctx.save_for_backward(x, w, offsets)


def _linear_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, w, offsets = ctx.saved_tensors
    need = list(ctx.needs_input_grad[:3])
    grads = torch.ops.effbench_kernels.grouped_linear_backward(grad, x, w, offsets, ctx.dense, ctx.backend, need)
    return (*_wanted(grads, need), None, None, None)


def _experts(
    x: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    b_in: torch.Tensor | None,
    b_out: torch.Tensor | None,
    weight: torch.Tensor | None,
    add: torch.Tensor | None,
    offsets: torch.Tensor,
    token: torch.Tensor,
    inverse: torch.Tensor,
    dense: bool,
    act: str,
    backend: str,
    keep_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return load(backend).experts_forward(
        x, w_in, w_out, b_in, b_out, weight, add, offsets, token, inverse, dense, act, keep_pre
    )


def _experts_fake(
    x: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    b_in: torch.Tensor | None,
    b_out: torch.Tensor | None,
    weight: torch.Tensor | None,
    add: torch.Tensor | None,
    offsets: torch.Tensor,
    token: torch.Tensor,
    inverse: torch.Tensor,
    dense: bool,
    act: str,
    backend: str,
    keep_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = token.size(0) if weight is None else x.size(0)
    pre_shape = (token.size(0), w_in.size(1)) if keep_pre else (0,)
    return x.new_empty(rows, w_out.size(1)), x.new_empty(pre_shape)


def _experts_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    b_in: torch.Tensor | None,
    b_out: torch.Tensor | None,
    weight: torch.Tensor | None,
    pre: torch.Tensor,
    offsets: torch.Tensor,
    token: torch.Tensor,
    inverse: torch.Tensor,
    dense: bool,
    act: str,
    backend: str,
    need: list[bool],
) -> Tensors:
    return load(backend).experts_backward(
        grad, x, w_in, w_out, b_in, b_out, weight, pre, offsets, token, inverse, dense, act, need
    )


def _experts_backward_fake(
    grad: torch.Tensor,
    x: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    b_in: torch.Tensor | None,
    b_out: torch.Tensor | None,
    weight: torch.Tensor | None,
    pre: torch.Tensor,
    offsets: torch.Tensor,
    token: torch.Tensor,
    inverse: torch.Tensor,
    dense: bool,
    act: str,
    backend: str,
    need: list[bool],
) -> Tensors:
    shapes = (x.shape, w_in.shape, w_out.shape, w_in.shape[:2], w_out.shape[:2])
    grads = [x.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, need, strict=False)]
    like = x if weight is None or not need[5] else weight
    return (*grads, like.new_empty(weight.shape if weight is not None and need[5] else (0,)))


def _experts_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, w_in, w_out, b_in, b_out, weight, _add, offsets, token, inverse, ctx.dense, ctx.act, ctx.backend, _keep = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w_in, w_out, b_in, b_out, weight, output[1], offsets, token, inverse)


def _experts_gradient(ctx: Any, grad: torch.Tensor | None, _grad_pre: None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 14
    need = list(ctx.needs_input_grad[:6])
    grads = torch.ops.effbench_kernels.experts_backward(grad, *ctx.saved_tensors, ctx.dense, ctx.act, ctx.backend, need)
    return (*_wanted(grads, need), grad if ctx.needs_input_grad[6] else None, *(None,) * 7)


def _wanted(grads: Tensors, need: list[bool]) -> list[torch.Tensor | None]:
    return [grad if wanted else None for grad, wanted in zip(grads, need, strict=True)]


def _register() -> None:
    library = torch.library
    call = "Tensor x, Tensor w, Tensor? bias, Tensor offsets, bool dense, str backend"
    library.custom_op(_LINEAR, _linear, mutates_args=(), schema=f"({call}) -> Tensor")
    library.register_fake(_LINEAR, _linear_fake)
    call = "Tensor grad, Tensor x, Tensor w, Tensor offsets, bool dense, str backend, bool[] need"
    library.custom_op(f"{_LINEAR}_backward", _linear_backward, mutates_args=(), schema=f"({call}) -> (Tensor, Tensor, Tensor)")
    library.register_fake(f"{_LINEAR}_backward", _linear_backward_fake)
    library.register_autograd(_LINEAR, _linear_gradient, setup_context=_linear_context)

    call = f"{_WEIGHTS}, Tensor? add, {_PLAN}, str backend, bool keep_pre"
    library.custom_op(_EXPERTS, _experts, mutates_args=(), schema=f"({call}) -> (Tensor, Tensor)")
    library.register_fake(_EXPERTS, _experts_fake)
    call = f"Tensor grad, {_WEIGHTS}, Tensor pre, {_PLAN}, str backend, bool[] need"
    six = ", ".join(["Tensor"] * 6)
    library.custom_op(f"{_EXPERTS}_backward", _experts_backward, mutates_args=(), schema=f"({call}) -> ({six})")
    library.register_fake(f"{_EXPERTS}_backward", _experts_backward_fake)
    library.register_autograd(_EXPERTS, _experts_gradient, setup_context=_experts_context)


_register()
