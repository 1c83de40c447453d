"""Grouped products in Triton, for NVIDIA GPUs from compute capability 8.0 on; on a CPU under Triton's interpreter only.

Shapes as in ``torch_backend``. The host never waits for the device: group sizes stay there, so a layer can be captured in a CUDA
graph and replayed with another routing. There are no atomics, and every sum has a fixed order, so a run repeats bit for bit.

Forward: gather, first product and activation in one kernel · second product · weighted sum over a token's rows. With few pairs
two kernels do it all (``triton_small``). Unlike in ``torch_backend`` the weights of the routing are applied in that last sum, in
float32, so nothing has to bring them into the order of the plan.

Backward: one kernel makes u = gradient · W_out, recomputes the activation and writes what the rest needs · the two gradients of
weights, gathering as they go · the rows of the gradient of x, and their sum by token.
"""

import os

import torch

from effbench_kernels import triton_launch as launch
from effbench_kernels import triton_sizes as table
from effbench_kernels.plan import by_position

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def linear_forward(
    x_ND: torch.Tensor, w_EOD: torch.Tensor, bias_EO: torch.Tensor | None, offsets_E1: torch.Tensor, dense: bool
) -> torch.Tensor:
    """See ``backends.Backend``."""
    check(x_ND)
    if x_ND.size(0) == 0:
        return x_ND.new_empty(0, w_EOD.size(1))
    with torch.cuda.device_of(x_ND):
        return _rows(x_ND, w_EOD, _packed(bias_EO), offsets_E1)


