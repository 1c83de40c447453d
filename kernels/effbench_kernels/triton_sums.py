"""Triton kernels without a matrix product: sums over the rows of a token, of an expert, and of a pair. All in a fixed order.

Shapes: T tokens, K experts a token, N = T·K pairs, E experts, O output width.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def combine(
    rows,
    weight,
    add,
    out,
    offsets,
    inverse,
    tokens,
    experts,
    slots,
    width,
    add_stride,
    BT: tl.constexpr,
    BO: tl.constexpr,
    ACC: tl.constexpr,
):
    """out (T, O) = the sum over a token's pairs that are kept of weight · their row, plus ``add``; no weight counts as 1."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    real, inside = t < tokens, o < width
    kept = tl.load(offsets + experts)
    acc = tl.zeros([BT, BO], dtype=ACC)
    for slot in range(slots):
        row = tl.load(inverse + t * slots + slot, mask=real, other=0)
        use = real & (row < kept)
        part = tl.load(rows + row[:, None] * width + o[None, :], mask=use[:, None] & inside[None, :], other=0.0).to(ACC)
        if weight is not None:
            part *= tl.load(weight + t * slots + slot, mask=use, other=0.0).to(ACC)[:, None]
        acc += part
    mask = real[:, None] & inside[None, :]
    if add is not None:
        acc += tl.load(add + t[:, None] * add_stride + o[None, :], mask=mask, other=0.0).to(ACC)
    tl.store(out + t[:, None] * width + o[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def group_sum(
    rows,
    weight,
    token,
    offsets,
    out,
    width,
    stride,
    BR: tl.constexpr,
    BC: tl.constexpr,
    ACC: tl.constexpr,
):
    """out (E, O) = the sum of weight · row over the rows of an expert, gathered if there are tokens."""
    expert = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    start = tl.load(offsets + expert)
    size = (tl.load(offsets + expert + 1) - start).to(tl.int32)
    acc = tl.zeros([BR, BC], dtype=ACC)
    for r0 in range(0, size, BR):
        r = r0 + tl.arange(0, BR)
        real = r < size
        source = start + r if token is None else tl.load(token + start + r, mask=real, other=0)
        part = tl.load(rows + source[:, None] * stride + c[None, :], mask=real[:, None] & (c < width)[None, :], other=0.0)
        if weight is None:
            acc += part.to(ACC)
        else:
            acc += part.to(ACC) * tl.load(weight + start + r, mask=real, other=0.0).to(ACC)[:, None]
    tl.store(out + expert * width + c, tl.sum(acc, 0).to(out.dtype.element_ty), mask=c < width)


@triton.jit(do_not_specialize=["pairs"])
def weight_gradient(
    dots,
    grad,
    bias,
    offsets,
    inverse,
    out,
    pairs,
    experts,
    slots,
    parts,
    width,
    grad_stride,
    BP: tl.constexpr,
    BO: tl.constexpr,
    BE: tl.constexpr,
    ACC: tl.constexpr,
):
    """out (T, K) = the sum of the parts of <u, act(pre)> (parts, N), plus <gradient, b_out[e]>; zero for a dropped pair."""
    p = (tl.program_id(0) * BP + tl.arange(0, BP)).to(tl.int64)
    row = tl.load(inverse + p, mask=p < pairs, other=0)
    kept = (p < pairs) & (row < tl.load(offsets + experts))
    acc = tl.zeros([BP], dtype=ACC)
    for _part in range(parts):
        acc += tl.load(dots + row, mask=kept, other=0.0).to(ACC)
        dots += pairs
    if bias is not None:
        e = tl.arange(0, BE)
        end = tl.load(offsets + 1 + e, mask=e < experts, other=0)
        expert = tl.sum(((end[None, :] <= row[:, None]) & (e < experts)[None, :]).to(tl.int64), 1)
        token = p // slots
        total = tl.zeros([BP, BO], dtype=ACC)
        for o0 in range(0, width, BO):
            o = o0 + tl.arange(0, BO)
            mask = kept[:, None] & (o < width)[None, :]
            g = tl.load(grad + token[:, None] * grad_stride + o[None, :], mask=mask, other=0.0).to(ACC)
            total += g * tl.load(bias + expert[:, None] * width + o[None, :], mask=mask, other=0.0).to(ACC)
        acc += tl.sum(total, 1)
    tl.store(out + p, acc.to(out.dtype.element_ty), mask=p < pairs)
