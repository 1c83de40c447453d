"""The expert layer in PyTorch, for any device; the fast path on a CPU.

Shapes: T tokens, K experts a token, E experts, N = T·K pairs of which the first n are kept, D input width, P width before the
activation (2F gated, else F), F hidden width, O output width.

The products are those of ``products``: no weight is copied, no product is padded, and an expert without tokens costs nothing. On
other devices than the CPU the group sizes are read back, which waits for the device.

The routing weight is applied to the activations, before the second product: the sum over a token's experts then needs no weights,
and the weight's gradient is <grad W_out, act(pre)>, which needs no saved output rows (SonicMoE, arXiv 2512.14080, section 4).
"""

from itertools import pairwise

import torch

from effbench_kernels import native
from effbench_kernels.activations import activate, activate_backward
from effbench_kernels.plan import by_position
from effbench_kernels.products import Groups, linear, outer


def linear_forward(
    x_ND: torch.Tensor, w_EOD: torch.Tensor, bias_EO: torch.Tensor | None, offsets_E1: torch.Tensor, dense: bool
) -> torch.Tensor:
    """See ``backends.Backend``."""
    groups = Groups(offsets_E1, dense)
    out_NO = _with_zero_tail(x_ND, x_ND.size(0), w_EOD.size(1), groups.kept)
    linear(x_ND, None, w_EOD, bias_EO, groups, out_NO)
    return out_NO


