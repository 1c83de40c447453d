"""Processes that cannot outlive their parent, and messages between them.

A child asks the kernel to be killed when its parent dies (PR_SET_PDEATHSIG), and checks that it has not died already.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import socket
import struct
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_LENGTH = struct.Struct("<Q")


def die_with_parent(parent_pid: int) -> None:
    """Have this process killed the moment its parent dies; ends at once when that has happened already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def first_to_be_killed() -> None:
    """Tell the kernel to prefer this process when memory runs out, so that the runner survives it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def send(sock: socket.socket, message: Any, fds: tuple[int, ...] = ()) -> None:
    """Send one message, length first, with open file descriptors beside it."""
    payload = pickle.dumps(message)
    socket.send_fds(sock, [_LENGTH.pack(len(payload))], list(fds))
    sock.sendall(payload)


def receive(sock: socket.socket, max_fds: int = 0) -> tuple[Any, list[int]]:
    """Receive one message and its file descriptors. Raises EOFError when the other side is gone."""
    head, fds, _, _ = socket.recv_fds(sock, _LENGTH.size, max_fds)
    while len(head) < _LENGTH.size:
        head += _some(sock, _LENGTH.size - len(head))
    size, parts = _LENGTH.unpack(head)[0], []
    while size:
        parts.append(_some(sock, size))
        size -= len(parts[-1])
    return pickle.loads(b"".join(parts)), fds


def _some(sock: socket.socket, size: int) -> bytes:
    data = sock.recv(min(size, 1 << 20))
    if not data:
        raise EOFError("the other side is gone")
    return data
