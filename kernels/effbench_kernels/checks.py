"""What every backend refuses, in the same words, before anything is computed.

Shapes: T tokens, K experts a token, E experts, N = T·K pairs, D input width, P width before the activation (2F gated, else F),
F hidden width, O output width.
"""

from typing import TYPE_CHECKING

import torch

from effbench_kernels.activations import ACTIVATIONS, is_gated

if TYPE_CHECKING:
    from effbench_kernels.plan import Plan

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def _shape(name: str, tensor: torch.Tensor, want: tuple[int | str, ...]) -> None:
    sizes = tuple(tensor.shape)
    if len(sizes) != len(want) or any(isinstance(size, int) and size != got for size, got in zip(want, sizes, strict=True)):
        text = ", ".join(map(str, want))
        raise ValueError(f"{name} must have shape ({text}), got {sizes}")


def _like(name: str, tensor: torch.Tensor, model: torch.Tensor, model_name: str) -> None:
    if tensor.device != model.device:
        raise ValueError(f"{name} is on {tensor.device}, {model_name} on {model.device}")
    if tensor.dtype != model.dtype:
        raise TypeError(f"{name} is {tensor.dtype}, {model_name} {model.dtype}")


def check_index(index_TK: torch.Tensor, num_experts: int) -> None:
    """An integer (T, K) tensor and at least one expert."""
    if index_TK.dtype not in _INTEGERS:
        raise TypeError(f"index must hold integers, got {index_TK.dtype}")
    if index_TK.dim() != 2:
        raise ValueError(f"index must have shape (tokens, k), got {tuple(index_TK.shape)}")
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")


def check_logits(logits_TE: torch.Tensor) -> None:
    """A floating (T, E) tensor of finite values.

    On the CPU a value that is not finite raises ValueError. On other devices, and under ``torch.compile``, the check is an
    assertion on the device, because reading the answer back would stall it.
    """
    if not logits_TE.is_floating_point():
        raise TypeError(f"logits must be floating, got {logits_TE.dtype}")
    if logits_TE.dim() != 2 or logits_TE.size(1) < 1:
        raise ValueError(f"logits must have shape (tokens, experts), got {tuple(logits_TE.shape)}")
    finite = torch.isfinite(logits_TE.detach()).all()
    if logits_TE.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(finite, "router logits hold NaN or infinity")
    elif not finite:
        raise ValueError("router logits hold NaN or infinity")


def check_weight(weight_TK: torch.Tensor, plan: "Plan", x: torch.Tensor) -> None:
    """Weights (T, K) on the device of x, in its type or float32."""
    _shape("weight", weight_TK, tuple(plan.inverse.shape))
    if weight_TK.device != x.device:
        raise ValueError(f"weight is on {weight_TK.device}, x on {x.device}")
    if weight_TK.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"weight must be {x.dtype} as x, or torch.float32, got {weight_TK.dtype}")


def check_linear(x: torch.Tensor, w_EOD: torch.Tensor, plan: "Plan", bias_EO: torch.Tensor | None, rows: str) -> None:
    """One grouped product: x (T, D) or (N, D), w (E, O, D), bias (E, O)."""
    _floating("x", x)
    _shape("x", x, (plan.inverse.size(0) if rows == "gather" else plan.token.size(0), "D"))
    _shape("w", w_EOD, (plan.num_experts, "O", x.size(1)))
    _like("w", w_EOD, x, "x")
    if bias_EO is not None:
        _shape("bias", bias_EO, tuple(w_EOD.shape[:2]))
        _like("bias", bias_EO, x, "x")
    _plan_device(plan, x)


def check_combine(rows_NO: torch.Tensor, plan: "Plan", weight_TK: torch.Tensor | None, add_TO: torch.Tensor | None) -> None:
    """Rows (N, O) in the order of the plan, weights (T, K), an addend (T, O)."""
    _floating("rows", rows_NO)
    _shape("rows", rows_NO, (plan.token.size(0), "O"))
    if weight_TK is not None:
        check_weight(weight_TK, plan, rows_NO)
    if add_TO is not None:
        _shape("add", add_TO, (plan.inverse.size(0), rows_NO.size(1)))
        _like("add", add_TO, rows_NO, "rows")
    _plan_device(plan, rows_NO)


def check_experts(
    x_TD: torch.Tensor,
    w_in_EPD: torch.Tensor,
    w_out_EOF: torch.Tensor,
    plan: "Plan",
    weight_TK: torch.Tensor,
    act: str,
    b_in_EP: torch.Tensor | None,
    b_out_EO: torch.Tensor | None,
    add_TO: torch.Tensor | None,
    save: str,
) -> None:
    """A whole expert layer."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    if save not in ("pre", "none"):
        raise ValueError(f"save must be 'pre' or 'none', got {save!r}")
    _floating("x", x_TD)
    experts = plan.num_experts
    _shape("x", x_TD, (plan.inverse.size(0), "D"))
    _shape("w_in", w_in_EPD, (experts, "P", x_TD.size(1)))
    wide = w_in_EPD.size(1)
    if is_gated(act) and wide % 2:
        raise ValueError(f"w_in of a gated activation needs an even number of rows an expert (gate, then value), got {wide}")
    _shape("w_out", w_out_EOF, (experts, "O", wide // 2 if is_gated(act) else wide))
    out = w_out_EOF.size(1)
    _like("w_in", w_in_EPD, x_TD, "x")
    _like("w_out", w_out_EOF, x_TD, "x")
    for name, tensor, shape in (("b_in", b_in_EP, (experts, wide)), ("b_out", b_out_EO, (experts, out))):
        if tensor is not None:
            _shape(name, tensor, shape)
            _like(name, tensor, x_TD, "x")
    if add_TO is not None:
        _shape("add", add_TO, (x_TD.size(0), out))
        _like("add", add_TO, x_TD, "x")
    check_weight(weight_TK, plan, x_TD)
    _plan_device(plan, x_TD)


def _floating(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating, got {tensor.dtype}")


def _plan_device(plan: "Plan", x: torch.Tensor) -> None:
    if plan.offsets.device != x.device:
        raise ValueError(f"the plan is on {plan.offsets.device}, x on {x.device}")
