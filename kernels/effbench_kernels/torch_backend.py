"""Grouped products in plain PyTorch, for any device; the fast path on a CPU.

Shapes: T tokens, K experts a token, E experts, N = T·K pairs of which the first n are kept, D input width, P width before the
activation (2F gated, else F), F hidden width, O output width.

One matrix product an expert that has tokens, written into place: no weight is copied, no product is padded, and an expert
without tokens costs nothing. On other devices than the CPU the group sizes are read back, which waits for the device. A dense
plan is one batched product over all experts.

The routing weight is applied to the activations, before the second product: the sum over a token's experts then needs no weights,
and the weight's gradient is <grad W_out, act(pre)>, which needs no saved output rows (SonicMoE, arXiv 2512.14080, section 4).
"""

from itertools import pairwise

import torch

from effbench_kernels.activations import activate, activate_backward


def linear_forward(
    x_ND: torch.Tensor, w_EOD: torch.Tensor, bias_EO: torch.Tensor | None, offsets_E1: torch.Tensor, dense: bool
) -> torch.Tensor:
    """See ``backends.Backend``."""
    bounds = offsets_E1.tolist()
    out_NO = _with_zero_tail(x_ND, x_ND.size(0), w_EOD.size(1), bounds[-1])
    _linear(x_ND[: bounds[-1]], w_EOD.mT, bias_EO, bounds, dense, out_NO[: bounds[-1]])
    return out_NO


