"""Whose processes are on the GPU: ours, somebody else's, or not to be told.

NVML lists process numbers. In the machine's first PID namespace they are the numbers we know. Inside a container the
driver may give the numbers of another namespace, where ours cannot be recognised: then the answer is "undecidable",
unless one listed number is ours, which shows that NVML speaks our numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from effbench.errors import ProbeError

PROC = Path("/proc")
FIRST_NAMESPACE = "pid:[4026531836]"  # a constant of Linux: PROC_PID_INIT_INO

GpuProcess = tuple[int, int | None]  # process number, bytes on the device (None where the driver does not say)


class ProcessWatch:
    """Looks at the process list of one GPU again and again, and remembers who was there."""

    def __init__(self, root_pid: int, list_processes: Callable[[], Sequence[GpuProcess]], proc: Path = PROC):
        self._root, self._list, self._proc = root_pid, list_processes, proc
        self._own = {root_pid, *_numbers_of(root_pid, proc)}
        self._decidable = _in_first_namespace(proc)
        self._own_seen = False
        self._looked = False
        self.others: set[int] = set()

    def own_bytes(self) -> float:
        """Look once; bytes on the device that belong to our process tree. ProbeError where that cannot be told."""
        listed = dict(self._list())
        self._looked = True
        own = {pid for pid in listed if self._is_own(pid)}
        self._own_seen |= bool(own)
        self.others |= listed.keys() - own
        sizes = [listed[pid] for pid in own]
        if not own and not self._decidable:
            raise ProbeError("foreign_process_undecidable")
        if any(size is None for size in sizes):
            raise ProbeError("not_supported")
        return float(sum(size for size in sizes if size is not None))

    def reasons(self) -> list[str]:
        """What the whole series of looks tells."""
        if not self._looked or not (self._decidable or self._own_seen):
            return ["foreign_process_undecidable"]
        return ["foreign_process"] if self.others else []

    def _is_own(self, pid: int) -> bool:
        """Whether `pid` is our launch or descends from it, by our own view of the process table."""
        seen = {0, 1}
        while pid not in self._own:
            if pid in seen:
                return False
            seen.add(pid)
            pid = _parent_of(pid, self._proc)
        return True


def _in_first_namespace(proc: Path) -> bool:
    try:
        return str((proc / "self/ns/pid").readlink()) == FIRST_NAMESPACE
    except OSError:
        return False


def _numbers_of(pid: int, proc: Path) -> list[int]:
    """The numbers of a process in every namespace from ours inwards."""
    return [int(number) for number in _status(pid, proc).get("NSpid", "").split()]


def _parent_of(pid: int, proc: Path) -> int:
    """The parent's number, 0 where the process is gone or not in our namespace."""
    return int(_status(pid, proc).get("PPid", "0"))


def _status(pid: int, proc: Path) -> dict[str, str]:
    try:
        lines = (proc / str(pid) / "status").read_text().splitlines()
    except OSError:
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
