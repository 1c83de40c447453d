"""Landlock, by which a process gives up what it never needs: after `restrict` it reads below some folders, writes below
others, and neither opens nor accepts a TCP connection. For good, and for everything it starts; no privilege is needed.

https://docs.kernel.org/userspace-api/landlock.html (Linux 5.13 and later; each version of the interface can refuse more).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture since they are young
ASK_VERSION, RULE_PATH_BENEATH = 1, 1
SET_NO_NEW_PRIVS = 38

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}  # by version, from this one on
ON_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | (1 << 14) | (1 << 15)
TCP_FROM, TCP_RIGHTS = 4, 0b11  # bind, connect
SCOPES_FROM, SCOPES = 6, 0b11  # abstract Unix sockets, signals


def version() -> int:
    """Of the kernel's interface; 0 where it has none."""
    return max(_call(CREATE_RULESET, None, 0, ASK_VERSION), 0)


def restrict(*, read: Sequence[Path], write: Sequence[Path]) -> list[str]:
    """Give up all other access to files, and TCP. Returns what this kernel cannot refuse, a sentence each. Raises OSError."""
    found = version()
    if not found:
        return ["This kernel has no Landlock: which files the verifier opens was not restricted."]
    files = max(rights for since, rights in FILE_RIGHTS.items() if since <= found)
    tcp, scopes = (rights if found >= since else 0 for since, rights in ((TCP_FROM, TCP_RIGHTS), (SCOPES_FROM, SCOPES)))
    fields = 1 if found < TCP_FROM else 2 if found < SCOPES_FROM else 3
    attributes = struct.pack("=3Q", files, tcp, scopes)[: 8 * fields]
    ruleset = _checked(_call(CREATE_RULESET, attributes, len(attributes), 0), "create a Landlock ruleset")
    try:
        for paths, rights in ((read, READ_FILE | READ_DIR), (write, files & ~EXECUTE)):
            for path in paths:
                _allow(ruleset, path, rights)
        _checked(ctypes.CDLL(None, use_errno=True).prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0), "give up new privileges")
        _checked(_call(RESTRICT_SELF, ruleset, 0), "enter a Landlock ruleset")
    finally:
        os.close(ruleset)
    missing = []
    if not tcp:
        missing.append(f"This kernel's Landlock (version {found}) does not refuse TCP.")
    return missing


def _allow(ruleset: int, path: Path, rights: int) -> None:
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        allowed = rights if path.is_dir() else rights & ON_A_FILE
        rule = struct.pack("=Qi", allowed, handle)
        _checked(_call(ADD_RULE, ruleset, RULE_PATH_BENEATH, rule, 0), f"allow {path}")
    finally:
        os.close(handle)


def _call(number: int, *arguments: object) -> int:
    converted = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    return int(ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *converted))


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot {what}: {os.strerror(code)}")
    return result
