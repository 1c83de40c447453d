"""Files that are there whole or not at all, and one sentence for what the operating system refuses.

A file is written under a dot-name in its own folder, flushed to the disk, renamed, and the folder flushed. The writer holds
a lock on its temporary file, so that a dead writer's leftover can be told from a file in the making.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from pathlib import Path
from typing import Any

from effbench.errors import DamagedFile, StoreError


def publish(folder: Path, name: str | None, data: Any) -> Path:
    """Write `data` as folder/name so that it is there whole or not at all; with no name, only prove that it could be."""
    target = folder / name if name else folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary, handle = _open_locked(folder)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(handle, rest) :]
            os.fsync(handle)
            if name:
                temporary.rename(target)
        finally:
            os.close(handle)
            unlink(temporary)
        if name:
            flush_folder(folder)
    except OSError as fault:
        raise explain(fault, target, "write") from None
    return target


def _open_locked(folder: Path) -> tuple[Path, int]:
    """A new temporary file and a handle that holds its lock until closed, which is how others know that we live."""
    while True:
        path = folder / f".{secrets.token_hex(8)}.tmp"
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with contextlib.suppress(OSError):  # a file system without locks; compaction then leaves temporaries alone
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return path, handle
        os.close(handle)  # taken for a leftover between open and lock


def remove_leftovers(folder: Path) -> int:
    """Remove temporaries whose lock nobody holds. Returns how many."""
    removed = 0
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed += 1
            finally:
                os.close(handle)
    return removed


def flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def damaged(path: Path, fault: BaseException) -> DamagedFile:
    cause = " ".join(str(fault).split())[:200] or type(fault).__name__
    return DamagedFile(
        f"{path} cannot be read ({cause}). Restore it from a copy or delete it; the other files are not affected."
    )


def explain(fault: OSError, path: Path, verb: str) -> StoreError:
    """One sentence for what the operating system refused."""
    if fault.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreError(
            f"Cannot {verb} {path}: the disk or quota is full. Free some space or name another folder with --results."
        )
    if fault.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StoreError(f"Cannot {verb} {path}: permission denied or read-only. Name a folder of yours with --results.")
    if fault.errno in (errno.ENOTDIR, errno.EEXIST):
        return StoreError(f"Cannot {verb} {path}: a part of this path is a file, not a folder. Name a folder with --results.")
    return StoreError(f"Cannot {verb} {path}: {fault.strerror or fault}. Name another folder with --results.")
