"""What the host decides for the Triton kernels: which backend, which tiles; and that it never waits for the device."""

import itertools
import subprocess
import sys

import pytest
import torch
from effbench_kernels import backends, sort
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.test_experts import run
from tests.kernels.truth import gradients, make


def test_on_a_cpu_the_torch_backend_is_the_default():
    assert backends.resolve(None, torch.zeros(1)) == "torch"
    assert backends.resolve("triton", torch.zeros(1)) == "triton"
    with pytest.raises(ValueError, match="one of torch, triton, reference, got 'cuda'"):
        backends.resolve("cuda", torch.zeros(1))


class OnGpu:
    device = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("installed", "capability", "cuda", "name"),
    [
        (True, (9, 0), "12.8", "triton"),
        (True, (8, 0), "12.8", "triton"),
        (True, (7, 5), "12.8", "torch"),
        (False, (9, 0), "12.8", "torch"),
        (True, (9, 4), None, "torch"),
    ],
)
def test_on_a_gpu_the_default_is_triton_where_it_can_run(installed, capability, cuda, name, monkeypatch):
    monkeypatch.setattr(backends, "_HAS_TRITON", installed)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert backends.resolve(None, OnGpu) == name


def test_without_triton_asking_for_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    with pytest.raises(ImportError, match=r"pip install 'triton>=3.6'"):
        run(make(), "swiglu", backend="triton")


@pytest.mark.usefixtures("interpreter")
def test_tensors_on_a_cpu_are_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(
        ValueError, match=r"needs tensors on a CUDA device, got cpu; use backend='torch', or set TRITON_INTERPRET"
    ):
        run(make(), "swiglu", backend="triton")


@pytest.mark.usefixtures("interpreter")
def test_types_without_kernels_are_refused():
    case = make().to(torch.float32)
    low = case.to(torch.float8_e5m2)
    low.weight = case.weight
    with pytest.raises(TypeError, match=r"takes torch.float16, .*, got torch.float8_e5m2"):
        run(low, "swiglu", backend="triton")


def test_the_library_does_not_import_triton():
    code = "import sys, effbench_kernels; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


class NoReading(TorchDispatchMode):
    """Raises where the host would wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert "_local_scalar_dense" not in name and "nonzero" not in name and "_to_copy" not in name, name
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("tokens", [2, 40])
def test_the_host_never_reads_the_device(tokens, monkeypatch):
    own, plan = make(tokens=tokens, low=-1).fresh(), sort(make(tokens=tokens, low=-1).index, 5)

    def refuse(*_):
        raise AssertionError("the host read a tensor")

    for name in ("tolist", "item", "numpy", "__bool__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    with NoReading():
        out = run(own, "swiglu", backend="triton", plan=plan)
        gradients(own, out)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("rows", [16, 64])
def test_the_map_of_tiles_covers_each_row_once(rows, tail):
    from effbench_kernels.triton_launch import map_tiles

    generator = torch.Generator().manual_seed(rows)
    for count in (1, 2, 7, 300):
        for pairs in (1, 16, 17, 200):
            index = torch.randint(-1, count + 1, (pairs, 1), generator=generator)
            index = torch.where(torch.rand(pairs, 1, generator=generator) < 0.3, 0, index)
            plan = sort(index, count)
            tiles, bound = map_tiles(plan.offsets, pairs, rows, tail)
            bounds = plan.offsets.tolist() + ([pairs] if tail else [])
            expected = []
            for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
                expected += [[expert, row, min(row + rows, end)] for row in range(start, end, rows)]
            assert tiles[0] == len(expected) <= bound
            assert tiles[1 : 1 + 3 * len(expected)].view(-1, 3).tolist() == expected


@pytest.mark.usefixtures("interpreter")
def test_tiles_fit_every_device():
    """On 99 KiB of shared memory, as on consumer GPUs, the pipeline gets fewer stages."""
    from effbench_kernels import triton_sizes as sizes

    x = torch.zeros(1, dtype=torch.bfloat16)
    big = sizes.sizes(x.dtype, 4096, 8, 4096, 4096)
    assert big.rows == 128 and sizes._stages(x, big, 1) == big.stages
    sizes._shared_bytes.cache_clear()
    try:
        sizes._shared_bytes, real = lambda device: 91 * 1024, sizes._shared_bytes
        assert sizes._stages(x, big, 1) == 1
    finally:
        sizes._shared_bytes = real


@pytest.mark.usefixtures("interpreter")
def test_the_kernels_for_a_few_pairs_are_for_few_pairs_with_experts_of_their_own():
    from effbench_kernels.triton_sizes import few

    assert few(1, 8, 64) and few(8, 8, 64) and few(1, 2, 8) and few(4, 2, 8) and few(1, 300, 300) is False
    assert not few(32, 2, 8) and not few(9, 8, 64) and not few(0, 2, 8) and not few(30, 1, 1)
