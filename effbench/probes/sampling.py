"""Sample something over time from a process of its own, so that nothing spins or allocates beside the measured work.

    parent   prepare ─────────── start ──────── mark ────────── stop ─▶ Recording
                │ fork             │ go            │ one more      │ last reading
    child       └─ sleeps on pipe ─┴─ open, read … read … read … ──┴─ close, send, exit

`prepare` forks; call it early, from the main thread, before CUDA starts and before a model fills memory: a later fork
copies page tables while others wait and makes the parent pay for each page it writes next. The child opens its source
itself, so NVML lives in the child alone. It sleeps in poll() between readings and dies with its parent.
A sampler never raises for its child: a child that failed, died or hung is a reason code in the Recording.
"""

from __future__ import annotations

import array
import ctypes
import gc
import math
import os
import pickle
import select
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from effbench.errors import ProbeError

Sample = tuple[str, float, float]  # series name, time in s on the launch's clock, value
Clock = Callable[[], float]

_GO, _MARK, _STOP = b"g", b"m", b"s"
_READY = b"r"  # precedes the pickled Recording, which cannot begin with this byte
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)  # loaded here: a forked child should not need the dynamic linker


def launch_clock(birth_ns: int | None = None) -> Clock:
    """Seconds since `birth_ns` (now, if None) on CLOCK_MONOTONIC, which all processes of a machine share."""
    origin_ns = time.perf_counter_ns() if birth_ns is None else birth_ns
    return lambda: (time.perf_counter_ns() - origin_ns) * 1e-9


class Source:
    """What a sampler reads. Built in the child, so the constructor opens devices; it may raise ProbeError(reason).

    `period_s` is asked before every reading, so a source may change its own pace; None means the sampler's.
    `ready` turns true when the parent may go on; until then `Sampler.start` waits.
    """

    period_s: float | None = None
    ready: bool = True

    def read(self) -> Iterable[Sample]:
        """One reading of everything that is due. ProbeError loses this reading and keeps its reason; others end the child."""
        raise NotImplementedError

    def mark(self) -> Iterable[Sample]:
        """The extra reading at a border of the window; by default an ordinary one."""
        return self.read()

    def close(self) -> tuple[Mapping[str, Any], Iterable[str]]:
        """Release everything; return facts (JSON) and reason codes."""
        return {}, ()


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What a sampler brought home. `series` maps a name to its times in s and its values, both float64 of shape (N,)."""

    series: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()


class SamplingLoop:
    """The reading side without the sleeping: who waits between `tick`s, and on which clock, is the caller's affair."""

    def __init__(self, source: Source, *, period_s: float, clock: Clock):
        self._source, self._period_s, self._clock = source, period_s, clock
        self._times: dict[str, array.array[float]] = {}
        self._values: dict[str, array.array[float]] = {}
        self._reasons: dict[str, None] = {}  # a set that keeps its order
        self._anchor_s, self._count, self._pace_s = clock(), 0, self._period()
        self.reads = 0

    @property
    def due_s(self) -> float:
        """When the next reading is due, on the clock."""
        return self._anchor_s + self._count * self._pace_s

    def tick(self) -> None:
        """Take the due reading and set the next one on the absolute schedule; a late reading skips, it never bunches up."""
        self._take(self._source.read)
        now_s = self._clock()
        if self._pace_s != self._period():
            self._pace_s, self._anchor_s, self._count = self._period(), now_s, 1
        else:
            self._count = max(self._count + 1, math.floor((now_s - self._anchor_s) / self._pace_s) + 1)

    def mark(self) -> None:
        """Take a reading now, outside the schedule."""
        self._take(self._source.mark)

    def finish(self) -> Recording:
        """Take a last reading, close the source and return everything."""
        self.mark()
        return self.gather(*self._source.close())

    def gather(self, facts: Mapping[str, Any], reasons: Iterable[str]) -> Recording:
        """Everything read so far, with these facts and reasons."""
        series = {name: (np.array(self._times[name]), np.array(self._values[name])) for name in self._times}
        all_reasons = tuple({**self._reasons, **dict.fromkeys(reasons)})
        return Recording(series=series, facts={"reads": self.reads, **facts}, reasons=all_reasons)

    def _period(self) -> float:
        return self._source.period_s or self._period_s

    def _take(self, read: Callable[[], Iterable[Sample]]) -> None:
        self.reads += 1
        try:
            for name, t_s, value in read():
                self._times.setdefault(name, array.array("d")).append(t_s)
                self._values.setdefault(name, array.array("d")).append(value)
        except ProbeError as error:
            self._reasons[error.reason] = None