def linear_backward(
    grad_NO: torch.Tensor, x_ND: torch.Tensor, w_EOD: torch.Tensor, offsets_E1: torch.Tensor, dense: bool, need: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``backends.Backend``."""
    groups = Groups(offsets_E1, dense)
    dx_ND, dw_EOD, db_EO = (x_ND.new_empty(0) for _ in range(3))
    if need[0]:
        dx_ND = _with_zero_tail(x_ND, x_ND.size(0), x_ND.size(1), groups.kept)
        linear(grad_NO, None, w_EOD.mT, None, groups, dx_ND)
    if need[1]:
        dw_EOD = outer(grad_NO, None, x_ND, None, groups)
    if need[2]:
        db_EO = _group_sum(grad_NO[: groups.kept], None, groups)
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
    if weight_TK is not None:
        route = (weight_TK, add_TO, offsets_E1, token_N, inverse_TK)
        done = native.forward(x_TD, w_in_EPD, w_out_EOF, b_in_EP, b_out_EO, *route, act, keep_pre)
        if done is not None:
            return done
    groups = Groups(offsets_E1, dense)
    kept, pairs = groups.kept, token_N.size(0)
    pre_NP = _with_zero_tail(x_TD, pairs, w_in_EPD.size(1), kept)
    linear(x_TD, token_N, w_in_EPD, b_in_EP, groups, pre_NP)
    act_nF = activate(pre_NP[:kept], act)
    rows_NO = _with_zero_tail(x_TD, pairs, w_out_EOF.size(1), kept)
    if weight_TK is None:
        linear(act_nF, None, w_out_EOF, b_out_EO, groups, rows_NO)
        out = rows_NO
    else:
        weight_n = by_position(weight_TK, inverse_TK)[:kept]
        act_nF.mul_(weight_n[:, None])
        linear(act_nF, None, w_out_EOF, None, groups, rows_NO)
        if b_out_EO is not None:
            _add_weighted_bias(rows_NO, weight_n, b_out_EO, groups.bounds)
        out = _sum_rows(rows_NO, inverse_TK, dense)
        if add_TO is not None:
            out += add_TO
    return out, pre_NP if keep_pre else x_TD.new_empty(0)


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
    need_x, need_w_in, need_w_out, need_b_in, need_b_out, need_weight = need
    groups = Groups(offsets_E1, dense)
    kept, pairs = groups.kept, token_N.size(0)
    dx_TD, dw_in_EPD, dw_out_EOF, db_in_EP, db_out_EO, dweight_TK = (x_TD.new_empty(0) for _ in range(6))
    if not any(need):
        return dx_TD, dw_in_EPD, dw_out_EOF, db_in_EP, db_out_EO, dweight_TK
    grad_row_N = None if weight_TK is None else token_N  # the gradient of a layer has a row a token, of bare rows one a pair
    if pre_NP.dim() == 1:  # not kept: computed again
        pre_NP = x_TD.new_empty(pairs, w_in_EPD.size(1))
        linear(x_TD, token_N, w_in_EPD, b_in_EP, groups, pre_NP)
    pre_nP = pre_NP[:kept]
    weight_n = None if weight_TK is None else by_position(weight_TK, inverse_TK)[:kept]
    grad_nO = grad[:0]
    if b_out_EO is not None and (need_b_out or need_weight):
        grad_nO = grad[:kept] if grad_row_N is None else grad.index_select(0, token_N[:kept])

    u_nF = pre_nP.new_empty(kept, w_out_EOF.size(2))
    linear(grad, grad_row_N, w_out_EOF.mT, None, groups, u_nF)
    act_nF, dpre_nP, dots_n = native.hidden_gradient(u_nF, pre_nP, weight_n, act) or _hidden_gradient(
        u_nF, pre_nP, weight_n, act
    )
    if need_weight and weight_TK is not None:
        dweight_N = weight_TK.new_zeros(pairs)
        dweight_N[:kept] = dots_n
        if b_out_EO is not None:
            _add_bias_dots(dweight_N, grad_nO, b_out_EO, groups.bounds)
        dweight_TK = dweight_N.index_select(0, inverse_TK.view(-1)).view(inverse_TK.shape)
    if need_w_out:
        dw_out_EOF = outer(grad, grad_row_N, act_nF, None, groups)
    if need_b_out:
        db_out_EO = _group_sum(grad_nO, weight_n, groups)
    if need_w_in:
        dw_in_EPD = outer(dpre_nP, None, x_TD, token_N, groups)
    if need_b_in:
        db_in_EP = _group_sum(dpre_nP, None, groups)
    if need_x:
        drows_ND = _with_zero_tail(x_TD, pairs, x_TD.size(1), kept)
        linear(dpre_nP, None, w_in_EPD.mT, None, groups, drows_ND)
        dx_TD = _sum_rows(drows_ND, inverse_TK, dense)
    return dx_TD, dw_in_EPD, dw_out_EOF, db_in_EP, db_out_EO, dweight_TK


def _hidden_gradient(
    u_nF: torch.Tensor, pre_nP: torch.Tensor, weight_n: torch.Tensor | None, act: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``native.hidden_gradient``, in torch. ``u_nF`` is used up."""
    act_nF = activate(pre_nP, act)
    wide = torch.float64 if u_nF.dtype == torch.float64 else torch.float32
    dots_n = torch.sum(u_nF * act_nF, -1, dtype=wide)
    if weight_n is not None:
        u_nF.mul_(weight_n[:, None])
        act_nF.mul_(weight_n[:, None])
    return act_nF, activate_backward(u_nF, pre_nP, act), dots_n


def _with_zero_tail(like: torch.Tensor, rows: int, width: int, kept: int) -> torch.Tensor:
    out = like.new_empty(rows, width)
    if kept < rows:
        out[kept:].zero_()
    return out


def _group_sum(rows_nO: torch.Tensor, weight_n: torch.Tensor | None, groups: Groups) -> torch.Tensor:
    """(E, O): the sum, weighted if asked, of the rows of each expert; accumulated in at least float32."""
    sizes = groups.sizes
    weights = [None] * len(sizes) if weight_n is None else weight_n.split(sizes)
    out_EO = rows_nO.new_empty(len(sizes), rows_nO.size(1))
    for part, weight, out in zip(rows_nO.split(sizes), weights, out_EO.unbind(0), strict=True):
        if weight is None:
            torch.sum(part, 0, out=out)
        else:
            out.copy_(weight @ part.to(weight.dtype))
    return out_EO


def _sum_rows(rows_NO: torch.Tensor, inverse_TK: torch.Tensor, dense: bool) -> torch.Tensor:
    """(T, O): the sum of the rows of each token."""
    tokens, experts_a_token = inverse_TK.shape
    if rows_NO.size(0) == 0:
        return rows_NO.new_zeros(tokens, rows_NO.size(1))
    if experts_a_token == 1:
        return rows_NO.index_select(0, inverse_TK.view(-1))
    if dense:
        return rows_NO.view(experts_a_token, tokens, -1).sum(0)
    return torch.nn.functional.embedding_bag(inverse_TK, rows_NO, mode="sum")


def _add_weighted_bias(rows_NO: torch.Tensor, weight_n: torch.Tensor, bias_EO: torch.Tensor, bounds: list[int]) -> None:
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            rows_NO[start:end].addcmul_(weight_n[start:end, None].to(rows_NO.dtype), bias_EO[expert])


def _add_bias_dots(dweight_N: torch.Tensor, grad_nO: torch.Tensor, bias_EO: torch.Tensor, bounds: list[int]) -> None:
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            # not a matrix product: the order of its sums depends on the number of threads on some processors
            product_nO = grad_nO[start:end].to(dweight_N.dtype) * bias_EO[expert].to(dweight_N.dtype)
            dweight_N[start:end] += product_nO.sum(-1)
