"""A function of this package in a process of its own that can hurt nothing: what a hostile bundle may do at most.

    this process ──request.json, bundle──▶ a fresh interpreter in an empty folder ──one JSON document, size-limited──▶ here
                                           500 MB of address space, 10 s of CPU, no core, no file written, few files open,
                                           Landlock: reads Python and the folder, no TCP; dies with this process

The interpreter is started isolated and not forked: no module, handle, secret or environment of this process is in it. At
most two are alive at once on a machine and user; whoever comes third waits. Whatever happens to it, its end is an `Outcome`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import json
import os
import resource
import select
import signal
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from effbench.errors import BundleError, StoreError
from effbench.exchange import landlock, limits

REQUEST, MODULES = "request.json", ("numpy", "pyarrow.parquet")  # imported before files are out of reach
ENVIRONMENT = {  # one thread, one heap: threads and arenas reserve address space that nobody uses
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "LC_ALL": "C.UTF-8",
}
POLL_S = 0.02
PARENT_DEATH_SIGNAL = 1
ENDED_BY = {
    signal.SIGXCPU: "it needed more than {cpu_s} s of CPU",
    signal.SIGABRT: f"it was aborted, by a library that cannot read it or for want of memory ({limits.ADDRESS_SPACE_BYTES / 1e6:.0f} MB)",
    signal.SIGSEGV: "a library crashed on it",
    signal.SIGBUS: "a library crashed on it",
    signal.SIGKILL: "it was killed by the system",
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a function returned, or why it returned nothing; `notes` say what could not be enforced here."""

    value: Any = None
    refusal: str = ""
    check: str = "limits"
    where: str = ""
    notes: tuple[str, ...] = ()


def run(
    function: Callable[[Any], Any],
    request: Any,
    *,
    files: Mapping[str, bytes] | None = None,
    cpu_s: int = limits.CPU_S,
    wall_s: float = limits.WALL_S,
) -> Outcome:
    """`function(request)` in the sandbox, in a folder that holds `files`; what it returns must be JSON.

    Raises StoreError where the folder for temporary files cannot be used; never for what happens inside."""
    name = f"{function.__module__}:{function.__qualname__}"
    asked = {"function": name, "request": request, "parent": os.getpid(), "cpu_s": cpu_s}
    with _place() as place, tempfile.TemporaryDirectory(prefix="effbench-verify-") as folder:
        try:
            for file_name, data in (files or {}).items():
                (Path(folder) / file_name).write_bytes(data)
            (Path(folder) / REQUEST).write_text(json.dumps(asked))
        except OSError as fault:
            raise StoreError(f"The folder for temporary files, {folder}, cannot be written: {fault.strerror}.") from None
        isolated = "-EP" if site.ENABLE_USER_SITE else "-I"  # without the environment and the current folder
        command = [sys.executable, isolated, "-B", "-m", "effbench.exchange.sandbox"]
        kept = {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}
        began_s = time.monotonic()
        with subprocess.Popen(
            command, cwd=folder, env=ENVIRONMENT | kept | {"TMPDIR": folder}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, pass_fds=(place,), process_group=0,
        ) as child:  # fmt: skip
            try:
                answer, why = _answer(child, began_s + wall_s, wall_s)
            finally:  # it has not been waited for, so the number is still its own
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
        return _outcome(answer, why, child.returncode, cpu_s)


def _answer(child: subprocess.Popen[bytes], end_s: float, wall_s: float) -> tuple[bytes, str]:
    """All that the child says until it closes its end, which it does by ending, or why no more is read."""
    assert child.stdout, "it was opened as a pipe"
    found, ready = bytearray(), select.poll()
    ready.register(child.stdout, select.POLLIN)
    while (left_s := end_s - time.monotonic()) > 0:
        if not ready.poll(left_s * 1000):
            continue
        part = os.read(child.stdout.fileno(), 1 << 16)
        if not part:
            return bytes(found), ""
        found += part
        if len(found) > limits.RESULT_BYTES:
            return b"", f"its report is more than {limits.RESULT_BYTES:,} bytes"
    return b"", f"it took more than {wall_s:g} s"