def linear_backward(
    grad_NO: torch.Tensor, x_ND: torch.Tensor, w_EOD: torch.Tensor, offsets_E1: torch.Tensor, dense: bool, need: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``backends.Backend``."""
    bounds = offsets_E1.tolist()
    kept = bounds[-1]
    grad_nO = grad_NO[:kept]
    dx_ND, dw_EOD, db_EO = (x_ND.new_empty(0) for _ in range(3))
    if need[0]:
        dx_ND = _with_zero_tail(x_ND, x_ND.size(0), x_ND.size(1), kept)
        _linear(grad_nO, w_EOD, None, bounds, dense, dx_ND[:kept])
    if need[1]:
        dw_EOD = _outer(grad_nO, x_ND[:kept], bounds, dense)
    if need[2]:
        db_EO = _group_sum(grad_nO, None, bounds)
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
    bounds = offsets_E1.tolist()
    kept, pairs = bounds[-1], token_N.size(0)
    pre_NP = _with_zero_tail(x_TD, pairs, w_in_EPD.size(1), kept)
    pre_nP = pre_NP[:kept]
    _linear(_gather(x_TD, token_N, kept, dense), w_in_EPD.mT, b_in_EP, bounds, dense, pre_nP)
    act_nF = activate(pre_nP, act)
    rows_NO = _with_zero_tail(x_TD, pairs, w_out_EOF.size(1), kept)
    if weight_TK is None:
        _linear(act_nF, w_out_EOF.mT, b_out_EO, bounds, dense, rows_NO[:kept])
        out = rows_NO
    else:
        weight_n = _sorted_weight(weight_TK, inverse_TK)[:kept]
        act_nF.mul_(weight_n[:, None])
        _linear(act_nF, w_out_EOF.mT, None, bounds, dense, rows_NO[:kept])
        if b_out_EO is not None:
            _add_weighted_bias(rows_NO, weight_n, b_out_EO, bounds)
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
    bounds = offsets_E1.tolist()
    kept, pairs = bounds[-1], token_N.size(0)
    dx_TD, dw_in_EPD, dw_out_EOF, db_in_EP, db_out_EO, dweight_TK = (x_TD.new_empty(0) for _ in range(6))
    if not any(need):
        return dx_TD, dw_in_EPD, dw_out_EOF, db_in_EP, db_out_EO, dweight_TK
    grad_nO = grad[:kept] if weight_TK is None else _gather(grad, token_N, kept, dense)
    pre_nP = pre_NP[:kept]
    if pre_NP.dim() == 1:  # not kept: computed again
        pre_nP = x_TD.new_empty(kept, w_in_EPD.size(1))
        _linear(_gather(x_TD, token_N, kept, dense), w_in_EPD.mT, b_in_EP, bounds, dense, pre_nP)
    weight_n = None if weight_TK is None else _sorted_weight(weight_TK, inverse_TK)[:kept]

    act_nF = activate(pre_nP, act)
    dact_nF = torch.empty_like(act_nF)
    _linear(grad_nO, w_out_EOF, None, bounds, dense, dact_nF)
    if need_weight and weight_TK is not None:
        dweight_N = weight_TK.new_zeros(pairs)
        torch.sum(dact_nF * act_nF, -1, dtype=weight_TK.dtype, out=dweight_N[:kept])
        if b_out_EO is not None:
            _add_bias_dots(dweight_N, grad_nO, b_out_EO, bounds)
        dweight_TK = dweight_N.index_select(0, inverse_TK.view(-1)).view(inverse_TK.shape)
    if weight_n is not None:
        dact_nF.mul_(weight_n[:, None])
        act_nF.mul_(weight_n[:, None])
    if need_w_out:
        dw_out_EOF = _outer(grad_nO, act_nF, bounds, dense)
    if need_b_out:
        db_out_EO = _group_sum(grad_nO, weight_n, bounds)
    dpre_nP = activate_backward(dact_nF, pre_nP, act)
    if need_w_in:
        dw_in_EPD = _outer(dpre_nP, _gather(x_TD, token_N, kept, dense), bounds, dense)
    if need_b_in:
        db_in_EP = _group_sum(dpre_nP, None, bounds)
    if need_x:
        drows_ND = _with_zero_tail(x_TD, pairs, x_TD.size(1), kept)
        _linear(dpre_nP, w_in_EPD, None, bounds, dense, drows_ND[:kept])
        dx_TD = _sum_rows(drows_ND, inverse_TK, dense)
    return dx_TD, dw_in_EPD, dw_out_EOF, db_in_EP, db_out_EO, dweight_TK


def _with_zero_tail(like: torch.Tensor, rows: int, width: int, kept: int) -> torch.Tensor:
    out = like.new_empty(rows, width)
    if kept < rows:
        out[kept:].zero_()
    return out


def _gather(x_TD: torch.Tensor, token_N: torch.Tensor, kept: int, dense: bool) -> torch.Tensor:
    """(n, D) rows in the order of the plan; (1, T, D) for a dense plan, where every expert reads the same rows."""
    return x_TD[None] if dense else x_TD.index_select(0, token_N[:kept])


def _sorted_weight(weight_TK: torch.Tensor, inverse_TK: torch.Tensor) -> torch.Tensor:
    weight_N = weight_TK.reshape(-1)
    return torch.empty_like(weight_N).scatter_(0, inverse_TK.reshape(-1), weight_N)


def _sizes(bounds: list[int]) -> list[int]:
    return [end - start for start, end in pairwise(bounds)]


def _by_expert(rows: torch.Tensor, experts: int, tokens: int) -> torch.Tensor:
    """(E, T, D) from (n, D) rows of a dense plan, or from (1, T, D) rows that all experts share."""
    return rows.expand(experts, -1, -1) if rows.dim() == 3 else rows.view(experts, tokens, rows.size(1))


def _linear(
    rows: torch.Tensor,
    w_EDO: torch.Tensor,
    bias_EO: torch.Tensor | None,
    bounds: list[int],
    dense: bool,
    out_nO: torch.Tensor,
) -> None:
    """out = rows of expert e · w[e] (+ bias[e]); the rows (n, D), or for a dense plan (1, T, D) or (n, D)."""
    if dense:
        experts, _, width = w_EDO.shape
        rows_ETD, out_ETO = _by_expert(rows, experts, bounds[1]), out_nO.view(experts, bounds[1], width)
        if bias_EO is None:
            torch.bmm(rows_ETD, w_EDO, out=out_ETO)
        else:
            torch.baddbmm(bias_EO[:, None], rows_ETD, w_EDO, out=out_ETO)
        return
    active = [(expert, size) for expert, size in enumerate(_sizes(bounds)) if size]
    sizes = [size for _, size in active]
    for (expert, _), part, out in zip(active, rows.split(sizes), out_nO.split(sizes), strict=True):
        if bias_EO is None:
            torch.mm(part, w_EDO[expert], out=out)
        else:
            torch.addmm(bias_EO[expert], part, w_EDO[expert], out=out)


def _outer(left: torch.Tensor, right: torch.Tensor, bounds: list[int], dense: bool) -> torch.Tensor:
    """(E, O, D): the product of the rows of expert e, left transposed; zero for an expert without rows."""
    experts = len(bounds) - 1
    if dense:
        return torch.bmm(_by_expert(left, experts, bounds[1]).mT, _by_expert(right, experts, bounds[1]))
    sizes = _sizes(bounds)
    out_EOD = left.new_empty(experts, left.size(1), right.size(1))
    for size, part_O, part_D, out_OD in zip(sizes, left.split(sizes), right.split(sizes), out_EOD.unbind(0), strict=True):
        if size:
            torch.mm(part_O.t(), part_D, out=out_OD)
        else:
            out_OD.zero_()
    return out_EOD


def _group_sum(rows: torch.Tensor, weight_n: torch.Tensor | None, bounds: list[int]) -> torch.Tensor:
    """(E, O): the sum, weighted if asked, of the rows of each expert; accumulated in at least float32."""
    experts, width = len(bounds) - 1, rows.size(-1)
    sizes = _sizes(bounds)
    parts = rows.expand(experts, -1, -1).unbind(0) if rows.dim() == 3 else rows.split(sizes)
    weights = [None] * experts if weight_n is None else weight_n.split(sizes)
    out_EO = rows.new_empty(experts, width)
    for part, weight, out in zip(parts, weights, out_EO.unbind(0), strict=True):
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


def _add_bias_dots(dweight_N: torch.Tensor, grad: torch.Tensor, bias_EO: torch.Tensor, bounds: list[int]) -> None:
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            part = grad[0] if grad.dim() == 3 else grad[start:end]
            dweight_N[start:end] += part.to(dweight_N.dtype) @ bias_EO[expert].to(dweight_N.dtype)
