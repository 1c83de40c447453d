"""Parts of the Triton kernels: activations, the map of tiles, and the inner loop of a grouped product.

Shapes: N pairs, E experts; BM rows, BN columns and BK steps of depth in a tile.

Work is cut into tiles of BM consecutive rows of one expert. How many tiles there are depends on the routing, which stays on the
device, so the host reserves as many as there can be, N // BM + E, and every kernel reads the true count. Row and expert offsets
are 64 bits wide, coordinates inside one expert's matrix 32.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import os

import triton
import triton.language as tl

from effbench_kernels.activations import CLAMP_ALPHA, CLAMP_LIMIT

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_ALPHA, _LIMIT = tl.constexpr(CLAMP_ALPHA), tl.constexpr(CLAMP_LIMIT)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without an overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def activation(x, ACT: tl.constexpr):
    """What is done to the gate, or to all there is. tanh-gelu is x · sigmoid(2 u), u the argument of its tanh."""
    if ACT == "silu":
        y = x * sigmoid(x)
    elif ACT == "clamped":
        g = tl.minimum(x, _LIMIT)
        y = g * sigmoid(g * _ALPHA)
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        y = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACT == "relu")
        y = tl.where(x > 0, x, 0.0)
    return y


@triton.jit
def slope(x, ACT: tl.constexpr):
    """The derivative of ``activation``."""
    if ACT == "silu":
        s = sigmoid(x)
        d = s * (1.0 + x * (1.0 - s))
    elif ACT == "clamped":
        g = tl.minimum(x, _LIMIT)
        s = sigmoid(g * _ALPHA)
        d = tl.where(x <= _LIMIT, s * (1.0 + g * _ALPHA * (1.0 - s)), 0.0)
    elif ACT == "gelu":
        d = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACT == "gelu_tanh":
        s = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        d = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        tl.static_assert(ACT == "relu")
        d = tl.where(x > 0, 1.0, 0.0)
    return d


@triton.jit
def factor_of(value, ACT: tl.constexpr):
    """What the value becomes before it is multiplied with the gate."""
    return tl.minimum(tl.maximum(value, -_LIMIT), _LIMIT) + 1.0 if ACT == "clamped" else value


@triton.jit
def factor_slope(grad, value, ACT: tl.constexpr):
    """The gradient of the value from that of ``factor_of``."""
    return tl.where(tl.abs(value) <= _LIMIT, grad, 0.0) if ACT == "clamped" else grad


@triton.jit(do_not_specialize=["pairs", "bound"])
def map_tiles(offsets, tiles, experts, pairs, bound, TAIL: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr):
    """tiles[0] = how many there are; then (expert, first row, row after the last) of each. One program for BT tiles.

    With TAIL the dropped pairs are the rows of an expert E, so that a kernel can write zeros there.
    """
    expert = tl.arange(0, BE)
    start = tl.load(offsets + expert, mask=expert <= experts, other=0)
    stop = tl.load(offsets + expert + 1, mask=expert < experts, other=0)
    if TAIL:
        stop = tl.where(expert == experts, pairs, stop)
        size = tl.where(expert <= experts, stop - start, 0)
    else:
        size = tl.where(expert < experts, stop - start, 0)
    last = tl.cumsum((size + BM - 1) // BM, 0)
    total = tl.max(last, 0)
    tile = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    done = last[None, :] <= tile[:, None]
    own = tl.sum(done.to(tl.int64), 1)
    before = tl.max(tl.where(done, last[None, :], 0), 1)
    real = (tile < total) & (tile < bound)
    row = tl.load(offsets + own, mask=real, other=0) + (tile - before) * BM
    end = tl.load(offsets + own + 1, mask=real & (own < experts), other=0)
    end = tl.where(own < experts, end, pairs)
    tl.store(tiles + 1 + 3 * tile, own, mask=real)
    tl.store(tiles + 2 + 3 * tile, row, mask=real)
    tl.store(tiles + 3 + 3 * tile, tl.minimum(row + BM, end), mask=real)
    tl.store(tiles + 0 * tile, total, mask=tile == 0)


@triton.jit
def locate(tile, tiles, total, across, GROUP: tl.constexpr):
    """Expert, first row, row after the last and column tile of the work item ``tile`` of ``total`` x ``across``.

    GROUP row tiles share each column tile before the next one is begun, so a tile of weights stays in the L2 cache.
    """
    span = GROUP * across
    first = (tile // span) * GROUP
    group = tl.minimum(total - first, GROUP)
    place = tile % span
    entry = tiles + 1 + 3 * (first + place % group).to(tl.int64)
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), place // group


@triton.jit
def weight_tile(
    w,
    expert,
    column,
    k0,
    columns,
    depth,
    stride_e,
    stride_n,
    stride_k,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WHOLE_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    TURNED: tl.constexpr,
):
    """The (BK, BN) tile of one expert's matrix (N, K), zero outside it. A descriptor is over (E, N, K), if turned (E, K, N).

    The only place where the kernels for many tokens read a weight.
    """
    if DESCRIPTOR:
        if TURNED:
            tile = w.load([expert.to(tl.int32), k0, column]).reshape(BK, BN)
        else:
            tile = w.load([expert.to(tl.int32), column, k0]).reshape(BN, BK).T
    else:
        k = k0 + tl.arange(0, BK)
        n = column + tl.arange(0, BN)
        at = w + expert * stride_e + k[:, None].to(tl.int64) * stride_k + n[None, :].to(tl.int64) * stride_n
        if WHOLE_K:
            tile = tl.load(at, mask=n[None, :] < columns, other=0.0)
        else:
            tile = tl.load(at, mask=(n[None, :] < columns) & (k[:, None] < depth), other=0.0)
    return tile


@triton.jit
def row_tile(a, rows, stride, k0, depth, BK: tl.constexpr, WHOLE_K: tl.constexpr):
    """(BM, BK) values of the given rows, zero from ``depth`` on. All rows must be readable."""
    k = k0 + tl.arange(0, BK)
    at = a + rows[:, None] * stride + k[None, :]
    return tl.load(at) if WHOLE_K else tl.load(at, mask=k[None, :] < depth, other=0.0)


@triton.jit
def multiply(left, right, acc, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """acc + left · right. The interpreter's own product takes the bits of bfloat16 for integers, so there both are widened."""
    if _INTERPRETED:
        left, right = left.to(ACC), right.to(ACC)
    return tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def product_tile(
    a,
    rows,
    a_stride,
    w,
    expert,
    column,
    columns,
    depth,
    limit,
    stride_e,
    stride_n,
    stride_k,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WHOLE_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """(BM, BN) = the given rows of a times the transposed (BN, K) rows of one expert's matrix; zero if ``limit`` is 0."""
    acc = tl.zeros([BM, BN], dtype=ACC)
    for k0 in range(0, limit, BK):
        left = row_tile(a, rows, a_stride, k0, depth, BK, WHOLE_K)
        right = weight_tile(
            w, expert, column, k0, columns, depth, stride_e, stride_n, stride_k, BN, BK, WHOLE_K, DESCRIPTOR, TURNED
        )
        acc = multiply(left, right, acc, PRECISION, ACC)
    return acc


@triton.jit
def product_tiles(
    a,
    rows,
    a_stride,
    w,
    expert,
    column,
    columns,
    depth,
    limit,
    stride_e,
    stride_n,
    stride_k,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WHOLE_K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """``product_tile`` for the columns n and columns + n at once, reading the rows of a only once: gate and value."""
    gate = tl.zeros([BM, BN], dtype=ACC)
    value = tl.zeros([BM, BN], dtype=ACC)
    for k0 in range(0, limit, BK):
        left = row_tile(a, rows, a_stride, k0, depth, BK, WHOLE_K)
        right = weight_tile(
            w, expert, column, k0, columns, depth, stride_e, stride_n, stride_k, BN, BK, WHOLE_K, DESCRIPTOR, TURNED
        )
        gate = multiply(left, right, gate, PRECISION, ACC)
        right = weight_tile(
            w,
            expert,
            column + columns,
            k0,
            2 * columns,
            depth,
            stride_e,
            stride_n,
            stride_k,
            BN,
            BK,
            WHOLE_K,
            DESCRIPTOR,
            TURNED,
        )
        value = multiply(left, right, value, PRECISION, ACC)
    return gate, value
