"""The launches of the Triton kernels: outputs are allocated here, sizes come from ``triton_sizes``.

Shapes: T tokens, K experts a token, E experts, N = T·K pairs in the order of the plan, D input width, P width before the
activation (2F gated, else F), F hidden width, O output width. Rows must be contiguous (``triton_sizes.rows_of``), biases,
routing weights and the plan whole; weights of experts may have any strides.
"""

import torch
import triton

from effbench_kernels import triton_products, triton_small, triton_sums, triton_tiles
from effbench_kernels import triton_sizes as table
from effbench_kernels.activations import is_gated


def map_tiles(offsets_E1: torch.Tensor, pairs: int, rows: int, tail: bool) -> tuple[torch.Tensor, int]:
    """The map of tiles of ``rows`` rows, and the most there can be; with ``tail`` the dropped pairs have tiles as well."""
    experts = offsets_E1.size(0) - 1
    bound = min(pairs, pairs // rows + experts + tail)
    tiles = offsets_E1.new_empty(1 + 3 * bound)
    block = triton.next_power_of_2(experts + 1)
    batch = max(1, min(64, 8192 // block))
    triton_tiles.map_tiles[(triton.cdiv(bound, batch),)](
        offsets_E1, tiles, experts, pairs, bound, TAIL=tail, BM=rows, BE=block, BT=batch, **table.COMPILER
    )
    return tiles, bound


def linear(
    a: torch.Tensor,
    w_ENK: torch.Tensor,
    bias: torch.Tensor | None,
    token: torch.Tensor | None,
    mapped: tuple[torch.Tensor, int],
    pairs: int,
) -> torch.Tensor:
    """(N, columns): rows of a, gathered if there are tokens, times the transposed matrix of their expert, plus its bias."""
    _, columns, depth = w_ENK.shape
    size = table.sizes(a.dtype, pairs, w_ENK.size(0), columns, depth)
    out = a.new_empty(pairs, columns)
    triton_products.linear[table.programs(a, mapped[1], columns, size, 1)](
        a, table.weights(w_ENK, size), bias, out, token, mapped[0], w_ENK.size(0), columns, depth, a.stride(0), *w_ENK.stride(),
        **table.options(w_ENK, size),
    )  # fmt: skip
    return out


def hidden(
    x_TD: torch.Tensor,
    w_in_EPD: torch.Tensor,
    b_in_EP: torch.Tensor | None,
    token_N: torch.Tensor,
    mapped: tuple[torch.Tensor, int],
    act: str,
    keep_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """act(rows · W_inᵀ + b_in) (N, F), and the pre-activations (N, P) if they are kept."""
    experts, wide, depth = w_in_EPD.shape
    pairs, matrices = token_N.size(0), 1 + is_gated(act)
    columns = wide // matrices
    size = table.sizes(x_TD.dtype, pairs, experts, columns, depth, matrices)
    whole = size._replace(columns=size.columns * matrices) if table.in_turns(act) else size
    out = x_TD.new_empty(pairs, columns)
    pre = x_TD.new_empty(pairs, wide) if keep_pre else None
    triton_products.hidden[table.programs(x_TD, mapped[1], columns, size, matrices)](
        x_TD, table.weights(w_in_EPD, whole), b_in_EP, pre, out, token_N, mapped[0], experts, columns, depth,
        x_TD.stride(0),
        *w_in_EPD.stride(), **table.activation(act), **table.options(w_in_EPD, size, matrices),
    )  # fmt: skip
    return out, pre


def hidden_gradient(
    grad: torch.Tensor,
    w_out_EOF: torch.Tensor,
    pre_NP: torch.Tensor,
    weight_N: torch.Tensor | None,
    token_N: torch.Tensor | None,
    mapped: tuple[torch.Tensor, int],
    act: str,
    want: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The weighted activations (N, F), the gradient of the pre-activations (N, P), and the parts of <u, act(pre)> (parts, N)."""
    w_EFO = w_out_EOF.mT
    experts, columns, depth = w_EFO.shape
    pairs = pre_NP.size(0)
    size = table.sizes(grad.dtype, pairs, experts, columns, depth, 2)  # the epilogue holds two more tiles
    act_out = grad.new_empty(pairs, columns) if want[0] else None
    dpre = torch.empty_like(pre_NP) if want[1] else None
    wide_type = torch.float64 if grad.dtype == torch.float64 else torch.float32
    dots = grad.new_empty(triton.cdiv(columns, size.columns), pairs, dtype=wide_type) if want[2] else None
    triton_products.hidden_gradient[table.programs(grad, mapped[1], columns, size, 1)](
        grad, table.weights(w_EFO, size), pre_NP, weight_N, act_out, dpre, dots, token_N, mapped[0], pairs, columns, depth,
        grad.stride(0), *w_EFO.stride(), **table.activation(act), **table.options(w_EFO, size),
    )  # fmt: skip
    return act_out, dpre, dots


def outer(
    left: torch.Tensor,
    right: torch.Tensor,
    left_token: torch.Tensor | None,
    right_token: torch.Tensor | None,
    offsets_E1: torch.Tensor,
) -> torch.Tensor:
    """(E, O, D): the sum over an expert's rows of left ⊗ right, each gathered by token if there are tokens."""
    experts, height, width = offsets_E1.size(0) - 1, left.size(1), right.size(1)
    size = table.OUTER[left.dtype.itemsize]
    size = size._replace(rows=table.cut(size.rows, height), columns=table.cut(size.columns, width))
    out = left.new_empty(experts, height, width)
    grid = experts * triton.cdiv(height, size.rows) * triton.cdiv(width, size.columns)
    if grid:
        triton_products.outer[(grid,)](
            left, right, out, left_token, right_token, offsets_E1, height, width, left.stride(0), right.stride(0),
            **table.common(left, size, 1),
        )  # fmt: skip
    return out


def combine(
    rows_NO: torch.Tensor,
    weight_TK: torch.Tensor | None,
    add_TO: torch.Tensor | None,
    offsets_E1: torch.Tensor,
    inverse_TK: torch.Tensor,
) -> torch.Tensor:
    """(T, O): the sum over a token's pairs of weight · row, plus ``add``."""
    tokens, width = inverse_TK.size(0), rows_NO.size(1)
    out = rows_NO.new_empty(tokens, width)
    block = min(1024, triton.next_power_of_2(max(width, 1)))
    together = max(1, 1024 // block)
    if tokens and width:
        triton_sums.combine[(triton.cdiv(tokens, together), triton.cdiv(width, block))](
            rows_NO, weight_TK, add_TO, out, offsets_E1, inverse_TK, tokens, offsets_E1.size(0) - 1, inverse_TK.size(1), width,
            0 if add_TO is None else add_TO.stride(0), BT=together, BO=block, ACC=table.accumulator(rows_NO.dtype), **table.COMPILER,
        )  # fmt: skip
    return out


def group_sum(
    rows: torch.Tensor, weight_N: torch.Tensor | None, token: torch.Tensor | None, offsets_E1: torch.Tensor
) -> torch.Tensor:
    """(E, O): the sum, weighted if asked, of the rows of each expert."""
    experts, width = offsets_E1.size(0) - 1, rows.size(1)
    out = rows.new_empty(experts, width)
    triton_sums.group_sum[(experts, triton.cdiv(width, 64))](
        rows,
        weight_N,
        token,
        offsets_E1,
        out,
        width,
        rows.stride(0),
        BR=32,
        BC=64,
        ACC=table.accumulator(rows.dtype),
        **table.COMPILER,
    )
    return out


def weight_gradient(
    dots: torch.Tensor,
    grad_TO: torch.Tensor,
    b_out_EO: torch.Tensor | None,
    offsets_E1: torch.Tensor,
    inverse_TK: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(T, K): the parts of <u, act(pre)> added up, plus <gradient, b_out>; zero for dropped pairs."""
    experts, pairs = offsets_E1.size(0) - 1, inverse_TK.numel()
    out = inverse_TK.new_empty(inverse_TK.shape, dtype=dtype)
    block = triton.next_power_of_2(experts)
    batch = 128 if b_out_EO is None else max(1, min(16, 8192 // block))
    triton_sums.weight_gradient[(triton.cdiv(pairs, batch),)](
        dots, grad_TO, b_out_EO, offsets_E1, inverse_TK, out, pairs, experts, inverse_TK.size(1), dots.size(0), grad_TO.size(1),
        grad_TO.stride(0), BP=batch, BO=128, BE=block, ACC=table.accumulator(grad_TO.dtype), **table.COMPILER,
    )  # fmt: skip
    return out


def few_experts(
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
    act: str,
    keep_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The whole layer in two launches: (T, O), or the sorted rows (N, O) without weight; and the pre-activations if kept."""
    experts, wide, depth = w_in_EPD.shape
    pairs = token_N.size(0)
    columns, width = w_out_EOF.size(2), w_out_EOF.size(1)
    acc = table.accumulator(x_TD.dtype)
    wide_type = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
    rows_NF = x_TD.new_empty(pairs, columns, dtype=wide_type)
    pre = x_TD.new_empty(pairs, wide) if keep_pre else None
    expert_N = token_N.new_empty(pairs)
    slice_, step_ = 4 if is_gated(act) else 8, table.cut(1024, depth)
    triton_small.few_hidden[(pairs * triton.cdiv(columns, slice_),)](
        x_TD, w_in_EPD, b_in_EP, pre, rows_NF, expert_N, offsets_E1, token_N, pairs, experts, columns, depth, x_TD.stride(0),
        *w_in_EPD.stride(), **table.activation(act), BN=slice_, BK=step_,
        BE=triton.next_power_of_2(experts), ACC=acc, num_warps=4, **table.COMPILER,
    )  # fmt: skip
    whole = weight_TK is None
    tokens, slots = (pairs, 1) if whole else (inverse_TK.size(0), inverse_TK.size(1))
    out = x_TD.new_empty(tokens, width)
    triton_small.few_out[(tokens, triton.cdiv(width, 4))](
        rows_NF, w_out_EOF, b_out_EO, weight_TK, add_TO, out, expert_N, None if whole else inverse_TK, experts, slots, width,
        columns, 0 if add_TO is None else add_TO.stride(0), *w_out_EOF.stride(), BN=4, BK=table.cut(1024, columns), ACC=acc,
        num_warps=4, **table.COMPILER,
    )  # fmt: skip
    return out, pre
