"""Ask optimum-benchmark 0.6.0 for launches, from our side: one driver process in its own environment.

The driver sleeps on its stdin between orders, so it disturbs nothing that is measured beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from benchmarks.peers import setup
from benchmarks.peers.setup import PeerUnavailable

DRIVER = Path(__file__).with_name("optimum_driver.py")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "LOG_LEVEL": "ERROR", "LOG_TO_FILE": "0", "TRANSFORMERS_VERBOSITY": "error"}


class Optimum:
    """A driver and its pipe. A context manager. Raises PeerUnavailable where the peer cannot be had or an order fails."""

    def __init__(self, checkpoint: Path, *, threads: int):
        self._checkpoint, self._threads = checkpoint, threads
        self._process: subprocess.Popen[str] | None = None
        self.versions: dict[str, str] = {}

    def __enter__(self) -> Self:
        python = setup.ensure()
        self._process = subprocess.Popen(
            [python, "-P", DRIVER, self._checkpoint],  # -P: this folder is not on its path
            cwd=self._checkpoint,
            env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(self._threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        ready = self._answer()["ready"]
        self.versions = {"optimum-benchmark": "0.6.0", "transformers of the peer": ready["transformers"]}
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is None:
            return
        try:
            self._process.communicate(timeout=10.0)  # the end of its stdin ends it
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def ask(self, mode: str, *, warmup_runs: int, iterations: int, duration_s: float) -> dict[str, Any]:
        """One launch (`process`, `inline`) or one reference loop (`bare`); blocks until it is done."""
        order = {"mode": mode, "warmup_runs": warmup_runs, "iterations": iterations, "duration_s": duration_s}
        print(json.dumps(order), file=self._pipe("stdin"), flush=True)
        answer = self._answer()
        if "error" in answer:
            raise PeerUnavailable(f"its {mode} launch failed: {answer['error']}")
        return answer

    def _answer(self) -> dict[str, Any]:
        line = self._pipe("stdout").readline()
        if not line:
            raise PeerUnavailable("its driver ended without an answer; run it by hand to see why")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _pipe(self, name: str) -> IO[str]:
        assert self._process is not None, "the driver is started on entering"
        pipe: IO[str] = getattr(self._process, name)
        return pipe
