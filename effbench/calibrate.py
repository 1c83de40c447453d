"""Measure a device's own peaks: copy bandwidth and matrix rate, the denominators of MFU and share of bandwidth.

    copy     a buffer several times larger than the caches is copied; bytes read and written both count (as in STREAM)
    matrix   C = A·B of square matrices; 2·n³ FLOPs per product, per dtype that the device computes

Medians of repeats after a warm-up. On a CPU all of it takes about 5 s at the given thread count; on a GPU time is
taken by CUDA events. `run` measures and keeps; other work on the machine makes peaks too low and MFU too high, so the
spread of the repeats is kept too, and `doctor` says when it is wide.

    effbench doctor --calibrate
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from effbench.hardware import Calibration, calibration_key, hardware_name, num_cores, save_calibration

_CPU_DTYPES = ("fp32", "bf16")
_GPU_DTYPES = ("bf16", "fp16", "tf32", "fp32")
_BUDGET_S = 1.0  # per quantity; three of them, sizing and warm-up stay within 6 s on a CPU
_LEAST_REPEATS, _MOST_REPEATS = 5, 200

_Timer = Callable[[Callable[[], object]], float]  # seconds of one call


def run(device: str = "cpu", threads: int | None = None) -> Calibration:
    """Measure and save, for every later launch on this device. Raises OSError where the cache cannot be written."""
    calibration = measure(device, threads)
    save_calibration(calibration)
    return calibration


def measure(device: str = "cpu", threads: int | None = None) -> Calibration:
    """Calibrate "cpu" (at `threads` threads, default all cores this process may use) or "cuda" (the current device).

    Raises RuntimeError of torch where the device cannot be used; a dtype the device cannot multiply is left out.
    """
    import torch

    on_gpu = device == "cuda"
    threads = None if on_gpu else threads or num_cores()
    name = hardware_name(device, torch.cuda.get_device_name() if on_gpu else None)
    timer = cuda_timer() if on_gpu else host_timer
    details: dict[str, Any] = {}
    rates: dict[str, float] = {}
    with _thread_count(threads), torch.inference_mode():
        size = _copy_bytes(device)
        copy = _copy_bytes_per_s(device, size, timer, details)
        for dtype in _GPU_DTYPES if on_gpu else _CPU_DTYPES:
            try:
                rates[dtype] = _matrix_flops_per_s(device, dtype, timer, details)
            except RuntimeError as error:  # no such product on this device
                details[f"{dtype}_failed"] = str(error).splitlines()[0]
    if on_gpu:
        torch.cuda.empty_cache()
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda or ""}
    return Calibration(
        key=calibration_key(name, threads), copy_bytes_per_s=copy, matrix_flops_per_s=rates, threads=threads,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"), versions=versions, details=details,
    )  # fmt: skip


def _copy_bytes_per_s(device: str, size: int, timer: _Timer, details: dict[str, Any]) -> float:
    import torch

    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = _repeat(lambda: target.copy_(source), timer)
    details["copy"] = {"buffer_bytes": size, **_spread(seconds)}
    return 2 * size / float(np.median(seconds))


def _matrix_flops_per_s(device: str, dtype: str, timer: _Timer, details: dict[str, Any]) -> float:
    import torch

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    with _fp32_precision("tf32" if dtype == "tf32" else "ieee", device):
        # A first product sizes the rest: large enough to be limited by arithmetic, small enough for several repeats.
        n, limit = (4096, 16384) if device == "cuda" else (512, 4096)
        while True:
            a, b = (torch.randn(n, n, device=device).to(kind) for _ in range(2))
            out = torch.empty(n, n, device=device, dtype=kind)

            def product(a: Any = a, b: Any = b, out: Any = out) -> object:
                return torch.mm(a, b, out=out)

            timer(product)
            once_s = timer(product)
            if n >= limit or 8 * once_s * (_LEAST_REPEATS + 2) > _BUDGET_S:
                break
            n *= 2
        seconds = _repeat(product, timer)
    details[dtype] = {"n": n, **_spread(seconds)}
    return 2 * n**3 / float(np.median(seconds))


def _repeat(call: Callable[[], object], timer: _Timer) -> list[float]:
    """Seconds of each call, after one that does not count, for about _BUDGET_S."""
    timer(call)
    seconds: list[float] = []
    deadline_s = time.perf_counter() + _BUDGET_S
    while len(seconds) < _LEAST_REPEATS or (time.perf_counter() < deadline_s and len(seconds) < _MOST_REPEATS):
        seconds.append(timer(call))
    return seconds


def _spread(seconds: list[float]) -> dict[str, float]:
    quarter, half, three_quarters = np.percentile(seconds, [25, 50, 75])
    return {"repeats": len(seconds), "relative_iqr": float((three_quarters - quarter) / half)}


def host_timer(call: Callable[[], object]) -> float:
    """Seconds of one call by the host's clock."""
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def cuda_timer() -> _Timer:
    """A timer of one call by CUDA events; it waits for the device."""
    import torch

    def timer(call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    return timer


def _copy_bytes(device: str) -> int:
    """Size of the copied buffer: at least 8 times the last-level cache, at most an eighth of the free memory."""
    import torch

    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return int(min(4 << 30, free // 8)) // 4096 * 4096
    return min(max(8 * _last_level_cache_bytes(), 128 << 20), 1 << 30, max(_available_bytes() // 8, 1 << 20)) // 4096 * 4096


def _last_level_cache_bytes(caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Size of the largest cache of the first core, in bytes; 0 when the kernel does not say."""
    sizes = [0]
    for size in caches.glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM]?)", size.read_text().strip())
        if found:
            sizes.append(int(found.group(1)) * {"": 1, "K": 1 << 10, "M": 1 << 20}[found.group(2)])
    return max(sizes)


def _available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    found = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.exists() else None
    return int(found.group(1)) * 1024 if found else 1 << 30


@contextmanager
def _thread_count(threads: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _fp32_precision(precision: str, device: str) -> Iterator[None]:
    """Products of 32-bit matrices in full ("ieee") or in tensor cores ("tf32"), on a GPU."""
    import torch

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if device == "cuda":
        matmul.fp32_precision = precision
    try:
        yield
    finally:
        if device == "cuda":
            matmul.fp32_precision = before
