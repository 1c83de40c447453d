"""Expert layers written in C for a CPU: the calls, each of which says when it cannot be had, so that torch does it instead.

The sources are in ``csrc`` and know float32 and bfloat16; ``compiled`` makes them a library for the processor at hand. It shares
the threads of torch and is compared with torch before it is used; ``why_not`` says why it is not.
``EFFBENCH_KERNELS_NATIVE=0`` leaves it out.
"""

import ctypes
import functools
import math
import mmap
import os
import subprocess
from typing import Any, NamedTuple

import torch

from effbench_kernels import compiled

_POINTERS = ("x", "row", "w", "bias", "out", "offsets", "left_row")
_NUMBERS = (
    "experts",
    "d",
    "o",
    "ldx",
    "ldo",
    "stride_e",
    "stride_o",
    "stride_d",
    "stride_bias",
    "is_bf16",
    "threads",
    "zeroed",
)
_LAYER_POINTERS = (
    "x", "w_in", "w_out", "scales_in", "scales_out", "b_in", "b_out", "weight", "add", "offsets", "token", "inverse", "h", "rows",
    "pre", "out",
)  # fmt: skip
_LAYER_NUMBERS = (
    "tokens", "k", "experts", "d", "f", "o", "ld_x", "stride_in", "ld_in", "stride_out", "ld_out", "ld_add", "act", "gated",
    "is_bf16", "threads", "bits", "group_in", "group_out",
)  # fmt: skip
_QUANTISED_POINTERS = ("x", "row", "codes", "scales", "bias", "out", "offsets")
_QUANTISED_NUMBERS = ("experts", "d", "o", "ldx", "ldo", "stride_bias", "group", "bits", "is_bf16", "threads")
_GRADIENT_POINTERS = ("u", "pre", "factor", "act_out", "dpre", "dots")
_GRADIENT_NUMBERS = ("pairs", "f", "act", "gated", "is_bf16", "threads")
_TYPES = (torch.float32, torch.bfloat16)
_ACTS = {"swiglu": (0, True), "silu": (0, False), "relu": (1, False)}


class _Product(ctypes.Structure):
    """``product`` of csrc/products.c."""

    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS] + [(name, ctypes.c_int64) for name in _NUMBERS]


class _Layer(ctypes.Structure):
    """``layer`` of csrc/layer.c."""

    _fields_ = [(name, ctypes.c_void_p) for name in _LAYER_POINTERS] + [(name, ctypes.c_int64) for name in _LAYER_NUMBERS]


class _HiddenGradient(ctypes.Structure):
    """``hidden_gradient`` of csrc/layer.c."""

    _fields_ = [(name, ctypes.c_void_p) for name in _GRADIENT_POINTERS] + [(name, ctypes.c_int64) for name in _GRADIENT_NUMBERS]


class _Quantised(ctypes.Structure):
    """``quantised`` of csrc/quantised.c."""

    _fields_ = [(name, ctypes.c_void_p) for name in _QUANTISED_POINTERS] + [
        (name, ctypes.c_int64) for name in _QUANTISED_NUMBERS
    ]


class Codes(NamedTuple):
    """What ``quantised_torch`` stores beside the codes of w_in and w_out: scales, and how many weights share one."""

    scales_in: torch.Tensor
    group_in: int
    scales_out: torch.Tensor
    group_out: int


def why_not() -> str:
    """Why the C products are not used on this machine; "" where they are. Builds them if need be."""
    return _load()[1]


def computes(x: torch.Tensor) -> bool:
    """Whether layers of this type on this device run in C here."""
    return x.device.type == "cpu" and x.dtype in _TYPES and not why_not()


def product(
    x: torch.Tensor,
    row_N: torch.Tensor | None,
    w_EOD: torch.Tensor,
    bias_EO: torch.Tensor | None,
    offsets_E1: torch.Tensor,
    out_NO: torch.Tensor,
    library: Any = None,
) -> bool:
    """out[i] = w[e] · x[row[i]] + bias[e] for the rows i from offsets[e] up to offsets[e + 1]; row None: x[i].

    Any strides for w as long as one of its last two is 1. library: another than the one in use, to try it. False, and nothing done,
    where this cannot be had in C.
    """
    library = library or _load()[0]
    widths = w_EOD.size(2) == 1 or w_EOD.stride(2) == 1
    if library is None or not _usable(x, w_EOD, out_NO) or not (widths or w_EOD.stride(1) == 1) or min(out_NO.shape) == 0:
        return False
    if bias_EO is not None:
        bias_EO = bias_EO.contiguous()
    job = _job(x, row_N, w_EOD, bias_EO, offsets_E1, out_NO)
    job.experts, job.o, job.d = w_EOD.shape
    job.stride_e, job.stride_o, job.stride_d = w_EOD.stride(0), w_EOD.stride(1), 1 if widths else w_EOD.stride(2)
    return bool(library.effbench_product(ctypes.byref(job)) == 0)


