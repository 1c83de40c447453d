"""Grouped products with weights of 4 or 8 bits, on any device: one expert is turned back into numbers at a time, never the stack.

Shapes: N pairs, E experts, D input width, O output width, G = D / group groups, B = ceil(O / 64) blocks of rows.

int4: a weight is (code - 8) · scale + zero, code from 0 to 15. codes (E, B, D, 32) uint8: byte r of column d holds row r of the
block in its low and row r + 32 in its high half. scales (E, G, 64·B, 2): scale, then zero. Rows past O are padding.
int8: a weight is code · scale, code from -127 to 127. codes (E, O, D) int8, scales (E, O, G).

Scales and zeros are bfloat16, held as int16 bit patterns, so that a cast of the model's type leaves them alone.

A few bfloat16 rows are multiplied with the codes as they are by torch's own products, on a CPU: the int4 layout is the one torch
uses where there is AVX-512, and int8 needs one scale a row (G = 1). Everything else goes through one expert's weights at a time.
"""

import functools
from itertools import pairwise

import torch

from effbench_kernels.activations import activate

BLOCK = 64
_PACKED_GROUPS = (32, 64, 128, 256)  # those torch's product takes
_FEW_ROWS = {torch.uint8: 48, torch.int8: 24}  # where both ways took the same time on one core with AVX-512


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
    padding = -w_OD.size(0) % BLOCK
    scales_OG2 = torch.stack([bits_OG, zero_OG.view(torch.int16)], -1)
    scales_GO2 = torch.nn.functional.pad(scales_OG2.transpose(0, 1), (0, 0, 0, padding)).contiguous()
    return _interleave(torch.nn.functional.pad(codes_OD, (0, 0, 0, padding))), scales_GO2


