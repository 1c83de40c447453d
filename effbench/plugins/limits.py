"""Limits on the process that tries a plugin: address space, size of files, and no file written outside of one folder.

They find mistakes and name them. They are no prison: what compiled code opens itself (torch.save) is not seen, and code that
means harm is not to be run, here or anywhere.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
HARMLESS = ("/dev/null", "/proc/self/")


def limit_memory(more_bytes: int | None) -> None:
    """Let the address space grow by so many bytes from what it is now; None: by any number."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if more_bytes is None:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more_bytes, hard))


def limit_files(file_bytes: int) -> None:
    """No file grows beyond so many bytes; writing further fails as "File too large"."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))


class Watch:
    """Refuses to Python code what would change a file outside of `folder`, and remembers what was refused."""

    def __init__(self, folder: Path):
        self.folder = os.path.realpath(folder)
        self.refused: list[str] = []

    def begin(self) -> None:
        """From now on; an audit hook stays for the life of the process."""
        sys.addaudithook(self._judge)

    def _judge(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & WRITING:
                self._inside(path)
        elif event in CHANGES:
            for value in args:
                self._inside(value)

    def _inside(self, path: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        found = os.path.realpath(os.fsdecode(path))
        if found.startswith((self.folder + os.sep, *HARMLESS)) or found in (self.folder, *HARMLESS):
            return
        self.refused.append(found)
        raise PermissionError(f"it writes to {found}; a technique leaves no files behind")
