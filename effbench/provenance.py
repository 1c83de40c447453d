"""Where a run happens: versions, device, driver, limits; and `env_id`, the identity of all that could move a number."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

import effbench
from effbench import hardware
from effbench.errors import UsageError
from effbench.scheduler import Environment
from effbench.schema import digest

ROOT = Path(effbench.__file__).parent
# Changing one of these cannot move a measured number, so a resume does not start over for it.
NO_PART_OF_A_LAUNCH = ("store", "rows", "files", "proof", "checks", "analysis", "exchange", "plugins", "cli", "doctor.py")
PACKAGES = (
    "torch", "transformers", "peft", "numpy", "triton", "bitsandbytes", "torchao", "flash-attn", "fla-core",
    "flash-linear-attention", "accelerate", "safetensors", "nvidia-ml-py", "sympy",
)  # fmt: skip


def environment(device: str) -> Environment:
    """Everything about this machine and installation that a row must say."""
    packages = {name: version for name in PACKAGES if (version := _version(name))}
    gpu = _gpu() if device == "cuda" else {}
    name = hardware.hardware_name(device, gpu.get("name"))
    identity = {
        "source": source_digest(),
        "python": platform.python_version(),
        "packages": packages,
        "device": name,
        "driver": gpu.get("driver"),
        "power_limit_w": gpu.get("power_limit_w"),
        "cpu": hardware.cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
    }
    provenance = {
        "effbench_version": effbench.__version__,
        "source_digest": identity["source"],
        "git_commit": git_commit(),
        "python": identity["python"],
        "platform": platform.platform(),
        "device_name": name,
        "driver": _text(gpu.get("driver")),
        "cuda": torch_cuda_version(),
        "power_limit_w": _text(gpu.get("power_limit_w")),
        "cpu": identity["cpu"],
        "cores": str(identity["cores"]),
        "memory_gb": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f}",
        "packages": json.dumps(packages, sort_keys=True),
        "details": json.dumps(gpu, sort_keys=True, default=str),
    }
    return Environment(env_id=digest(identity), hardware=name, provenance=provenance, peaks=hardware.peaks(name))


def device_memory(device: str) -> tuple[str, int | None]:
    """What to call the device that runs, and the bytes of its memory, None where nobody says."""
    if device == "cpu":
        return "this machine", hardware.host_memory_bytes()
    gpu = _gpu()
    name = gpu.get("name")
    row = hardware.device(name) if name else None
    return f"the {name}" if name else "the GPU", gpu.get("memory_total_bytes") or (row.memory_bytes if row else None)


def resolve_device(wanted: str) -> str:
    """`auto` resolved: cuda where both a visible GPU and a CUDA build of torch are, else cpu. Raises UsageError."""
    from effbench.probes import nvml

    if wanted == "cpu" or (wanted == "auto" and torch_cuda_version() is None):
        return "cpu"
    if torch_cuda_version() is None:
        raise UsageError("--device cuda needs a CUDA build of torch; the one installed is a CPU build.")
    if nvml.visible_devices():
        return "cuda"
    if wanted == "cuda":
        raise UsageError(f"--device cuda: no GPU is visible ({nvml.why_no_device()}). `effbench doctor` says more.")
    return "cpu"


@cache
def source_digest() -> str:
    """SHA-256 over the files of the measuring arm: what runs inside a launch or decides what it does."""
    total = hashlib.sha256()
    for path in sorted(ROOT.rglob("*")):
        inside = path.relative_to(ROOT)
        if path.suffix not in (".py", ".yaml", ".txt") or inside.parts[0].removesuffix(".py") in {
            part.removesuffix(".py") for part in NO_PART_OF_A_LAUNCH
        }:
            continue
        total.update(f"{inside}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


@cache
def torch_cuda_version() -> str | None:
    """CUDA version torch was built for, read without importing torch; None for a CPU build or where there is none."""
    spec = util.find_spec("torch")
    if spec is None or not spec.origin:
        return None
    values: dict[str, Any] = {}
    for line in (Path(spec.origin).parent / "version.py").read_text().splitlines():
        if line.startswith("cuda"):
            values["cuda"] = line.partition("=")[2].strip().strip("'\"")
    return None if values.get("cuda") in (None, "None") else values["cuda"]


@cache
def git_commit() -> str | None:
    """Commit of the checkout effbench runs from, with '+changes' when files differ; None outside a checkout of its own."""
    commands = ("ls-files --error-unmatch __init__.py", "rev-parse HEAD", "status --porcelain --untracked-files=no")
    try:
        _, commit, changes = (
            # Without optional locks: a run that is killed must not leave a locked index behind.
            subprocess.run(
                ["git", "--no-optional-locks", *c.split()], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True
            ).stdout
            for c in commands
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+changes" if changes.strip() else "")


def _gpu() -> dict[str, Any]:
    from effbench.probes import nvml

    devices = nvml.visible_devices()
    return nvml.provenance(devices[0]) if devices else {}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
