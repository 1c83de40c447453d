"""Expert layers written in C for a CPU: compiled once by the machine's own compiler, found again in a cache, never required.

The sources are in ``csrc``; they know float32 and bfloat16. The library is built for the processor at hand, shares the threads of
torch, is compared with torch before it is used, and lies in ``EFFBENCH_KERNELS_CACHE`` (else ``~/.cache/effbench_kernels``) under
a digest of sources, compiler, flags and processor. Where it cannot be built everything runs on torch alone; ``why_not`` says
why. ``EFFBENCH_KERNELS_NATIVE=0`` leaves it out.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-shared", "-fPIC", "-w")
_POINTERS = ("x", "row", "w", "bias", "out", "offsets", "left_row")
_NUMBERS = ("experts", "d", "o", "ldx", "ldo", "stride_e", "stride_o", "stride_d", "stride_bias", "is_bf16", "threads")
_LAYER_POINTERS = (
    "x", "w_in", "w_out", "b_in", "b_out", "weight", "add", "offsets", "token", "inverse", "h", "rows", "pre", "out",
)  # fmt: skip
_LAYER_NUMBERS = (
    "tokens", "k", "experts", "d", "f", "o", "ld_x", "stride_in", "ld_in", "stride_out", "ld_out", "ld_add", "act", "gated",
    "is_bf16", "threads",
)  # fmt: skip
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


class Unavailable(RuntimeError):
    """The C products cannot be used here; the message says why."""


def why_not() -> str:
    """Why the C products are not used on this machine; "" where they are. Builds them if need be."""
    return _load()[1]


def product(
    x: torch.Tensor,
    row_N: torch.Tensor | None,
    w_EOD: torch.Tensor,
    bias_EO: torch.Tensor | None,
    offsets_E1: torch.Tensor,
    out_NO: torch.Tensor,
) -> bool:
    """out[i] = w[e] · x[row[i]] + bias[e] for the rows i from offsets[e] up to offsets[e + 1]; row None: x[i].

    Any strides for w as long as one of its last two is 1. False, and nothing done, where this cannot be had in C.
    """
    library = _load()[0]
    return library is not None and _product(library, x, row_N, w_EOD, bias_EO, offsets_E1, out_NO)


def _product(
    library: Any,
    x: torch.Tensor,
    row_N: torch.Tensor | None,
    w_EOD: torch.Tensor,
    bias_EO: torch.Tensor | None,
    offsets_E1: torch.Tensor,
    out_NO: torch.Tensor,
) -> bool:
    widths = w_EOD.size(2) == 1 or w_EOD.stride(2) == 1
    if not _usable(x, w_EOD, out_NO) or not (widths or w_EOD.stride(1) == 1) or min(out_NO.shape) == 0:
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
) -> bool:
    """out[e] = Σ left[left_row[i]] ⊗ right[right_row[i]] over the rows i of expert e, zero where it has none.

    A row index None stands for i itself. False, and nothing done, where this cannot be had in C.
    """
    library = _load()[0]
    return library is not None and _outer(library, left, left_row_N, right, right_row_N, offsets_E1, out_EOD)


def _outer(
    library: Any,
    left: torch.Tensor,
    left_row_N: torch.Tensor | None,
    right: torch.Tensor,
    right_row_N: torch.Tensor | None,
    offsets_E1: torch.Tensor,
    out_EOD: torch.Tensor,
) -> bool:
    if not _usable(left, right, out_EOD) or not out_EOD.is_contiguous() or out_EOD.numel() == 0:
        return False
    job = _job(right, right_row_N, left, None, offsets_E1, out_EOD)
    job.left_row = None if left_row_N is None else left_row_N.data_ptr()
    job.experts, job.o, job.d = out_EOD.shape
    job.stride_o, job.stride_d = 1, left.stride(0)
    return bool(library.effbench_outer(ctypes.byref(job)) == 0)


def forward(
    x_TD: torch.Tensor,
    w_in_EPD: torch.Tensor,
    w_out_EOF: torch.Tensor,
    b_in_EP: torch.Tensor | None,
    b_out_EO: torch.Tensor | None,
    weight_TK: torch.Tensor,
    add_TO: torch.Tensor | None,
    offsets_E1: torch.Tensor,
    token_N: torch.Tensor,
    inverse_TK: torch.Tensor,
    act: str,
    keep_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The layer (T, O) and its pre-activations (N, P), empty if not kept; None where this cannot be had in C.

    The hidden and the products' rows are the only other memory it takes.
    """
    library = _load()[0]
    if library is None or act not in _ACTS or not _usable(x_TD, w_in_EPD, w_out_EOF) or w_in_EPD.stride(2) != 1:
        return None
    (tokens, top_k), (experts, width, hidden) = inverse_TK.shape, w_out_EOF.shape
    out_TO = x_TD.new_empty(tokens, width)
    pre = x_TD.new_empty(token_N.size(0), w_in_EPD.size(1)) if keep_pre else x_TD.new_empty(0)
    if keep_pre:
        pre[int(offsets_E1[-1]) :].zero_()
    h, rows = x_TD.new_empty(token_N.size(0), hidden), x_TD.new_empty(token_N.size(0), width)
    weight_TK, inverse_TK = weight_TK.float().contiguous(), inverse_TK.contiguous()
    kept = [None if bias is None else bias.contiguous() for bias in (b_in_EP, b_out_EO)]
    job = _Layer(
        x=x_TD.data_ptr(), w_in=w_in_EPD.data_ptr(), w_out=w_out_EOF.data_ptr(), weight=weight_TK.data_ptr(),
        offsets=offsets_E1.data_ptr(), token=token_N.data_ptr(), inverse=inverse_TK.data_ptr(), h=h.data_ptr(),
        rows=rows.data_ptr(), out=out_TO.data_ptr(), tokens=tokens, k=top_k, experts=experts, d=x_TD.size(1), f=hidden, o=width,
        ld_x=x_TD.stride(0), stride_in=w_in_EPD.stride(0), ld_in=w_in_EPD.stride(1), stride_out=w_out_EOF.stride(0),
        ld_out=w_out_EOF.stride(1), is_bf16=x_TD.dtype == torch.bfloat16, threads=torch.get_num_threads(),
    )  # fmt: skip
    job.act, job.gated = _ACTS[act]
    job.b_in, job.b_out = (None if bias is None else bias.data_ptr() for bias in kept)
    job.pre = pre.data_ptr() if keep_pre else None
    if add_TO is not None:
        add_TO = add_TO if add_TO.stride(1) == 1 else add_TO.contiguous()
        job.add, job.ld_add = add_TO.data_ptr(), add_TO.stride(0)
    library.effbench_forward(ctypes.byref(job))
    return out_TO, pre


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
        library = ctypes.CDLL(str(_built()))
    except (Unavailable, OSError, subprocess.SubprocessError) as reason:
        return None, str(reason)
    library.effbench_product.restype = library.effbench_outer.restype = ctypes.c_int
    wrong = next((str(dtype) for dtype in _TYPES if not _agrees(library, dtype)), None)
    return (None, f"what {_compiler()} compiled is wrong for {wrong}") if wrong else (library, "")


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
        _product(library, x_ND, None, w_EOD, None, offsets_E1, y_NO),
        _product(library, y_NO, None, w_EOD.mT, None, offsets_E1, back_ND),
        _outer(library, y_NO, None, x_ND, None, offsets_E1, outer_EOD),
    ]
    rows = (slice(0, 7), slice(7, 9))
    back = [y_NO[rows[e]].double() @ w_EOD[e].double() for e in range(2)]
    sums = [y_NO[rows[e]].double().T @ x_ND[rows[e]].double() for e in range(2)]
    truths = torch.cat(want), torch.cat(back), torch.stack(sums)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    pairs = zip(done, (y_NO, back_ND, outer_EOD), truths, strict=True)
    return all(not ran or bool((got - true).norm() <= limit * true.norm()) for ran, got, true in pairs)


