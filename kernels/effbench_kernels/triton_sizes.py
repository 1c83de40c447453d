"""What the host decides about a Triton kernel, without reading the device: tile sizes, stages, programs, how weights are read.

"Columns" and "depth" are the two sides (N, K) of one expert's matrix.

The sizes come from a table keyed on the type, the matrix and the mean number of rows an expert has, in four steps. A token count
is never a key, so a changing batch compiles nothing new once its step is known. Nothing is tried out at run time.
"""

import functools
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from effbench_kernels.activations import is_gated

FEW_PAIRS = 64
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_RESERVED_BYTES = 8 * 1024  # of shared memory, for what the compiler adds to the stages of the pipeline
_GROUP = 8
COMPILER = {"enable_fp_fusion": True}
_GATES = {
    "swiglu": "silu",
    "geglu": "gelu",
    "geglu_tanh": "gelu_tanh",
    "swiglu_clamped": "clamped",
    "swiglu_clamped_interleaved": "clamped",
}


class Sizes(NamedTuple):
    """BM rows, BN columns, BK depth of a tile, warps of a program, stages of its software pipeline."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


_TABLE = {  # bytes of an element -> rows of a tile -> sizes; a gated product has half the columns, twice
    2: {
        16: Sizes(16, 128, 128, 4, 4),
        32: Sizes(32, 128, 128, 4, 3),
        64: Sizes(64, 128, 64, 4, 4),
        128: Sizes(128, 256, 64, 8, 3),
    },
    4: {16: Sizes(16, 64, 64, 4, 3), 32: Sizes(32, 64, 64, 4, 3), 64: Sizes(64, 64, 32, 4, 3), 128: Sizes(64, 128, 32, 8, 3)},
    8: {16: Sizes(16, 32, 16, 4, 2), 32: Sizes(32, 32, 16, 4, 2), 64: Sizes(32, 32, 16, 4, 2), 128: Sizes(32, 32, 16, 4, 2)},
}
OUTER = {2: Sizes(128, 128, 64, 8, 3), 4: Sizes(64, 64, 32, 4, 3), 8: Sizes(32, 32, 16, 4, 2)}


def few(tokens: int, slots: int, experts: int) -> bool:
    """Whether the kernels for a few pairs are used: T·K <= 64, and at most two pairs for each expert an even routing meets."""
    pairs = tokens * slots
    met = experts * (1 - (1 - min(slots / experts, 1)) ** tokens)
    return 0 < pairs <= FEW_PAIRS and pairs <= 2 * met


def step(pairs: int, experts: int) -> int:
    """The key of the table: 16, 32, 64 or 128, from the mean number of rows an expert has."""
    mean = pairs / experts
    return 128 if mean >= 192 else 64 if mean >= 48 else 32 if mean >= 20 else 16


def sizes(dtype: torch.dtype, pairs: int, experts: int, columns: int, depth: int, matrices: int = 1) -> Sizes:
    """The tile of a product over rows, cut to the matrix; ``matrices`` is 2 where gate and value are computed together."""
    best = _TABLE[dtype.itemsize][step(pairs, experts)]
    return best._replace(columns=cut(best.columns // matrices, columns), depth=cut(best.depth, depth))


def programs(x: torch.Tensor, bound: int, columns: int, size: Sizes, matrices: int) -> tuple[int]:
    """As many programs as run at once, or as there can be work items; few under the interpreter, to walk the loop."""
    used = _stage_bytes(x, size, matrices) * _stages(x, size, matrices)
    resident = max(1, min(_shared_bytes(x.device) // used, 16 // size.warps))
    return (int(max(1, min(bound * triton.cdiv(columns, size.columns), resident * _processors(x.device)))),)


def options(w_ENK: torch.Tensor, size: Sizes, matrices: int = 1) -> dict[str, Any]:
    """The constants of a product with the weights of experts."""
    whole = w_ENK.size(2) % size.depth == 0
    turned = _turned(w_ENK)
    return {"WHOLE_K": whole, "DESCRIPTOR": _describable(w_ENK), "TURNED": turned, **common(w_ENK, size, matrices)}


def common(x: torch.Tensor, size: Sizes, matrices: int) -> dict[str, Any]:
    """The constants of every kernel with a matrix product."""
    return {
        "BM": size.rows,
        "BN": size.columns,
        "BK": size.depth,
        "GROUP": _GROUP,
        "PRECISION": precision(x.dtype),
        "ACC": accumulator(x.dtype),
        "num_warps": size.warps,
        "num_stages": _stages(x, size, matrices),
        **COMPILER,
    }


def activation(act: str) -> dict[str, Any]:
    """The constants that tell a kernel its activation."""
    return {"ACT": _GATES.get(act, act), "GATED": is_gated(act), "TURNS": in_turns(act)}


def in_turns(act: str) -> bool:
    """Whether gate and value stand in turns."""
    return act.endswith("_interleaved")


def weights(w_ENK: torch.Tensor, size: Sizes) -> Any:
    """The weights as the kernel takes them: behind a tensor descriptor where their layout allows, else as they are."""
    if not _describable(w_ENK):
        return w_ENK
    if _turned(w_ENK):
        return TensorDescriptor.from_tensor(w_ENK.mT, [1, size.depth, size.columns])
    return TensorDescriptor.from_tensor(w_ENK, [1, size.columns, size.depth])


def precision(dtype: torch.dtype) -> str:
    """How float32 products are made: three TF32 products, which keep float32's accuracy, or one where the user allows it."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def accumulator(dtype: torch.dtype) -> Any:
    """The type sums are made in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x with its last dimension contiguous, copied only if it is not."""
    return x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous()


def cut(size: int, length: int) -> int:
    """The block for a side of ``length``: a power of two, at least 16 (what a matrix unit takes), at most ``size``."""
    return max(16, min(size, int(triton.next_power_of_2(length))))


def _describable(w_ENK: torch.Tensor) -> bool:
    """What the tensor memory accelerator asks for: 16-bit values, one contiguous side, the rest in multiples of 16 bytes."""
    if w_ENK.element_size() != 2 or w_ENK.numel() == 0 or not _accelerator(w_ENK.device):
        return False
    inner = 1 if _turned(w_ENK) else 2
    others = [w_ENK.stride(side) for side in (0, 3 - inner)]
    return w_ENK.stride(inner) == 1 and w_ENK.data_ptr() % 16 == 0 and all(s > 0 and s * 2 % 16 == 0 for s in others)


def _turned(w_ENK: torch.Tensor) -> bool:
    return bool(w_ENK.stride(2) != 1 and w_ENK.stride(1) == 1)


def _stages(x: torch.Tensor, size: Sizes, matrices: int) -> int:
    """The stages of the table, or as many as the shared memory of the device holds."""
    return max(1, min(size.stages, _shared_bytes(x.device) // _stage_bytes(x, size, matrices)))


def _stage_bytes(x: torch.Tensor, size: Sizes, matrices: int) -> int:
    return (size.rows + matrices * size.columns) * size.depth * int(x.element_size())


@functools.cache
def _accelerator(device: torch.device) -> bool:
    return INTERPRETED or bool(torch.cuda.get_device_capability(device)[0] >= 9)


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return 227 * 1024 - _RESERVED_BYTES  # as on an H100
    total = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return int(total) - _RESERVED_BYTES


@functools.cache
def _processors(device: torch.device) -> int:
    return 3 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).multi_processor_count)