def outer(
    left: torch.Tensor,
    left_row_N: torch.Tensor | None,
    right: torch.Tensor,
    right_row_N: torch.Tensor | None,
    offsets_E1: torch.Tensor,
    out_EOD: torch.Tensor,
    zeroed: bool = False,
    library: Any = None,
) -> bool:
    """out[e] = Σ left[left_row[i]] ⊗ right[right_row[i]] over the rows i of expert e, zero where it has none.

    A row index None stands for i itself. zeroed: out holds zeros already, and an expert without rows need not be touched.
    library and what is returned: as in ``product``.
    """
    library = library or _load()[0]
    if library is None or not _usable(left, right, out_EOD) or not out_EOD.is_contiguous() or out_EOD.numel() == 0:
        return False
    job = _job(right, right_row_N, left, None, offsets_E1, out_EOD)
    job.left_row = None if left_row_N is None else left_row_N.data_ptr()
    job.experts, job.o, job.d = out_EOD.shape
    job.stride_o, job.stride_d, job.zeroed = 1, left.stride(0), zeroed
    return bool(library.effbench_outer(ctypes.byref(job)) == 0)


def zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros on the CPU in memory fresh from the system, which costs and takes nothing until it is touched."""
    count = math.prod(shape)
    pages = mmap.mmap(-1, max(count * like.element_size(), 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype, count=count).view(shape)


def forward(
    x_TD: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    b_in_EP: torch.Tensor | None,
    b_out_EO: torch.Tensor | None,
    weight_TK: torch.Tensor,
    add_TO: torch.Tensor | None,
    offsets_E1: torch.Tensor,
    token_N: torch.Tensor,
    inverse_TK: torch.Tensor,
    act: str,
    keep_pre: bool,
    codes: Codes | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The layer (T, O) and its pre-activations (N, P), empty if not kept; None where this cannot be had in C.

    w_in (E, P, D) and w_out (E, O, F), or with ``codes`` their codes. The hidden and the products' rows are the only other memory.
    """
    library = _load()[0]
    whole = x_TD.dtype in _TYPES and x_TD.device.type == "cpu" and x_TD.stride(1) == w_in.stride(2) == w_out.stride(2) == 1
    typed = w_in.is_contiguous() and w_out.is_contiguous() if codes else w_in.dtype == w_out.dtype == x_TD.dtype
    if library is None or act not in _ACTS or not whole or not typed:
        return None
    kind, gated = _ACTS[act]
    (tokens, top_k), (experts, wide), width = inverse_TK.shape, w_in.shape[:2], w_out.size(1)
    pairs, hidden = token_N.size(0), wide // 2 if gated else wide
    out_TO, h, rows = x_TD.new_empty(tokens, width), x_TD.new_empty(pairs, hidden), x_TD.new_empty(pairs, width)
    pre = x_TD.new_empty(pairs, wide) if keep_pre else x_TD.new_empty(0)
    if keep_pre:
        pre[int(offsets_E1[-1]) :].zero_()
    weight_TK, inverse_TK = weight_TK.float().contiguous(), inverse_TK.contiguous()
    biases = [None if bias is None else bias.contiguous() for bias in (b_in_EP, b_out_EO)]
    job = _Layer(
        x=x_TD.data_ptr(), w_in=w_in.data_ptr(), w_out=w_out.data_ptr(), weight=weight_TK.data_ptr(), offsets=offsets_E1.data_ptr(),
        token=token_N.data_ptr(), inverse=inverse_TK.data_ptr(), h=h.data_ptr(), rows=rows.data_ptr(), out=out_TO.data_ptr(),
        tokens=tokens, k=top_k, experts=experts, d=x_TD.size(1), f=hidden, o=width, ld_x=x_TD.stride(0), stride_in=w_in.stride(0),
        ld_in=w_in.stride(1), stride_out=w_out.stride(0), ld_out=w_out.stride(1), act=kind, gated=gated,
        is_bf16=x_TD.dtype == torch.bfloat16, threads=torch.get_num_threads(),
    )  # fmt: skip
    job.b_in, job.b_out = (None if bias is None else bias.data_ptr() for bias in biases)
    job.pre = pre.data_ptr() if keep_pre else None
    if codes:
        job.scales_in, job.scales_out = codes.scales_in.data_ptr(), codes.scales_out.data_ptr()
        job.group_in, job.group_out, job.bits = codes.group_in, codes.group_out, 8 if w_in.dtype == torch.int8 else 4
    if add_TO is not None:
        add_TO = add_TO if add_TO.stride(1) == 1 else add_TO.contiguous()
        job.add, job.ld_add = add_TO.data_ptr(), add_TO.stride(0)
    return (out_TO, pre) if library.effbench_forward(ctypes.byref(job)) == 0 else None