def unpack(codes: torch.Tensor, scales: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """The weights (O, D) of one expert in a floating type, each rounded once; a view of (D, 64·B) memory for int4."""
    work = torch.float32 if dtype == torch.float16 else dtype  # float16 cannot hold every scale
    if codes.dtype == torch.int8:
        w_OD = codes.to(work)
        w_OD.unflatten(1, (scales.size(1), -1)).mul_(_value(scales, work)[:, :, None])
        return w_OD.to(dtype)
    blocks, depth, _ = codes.shape
    w_DO = torch.empty(depth, blocks * BLOCK, dtype=work, device=codes.device)
    low_DBr, high_DBr = w_DO.view(depth, blocks, 2, BLOCK // 2).unbind(2)
    low_DBr.copy_(((codes & 15).view(torch.int8) - 8).transpose(0, 1))
    high_DBr.copy_(((codes >> 4).view(torch.int8) - 8).transpose(0, 1))
    w_GgO = w_DO.unflatten(0, (scales.size(0), -1))
    step_GO, zero_GO = _value(scales, work).movedim(-1, 0).contiguous()
    torch.addcmul(zero_GO[:, None], w_GgO, step_GO[:, None], out=w_GgO)
    return w_DO[:, :width].t().to(dtype)


def linear_forward(
    x_ND: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias_EO: torch.Tensor | None,
    offsets_E1: torch.Tensor,
    width: int,
) -> torch.Tensor:
    """(N, O): each row times the weights of its expert; rows of dropped pairs are zero."""
    bounds = offsets_E1.tolist()
    return _with_zero_tail(_linear(x_ND[: bounds[-1]], codes, scales, bias_EO, _groups(bounds), width), x_ND.size(0))


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
    """(T, O): the whole layer, for inference. q_in and q_out: codes, scales and output width."""
    bounds = offsets_E1.tolist()
    groups, kept = _groups(bounds), bounds[-1]
    pre_nP = _linear(x_TD.index_select(0, token_N[:kept]), q_in[0], q_in[1], b_in_EP, groups, q_in[2])
    rows_nO = _linear(activate(pre_nP, act), q_out[0], q_out[1], b_out_EO, groups, q_out[2])
    weight_N = weight_TK.reshape(-1)
    weight_N = torch.empty_like(weight_N).scatter_(0, inverse_TK.reshape(-1), weight_N)
    rows_NO = _with_zero_tail(rows_nO * weight_N[:kept, None], token_N.size(0))
    rows_TKO = rows_NO.index_select(0, inverse_TK.view(-1)).view(*inverse_TK.shape, rows_NO.size(1))
    out_TO = rows_TKO.sum(1).to(x_TD.dtype)
    return out_TO if add_TO is None else out_TO.add_(add_TO)


def _groups(bounds: list[int]) -> list[tuple[int, int]]:
    """The experts that have rows, and how many."""
    return [(expert, end - start) for expert, (start, end) in enumerate(pairwise(bounds)) if start != end]


def _with_zero_tail(rows_nO: torch.Tensor, pairs: int) -> torch.Tensor:
    missing = pairs - rows_nO.size(0)
    return torch.cat([rows_nO, rows_nO.new_zeros(missing, rows_nO.size(1))]) if missing else rows_nO


def _linear(
    x_nD: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias_EO: torch.Tensor | None,
    groups: list[tuple[int, int]],
    width: int,
) -> torch.Tensor:
    """(n, O) for the n rows that are kept."""
    sizes = [size for _, size in groups]
    parts = x_nD.split(sizes) if sizes else ()
    if sizes and max(sizes) <= rows_read_packed(x_nD, codes, scales):
        out_nO = torch.cat(_packed_products(parts, codes, scales, groups))[:, :width]
    else:
        out_nO = x_nD.new_empty(x_nD.size(0), width)
        for (expert, _), part, out in zip(groups, parts, out_nO.split(sizes) if sizes else (), strict=True):
            torch.mm(part, unpack(codes[expert], scales[expert], width, x_nD.dtype).t(), out=out)
    if bias_EO is not None:
        for (expert, _), out in zip(groups, out_nO.split(sizes) if sizes else (), strict=True):
            out += bias_EO[expert]
    return out_nO


def _packed_products(
    parts: tuple[torch.Tensor, ...], codes: torch.Tensor, scales: torch.Tensor, groups: list[tuple[int, int]]
) -> list[torch.Tensor]:
    """The products of few rows with the codes as they are."""
    values = scales.view(torch.bfloat16)
    pairs = zip(groups, parts, strict=True)
    if codes.dtype == torch.int8:
        values_EO = values.squeeze(2)
        return [torch.ops.aten._weight_int8pack_mm(part, codes[expert], values_EO[expert]) for (expert, _), part in pairs]
    depth = codes.size(2)
    w_EOh, group = codes.view(codes.size(0), -1, depth // 2), depth // scales.size(1)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return [product(part, w_EOh[expert], group, values[expert]) for (expert, _), part in pairs]


def linear_backward(
    grad_NO: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, offsets_E1: torch.Tensor, need: list[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients (N, D) of the rows and (E, O) of the biases; empty where not needed."""
    bounds = offsets_E1.tolist()
    pairs, width = grad_NO.shape
    dx_ND = grad_NO.new_empty((pairs, codes.size(2)) if need[0] else (0,))
    db_EO = grad_NO.new_empty((codes.size(0), width) if need[1] else (0,))
    if need[0]:
        dx_ND[bounds[-1] :].zero_()
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if need[0] and start < end:
            torch.mm(grad_NO[start:end], unpack(codes[expert], scales[expert], width, grad_NO.dtype), out=dx_ND[start:end])
        if need[1]:
            torch.sum(grad_NO[start:end], 0, out=db_EO[expert])
    return dx_ND, db_EO


def rows_read_packed(x_ND: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> int:
    """Up to how many rows of an expert are multiplied with the codes as they are; 0 where none."""
    if x_ND.device.type != "cpu" or x_ND.dtype != torch.bfloat16:
        return 0
    if codes.dtype == torch.int8:
        fits = scales.size(2) == 1
    else:
        depth, groups = codes.size(2), scales.size(1)
        fits = depth % 2 == 0 and depth // groups in _PACKED_GROUPS and _torch_reads_this_layout()
    return _FEW_ROWS[codes.dtype] if fits else 0


@functools.cache
def _torch_reads_this_layout() -> bool:
    """torch lays codes out by what the CPU can do; true where that is the layout here."""
    codes_OD = (torch.arange(2 * BLOCK * 2, dtype=torch.int32) * 7 % 16).view(2 * BLOCK, 2)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OD, 1)
    return bool(torch.equal(theirs.view(2, 2, BLOCK // 2), _interleave(codes_OD.to(torch.uint8))))


def _interleave(codes_OD: torch.Tensor) -> torch.Tensor:
    """(B, D, 32) bytes from (64·B, D) codes."""
    codes_B2rD = codes_OD.unflatten(0, (-1, 2, BLOCK // 2))
    return (codes_B2rD[:, 0] | codes_B2rD[:, 1] << 4).transpose(1, 2).contiguous()


def _round_up(positive: torch.Tensor) -> torch.Tensor:
    """The bits of the smallest bfloat16 that is not below a float32."""
    near = positive.bfloat16()
    return near.view(torch.int16) + (near.float() < positive).to(torch.int16)


def _value(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return bits.view(torch.bfloat16).to(dtype)