def linear_backward(
    grad_NO: torch.Tensor, x_ND: torch.Tensor, w_EOD: torch.Tensor, offsets_E1: torch.Tensor, dense: bool, need: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``backends.Backend``."""
    check(x_ND)
    dx_ND, dw_EOD, db_EO = (x_ND.new_empty(0) for _ in range(3))
    grad_NO = table.rows_of(grad_NO)
    with torch.cuda.device_of(x_ND):
        if need[0]:
            dx_ND = _rows(grad_NO, w_EOD.mT, None, offsets_E1) if x_ND.size(0) else torch.empty_like(x_ND)
        if need[1]:
            dw_EOD = launch.outer(grad_NO, table.rows_of(x_ND), None, None, offsets_E1)
        if need[2]:
            db_EO = launch.group_sum(grad_NO, None, None, offsets_E1)
    return dx_ND, dw_EOD, db_EO


def experts_forward(
    x_TD: torch.Tensor,
    w_in_EPD: torch.Tensor,
    w_out_EOF: torch.Tensor,
    b_in_EP: torch.Tensor | None,
    b_out_EO: torch.Tensor | None,
    weight_TK: torch.Tensor | None,
    add_TO: torch.Tensor | None,
    offsets_E1: torch.Tensor,
    token_N: torch.Tensor,
    inverse_TK: torch.Tensor,
    dense: bool,
    act: str,
    keep_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``backends.Backend``."""
    check(x_TD)
    x_TD, b_in_EP, b_out_EO, weight_TK = table.rows_of(x_TD), _packed(b_in_EP), _packed(b_out_EO), _packed(weight_TK)
    add_TO = None if add_TO is None else table.rows_of(add_TO)
    pairs, (tokens, slots), experts = token_N.size(0), inverse_TK.shape, w_in_EPD.size(0)
    with torch.cuda.device_of(x_TD):
        if table.few(tokens, slots, experts):
            out, pre = launch.few_experts(
                x_TD, w_in_EPD, w_out_EOF, b_in_EP, b_out_EO, weight_TK, add_TO, offsets_E1, token_N, inverse_TK, act, keep_pre
            )
            return out, x_TD.new_empty(0) if pre is None else pre
        if pairs == 0:
            rows_NO, pre = x_TD.new_empty(0, w_out_EOF.size(1)), x_TD.new_empty(0, w_in_EPD.size(1)) if keep_pre else None
        else:
            mapped = launch.map_tiles(offsets_E1, pairs, _tile_rows(x_TD, pairs, experts), weight_TK is None)
            act_NF, pre = launch.hidden(x_TD, w_in_EPD, b_in_EP, token_N, mapped, act, keep_pre)
            rows_NO = launch.linear(act_NF, w_out_EOF, b_out_EO, None, mapped, pairs)
        out = rows_NO if weight_TK is None else launch.combine(rows_NO, weight_TK, add_TO, offsets_E1, inverse_TK)
    return out, x_TD.new_empty(0) if pre is None else pre


def experts_backward(
    grad: torch.Tensor,
    x_TD: torch.Tensor,
    w_in_EPD: torch.Tensor,
    w_out_EOF: torch.Tensor,
    b_in_EP: torch.Tensor | None,
    b_out_EO: torch.Tensor | None,
    weight_TK: torch.Tensor | None,
    pre_NP: torch.Tensor,
    offsets_E1: torch.Tensor,
    token_N: torch.Tensor,
    inverse_TK: torch.Tensor,
    dense: bool,
    act: str,
    need: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``backends.Backend``."""
    check(x_TD)
    need_x, need_w_in, need_w_out, need_b_in, need_b_out, need_weight = need
    need_weight = need_weight and weight_TK is not None
    dx_TD, dw_in_EPD, dw_out_EOF, db_in_EP, db_out_EO, dweight_TK = (x_TD.new_empty(0) for _ in range(6))
    pairs, experts = token_N.size(0), w_in_EPD.size(0)
    need_dpre = need_x or need_w_in or need_b_in
    grad, x_TD = table.rows_of(grad), table.rows_of(x_TD)
    token = None if weight_TK is None else token_N
    with torch.cuda.device_of(x_TD):
        weight_N = None if weight_TK is None else by_position(weight_TK, inverse_TK)
        act_NF, dpre_NP = (x_TD.new_empty(0, side) for side in (w_out_EOF.size(2), w_in_EPD.size(1)))
        if pairs and (need_dpre or need_w_out or need_weight):
            mapped = launch.map_tiles(offsets_E1, pairs, _tile_rows(x_TD, pairs, experts), False)
            if pre_NP.dim() == 1:  # not kept: computed again
                pre_NP = launch.linear(x_TD, w_in_EPD, _packed(b_in_EP), token_N, mapped, pairs)
            want = (need_w_out, need_dpre, need_weight)
            made, dpre, dots = launch.hidden_gradient(grad, w_out_EOF, pre_NP, weight_N, token, mapped, act, want)
            act_NF, dpre_NP = act_NF if made is None else made, dpre_NP if dpre is None else dpre
            if dots is not None and weight_TK is not None:
                dweight_TK = launch.weight_gradient(dots, grad, _packed(b_out_EO), offsets_E1, inverse_TK, weight_TK.dtype)
            if need_x:
                drows_ND = launch.linear(dpre_NP, w_in_EPD.mT, None, None, mapped, pairs)
                dx_TD = launch.combine(drows_ND, None, None, offsets_E1, inverse_TK)
        elif need_x or need_weight:
            dx_TD = torch.zeros_like(x_TD) if need_x else dx_TD
            dweight_TK = torch.zeros_like(inverse_TK, dtype=weight_TK.dtype) if weight_TK is not None else dweight_TK
        if need_w_out:
            dw_out_EOF = launch.outer(grad, act_NF, token, None, offsets_E1)
        if need_w_in:
            dw_in_EPD = launch.outer(dpre_NP, x_TD, None, token_N, offsets_E1)
        if need_b_in:
            db_in_EP = launch.group_sum(dpre_NP, None, None, offsets_E1)
        if need_b_out:
            db_out_EO = launch.group_sum(grad, weight_N, token, offsets_E1)
    return dx_TD, dw_in_EPD, dw_out_EOF, db_in_EP, db_out_EO, dweight_TK


def check(x: torch.Tensor) -> None:
    """Raises ValueError where there is no device to run on, TypeError for a type without kernels."""
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"the triton backend needs tensors on a CUDA device, got {x.device}; "
            "use backend='torch', or set TRITON_INTERPRET=1 before the first call to run under Triton's interpreter"
        )
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        raise ValueError(f"the triton backend needs compute capability 8.0, {x.device} has less; use backend='torch'")
    if x.dtype not in _TYPES:
        raise TypeError(f"the triton backend takes {', '.join(map(str, _TYPES))}, got {x.dtype}")


def _rows(a_NK: torch.Tensor, w_ENK: torch.Tensor, bias: torch.Tensor | None, offsets_E1: torch.Tensor) -> torch.Tensor:
    a_NK, pairs = table.rows_of(a_NK), a_NK.size(0)
    mapped = launch.map_tiles(offsets_E1, pairs, _tile_rows(a_NK, pairs, w_ENK.size(0)), True)
    return launch.linear(a_NK, w_ENK, bias, None, mapped, pairs)


def _tile_rows(x: torch.Tensor, pairs: int, experts: int) -> int:
    return table.sizes(x.dtype, pairs, experts, 1, 1).rows


def _packed(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()
