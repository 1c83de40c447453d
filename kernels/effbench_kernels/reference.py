"""The law: the expert layer as loops over tokens and their experts, in float64, rounded once at the end.

Shapes: T tokens, K experts a token, E experts, N = T·K pairs, D input width, P width before the activation (2F gated, else F),
F hidden width, O output width.

Every other backend is judged against these functions. They are slow on purpose, take every floating type and every device, and
are differentiable by autograd alone.
"""

import torch

from effbench_kernels.activations import formula
from effbench_kernels.norms import Norm
from effbench_kernels.plan import Plan


def experts(
    x_TD: torch.Tensor,
    w_in_EPD: torch.Tensor,
    w_out_EOF: torch.Tensor,
    plan: Plan,
    weight_TK: torch.Tensor,
    act: str,
    b_in_EP: torch.Tensor | None,
    b_out_EO: torch.Tensor | None,
    add_TO: torch.Tensor | None,
    norm: Norm | None,
) -> torch.Tensor:
    """(T, O): Σ_k weight · norm_e(w_out_e · act(w_in_e · x + b_in_e) + b_out_e) + add, over the pairs that are kept."""
    kept = int(plan.offsets[-1])
    out = []
    for token, positions in enumerate(plan.inverse.tolist()):
        x_D = x_TD[token].double()
        y_O = torch.zeros(w_out_EOF.size(1), dtype=torch.float64, device=x_TD.device) + x_D[:0].sum()
        for slot, position in enumerate(positions):
            if position < kept:
                expert = int(plan.expert[position])
                pre_P = _affine(w_in_EPD[expert], x_D, None if b_in_EP is None else b_in_EP[expert])
                row_O = _affine(w_out_EOF[expert], formula(pre_P, act), None if b_out_EO is None else b_out_EO[expert])
                if norm is not None:
                    row_O = _norm(row_O, norm, expert)
                y_O = y_O + weight_TK[token, slot].double() * row_O
        out.append(y_O if add_TO is None else y_O + add_TO[token].double())
    return _stack(out, x_TD, w_out_EOF.size(1))


def grouped_linear(x_ND: torch.Tensor, w_EOD: torch.Tensor, plan: Plan, bias_EO: torch.Tensor | None) -> torch.Tensor:
    """(N, O) from sorted rows: each row times the weights of its expert; zero for dropped pairs."""
    kept = int(plan.offsets[-1])
    out = []
    for position, expert in enumerate(plan.expert.tolist()):
        if position < kept:
            out.append(_affine(w_EOD[expert], x_ND[position].double(), None if bias_EO is None else bias_EO[expert]))
        else:
            out.append(torch.zeros(w_EOD.size(1), dtype=torch.float64, device=x_ND.device))
    return _stack(out, x_ND, w_EOD.size(1))


def _affine(w_OD: torch.Tensor, x_D: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    y_O = w_OD.double() @ x_D
    return y_O if bias_O is None else y_O + bias_O.double()


def _norm(row_O: torch.Tensor, norm: Norm, expert: int) -> torch.Tensor:
    if norm.kind == "layer":
        row_O = row_O - row_O.mean()
    row_O = row_O / (row_O.square().mean() + norm.eps).sqrt() * norm.gain[expert].double()
    return row_O if norm.bias is None else row_O + norm.bias[expert].double()


def _stack(rows: list[torch.Tensor], like: torch.Tensor, width: int) -> torch.Tensor:
    return torch.stack(rows).to(like.dtype) if rows else like.new_zeros(0, width)