class Sampler:
    """A child process that reads `open_source()` every `period_s` seconds on `clock` until it is stopped.

    `open_source` runs in the child. `answer_s` is how long the child may take to answer a stop before it is killed,
    `open_s` how long `start` waits for the source to be ready.
    """

    answer_s = 2.0
    open_s = 10.0

    def __init__(self, open_source: Callable[[], Source], *, period_s: float, clock: Clock):
        self._open_source, self._period_s, self._clock = open_source, period_s, clock
        self._pid: int | None = None
        self._commands = self._answers = -1

    def prepare(self) -> None:
        """Fork the child, which sleeps until `start`."""
        if self._pid is not None:
            return
        parent, (command_out, self._commands), (self._answers, answer_in) = os.getpid(), os.pipe(), os.pipe()
        with warnings.catch_warnings():
            # Python 3.12 and later warn when other threads run, because one of them may hold a lock at this moment. The
            # child takes no lock of theirs: no torch, no logging, no print. Were it to hang all the same, `stop` says so.
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            _live(self, parent, command_out, answer_in)
        os.close(command_out)
        os.close(answer_in)
        self._pid = pid
        _parent_ends.update((self._commands, self._answers))

    def start(self) -> None:
        """Begin to sample; returns when the source is ready, has failed, or after `open_s`."""
        self.prepare()
        self._tell(_GO)
        _wait_readable(self._answers, self.open_s)

    def mark(self) -> None:
        """Ask for a reading now, at a border of the window. Does not wait for it."""
        self._tell(_MARK)

    def stop(self) -> Recording:
        """End sampling and return the recording. A silent child is killed: reason `sampler_hung` or `sampler_died`."""
        if self._pid is None:
            return Recording(reasons=("sampler_died",))
        self._tell(_STOP)
        answer, hung = self._receive()
        if hung:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        self._reap()
        for end in (self._commands, self._answers):
            _parent_ends.discard(end)
            os.close(end)
        self._pid = None
        return _decode(answer) or Recording(reasons=("sampler_hung" if hung else "sampler_died",))

    def _tell(self, command: bytes) -> None:
        with suppress(OSError):  # the child is gone; `stop` finds out
            os.write(self._commands, command)

    def _receive(self) -> tuple[bytes, bool]:
        """Everything up to the end of the pipe, and whether the child fell silent for `answer_s` before that."""
        answer = bytearray()
        while _wait_readable(self._answers, self.answer_s):
            part = os.read(self._answers, 1 << 20)
            if not part:
                return bytes(answer), False
            answer += part
        return bytes(answer), True

    def _reap(self) -> None:
        """Collect the child. One that hangs inside the driver cannot even be killed, so this gives up after a second."""
        assert self._pid is not None
        for _ in range(100):
            try:
                if os.waitpid(self._pid, os.WNOHANG) != (0, 0):
                    return
            except ChildProcessError:
                return
            time.sleep(0.01)


_parent_ends: set[int] = set()  # pipe ends that later children must not keep open


def _live(sampler: Sampler, parent: int, commands: int, answers: int) -> None:
    """The life of the child. Leaves by os._exit only: the parent's exit handlers and objects are not ours to run."""
    status = 1
    try:
        gc.disable()  # a collection here would run destructors of the parent's tensors
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before prctl
            return
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for end in (*_parent_ends, sampler._commands, sampler._answers):
            os.close(end)
        if os.read(commands, 1) == _GO:
            answer = memoryview(pickle.dumps(_sample(sampler, commands, answers)))
            while answer:  # a pipe takes a part at a time
                answer = answer[os.write(answers, answer) :]
        status = 0
    finally:
        os._exit(status)


def _sample(sampler: Sampler, commands: int, answers: int) -> Recording:
    """Open, read until told to stop, close. A fault of the source itself keeps what was read before it."""
    loop: SamplingLoop | None = None
    try:
        source = sampler._open_source()
        loop = SamplingLoop(source, period_s=sampler._period_s, clock=sampler._clock)
        begin_s, begin_cpu_s, announced, command = time.perf_counter(), time.process_time(), False, b""
        while command != _STOP:
            if _wait_readable(commands, loop.due_s - sampler._clock()):
                command = os.read(commands, 1) or _STOP  # an empty read: the parent closed its end
                if command == _MARK:
                    loop.mark()
            else:
                loop.tick()
            if source.ready and not announced:
                announced = bool(os.write(answers, _READY))
        recording = loop.finish()
        cpu_share = (time.process_time() - begin_cpu_s) / (time.perf_counter() - begin_s)
        return replace(recording, facts={**recording.facts, "cpu_share": cpu_share})
    except ProbeError as error:
        return Recording(reasons=(error.reason,), facts={"detail": str(error)})
    except Exception:
        facts = {"detail": traceback.format_exc()}
        return loop.gather(facts, ["sampler_died"]) if loop else Recording(reasons=("sampler_died",), facts=facts)


def _wait_readable(end: int, timeout_s: float) -> bool:
    """Sleep until `end` can be read or the time is up; True when it can be read (or its other side is closed)."""
    waiter = select.poll()
    waiter.register(end, select.POLLIN)
    # Milliseconds, rounded up: rounded down, the last one before a deadline would be a busy loop.
    return bool(waiter.poll(max(0, math.ceil(timeout_s * 1000))))


def _decode(answer: bytes) -> Recording | None:
    """The recording of a complete answer, None for what a dead or silenced child left behind."""
    try:
        recording = pickle.loads(answer.removeprefix(_READY))
    except (pickle.UnpicklingError, EOFError):
        return None
    assert isinstance(recording, Recording)
    return recording