def hidden_gradient(
    u_nF: torch.Tensor, pre_nP: torch.Tensor, weight_n: torch.Tensor | None, act: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """weight · act(pre) (n, F), the gradient of pre (n, P), and <u, act(pre)> (n) in float32, with u the gradient of act(pre)
    before the weight; None where this cannot be had in C.
    """
    library = _load()[0]
    whole = u_nF.is_contiguous() and pre_nP.is_contiguous() and u_nF.dtype == pre_nP.dtype and u_nF.dtype in _TYPES
    if library is None or act not in _ACTS or not whole or u_nF.device.type != "cpu":
        return None
    act_nF, dpre_nP, dots_n = (
        torch.empty_like(u_nF),
        torch.empty_like(pre_nP),
        u_nF.new_empty(u_nF.size(0), dtype=torch.float32),
    )
    factor_n = None if weight_n is None else weight_n.float().contiguous()
    job = _HiddenGradient(
        u=u_nF.data_ptr(), pre=pre_nP.data_ptr(), factor=None if factor_n is None else factor_n.data_ptr(),
        act_out=act_nF.data_ptr(), dpre=dpre_nP.data_ptr(), dots=dots_n.data_ptr(), pairs=u_nF.size(0), f=u_nF.size(1),
        is_bf16=u_nF.dtype == torch.bfloat16, threads=torch.get_num_threads(),
    )  # fmt: skip
    job.act, job.gated = _ACTS[act]
    library.effbench_hidden_gradient(ctypes.byref(job))
    return act_nF, dpre_nP, dots_n


def quantised(
    x: torch.Tensor,
    row_N: torch.Tensor | None,
    codes: torch.Tensor,
    scales: torch.Tensor,
    group: int,
    bias_EO: torch.Tensor | None,
    offsets_E1: torch.Tensor,
    out_NO: torch.Tensor,
) -> bool:
    """``product`` with the weights that ``quantised_torch`` stores as codes and scales; False where this cannot be had in C."""
    library = _load()[0]
    whole = codes.is_contiguous() and scales.is_contiguous() and x.stride(-1) == 1 and out_NO.stride(-1) == 1
    if library is None or not whole or x.dtype not in _TYPES or x.device.type != "cpu" or out_NO.numel() == 0:
        return False
    if bias_EO is not None:
        bias_EO = bias_EO.contiguous()
    job = _Quantised(
        x=x.data_ptr(), row=None if row_N is None else row_N.data_ptr(), codes=codes.data_ptr(), scales=scales.data_ptr(),
        bias=None if bias_EO is None else bias_EO.data_ptr(), out=out_NO.data_ptr(), offsets=offsets_E1.data_ptr(),
        experts=codes.size(0), d=x.size(1), o=codes.size(1), ldx=x.stride(0), ldo=out_NO.stride(0), stride_bias=codes.size(1),
        group=group, bits=8 if codes.dtype == torch.int8 else 4, is_bf16=x.dtype == torch.bfloat16, threads=torch.get_num_threads(),
    )  # fmt: skip
    return bool(library.effbench_quantised(ctypes.byref(job)) == 0)


def sort(index_TK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...] | None:
    """The fields of ``Plan`` of a routing; None where this cannot be had in C."""
    library = _load()[0]
    if library is None or index_TK.device.type != "cpu":
        return None
    index_TK = index_TK.to(torch.int64).contiguous()
    offsets_E1, inverse_TK = index_TK.new_empty(num_experts + 1), torch.empty_like(index_TK)
    token_N, slot_N, expert_N = (index_TK.new_empty(index_TK.numel()) for _ in range(3))
    made = (offsets_E1, token_N, slot_N, expert_N, inverse_TK)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in made)
    tokens, top_k = (ctypes.c_int64(size) for size in index_TK.shape)
    library.effbench_sort(ctypes.c_void_p(index_TK.data_ptr()), tokens, top_k, ctypes.c_int64(num_experts), *pointers)
    return made


