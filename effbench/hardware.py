"""What a device can do at most: datasheet rows with their sources, and the rates measured on the device itself.

Torch-free. A device that is not in the table has no peak: None, never a guess. FLOP/s are dense (datasheets print the
doubled figure for 2:4 sparsity); matrix rates are those of the tensor cores with 32-bit accumulation, fp32 that of the
ordinary cores. Capacities are the datasheet's GB read as GiB, which is what devices report (H100 "80 GB": 81,559 MiB).
A GPU is one row. Rows are matched by the exact name that NVML and torch.cuda give, so a laptop or MIG variant is unknown.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GIB = 2**30
DTYPES = ("bf16", "fp16", "fp8", "int8", "tf32", "fp32")


@dataclass(frozen=True, kw_only=True)
class Device:
    """One datasheet row. Rates in FLOP/s (int8: operations/s) and B/s; `None` or an absent dtype means not stated."""

    name: str
    reported_as: tuple[str, ...]  # names by NVML, without the leading "NVIDIA "
    flops_per_s: Mapping[str, float]
    memory_bytes_per_s: float
    memory_bytes: int
    power_w: float  # highest configurable limit of `power_scope`
    power_scope: str = "gpu"  # "module": CPU, GPU and memory of a Grace Hopper together
    source: str


def _row(name: str, reported_as: tuple[str, ...], tflops: tuple[float | None, ...], tb_per_s: float, gb: int, power_w: float,
         source: str, power_scope: str = "gpu") -> Device:  # fmt: skip
    rates = {dtype: rate * 1e12 for dtype, rate in zip(DTYPES, tflops, strict=True) if rate is not None}
    return Device(name=name, reported_as=reported_as, flops_per_s=rates, memory_bytes_per_s=tb_per_s * 1e12,
                  memory_bytes=gb * GIB, power_w=power_w, power_scope=power_scope, source=source)  # fmt: skip


_H100 = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
_H200 = "https://www.nvidia.com/en-us/data-center/h200/"
_GH200 = "https://resources.nvidia.com/en-us-grace-cpu/grace-hopper-superchip"
_A100 = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
)
_L40S = "https://www.nvidia.com/en-us/data-center/l40s/"
_L4 = "https://www.nvidia.com/en-us/data-center/l4/"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"  # appendix A
_B200 = "https://www.nvidia.com/en-us/data-center/hgx/ and /dgx-b200/, an eighth of the board"

_SXM_HOPPER = (989.4, 989.4, 1978.9, 1978.9, 494.7, 66.9)
_NVL_HOPPER = (835.5, 835.5, 1670.5, 1670.5, 417.5, 60.0)
_AMPERE = (312.0, 312.0, None, 624.0, 156.0, 19.5)

# Columns of the rates: bf16, fp16, fp8, int8, tf32, fp32 in TFLOP/s, dense.
DEVICES: tuple[Device, ...] = (
    _row("H200 SXM", ("H200",), _SXM_HOPPER, 4.8, 141, 700, _H200),
    _row("H200 NVL", ("H200 NVL",), _NVL_HOPPER, 4.8, 141, 600, _H200),
    _row("GH200 96 GB HBM3", ("GH200 480GB", "GH200 120GB"), _SXM_HOPPER, 4.0, 96, 1000, _GH200, "module"),
    _row("GH200 144 GB HBM3e", ("GH200 144G HBM3e",), _SXM_HOPPER, 4.9, 144, 1000, _GH200, "module"),
    _row("H100 SXM", ("H100 80GB HBM3",), _SXM_HOPPER, 3.35, 80, 700, _H100),
    _row("H100 PCIe", ("H100 PCIe",), (756.5, 756.5, 1513.0, 1513.0, 378.0, 51.2), 2.0, 80, 350, _H100),
    _row("H100 NVL", ("H100 NVL",), _NVL_HOPPER, 3.9, 94, 400, _H100),
    _row("A100 40 GB SXM", ("A100-SXM4-40GB",), _AMPERE, 1.555, 40, 400, _A100),
    _row("A100 80 GB SXM", ("A100-SXM4-80GB",), _AMPERE, 2.039, 80, 400, _A100),
    _row("A100 40 GB PCIe", ("A100-PCIE-40GB",), _AMPERE, 1.555, 40, 250, _A100),
    _row("A100 80 GB PCIe", ("A100 80GB PCIe",), _AMPERE, 1.935, 80, 300, _A100),
    _row("L40S", ("L40S",), (362.05, 362.05, 733.0, 733.0, 183.0, 91.6), 0.864, 48, 350, _L40S),
    _row("L4", ("L4",), (121.0, 121.0, 242.5, 242.5, 60.0, 30.3), 0.3, 24, 72, _L4),
    _row("RTX 4090", ("GeForce RTX 4090",), (165.2, 165.2, 330.3, 660.6, 82.6, 82.6), 1.008, 24, 450, _ADA),
    _row("B200", ("B200",), (2250.0, 2250.0, 4500.0, 4500.0, 1125.0, 75.0), 8.0, 180, 1000, _B200),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Rates measured on one device: copied bytes/s (read and written) and matrix FLOP/s per dtype, medians of repeats."""

    key: str
    copy_bytes_per_s: float
    matrix_flops_per_s: Mapping[str, float]
    threads: int | None = None  # None on a GPU
    measured_at: str = ""  # ISO 8601, UTC
    versions: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)  # sizes, repeats, spread


