"""The other ranks of a launch: forked by its process before it has threads or a device, watched, and gone when it is gone.

    server ── fork ─▶ rank 0, the process that is measured ── fork ─▶ rank 1, rank 2 …
                       │ waits in poll for the end of any of them       │ killed by the kernel when rank 0 ends
                       └ says which was the first and why               └ writes what went wrong to a pipe

All are of one process group, which the server kills as a whole when the time is over. They meet at a file without a name, so there
is no port to be taken and nothing to be cleared away.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

from effbench import runner
from effbench.executors import lifeline
from effbench.ranks import Place
from effbench.runner import Clock, Request
from effbench.schema import Launch, Trace

GRACE_S = 3.0  # for rank 0 to notice by itself that another is gone
NOTICE_S = 0.5  # for the watcher to find out who was first
TOGETHER_S = 0.05
Deliver = Callable[[tuple[Launch, Trace]], None]


def run(request: Request, clock: Clock, deliver: Deliver) -> tuple[Launch, Trace]:
    """Run a launch of several ranks as rank 0. `deliver` hands over a result where this process cannot return any more."""
    peers = _Peers(request, clock)
    peers.watch(deliver)
    result = runner.run(request, clock, peers.place)
    return peers.end(result)


class _Peers:
    """The forked ranks and the thread that waits for their ends."""

    def __init__(self, request: Request, clock: Clock):
        self.request, self.size = request, request.spec.nproc
        meeting = os.memfd_create("rendezvous", 0)
        self.place = Place(
            rank=0, size=self.size, local_rank=0, local_size=self.size, meeting=f"file:///proc/self/fd/{meeting}"
        )
        self._over, self._lost, self._gone = threading.Event(), threading.Event(), threading.Event()
        self._why = self._detail = ""
        self._handles, self._pipes = dict[int, int](), dict[int, int]()  # by rank
        leader = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(1, self.size):
            read_end, write_end = os.pipe()
            pid = os.fork()
            if pid == 0:
                _follow(request, replace(self.place, rank=rank, local_rank=rank), write_end, leader)
            os.close(write_end)
            self._handles[rank], self._pipes[rank] = os.pidfd_open(pid), read_end

    def watch(self, deliver: Deliver) -> None:
        """Wait in a thread of its own, without spinning."""
        threading.Thread(target=self._watch, args=(deliver,), daemon=True).start()

    def _watch(self, deliver: Deliver) -> None:
        left = {handle: rank for rank, handle in self._handles.items()}
        poll = select.poll()
        for handle in left:
            poll.register(handle, select.POLLIN)
        while left and not self._lost.is_set():
            ended = [handle for handle, _ in poll.poll()]
            time.sleep(TOGETHER_S)  # a rank that dies takes others along: of them the one that was killed is the cause
            ended = list(dict.fromkeys([*ended, *(handle for handle, _ in poll.poll(0))]))
            causes = []
            for handle in ended:
                poll.unregister(handle)
                if cause := _cause(handle, left.pop(handle), self._pipes):
                    causes.append(cause)
            if causes and not self._over.is_set():
                _, self._why, self._detail = min(causes)
                self._lost.set()
        if self._lost.is_set() and not self._over.wait(GRACE_S):  # rank 0 waits for one that will not come
            deliver((runner.record(self.request, "failed", self._why, self._detail), Trace()))
            os._exit(0)
        for handle in left:
            os.waitid(os.P_PIDFD, handle, os.WEXITED)
        self._gone.set()

    def end(self, result: tuple[Launch, Trace]) -> tuple[Launch, Trace]:
        """The result, or what became of another rank where that is why there is none. All ranks are gone afterwards."""
        launch, trace = result
        if launch.status == "failed":
            if self._lost.wait(NOTICE_S):
                launch = replace(launch, reason=self._why, detail=f"{self._detail}\nRank 0:\n{launch.detail}")
            self._kill()
        self._over.set()
        if not self._gone.wait(GRACE_S):
            self._kill()
            self._gone.wait()
        return launch, trace

    def _kill(self) -> None:
        self._over.set()
        for handle in self._handles.values():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)


def _cause(handle: int, rank: int, pipes: Mapping[int, int]) -> tuple[float, str, str] | None:
    """When a rank that ended went wrong, how, and its traceback; None where it was over. What ends without a word comes first."""
    ended = os.waitid(os.P_PIDFD, handle, os.WEXITED)
    assert ended is not None
    said_s, said, detail = _read(pipes[rank])
    if ended.si_code != os.CLD_EXITED:
        said_s, said = -1.0, signal.Signals(ended.si_status).name
    elif ended.si_status == 0:
        return None
    return said_s, f"rank {rank} ended: {said or f'exit code {ended.si_status}'}", detail


def _follow(request: Request, place: Place, write_end: int, leader_pid: int) -> None:
    """All that another rank does; leaves by `os._exit`."""
    code = 1
    try:
        lifeline.die_with_parent(leader_pid)
        lifeline.first_to_be_killed()
        runner.follow(request, place)
        code = 0
    except BaseException as error:
        said = (time.monotonic(), runner.reason_of(error), traceback.format_exc())
        with suppress(OSError), os.fdopen(write_end, "wb") as pipe:
            pickle.dump(said, pipe)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _read(pipe: int) -> tuple[float, str, str]:
    with os.fdopen(pipe, "rb") as file:
        try:
            found: tuple[float, str, str] = pickle.load(file)
        except EOFError:
            return -1.0, "", ""
    return found
