"""Host memory of the launch above what it was born with, and the peaks of torch's CUDA allocator.

    fork ── birth() ── build ── … ──┤ reset peak ── window ── read peak ├── … ── __exit__: private bytes
                        sampled in a process of its own, 10 Hz: resident − shared, above birth

A launch is forked from a server that has already imported the libraries, so memory is counted from `birth()` on, which
the runner calls first thing in the child; without it nothing here has a zero and every figure is missing.
`process_memory` and the private bytes leave out pages that are shared with files or other processes; the peak is of all
resident pages, as the kernel keeps it, so it also holds library pages first touched by this launch (`file_growth_bytes`).
Sources: proc(5): statm, status (VmHWM), clear_refs (5), smaps_rollup; torch.cuda memory statistics.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from effbench.probe import Capability, Probe, ProbeContext, ProbeResult
from effbench.probes.sampling import Clock, Sample, Sampler, Source
from effbench.schema import Series

PERIOD_S = 0.1
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, kw_only=True)
class Birth:
    """Memory of a process when it began its own life, in B. `private_bytes` is None where the kernel does not tell."""

    pid: int
    resident_bytes: int
    unshared_bytes: int  # resident less pages of files and shared memory
    private_bytes: int | None


_births: dict[int, Birth] = {}


def birth() -> Birth:
    """Memory of this process at the first call in it. The runner calls this first in every launch; about 5 ms."""
    pid = os.getpid()
    if pid not in _births:
        _births.clear()  # what a forked child inherits is its parent's
        resident, unshared = _statm_bytes(Path(f"/proc/{pid}/statm").read_bytes())
        private = _private_bytes(pid)
        _births[pid] = Birth(pid=pid, resident_bytes=resident, unshared_bytes=unshared, private_bytes=private)
    return _births[pid]


class _Statm(Source):
    """Resident minus shared bytes of a process above its birth; one pread of a virtual file a reading."""

    def __init__(self, born: Birth, clock: Clock):
        self._born, self._clock = born, clock
        self._statm = os.open(f"/proc/{born.pid}/statm", os.O_RDONLY)

    def read(self) -> Iterable[Sample]:
        _, unshared = _statm_bytes(os.pread(self._statm, 256, 0))
        return [("process_memory", self._clock(), float(unshared - self._born.unshared_bytes))]


class MemoryProbe(Probe):
    """Series `process_memory` (B, above birth) and the facts below; what cannot be had is absent and named in `reasons`.

    Facts in B: host_memory_peak_bytes, host_private_bytes, file_growth_bytes, and on CUDA allocated_peak_bytes and
    reserved_peak_bytes. Reasons: see reasons.py. Processes that the launch itself starts are not counted.
    """

    name = "memory"

    def __init__(self, context: ProbeContext):
        super().__init__(context)
        self._born = _births.get(context.pid)
        self._facts: dict[str, Any] = {}
        self._reasons: list[str] = []
        self._series: tuple[Series, ...] = ()
        self._peak_is_reset = False
        self._sampler: Sampler | None = None
        if self._born is None:
            self._reasons.append("birth_not_taken")
            return
        born, clock = self._born, context.clock
        self._sampler = Sampler(lambda: _Statm(born, clock), period_s=PERIOD_S, clock=clock)
        self._sampler.prepare()  # now, because a probe is constructed before the build: see sampling.py

    @classmethod
    def at_birth(cls) -> None:
        birth()

    @classmethod
    def capabilities(cls) -> list[Capability]:
        """What of a process's memory this kernel, container and torch let us see."""
        pid, statm = os.getpid(), Path("/proc/self/statm").exists()
        remedy = "" if statm else "needs Linux with /proc mounted"
        found = [Capability(what="host memory over time", available=statm, detail="/proc/self/statm, 10 Hz", remedy=remedy)]
        peak = _reset_peak(pid) and _peak_bytes(pid) is not None
        remedy = "" if peak else "allow writing to /proc/self/clear_refs (a container may mount /proc read-only)"
        found.append(Capability(what="peak host memory", available=peak, detail="VmHWM, reset at the window", remedy=remedy))
        private = _private_bytes(pid) is not None
        remedy = "" if private else "needs a kernel with /proc/self/smaps_rollup (4.14 or later)"
        found.append(Capability(what="private host memory", available=private, detail="smaps_rollup", remedy=remedy))
        cuda = _cuda()
        remedy = "" if cuda else "needs an NVIDIA GPU and a CUDA build of torch"
        found.append(Capability(what="CUDA allocator peaks", available=cuda is not None, detail="torch.cuda", remedy=remedy))
        return found

    def __enter__(self) -> Self:
        if self._sampler:
            self._sampler.start()
        return self

    def window_begins(self) -> None:
        if self.context.device == "cuda":
            cuda = _cuda()
            if cuda:
                cuda.reset_peak_memory_stats()
            else:
                self._reasons.append("allocator_not_loaded")
        if self._born:
            self._peak_is_reset = _reset_peak(self._born.pid)

    def window_ended(self) -> None:
        if self._sampler and self._born:
            peak = _peak_bytes(self._born.pid) if self._peak_is_reset else None
            if peak is None:
                self._reasons.append("peak_not_reset")
            else:
                self._facts["host_memory_peak_bytes"] = peak - self._born.resident_bytes
            resident, unshared = _statm_bytes(Path(f"/proc/{self._born.pid}/statm").read_bytes())
            self._facts["file_growth_bytes"] = (resident - unshared) - (self._born.resident_bytes - self._born.unshared_bytes)
            self._sampler.mark()
        cuda = _cuda() if self.context.device == "cuda" else None
        if cuda:
            self._facts["allocated_peak_bytes"] = int(cuda.max_memory_allocated())
            self._facts["reserved_peak_bytes"] = int(cuda.max_memory_reserved())

    def __exit__(self, *exc: object) -> None:
        if not (self._sampler and self._born):
            return
        recording = self._sampler.stop()
        # With the prefix, because a lost energy sampler is another matter and makes energy invalid.
        self._reasons += [f"memory_{reason}" for reason in recording.reasons]
        if "cpu_share" in recording.facts:
            self._facts["memory_sampler_cpu_share"] = recording.facts["cpu_share"]
        self._series = tuple(
            Series(name=name, unit="B", scope="process", source="/proc/self/statm", t_s=t_s, values=values)
            for name, (t_s, values) in recording.series.items()
        )
        # Only now: while the sampler lives, pages written before its fork count as shared with it.
        private = _private_bytes(self._born.pid)
        if private is None or self._born.private_bytes is None:
            self._reasons.append("private_not_readable")
        else:
            self._facts["host_private_bytes"] = private - self._born.private_bytes

    def result(self) -> ProbeResult:
        return ProbeResult(series=self._series, facts=self._facts, reasons=tuple(dict.fromkeys(self._reasons)))


def _statm_bytes(statm: bytes) -> tuple[int, int]:
    """Resident bytes, and those less pages of files and shared memory: proc(5), fields 2 and 3 of statm."""
    _, resident, shared, *_ = statm.split()
    return int(resident) * _PAGE, (int(resident) - int(shared)) * _PAGE


def _peak_bytes(pid: int) -> int | None:
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def _private_bytes(pid: int) -> int | None:
    """Bytes of pages that only this process maps; walks all its page tables, so 5 ms and more."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return None
    return sum(int(kb) for kb in re.findall(r"^Private_(?:Clean|Dirty|Hugetlb):\s+(\d+) kB$", rollup, re.MULTILINE)) * 1024


def _reset_peak(pid: int) -> bool:
    """Set VmHWM to the present resident size (about 0.1 ms); False where that is not allowed."""
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _cuda() -> Any | None:
    """torch.cuda where torch is loaded and a device can be used; torch is never imported for this."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None