def device(name: str) -> Device | None:
    """The datasheet row of a GPU by the name NVML or torch.cuda gives it; None when the table does not know it."""
    bare = _bare(name)
    return next((d for d in DEVICES if bare in {_bare(n) for n in d.reported_as}), None)


def hardware_name(device: str = "cpu", gpu_name: str | None = None) -> str:
    """What rows are labelled with: "NVIDIA H200", or for a CPU "AMD EPYC · 2 cores" (cores this process may run on).

    `gpu_name` is what NVML or torch.cuda calls the device; without it the kernel driver is asked, which knows the model
    but not which of several GPUs is meant.
    """
    if device == "cpu":
        cores = num_cores()
        return f"{cpu_model()} · {cores} core{'s' * (cores != 1)}"
    return gpu_name or _driver_gpu_name() or "unknown GPU"


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's model without trade marks and clock, the machine type where the kernel gives no model (many ARM cores)."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        found = None
    model = found.group(1) if found else platform.processor() or platform.machine() or "unknown CPU"
    model = re.sub(r"\((R|TM|r|tm)\)|\bCPU\b|\bProcessor\b|@.*$|\b\d+-Core\b", " ", model)
    return " ".join(model.split())


def num_cores() -> int:
    """Logical CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


def host_memory_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory that this process may have: the machine's, or less where a control group allows less; None where nobody says."""
    found = []
    try:
        total = re.search(r"^MemTotal:\s*(\d+) kB", (proc / "meminfo").read_text(), re.MULTILINE)
        found += [int(total.group(1)) * 1024] if total else []
    except OSError:
        pass
    for limit in _group_limits(proc, groups):
        try:
            found.append(int(limit.read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(found, default=None)


def _group_limits(proc: Path, groups: Path) -> Iterator[Path]:
    """The files of this process's memory control group, in either version, and of those that it lies in."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (groups / "memory", "memory.limit_in_bytes") if controllers else (groups, "memory.max")
        place = root / path.lstrip("/")
        yield from (folder / name for folder in (place, *place.parents) if folder.is_relative_to(root))


def calibration_key(hardware: str, threads: int | None = None) -> str:
    """Name of a calibration: the hardware as in rows, on a CPU with the number of threads that computed."""
    return hardware if threads is None else f"{hardware} · {threads} thread{'s' * (threads != 1)}"


def cache_dir() -> Path:
    """Where things are kept between runs: $EFFBENCH_CACHE, else ~/.cache/effbench. Not created here."""
    given = os.environ.get("EFFBENCH_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "effbench"


def calibration_path(key: str) -> Path:
    """The file of a calibration: readable name, and a digest because two keys may read alike."""
    slug = re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-")[:80]
    return cache_dir() / "calibration" / f"{slug}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.json"


def save_calibration(calibration: Calibration) -> Path:
    """Write a calibration for later runs, whole or not at all; returns its file. Raises OSError."""
    path = calibration_path(calibration.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(asdict(calibration), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def calibration(key: str) -> Calibration | None:
    """The saved calibration of this key; None when there is none, or its file cannot be read."""
    try:
        saved = Calibration(**json.loads(calibration_path(key).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return saved if saved.key == key else None


def peaks(hardware: str, threads: int | None = None) -> dict[str, Any]:
    """Peaks for a launch's record: measured on this device where `doctor --calibrate` has run, and the datasheet's.

    `threads` counts for this machine's CPU only, default all cores. Keys: matrix_flops_per_s, datasheet_flops_per_s (by
    dtype), copy_bytes_per_s, datasheet_bytes_per_s, calibrated_at, calibrated_threads, datasheet_source. What is not
    known is None (rates by dtype: an empty mapping).
    """
    threads = (threads or num_cores()) if hardware == hardware_name() else None
    measured, row = calibration(calibration_key(hardware, threads)), device(hardware)
    return {
        "matrix_flops_per_s": dict(measured.matrix_flops_per_s) if measured else {},
        "copy_bytes_per_s": measured.copy_bytes_per_s if measured else None,
        "calibrated_at": measured.measured_at if measured else None,
        "calibrated_threads": measured.threads if measured else None,
        "datasheet_flops_per_s": dict(row.flops_per_s) if row else {},
        "datasheet_bytes_per_s": row.memory_bytes_per_s if row else None,
        "datasheet_source": row.source if row else None,
    }


def _bare(name: str) -> str:
    return " ".join(name.lower().removeprefix("nvidia ").split())


def _driver_gpu_name(root: Path = Path("/proc/driver/nvidia/gpus")) -> str | None:
    """The model of the GPUs as the kernel driver lists them; None when there is none, or models differ."""
    models = set()
    for information in root.glob("*/information"):
        found = re.search(r"^Model:\s*(.+?)\s*$", information.read_text(), re.MULTILINE)
        if found:
            models.add(found.group(1))
    return models.pop() if len(models) == 1 else None