def _built() -> Path:
    """The compiled library, made if it is not in the cache. Raises Unavailable."""
    compiler, threads = _compiler(), _openmp()
    if not compiler:
        raise Unavailable("there is no C compiler; install gcc")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    texts = {path.name: path.read_text() for path in sorted(_SOURCES.iterdir())}
    parts = (*texts.items(), version, *_FLAGS, threads, platform.machine(), _processor())
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:20]
    cache = Path(os.environ.get("EFFBENCH_KERNELS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"))
    path = cache / "effbench_kernels" / f"experts-{digest}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [compiler, *_FLAGS, *map(str, sorted(_SOURCES.glob("*.c"))), threads, "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
            if done.returncode:
                raise Unavailable(f"{compiler} could not compile them: {done.stderr.strip()[:500]}")
            made.replace(path)
    return path


def _compiler() -> str:
    """The path of the C compiler: the one that CC names, gcc, or clang; "" for none."""
    return next((path for name in (os.environ.get("CC"), "gcc", "clang") if name and (path := shutil.which(name))), "")


def _openmp() -> str:
    """The OpenMP library that torch has loaded: a second one would bring threads of its own. Raises Unavailable."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    found = sorted({line.split()[-1] for line in lines if any(name in line for name in ("libgomp", "libiomp5", "libomp"))})
    if not found:
        raise Unavailable("torch has loaded no OpenMP library whose threads could be shared")
    return found[0]


def _processor() -> str:
    """What the processor can do, since the library is built for it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
