"""Make `.venv-peer`, the virtual environment of optimum-benchmark 0.6.0, with exact pins; says why where it cannot.

    python benchmarks/peers/setup.py      # made once; later calls only look whether the pins have changed

The peer needs transformers 4, effbench transformers 5, so they cannot share an environment. torch is looked up before it
is fetched: a build that asks for CUDA libraries is refused, because the comparison is one of CPU builds. Where the package
index offers no CPU build first, install one by hand into `.venv-peer`, then call this again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
PEER = ROOT / ".venv-peer"
PYTHON = PEER / "bin" / "python"
PINS = Path(__file__).with_name("requirements.txt")
READY = PEER / ".ready"  # holds the pins it was made from
PROOF = "import optimum_benchmark, torch, transformers; assert torch.version.cuda is None, 'this torch is a CUDA build'"
GPU_PACKAGES = ("nvidia-", "cuda-", "triton")


class PeerUnavailable(Exception):
    """The peer cannot be had here; the message says why."""


def ensure() -> Path:
    """The interpreter of the peer's environment, made if it is not there. Raises PeerUnavailable."""
    pins = PINS.read_text()
    if READY.is_file() and READY.read_text() == pins:
        return PYTHON
    if not PYTHON.exists():
        venv.create(PEER, with_pip=True)
    if _run("import torch; assert torch.version.cuda is None").returncode:
        torch = next(line for line in pins.splitlines() if line.startswith("torch=="))
        _refuse_gpu_build(torch)
        _pip("install", torch)
    _pip("install", "-r", str(PINS))
    proof = _run(PROOF)
    if proof.returncode:
        raise PeerUnavailable(f"{PEER.name} is there but cannot import the peer: {_last_line(proof)}")
    READY.write_text(pins)
    return PYTHON


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, timeout=300, check=False)


def _refuse_gpu_build(torch: str) -> None:
    """Ask pip what it would install, without installing it."""
    answer = _pip("install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--report", "-", torch)
    metadata = json.loads(answer)["install"][0]["metadata"]
    gpu = [need for need in metadata.get("requires_dist", ()) if need.startswith(GPU_PACKAGES)]
    if gpu:
        raise PeerUnavailable(f"pip would fetch a CUDA build of {torch} (it needs {gpu[0]}); install the CPU build by hand")


def _pip(*arguments: str) -> str:
    command = [str(PYTHON), "-m", "pip", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise PeerUnavailable(f"`pip {' '.join(arguments)}` failed: {_last_line(done)}")
    return done.stdout


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit {done.returncode}, nothing said"


if __name__ == "__main__":
    try:
        print(f"The peer is ready: {ensure()}")
    except (PeerUnavailable, subprocess.TimeoutExpired) as reason:
        sys.exit(f"The peer is not available: {reason}")
