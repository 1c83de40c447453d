"""Launches on this machine: one fork server, one child at a time, and a parent that blocks while the child works.

A spec that sets environment variables gets a cold process of its own, since libraries read them at import.
"""

from __future__ import annotations

import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from types import TracebackType
from typing import IO, Any, Self

from effbench.errors import LaunchError
from effbench.executors import lifeline
from effbench.runner import Request, record
from effbench.schema import Launch, Trace

START_LIMIT_S = 300.0
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")
SERVER_ENVIRONMENT = {
    **ONE_THREAD,
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking whether CUDA is there must not initialise it before a fork
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


class ServerGone(LaunchError):
    """The fork server ended; `detail` holds what it printed."""


class ForkServer:
    """One fork server process and the socket to it. Raises ServerGone when it does not start or dies."""

    def __init__(self, environment: dict[str, str] | None = None):
        self._ours, theirs = socket.socketpair()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the server)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "effbench.executors.server", str(theirs.fileno()), str(os.getpid())],
            env={**os.environ, **SERVER_ENVIRONMENT, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # Ctrl-C in the terminal reaches the executor only
        )
        theirs.close()
        self._ours.settimeout(START_LIMIT_S)
        self.import_s: float = self._receive()["ready"]
        self._ours.settimeout(None)

    def launch(self, request: Request) -> tuple[bytes, dict[str, Any], bool]:
        """Run one child to its end: what it sent, how it ended, whether its time ran out. Blocks without polling."""
        read_end, write_end = os.pipe()
        try:
            lifeline.send(self._ours, ("launch", request), fds=(write_end,))
        except OSError as error:
            os.close(read_end)
            raise self._gone() from error
        finally:
            os.close(write_end)
        deadline = time.monotonic() + request.time_limit_s
        chunks: list[bytes] = []
        timed_out = False
        self._receive()  # {"pid": …}
        with selectors.DefaultSelector() as selector:
            selector.register(read_end, selectors.EVENT_READ)
            selector.register(self._ours, selectors.EVENT_READ)
            try:
                while True:
                    ready = {key.fileobj for key, _ in selector.select(None if timed_out else deadline - time.monotonic())}
                    if not ready and not timed_out:
                        timed_out = True
                        lifeline.send(self._ours, ("kill", None))
                    if read_end in ready:
                        chunks.append(os.read(read_end, 1 << 20))
                        if not chunks[-1]:
                            selector.unregister(read_end)
                    if self._ours in ready:
                        ended = self._receive()
                        chunks.extend(_drain(read_end))
                        return b"".join(chunks), ended, timed_out
            finally:
                os.close(read_end)

    def close(self) -> None:
        """End the server and with it any child."""
        self._ours.close()
        try:
            self._process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _receive(self) -> dict[str, Any]:
        try:
            message: dict[str, Any] = lifeline.receive(self._ours)[0]
        except (EOFError, OSError) as error:
            raise self._gone() from error
        return message

    def _gone(self) -> ServerGone:
        self._process.kill()
        self._process.wait()
        self._ours.close()
        self._log.seek(0)
        text = self._log.read().decode(errors="replace")
        self._log.close()
        last = text.strip().splitlines()[-1:] or ["it printed nothing"]
        return ServerGone("server_gone", f"The fork server ended (exit {self._process.returncode}): {last[0]}", text[-8192:])


class LocalExecutor:
    """Runs requests one after another on this machine. A context manager; leaving it ends every process."""

    def __init__(self) -> None:
        self._server: ForkServer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.renew()

    def renew(self) -> None:
        """End the fork server; the next launch starts a new one."""
        if self._server:
            self._server.close()
            self._server = None

    def launch(self, request: Request) -> tuple[Launch, Trace]:
        """Run one request in a fresh process. Never raises for what the launch does; KeyboardInterrupt passes."""
        cold = bool(request.spec.environment)
        if cold:
            self.renew()
        try:
            if self._server is None:
                self._server = ForkServer(dict(request.spec.environment))
            payload, ended, timed_out = self._server.launch(request)
        except ServerGone as error:
            self.renew()
            return record(request, "failed", str(error), error.detail), Trace()
        except BaseException:
            self.renew()
            raise
        if cold:
            self.renew()
        return _result(request, payload, ended, timed_out)


def _result(request: Request, payload: bytes, ended: dict[str, Any], timed_out: bool) -> tuple[Launch, Trace]:
    if timed_out:
        reason = f"time_limit: no result after {request.time_limit_s:g} s"
        return record(request, "failed", reason, ended["output"]), Trace()
    if os.waitstatus_to_exitcode(ended["exit"]) == 0 and payload:
        launch, trace = pickle.loads(payload)
        return launch, trace
    return record(request, "failed", _how_it_died(ended), ended["output"]), Trace()


def _how_it_died(ended: dict[str, Any]) -> str:
    code = os.waitstatus_to_exitcode(ended["exit"])
    if code == -signal.SIGKILL and ended["oom"]:
        return "out_of_memory: killed by the kernel"
    if code < 0:
        return f"killed: {signal.Signals(-code).name}"
    return f"exited: code {code} without a result"


def _drain(descriptor: int) -> list[bytes]:
    """What is left in a pipe whose writer has ended; never blocks on a grandchild that still holds it."""
    os.set_blocking(descriptor, False)
    chunks = []
    try:
        while data := os.read(descriptor, 1 << 20):
            chunks.append(data)
    except BlockingIOError:
        pass
    return chunks
