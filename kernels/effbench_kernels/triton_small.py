"""Triton kernels for a few pairs (T·K <= 64): bound by reading the weights once, so no tile is padded and nothing is mapped.

Shapes: N pairs in the order of the plan, E experts, D input width, P width before the activation, F hidden width, O output width.

Two launches. First one program a pair and slice of F, the pairs of a slice next to each other: where two of them share an expert,
the second finds the weights in the L2 cache. Then one program a token and slice of O, which sums over the token's pairs in order.
Products are multiplied and added in float32 on the ordinary cores, since one row leaves nothing for a matrix unit to do.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl

from effbench_kernels.triton_tiles import activation, factor_of


@triton.jit(do_not_specialize=["pairs"])
def few_hidden(
    x,
    w,
    bias,
    pre,
    out,
    expert_of,
    offsets,
    token,
    pairs,
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
    BN: tl.constexpr,
    BK: tl.constexpr,
    BE: tl.constexpr,
    ACC: tl.constexpr,
):
    """out (N, F) = act(x[token] · w_in[e]ᵀ + b_in[e]); also the pre-activations (N, P) if wanted, and expert_of (N,), E if dropped."""
    row = (tl.program_id(0) % pairs).to(tl.int64)
    column = (tl.program_id(0) // pairs) * BN
    e = tl.arange(0, BE)
    end = tl.load(offsets + 1 + e, mask=e < experts, other=0)
    expert = tl.sum(((end <= row) & (e < experts)).to(tl.int64), 0)
    if column == 0:
        tl.store(expert_of + row, expert)
    limit = tl.where(expert < experts, depth, 0)
    n = column + tl.arange(0, BN)
    wide = 2 * columns if GATED else columns
    p = n * 2 if TURNS else n
    q = p + 1 if TURNS else p + columns
    x += tl.load(token + row) * x_stride
    at = w + expert * stride_e + p[:, None].to(tl.int64) * stride_n
    there = w + expert * stride_e + q[:, None].to(tl.int64) * stride_n
    gate = tl.zeros([BN, BK], dtype=ACC)
    value = tl.zeros([BN, BK], dtype=ACC)
    for k0 in range(0, limit, BK):
        k = k0 + tl.arange(0, BK)
        mask = (n < columns)[:, None] & (k < depth)[None, :]
        left = tl.load(x + k, mask=k < depth, other=0.0).to(ACC)[None, :]
        gate += tl.load(at + k[None, :].to(tl.int64) * stride_k, mask=mask, other=0.0).to(ACC) * left
        if GATED:
            value += tl.load(there + k[None, :].to(tl.int64) * stride_k, mask=mask, other=0.0).to(ACC) * left
    inside = n < tl.where(expert < experts, columns, 0)
    g = tl.sum(gate, 1)
    if bias is not None:
        g += tl.load(bias + expert * wide + p, mask=inside, other=0.0).to(ACC)
    if pre is not None:
        tl.store(pre + row * wide + p, g.to(pre.dtype.element_ty), mask=inside)
    y = activation(g, ACT)
    if GATED:
        v = tl.sum(value, 1)
        if bias is not None:
            v += tl.load(bias + expert * wide + q, mask=inside, other=0.0).to(ACC)
        if pre is not None:
            tl.store(pre + row * wide + q, v.to(pre.dtype.element_ty), mask=inside)
        y = y * factor_of(v, ACT)
    tl.store(out + row * columns + n, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def few_out(
    hidden,
    w,
    bias,
    weight,
    add,
    out,
    expert_of,
    inverse,
    experts,
    slots,
    columns,
    depth,
    add_stride,
    stride_e,
    stride_n,
    stride_k,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
):
    """out (T, O) = the sum over a token's pairs of weight · (w_out[e] · hidden + b_out[e]), plus ``add``.

    Without ``inverse`` every pair is a token of its own, in the order of the plan: out (N, O), zero for dropped pairs.
    """
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = n < columns
    acc = tl.zeros([BN, BK], dtype=ACC)
    rest = tl.zeros([BN], dtype=ACC)
    for slot in range(slots):
        row = token if inverse is None else tl.load(inverse + token * slots + slot)
        expert = tl.load(expert_of + row)
        kept = expert < experts
        factor = 1.0 if weight is None else tl.load(weight + token * slots + slot, mask=kept, other=0.0).to(ACC)
        at = w + expert * stride_e + n[:, None].to(tl.int64) * stride_n
        for k0 in range(0, tl.where(kept, depth, 0), BK):
            k = k0 + tl.arange(0, BK)
            left = tl.load(hidden + row * depth + k, mask=k < depth, other=0.0).to(ACC) * factor
            right = tl.load(at + k[None, :].to(tl.int64) * stride_k, mask=inside[:, None] & (k < depth)[None, :], other=0.0)
            acc += right.to(ACC) * left[None, :]
        if bias is not None:
            b = tl.load(bias + expert * columns + n, mask=n < tl.where(kept, columns, 0), other=0.0)
            rest += factor * b.to(ACC)
    total = tl.sum(acc, 1) + rest
    if add is not None:
        total += tl.load(add + token * add_stride + n, mask=inside, other=0.0).to(ACC)
    tl.store(out + token * columns + n, total.to(out.dtype.element_ty), mask=inside)
