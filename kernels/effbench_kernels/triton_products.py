"""Triton kernels for many tokens: the grouped products, with what comes before and after them fused in.

Shapes: N pairs in the order of the plan, E experts, D input width, P width before the activation, F hidden width, O output width.

The three products over rows are persistent: as many programs as the device runs at once, each taking every so-manieth work item
of ``triton_tiles.locate``. Rows of x are gathered by token through plain pointers; weights come through tensor descriptors where
their layout allows (DESCRIPTOR). A row past the end of a tile repeats a valid row and is not stored, so nothing unwritten is
read and no mask stands in the inner loop.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl

from effbench_kernels.triton_tiles import (
    activation,
    factor_of,
    factor_slope,
    locate,
    multiply,
    product_tile,
    product_tiles,
    slope,
)


@triton.jit
def linear(
    a,
    w,
    bias,
    out,
    token,
    tiles,
    experts,
    columns,
    depth,
    a_stride,
    stride_e,
    stride_n,
    stride_k,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """out (N, columns) = a (N, depth), or a (T, depth) gathered by ``token``, times w[e]ᵀ (columns, depth), plus bias[e].

    Rows of "expert" E, the dropped pairs, become zero if the map of tiles has them.
    """
    total = tl.load(tiles).to(tl.int32)
    across = tl.cdiv(columns, BN)
    for tile in range(tl.program_id(0), total * across, tl.num_programs(0)):
        expert, first, end, across_at = locate(tile, tiles, total, across, GROUP)
        rows = first + tl.arange(0, BM)
        valid = tl.minimum(rows, end - 1)
        source = valid if token is None else tl.load(token + valid)
        limit = tl.where(expert < experts, depth, 0)
        column = across_at * BN
        n = column + tl.arange(0, BN)
        acc = product_tile(
            a, source, a_stride, w, expert, column, columns, depth, limit, stride_e, stride_n, stride_k,
            BM, BN, BK, WHOLE_K, DESCRIPTOR, TURNED, PRECISION, ACC,
        )  # fmt: skip
        if bias is not None:
            acc += tl.load(bias + expert * columns + n, mask=n < tl.where(expert < experts, columns, 0), other=0.0)[None, :].to(
                ACC
            )
        at = out + rows[:, None] * columns + n[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=(rows < end)[:, None] & (n < columns)[None, :])


@triton.jit
def hidden(
    x,
    w,
    bias,
    pre,
    out,
    token,
    tiles,
    experts,
    columns,
    depth,
    x_stride,
    stride_e,
    stride_n,
    stride_k,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    TURNS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """out (N, F) = act(x[token] · w_in[e]ᵀ + b_in[e]), and the pre-activations (N, P) if wanted. ``columns`` is F.

    Of "expert" E, the dropped pairs, nothing is read; their rows are finite and have no meaning.
    Gate and value are two products of one pass over x; where they stand in turns (TURNS), one product of twice the width.
    """
    total = tl.load(tiles).to(tl.int32)
    across = tl.cdiv(columns, BN)
    wide = 2 * columns if GATED else columns
    for tile in range(tl.program_id(0), total * across, tl.num_programs(0)):
        expert, first, end, across_at = locate(tile, tiles, total, across, GROUP)
        rows = first + tl.arange(0, BM)
        source = tl.load(token + tl.minimum(rows, end - 1))
        limit = tl.where(expert < experts, depth, 0)
        column = across_at * BN
        n = column + tl.arange(0, BN)
        inside = (rows < end)[:, None] & (n < columns)[None, :]
        if GATED and not TURNS:
            gate, value = product_tiles(
                x, source, x_stride, w, expert, column, columns, depth, limit, stride_e, stride_n, stride_k,
                BM, BN, BK, WHOLE_K, DESCRIPTOR, TURNED, PRECISION, ACC,
            )  # fmt: skip
            if bias is not None:
                own_columns = tl.where(expert < experts, columns, 0)
                gate += tl.load(bias + expert * wide + n, mask=n < own_columns, other=0.0)[None, :].to(ACC)
                value += tl.load(bias + expert * wide + columns + n, mask=n < own_columns, other=0.0)[None, :].to(ACC)
            if pre is not None:
                at = pre + rows[:, None] * wide + n[None, :]
                tl.store(at, gate.to(pre.dtype.element_ty), mask=inside)
                tl.store(at + columns, value.to(pre.dtype.element_ty), mask=inside)
            y = activation(gate, ACT) * factor_of(value, ACT)
        else:
            BP: tl.constexpr = 2 * BN if TURNS else BN
            all_of = product_tile(
                x, source, x_stride, w, expert, across_at * BP, wide, depth, limit, stride_e, stride_n, stride_k,
                BM, BP, BK, WHOLE_K, DESCRIPTOR, TURNED, PRECISION, ACC,
            )  # fmt: skip
            p = across_at * BP + tl.arange(0, BP)
            if bias is not None:
                all_of += tl.load(bias + expert * wide + p, mask=p < tl.where(expert < experts, wide, 0), other=0.0)[
                    None, :
                ].to(ACC)
            if pre is not None:
                at = pre + rows[:, None] * wide + p[None, :]
                tl.store(at, all_of.to(pre.dtype.element_ty), mask=(rows < end)[:, None] & (p < wide)[None, :])
            if TURNS:
                gate, value = tl.split(tl.reshape(all_of, (BM, BN, 2)))
                y = activation(gate, ACT) * factor_of(value, ACT)
            else:
                y = activation(all_of, ACT)
        tl.store(out + rows[:, None] * columns + n[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gradient_part(
    u,
    rows,
    end,
    column,
    factor,
    pre,
    act_out,
    dpre,
    columns,
    BN: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    TURNS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The end of ``hidden_gradient`` for the columns from ``column`` on; returns <u, act(pre)> over them, a number a row.

    Half a tile at a time, or its many values of a kind do not fit the registers.
    """
    wide = 2 * columns if GATED else columns
    n = column + tl.arange(0, BN)
    inside = (rows < end)[:, None] & (n < columns)[None, :]
    at = rows[:, None] * wide + n[None, :] * (2 if TURNS else 1)
    gate = tl.load(pre + at, mask=inside, other=0.0).to(ACC)
    y = activation(gate, ACT)
    if GATED:
        shift = 1 if TURNS else columns
        value = tl.load(pre + at + shift, mask=inside, other=0.0).to(ACC)
        scale = factor_of(value, ACT)
        part = tl.sum(u * y * scale, 1)
        u *= factor[:, None]
        if dpre is not None:
            tl.store(dpre + at, (u * scale * slope(gate, ACT)).to(dpre.dtype.element_ty), mask=inside)
            tl.store(dpre + at + shift, factor_slope(u * y, value, ACT).to(dpre.dtype.element_ty), mask=inside)
        y *= scale
    else:
        part = tl.sum(u * y, 1)
        if dpre is not None:
            tl.store(dpre + at, (u * factor[:, None] * slope(gate, ACT)).to(dpre.dtype.element_ty), mask=inside)
    if act_out is not None:
        y *= factor[:, None]
        tl.store(act_out + rows[:, None] * columns + n[None, :], y.to(act_out.dtype.element_ty), mask=inside)
    return part