def _usable(x: torch.Tensor, other: torch.Tensor, out: torch.Tensor) -> bool:
    same = x.dtype == other.dtype == out.dtype and x.dtype in _TYPES and x.device.type == "cpu"
    return same and x.stride(-1) == 1 and out.stride(-1) == 1 and (other.dim() == 3 or other.stride(-1) == 1)


def _job(
    x: torch.Tensor,
    row_N: torch.Tensor | None,
    w: torch.Tensor,
    bias_EO: torch.Tensor | None,
    offsets_E1: torch.Tensor,
    out: torch.Tensor,
) -> _Product:
    job = _Product(x=x.data_ptr(), w=w.data_ptr(), out=out.data_ptr(), offsets=offsets_E1.data_ptr())
    job.row = None if row_N is None else row_N.data_ptr()
    job.ldx, job.ldo, job.is_bf16, job.threads = x.stride(0), out.stride(0), x.dtype == torch.bfloat16, torch.get_num_threads()
    if bias_EO is not None:
        job.bias, job.stride_bias = bias_EO.data_ptr(), bias_EO.stride(0)
    return job


@functools.cache
def _load() -> tuple[Any, str]:
    """The library and "", or None and the reason."""
    if os.environ.get("EFFBENCH_KERNELS_NATIVE") == "0":
        return None, "EFFBENCH_KERNELS_NATIVE is 0"
    try:
        library = ctypes.CDLL(str(compiled.library_path()))
    except (compiled.Unavailable, OSError, subprocess.SubprocessError) as reason:
        return None, str(reason)
    for name in ("product", "outer", "quantised", "forward"):
        getattr(library, f"effbench_{name}").restype = ctypes.c_int
    wrong = next((str(dtype) for dtype in _TYPES if not _agrees(library, dtype)), None)
    return (None, f"what {compiled.compiler()} compiled is wrong for {wrong}") if wrong else (library, "")


def _agrees(library: Any, dtype: torch.dtype) -> bool:
    """Whether the library computes what torch computes, on one small case of each kind."""
    x_ND = torch.linspace(-1, 1, 9 * 70).view(9, 70).to(dtype)
    w_EOD = torch.linspace(2, -1, 2 * 67 * 70).view(2, 67, 70).to(dtype)
    offsets_E1, want = (
        torch.tensor([0, 7, 9]),
        [x_ND[:7].double() @ w_EOD[0].double().T, x_ND[7:].double() @ w_EOD[1].double().T],
    )
    y_NO, back_ND, outer_EOD = (
        torch.zeros(9, 67, dtype=dtype),
        torch.zeros(9, 70, dtype=dtype),
        torch.zeros(2, 67, 70, dtype=dtype),
    )
    done = [
        product(x_ND, None, w_EOD, None, offsets_E1, y_NO, library),
        product(y_NO, None, w_EOD.mT, None, offsets_E1, back_ND, library),
        outer(y_NO, None, x_ND, None, offsets_E1, outer_EOD, False, library),
    ]
    rows = (slice(0, 7), slice(7, 9))
    back = [y_NO[rows[e]].double() @ w_EOD[e].double() for e in range(2)]
    sums = [y_NO[rows[e]].double().T @ x_ND[rows[e]].double() for e in range(2)]
    truths = torch.cat(want), torch.cat(back), torch.stack(sums)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    pairs = zip(done, (y_NO, back_ND, outer_EOD), truths, strict=True)
    return all(not ran or bool((got - true).norm() <= limit * true.norm()) for ran, got, true in pairs)
