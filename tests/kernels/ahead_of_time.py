"""Compiles for a GPU, without one, every Triton kernel that a set of layers launches, and prints what came out.

    python -m tests.kernels.ahead_of_time [--arch 90] [--full] [--resources]

Launches are caught instead of carried out: their arguments give the types, alignments and constants to compile with. One line of
JSON a kernel. Triton's interpreter checks neither types nor layouts nor sizes, this does. It must not run with TRITON_INTERPRET.
"""

import json
import re
import sys

import torch
import triton
from effbench_kernels import dense_plan, experts, grouped_linear, sort, triton_backend, triton_sizes
from effbench_kernels.activations import is_gated
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
}
SEEN = set()
ARCH = int(sys.argv[sys.argv.index("--arch") + 1]) if "--arch" in sys.argv else 90
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}[ARCH]
TARGET = GPUTarget("cuda", ARCH, 32)


def source(kernel, args, kwargs):
    """What Triton's own launcher would compile for these arguments."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for at, param in enumerate(kernel.params):
        value = given[param.name]
        if param.is_constexpr or value is None or (type(value) is int and value == 1 and not param.do_not_specialize):
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[param.name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
        elif isinstance(value, torch.Tensor):
            signature[param.name] = "*" + TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(at,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                attributes[(at,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes)


def compile_only(kernel, *args, grid, warmup, **kwargs):
    src = source(kernel, args, kwargs)
    options = {name: kwargs[name] for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in kwargs}
    key = (src.hash(), str(options))
    if key in SEEN:
        return
    SEEN.add(key)
    constants = {kernel.arg_names[at[0]]: str(value) for at, value in src.constants.items()}
    record = {
        "kernel": kernel.__name__,
        "types": [t for t in src.signature.values() if t[0] in "*t"][:2],
        "constants": constants,
    }
    made = triton.compile(src, target=TARGET, options=options)
    ptx = made.asm["ptx"]
    record |= {"shared_bytes": made.metadata.shared, "warps": made.metadata.num_warps, "cubin_bytes": len(made.asm["cubin"])}
    record |= {"wgmma": "wgmma.mma_async" in ptx, "tma": "cp.async.bulk.tensor" in ptx, "mma": "mma.sync" in ptx}
    record |= {"local": ptx.count("st.local"), "atomics": re.search(r"\b(atom|red)\.", ptx) is not None}
    if "--resources" in sys.argv:
        record["usage"] = usage(made.asm["cubin"])
    print(json.dumps(record), flush=True)
    assert made.metadata.shared <= SHARED_BYTES, record


def usage(cubin):
    """Registers and stack of a kernel, by the vendor's tool."""
    import subprocess
    import tempfile
    from pathlib import Path

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return text.strip().splitlines()[-1].strip()


def layer(dtype, tokens, k, experts_, d, f, out, act="swiglu", bias=False, save="pre", dense=False, turned=False, norm=False):
    """Forward and backward of one layer; values do not matter, only what is launched."""
    wide = 2 * f if is_gated(act) else f
    index = torch.zeros(tokens, k, dtype=torch.int64)
    plan = dense_plan(tokens, experts_) if dense else sort(index, experts_)

    def leaf(*shape):
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    w_in, w_out = leaf(experts_, wide, d), leaf(experts_, out, f)
    if turned:
        w_in, w_out = leaf(experts_, d, wide).mT, leaf(experts_, f, out).mT
    x, weight = leaf(tokens, d), torch.ones(plan.inverse.shape, requires_grad=True)
    b_in, b_out = (leaf(experts_, wide), leaf(experts_, out)) if bias else (None, None)
    if norm:
        y = torch.ops.effbench_kernels.experts(
            x, w_in, w_out, b_in, b_out, None, None, plan.offsets, plan.token, plan.inverse, dense, act, "triton", True
        )[0]
    else:
        y = experts(x, w_in, w_out, plan, weight, act, b_in, b_out, leaf(tokens, out) if bias else None, save, backend="triton")
    y.sum().backward()


def main():
    JITFunction.run = compile_only
    triton_backend.check = lambda x: None
    triton_sizes._accelerator = lambda device: ARCH >= 90
    triton_sizes._shared_bytes = lambda device: SHARED_BYTES - triton_sizes._RESERVED_BYTES
    bf16, fp32, fp64, fp16 = torch.bfloat16, torch.float32, torch.float64, torch.float16
    layer(bf16, 1, 8, 64, 2048, 1024, 2048)  # few pairs
    layer(bf16, 256, 8, 8, 512, 256, 512)  # the largest tiles, whole
    layer(bf16, 64, 2, 8, 97, 47, 31, "gelu", bias=True)  # nothing divides
    layer(bf16, 256, 8, 8, 512, 256, 512, "swiglu_clamped_interleaved", bias=True, turned=True)
    layer(fp32, 256, 8, 8, 512, 256, 512, "geglu", save="none")
    layer(fp64, 40, 2, 4, 48, 32, 24, "gelu_tanh", bias=True)
    plan = sort(torch.zeros(256, 2, dtype=torch.int64), 4)
    grouped_linear(torch.zeros(256, 512, dtype=bf16), torch.zeros(4, 256, 512, dtype=bf16), plan, backend="triton")
    before = len(SEEN)
    for tokens in (200, 250, 255, 257, 1023, 4096):  # a step of the table: nothing new to compile
        layer(bf16, tokens, 8, 8, 512, 256, 512)
    print(json.dumps({"again": len(SEEN) - before}), flush=True)
    if "--full" not in sys.argv:
        return
    for dtype in (bf16, fp16, fp32, fp64):
        for tokens in (4, 64, 256, 1024):  # every step of the table
            for act in ("swiglu", "swiglu_clamped_interleaved", "relu"):
                layer(dtype, tokens, 2, 8, 512, 256, 512, act)
                layer(dtype, tokens, 2, 8, 97, 47, 31, act, bias=True, save="none")
        layer(dtype, 1, 2, 3, 97, 47, 31, "geglu_tanh", bias=True)
        layer(dtype, 1, 2, 3, 96, 48, 31, "swiglu_clamped_interleaved", bias=True, turned=True)
        layer(dtype, 64, 3, 3, 96, 48, 32, "silu", dense=True)
        layer(dtype, 64, 3, 3, 96, 48, 32, "relu", bias=True, norm=True)
        layer(dtype, 1024, 2, 8, 512, 256, 512, turned=True)
        layer(dtype, 16, 2, 300, 64, 32, 64, bias=True)


if __name__ == "__main__":
    main()
