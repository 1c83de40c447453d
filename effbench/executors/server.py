"""The fork server: imports the heavy libraries once, then forks one child per launch.

It uses one thread of every pool (a pool that exists before a fork is broken after it), never initialises CUDA, and
blocks in `poll` while a child works. Protocol, on one socket given as a file descriptor by the executor:

    server → {"ready": import_s}
    executor → ("launch", request) + write end of the result pipe     server → {"pid": child}
    executor → ("kill", None), at any time while a child works
    server → {"exit": wait status, "output": tail of what the child printed, "oom": out-of-memory kills seen}
"""

from __future__ import annotations

import gc
import os
import pickle
import select
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from effbench.executors import lifeline

OUTPUT_TAIL_BYTES = 8192


def main() -> None:
    """Entry point: `python -m effbench.executors.server FD PARENT_PID`."""
    descriptor, parent_pid = int(sys.argv[1]), int(sys.argv[2])
    lifeline.die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the executor's to handle
    started = time.perf_counter()
    _preload()
    gc.collect()
    gc.freeze()  # keeps the collector from touching, and so copying, shared pages in children
    with socket.socket(fileno=descriptor) as sock:
        lifeline.send(sock, {"ready": time.perf_counter() - started})
        while True:
            try:
                (order, request), fds = lifeline.receive(sock, max_fds=1)
            except EOFError:
                return
            if order == "launch":
                _serve(sock, request, fds[0])


def _preload() -> None:
    """Import what launches need and read the text, so that a fork has them."""
    import torch

    import effbench.executors.peers
    import effbench.models.builders
    import effbench.runner
    from effbench import registry

    torch.set_num_threads(1)
    for kind in registry.KINDS:
        for name, entry in registry.entries(kind).items():
            if entry.distribution == registry.HOME:
                registry.load(kind, name)
    effbench.models.builders.preload()
    assert not torch.cuda.is_initialized(), "a fork server must not initialise CUDA"


def _serve(sock: socket.socket, request: Any, result_fd: int) -> None:
    output = os.memfd_create("launch-output")
    kills_before = _out_of_memory_kills()
    server_pid = os.getpid()
    child = os.fork()
    if child == 0:
        _child(sock, request, result_fd, output, server_pid)
    os.close(result_fd)
    lifeline.send(sock, {"pid": child})
    status = _wait(sock, child)
    size = os.fstat(output).st_size
    tail = os.pread(output, OUTPUT_TAIL_BYTES, max(0, size - OUTPUT_TAIL_BYTES)).decode(errors="replace")
    os.close(output)
    lifeline.send(sock, {"exit": status, "output": tail, "oom": _out_of_memory_kills() - kills_before})


def _wait(sock: socket.socket, child: int) -> int:
    """Block until the child ends; kill its group when told to, or when the executor is gone."""
    handle = os.pidfd_open(child)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    poll.register(sock, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if handle in ready:
            os.close(handle)
            return os.waitpid(child, 0)[1]
        try:
            lifeline.receive(sock)  # the only order while a child works is to kill it
        except EOFError:
            poll.unregister(sock)
        _kill_group(child)


def _kill_group(child: int) -> None:
    for kill in (os.killpg, os.kill):  # the group may not exist yet in the child's first microseconds
        try:
            kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _child(sock: socket.socket, request: Any, result_fd: int, output: int, server_pid: int) -> None:
    """Everything a launch does; leaves by `os._exit`, so nothing of the server runs twice."""
    code = 1
    try:
        from effbench import runner
        from effbench.executors import peers

        clock = runner.monotonic_clock()
        os.setpgid(0, 0)
        lifeline.die_with_parent(server_pid)
        lifeline.first_to_be_killed()
        sock.close()
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(request.spec.environment)
        deliver = partial(_deliver, result_fd)
        if request.prepare_only:
            deliver(runner.prepare(request))
        elif request.spec.nproc > 1:
            deliver(peers.run(request, clock, deliver))
        else:
            deliver(runner.run(request, clock))
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _deliver(result_fd: int, result: Any) -> None:
    with os.fdopen(result_fd, "wb") as pipe:
        pickle.dump(result, pipe, protocol=pickle.HIGHEST_PROTOCOL)


def _out_of_memory_kills() -> int:
    """How many processes the kernel has killed for memory since boot; 0 where it does not say."""
    try:
        counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    except OSError:
        return 0
    return int(counters.get("oom_kill", 0))


if __name__ == "__main__":
    main()
