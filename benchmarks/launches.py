"""Launches by the real executor, for scripts that look at single launches and not at a whole run.

The spec comes from a suite through the planner and the launch goes through the local executor, so what is timed is what
`effbench run` does for each launch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.common import ROOT
from effbench import planning, provenance, suite
from effbench.executors.local import LocalExecutor
from effbench.runner import Request
from effbench.schema import Launch, Spec, Trace

# Shapes of both harnesses and of the bare loops.
SHAPES = {"batch_size": 2, "prompt_tokens": 64, "new_tokens": 32}
NOT_FIXED = ("warm_up", "window", "idle_before", "idle_after", "quality", "track")  # phases that are the measurement itself


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One launch and its wall time, from asking the executor to having the record."""

    launch: Launch
    trace: Trace
    wall_s: float

    @property
    def fixed_s(self) -> float:
        """Wall time less warm-up, window, idle, quality and the step whose tensors are counted."""
        return self.wall_s - sum(w.length_s for name, w in self.launch.windows.items() if name in NOT_FIXED)

    def phase_s(self, name: str) -> float | None:
        """Length of one phase of the launch."""
        window = self.launch.windows.get(name)
        return None if window is None else window.length_s

    def metric(self, name: str) -> float | None:
        """What the record reports."""
        return next((r.value for r in self.launch.metrics if r.name == name), None)


class Launcher:
    """The local executor and where it runs. A context manager; leaving it ends every process."""

    def __init__(self) -> None:
        self._executor, self._where = LocalExecutor(), provenance.environment("cpu")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._executor.renew()

    def server_cpu_s(self) -> float:
        """CPU time that the fork server itself has used since it started; 0 while there is none."""
        server = self._executor._server
        if server is None:
            return 0.0
        nanoseconds = Path(f"/proc/{server._process.pid}/schedstat").read_text().split()[0]
        return int(nanoseconds) * 1e-9

    def launch(self, spec: Spec, block: int = 0) -> Timed:
        """Run one launch to its end. Raises RuntimeError when it did not succeed: a benchmark has no row for that."""
        request = Request(
            launch_id=uuid.uuid4().hex, spec=spec, seed=spec.seed + block, suite="bench", env_id=self._where.env_id,
            block_id=uuid.uuid4().hex, block=block, position=0, hardware=self._where.hardware,
            provenance=self._where.provenance, peaks=self._where.peaks,
        )  # fmt: skip
        began_s = time.perf_counter()
        launch, trace = self._executor.launch(request)
        wall_s = time.perf_counter() - began_s
        if launch.status != "ok":
            raise RuntimeError(f"the launch failed ({launch.reason}):\n{launch.detail}")
        return Timed(launch=launch, trace=trace, wall_s=wall_s)


def generate_spec(checkpoint: Path, *, threads: int, protocol: str) -> Spec:
    """The resolved spec of `generate` on a local checkpoint, as `effbench plan` gives it."""
    params = {**SHAPES, "decode_engine": "eager", "validation_tokens": 0}
    case = {"workload": "generate", "params": params, "model": "tiny-llama", "weights": "path", "location": str(checkpoint)}
    return plan_one({**case, "threads": threads}, protocol)


def plan_one(case: Mapping[str, Any], protocol: str) -> Spec:
    """The one spec of a suite with this case; JSON is YAML."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.yaml"
        path.write_text(json.dumps({"name": "bench", "protocol": protocol, "cases": [dict(case)]}))
        found = planning.plan(suite.read_suite(path), planning.Options(device="cpu"))
    if found[0].skip_reason:
        raise RuntimeError(f"the planner skips this case: {found[0].skip_reason}")
    return found[0].spec


def save_checkpoint(folder: Path) -> Path:
    """The tiny model that both harnesses load, saved by a process of its own so that this one stays light."""
    command = [sys.executable, "-m", "benchmarks.peers.checkpoint", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"the checkpoint could not be saved:\n{done.stderr}")
    return folder
