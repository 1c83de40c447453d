"""Grouped products with weights of 4 or 8 bits, on any device: one expert is turned back into numbers at a time, never the stack.

Shapes: N pairs of which the first n are kept, E experts, D input width, O output width, G = D / group groups.

int4: a weight is (code - 8) · scale + zero, code from 0 to 15. codes (E, O, D / 2) uint8: of each block of 64 along D, byte r holds
weight r in its low and weight r + 32 in its high half; a D that 64 does not divide is one block, filled up to an even number.
scales (E, O, G, 2): scale, then zero.
int8: a weight is code · scale, code from -127 to 127. codes (E, O, D) int8, scales (E, O, G).

Scales and zeros are bfloat16, held as int16 bit patterns, so that a cast of the model's type leaves them alone.

On a CPU with AVX-512 the products of few rows read the codes as they are and make them numbers in registers (``native``);
everything else goes through one expert's weights at a time.
"""

from itertools import pairwise

import torch

from effbench_kernels import native
from effbench_kernels.activations import activate

BLOCK = 64
FEW_ROWS = 64  # of an expert; with more it pays to make its weights numbers once


def pack(w_OD: torch.Tensor, kind: str, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of one expert; the scales rounded up to bfloat16, so that no weight falls outside the codes' range."""
    w_OGg = w_OD.float().unflatten(1, (-1, group))
    if kind == "int8":
        bits_OG = _round_up(w_OGg.abs().amax(-1) / 127)
        step_OG1 = _value(bits_OG, torch.float32)[:, :, None]
        codes_OGg = (w_OGg / step_OG1.where(step_OG1 > 0, 1)).round_().clamp_(-127, 127)
        return codes_OGg.flatten(1).to(torch.int8), bits_OG
    low_OG, high_OG = w_OGg.amin(-1), w_OGg.amax(-1)
    bits_OG = _round_up((high_OG - low_OG) / 15)
    step_OG = _value(bits_OG, torch.float32)
    zero_OG = (low_OG + 8 * step_OG).bfloat16()
    codes_OGg = (w_OGg - zero_OG.float()[:, :, None]) / step_OG.where(step_OG > 0, 1)[:, :, None]
    codes_OD = codes_OGg.round_().clamp_(-8, 7).add_(8).flatten(1).to(torch.uint8)
    return _pair(codes_OD), torch.stack([bits_OG, zero_OG.view(torch.int16)], -1)


def unpack(codes: torch.Tensor, scales: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """The weights (O, D) of one expert in a floating type, each rounded once."""
    work = torch.float32 if dtype == torch.float16 else dtype  # float16 cannot hold every scale
    if codes.dtype == torch.int8:
        w_OD = codes.to(work)
        w_OD.unflatten(1, (-1, group)).mul_(_value(scales, work)[:, :, None])
        return w_OD.to(dtype)
    depth = scales.size(1) * group
    both_OB2r = torch.stack(
        [(half.view(torch.int8) - 8).unflatten(1, (-1, _half(depth))) for half in (codes & 15, codes >> 4)], 2
    )
    w_OD = both_OB2r.flatten(1)[:, :depth].to(work)
    step_OG, zero_OG = _value(scales, work).movedim(-1, 0).contiguous()
    w_OGg = w_OD.unflatten(1, (-1, group))
    torch.addcmul(zero_OG[:, :, None], w_OGg, step_OG[:, :, None], out=w_OGg)
    return w_OD.to(dtype)


def linear_forward(
    x_ND: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias_EO: torch.Tensor | None,
    offsets_E1: torch.Tensor,
    group: int,
) -> torch.Tensor:
    """(N, O): each row times the weights of its expert; rows of dropped pairs are zero."""
    return _linear(x_ND, None, (codes, scales, group), bias_EO, offsets_E1, x_ND.size(0))


def experts_forward(
    x_TD: torch.Tensor,
    q_in: tuple[torch.Tensor, torch.Tensor, int],
    q_out: tuple[torch.Tensor, torch.Tensor, int],
    b_in_EP: torch.Tensor | None,
    b_out_EO: torch.Tensor | None,
    weight_TK: torch.Tensor,
    add_TO: torch.Tensor | None,
    offsets_E1: torch.Tensor,
    token_N: torch.Tensor,
    inverse_TK: torch.Tensor,
    act: str,
) -> torch.Tensor:
    """(T, O): the whole layer, for inference. q_in and q_out: codes, scales and group."""
    pairs, codes = token_N.size(0), native.Codes(q_in[1], q_in[2], q_out[1], q_out[2])
    if _few(offsets_E1.tolist()):
        route = (weight_TK, add_TO, offsets_E1, token_N, inverse_TK)
        done = native.forward(x_TD, q_in[0], q_out[0], b_in_EP, b_out_EO, *route, act, False, codes)
        if done is not None:
            return done[0]
    pre_NP = _linear(x_TD, token_N, q_in, b_in_EP, offsets_E1, pairs)
    rows_NO = _linear(activate(pre_NP, act), None, q_out, b_out_EO, offsets_E1, pairs)
    kept_TK = inverse_TK < offsets_E1[-1]
    rows_TKO = rows_NO.index_select(0, inverse_TK.view(-1)).view(*inverse_TK.shape, rows_NO.size(1))
    out_TO = (rows_TKO * torch.where(kept_TK, weight_TK, 0)[:, :, None]).sum(1).to(x_TD.dtype)
    return out_TO if add_TO is None else out_TO.add_(add_TO)


def _linear(
    x: torch.Tensor,
    row_N: torch.Tensor | None,
    q: tuple[torch.Tensor, torch.Tensor, int],
    bias_EO: torch.Tensor | None,
    offsets_E1: torch.Tensor,
    pairs: int,
) -> torch.Tensor:
    """(N, O): row i of x, or row row_N[i], times the weights of its expert; zero where the pair is dropped."""
    codes, scales, group = q
    bounds = offsets_E1.tolist()
    out_NO = x.new_empty(pairs, codes.size(1))
    out_NO[bounds[-1] :].zero_()
    if _few(bounds) and native.quantised(x, row_N, codes, scales, group, bias_EO, offsets_E1, out_NO):
        return out_NO
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if start < end:
            part = x[start:end] if row_N is None else x.index_select(0, row_N[start:end])
            torch.mm(part, unpack(codes[expert], scales[expert], group, x.dtype).t(), out=out_NO[start:end])
            if bias_EO is not None:
                out_NO[start:end] += bias_EO[expert]
    return out_NO


def _few(bounds: list[int]) -> bool:
    return max((end - start for start, end in pairwise(bounds)), default=0) <= FEW_ROWS


def linear_backward(
    grad_NO: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, offsets_E1: torch.Tensor, group: int, need: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients (N, D) of the rows and (E, O) of the biases; empty where not needed."""
    bounds = offsets_E1.tolist()
    pairs, width = grad_NO.shape
    dx_ND = grad_NO.new_empty((pairs, scales.size(2) * group) if need[0] else (0,))
    db_EO = grad_NO.new_empty((codes.size(0), width) if need[1] else (0,))
    if need[0]:
        dx_ND[bounds[-1] :].zero_()
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if need[0] and start < end:
            torch.mm(grad_NO[start:end], unpack(codes[expert], scales[expert], group, grad_NO.dtype), out=dx_ND[start:end])
        if need[1]:
            torch.sum(grad_NO[start:end], 0, out=db_EO[expert])
    return dx_ND, db_EO


def _half(depth: int) -> int:
    """Weights that share a block's bytes with as many others."""
    return BLOCK // 2 if depth % BLOCK == 0 else -(-depth // 2)


def _pair(codes_OD: torch.Tensor) -> torch.Tensor:
    """(O, D / 2) bytes from (O, D) codes."""
    half = _half(codes_OD.size(1))
    filled_OD = torch.nn.functional.pad(codes_OD, (0, -codes_OD.size(1) % (2 * half)))
    low_OBr, high_OBr = filled_OD.unflatten(1, (-1, 2, half)).unbind(2)
    return (low_OBr | high_OBr << 4).flatten(1)


def _round_up(positive: torch.Tensor) -> torch.Tensor:
    """The bits of the smallest bfloat16 that is not below a float32."""
    near = positive.bfloat16()
    return near.view(torch.int16) + (near.float() < positive).to(torch.int16)


def _value(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return bits.view(torch.bfloat16).to(dtype)
