"""The expert layer and its parts, the same on every backend.

Shapes: T tokens, K experts a token, E experts, N = T·K pairs, D input width, P width before the activation (2F gated, else F),
F hidden width, O output width.

Errors, raised before anything is computed: ValueError for shapes, devices and names, TypeError for types.
"""

import torch

import effbench_kernels.ops  # noqa: F401  (registers the operators)
from effbench_kernels import reference
from effbench_kernels.backends import resolve
from effbench_kernels.checks import check_combine, check_experts, check_linear
from effbench_kernels.norms import Norm, check_norm, norm_rows
from effbench_kernels.plan import Plan


def experts(
    x: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    plan: Plan,
    weight: torch.Tensor,
    act: str = "swiglu",
    b_in: torch.Tensor | None = None,
    b_out: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    save: str = "pre",
    norm: Norm | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """A whole expert layer: (T, O) = Σ_k weight[t, k] · norm_e(w_out[e] · act(w_in[e] · x[t] + b_in[e]) + b_out[e]) + add[t].

    e is the expert of the pair (t, k); dropped pairs add nothing, whatever their weight. Differentiable once, in x, both weights,
    both biases, ``weight``, ``add`` and the norm's parameters.

    w_in (E, P, D) and w_out (E, O, F) are stacked as in ``torch.nn.Linear``; a gated ``act`` finds the gate in the first F
    rows of w_in and the value in the last F. weight (T, K) is in the type of x or float32, and for ``dense_plan`` the (T, E)
    gate. b_in (E, P), b_out (E, O). add (T, O): a shared expert's output or a residual, added in the same pass.
    act: one of ``ACTIVATIONS``. save: "pre" keeps the N·P pre-activations for backward, "none" computes them again there.
    norm: after each expert, before the weighted sum; it keeps the N·O rows for backward as well.
    backend: "torch", "triton", "reference", or None for the best one on the device of x.
    """
    check_experts(x, w_in, w_out, plan, weight, act, b_in, b_out, add, save)
    if norm is not None:
        check_norm(norm, plan.num_experts, w_out.size(1))
    name = resolve(backend, x)
    if name == "reference":
        return reference.experts(x, w_in, w_out, plan, weight, act, b_in, b_out, add, norm)
    inputs = (x, w_in, w_out, b_in, b_out, weight)
    keep = save == "pre" and torch.is_grad_enabled() and any(item is not None and item.requires_grad for item in inputs)
    route = (plan.offsets, plan.token, plan.inverse, plan.dense, act, name, keep)
    run = torch.ops.effbench_kernels.experts
    if norm is None:
        return run(x, w_in, w_out, b_in, b_out, weight, add, *route)[0]
    rows_NO = run(x, w_in, w_out, b_in, b_out, None, None, *route)[0]
    return combine(norm_rows(rows_NO, plan, norm), plan, weight, add)


def grouped_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    plan: Plan,
    bias: torch.Tensor | None = None,
    rows: str = "gather",
    out: str = "sorted",
    weight: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Each pair's row times the weights of its expert, plus its bias: the primitive the layer is made of. Differentiable once.

    rows: "gather" takes x (T, D), one row a token; "sorted" takes x (N, D) in the order of the plan.
    out: "sorted" gives (N, O) in the order of the plan, with zeros for dropped pairs; "sum" gives (T, O), the sum over a token's
    pairs, weighted by ``weight`` (T, K) if there is one.
    """
    for name, value, known in (("rows", rows, ("gather", "sorted")), ("out", out, ("sorted", "sum"))):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    check_linear(x, w, plan, bias, rows)
    x_ND = collect(x, plan) if rows == "gather" else x
    if resolve(backend, x) == "reference":
        y_NO = reference.grouped_linear(x_ND, w, plan, bias)
    else:
        y_NO = torch.ops.effbench_kernels.grouped_linear(x_ND, w, bias, plan.offsets, plan.dense, resolve(backend, x))
    return combine(y_NO, plan, weight) if out == "sum" else y_NO


def collect(x: torch.Tensor, plan: Plan) -> torch.Tensor:
    """(N, D): the row of each pair's token, in the order of the plan."""
    return x.index_select(0, plan.token)


def combine(
    rows: torch.Tensor, plan: Plan, weight: torch.Tensor | None = None, add: torch.Tensor | None = None
) -> torch.Tensor:
    """(T, O): the sum over a token's pairs of their rows, weighted by ``weight`` (T, K) if there is one, plus ``add`` (T, O).

    Dropped pairs add nothing, even where their row or weight is not a number.
    """
    check_combine(rows, plan, weight, add)
    kept_TK = plan.kept()
    rows_TKO = rows.index_select(0, plan.inverse.reshape(-1)).view(*plan.inverse.shape, rows.size(1))
    rows_TKO = torch.where(kept_TK[:, :, None], rows_TKO, 0)
    if weight is not None:
        rows_TKO = rows_TKO * torch.where(kept_TK, weight, 0)[:, :, None]
    out_TO = rows_TKO.sum(1).to(rows.dtype)
    return out_TO if add is None else out_TO + add