@triton.jit(do_not_specialize=["pairs"])
def hidden_gradient(
    grad,
    w,
    pre,
    weight,
    act_out,
    dpre,
    dots,
    token,
    tiles,
    pairs,
    columns,
    depth,
    grad_stride,
    stride_e,
    stride_n,
    stride_k,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    TURNS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """All that follows from u (N, F) = gathered gradient (N, O) · w_out[e] (O, F), each output only if given:

    dots (tiles of F, N): the part of <u, act(pre)> over this tile of F · act_out (N, F): weight · act(pre) ·
    dpre (N, P): weight · u · act'(pre). ``columns`` is F, ``depth`` is O; ``weight`` (N,) is in the order of the plan.
    """
    total = tl.load(tiles).to(tl.int32)
    across = tl.cdiv(columns, BN)
    for tile in range(tl.program_id(0), total * across, tl.num_programs(0)):
        expert, first, end, across_at = locate(tile, tiles, total, across, GROUP)
        rows = first + tl.arange(0, BM)
        valid = tl.minimum(rows, end - 1)
        source = valid if token is None else tl.load(token + valid)
        column = across_at * BN
        u = product_tile(
            grad, source, grad_stride, w, expert, column, columns, depth, depth, stride_e, stride_n, stride_k,
            BM, BN, BK, WHOLE_K, DESCRIPTOR, TURNED, PRECISION, ACC,
        )  # fmt: skip
        own = tl.full([BM], 1.0, ACC) if weight is None else tl.load(weight + rows, mask=rows < end, other=0.0).to(ACC)
        HALF: tl.constexpr = BN // 2
        left, right = tl.split(tl.permute(tl.reshape(u, (BM, 2, HALF)), (0, 2, 1)))
        part = gradient_part(left, rows, end, column, own, pre, act_out, dpre, columns, HALF, ACT, GATED, TURNS, ACC)
        part += gradient_part(right, rows, end, column + HALF, own, pre, act_out, dpre, columns, HALF, ACT, GATED, TURNS, ACC)
        if dots is not None:
            tl.store(dots + across_at.to(tl.int64) * pairs + rows, part, mask=rows < end)


@triton.jit
def outer(
    left,
    right,
    out,
    left_token,
    right_token,
    offsets,
    height,
    width,
    left_stride,
    right_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """out (E, height, width): the sum over the rows of expert e of left (height) ⊗ right (width), each gathered if it has tokens.

    One program an expert and tile; it walks all rows of the expert in order. An expert without rows gets zeros.
    """
    down, across = tl.cdiv(height, BM), tl.cdiv(width, BN)
    pid = tl.program_id(0)
    expert = (pid // (down * across)).to(tl.int64)
    place = pid % (down * across)
    first = (place // (GROUP * across)) * GROUP
    group = tl.minimum(down - first, GROUP)
    m = (first + place % (GROUP * across) % group) * BM + tl.arange(0, BM)
    n = (place % (GROUP * across) // group) * BN + tl.arange(0, BN)
    start = tl.load(offsets + expert)
    size = (tl.load(offsets + expert + 1) - start).to(tl.int32)
    acc = tl.zeros([BM, BN], dtype=ACC)
    for k0 in range(0, size, BK):
        k = k0 + tl.arange(0, BK)
        real = k < size
        rows = start + k
        from_left = rows if left_token is None else tl.load(left_token + rows, mask=real, other=0)
        from_right = rows if right_token is None else tl.load(right_token + rows, mask=real, other=0)
        at_left = left + from_left[:, None] * left_stride + m[None, :]
        at_right = right + from_right[:, None] * right_stride + n[None, :]
        a = tl.load(at_left, mask=real[:, None] & (m < height)[None, :], other=0.0)
        b = tl.load(at_right, mask=real[:, None] & (n < width)[None, :], other=0.0)
        acc = multiply(a.T, b, acc, PRECISION, ACC)
    at = out + (expert * height + m[:, None]) * width + n[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(m < height)[:, None] & (n < width)[None, :])