def _outcome(answer: bytes, why: str, code: int | None, cpu_s: int) -> Outcome:
    if not why and code and code < 0:
        why = ENDED_BY.get(signal.Signals(-code), f"it ended by {signal.Signals(-code).name}").format(cpu_s=cpu_s)
    if why:
        return Outcome(refusal=f"The bundle could not be verified within its limits: {why}.")
    try:
        return TypeAdapter(Outcome).validate_json(answer, strict=True)
    except ValidationError:
        return Outcome(refusal=f"The bundle could not be verified: its process ended with code {code} and no report.")


@contextlib.contextmanager
def _place() -> Iterator[int]:
    """One of two places, by a lock that the child holds too, so that a killed parent frees none too early."""
    folder = Path(tempfile.gettempdir()) / f"effbench-verify-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise StoreError(f"{folder} belongs to somebody else. Set TMPDIR to a folder of yours.")
        handles = [os.open(folder / f"place-{n}", os.O_RDWR | os.O_CREAT, 0o600) for n in range(limits.AT_ONCE_COUNT)]
    except OSError as fault:
        raise StoreError(f"{folder} cannot be used: {fault.strerror}. Set TMPDIR to a folder of yours.") from None
    try:
        yield _first_free(handles)
    finally:
        for handle in handles:
            os.close(handle)


def _first_free(handles: list[int]) -> int:
    while True:
        for handle in handles:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return handle
        time.sleep(POLL_S)


# In the child.


def main() -> None:
    """Give up everything, do what was asked, say what came of it."""
    asked = json.loads(Path(REQUEST).read_text())
    notes = _limit(asked["parent"], asked["cpu_s"])
    try:
        for module in (*MODULES, asked["function"].partition(":")[0]):
            importlib.import_module(module)
        notes += _restrict()
        said = _said(asked["function"], asked["request"])
    except MemoryError:
        said = {"refusal": "The verifier itself does not fit in its address space here.", "check": "limits"}
    data = json.dumps(said | {"notes": notes}).encode()
    while data:
        data = data[os.write(1, data) :]
    os._exit(0)


def _said(name: str, request: Any) -> dict[str, Any]:
    module, _, function = name.partition(":")
    try:
        return {"value": getattr(importlib.import_module(module), function)(request)}
    except BundleError as refusal:
        return {"refusal": refusal.message, "check": refusal.check, "where": refusal.where}
    except Exception as fault:
        if isinstance(fault, MemoryError):  # pyarrow's too
            why = f"needs more than {limits.ADDRESS_SPACE_BYTES / 1e6:.0f} MB of address space"
        else:
            why = f"has something that the verifier did not expect ({type(fault).__name__}: {str(fault)[: limits.MESSAGE_CHARACTERS]})"
        return {"refusal": f"The bundle {why}.", "check": "limits"}


def _limit(parent: int, cpu_s: int) -> list[str]:
    """Set the limits that the kernel keeps. Returns those that it would not set."""
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    wanted = {
        "address space": (resource.RLIMIT_AS, limits.ADDRESS_SPACE_BYTES),
        "CPU time": (resource.RLIMIT_CPU, cpu_s),
        "size of written files": (resource.RLIMIT_FSIZE, 0),
        "open files": (resource.RLIMIT_NOFILE, limits.OPEN_FILES_COUNT),
        "core files": (resource.RLIMIT_CORE, 0),
    }
    notes = []
    for what, (kind, value) in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value + 1 if kind == resource.RLIMIT_CPU else value))  # a signal, then the end
        except (OSError, ValueError) as fault:
            notes.append(f"The limit of {what} could not be set here ({fault}).")
    return notes


def _restrict() -> list[str]:
    """Files and network out of reach, but for what Python still loads and the folder of this process."""
    own = importlib.import_module("effbench").__path__
    shared = [sysconfig.get_config_var("LIBDIR"), "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache"]
    try:
        readable = [Path(path) for path in (*sys.path, *own, *shared) if path and Path(path).exists()]
        return landlock.restrict(read=readable, write=[Path.cwd()])
    except OSError as fault:
        return [f"Landlock could not be used here ({fault}): which files the verifier opens was not restricted."]


if __name__ == "__main__":
    main()
