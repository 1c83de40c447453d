"""Check a technique against the contract of the built-in ones, in a fresh process with limits. Torch-free.

    reports = check("./effbench-half-width")     # a folder with a pyproject.toml, not installed: each of its techniques
    reports = check("lora")                      # an installed technique

Limits are on a clause's time, the whole time, memory beyond the libraries, the size of a file; what the technique writes outside
of a temporary folder is refused. A technique that hangs, crashes or eats memory ends its own process only.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from effbench import registry
from effbench.errors import UnknownName, UsageError
from effbench.plugins import source
from effbench.plugins.contract import CLAUSES, MIXTURE, SHAPES

Status = Literal["kept", "broken", "not asked"]
Verdict = Literal["kept", "broken", "untried"]
LOADING = "loading the libraries"  # between the first clause and the others
OTHER_PROMISES = {
    "found": "it is found by its entry point and loads without torch",
    "files": "it writes no file outside of its temporary folder",
    LOADING: "its process lives",
}
PROMISES = OTHER_PROMISES | {clause.name: clause.promise for clause in CLAUSES}
ON_MODELS = {clause.name for clause in CLAUSES if clause.on_models}
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
CACHES = ("TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_HOME", "TRITON_CACHE_DIR")
TAIL_BYTES = 2000  # of what a process said before it crashed
END_S = 5.0  # that a process may take to end once it has closed its pipe


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of the process that a technique is tried in. Memory counts from what the libraries take."""

    clause_s: float = 60.0
    loading_s: float = 120.0
    total_s: float = 300.0
    memory_bytes: int = 2 << 30
    file_bytes: int = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one clause ended, on one shape or on none (""); `reason` says what was wrong, or why it was not asked."""

    clause: str
    shape: str
    status: Status
    reason: str
    took_s: float

    @property
    def promise(self) -> str:
        return PROMISES.get(self.clause, self.clause)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All outcomes of one technique. `about` holds axis, paper, distribution, version, licence and identity once it has loaded."""

    technique: str
    about: dict[str, str] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()
    took_s: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """Untried: nothing is wrong, and no model could be built here, so nothing is shown either."""
        if any(outcome.status == "broken" for outcome in self.outcomes):
            return "broken"
        return "kept" if any(o.clause == "forward" and o.status == "kept" for o in self.outcomes) else "untried"

    def to_json(self) -> dict[str, Any]:
        outcomes = [asdict(o) | {"promise": o.promise} for o in self.outcomes]
        return {"technique": self.technique, "verdict": self.verdict, **self.about, "took_s": self.took_s, "outcomes": outcomes}


LIMITS = Limits()


def check(
    target: str,
    limits: Limits = LIMITS,
    *,
    shapes: Sequence[str] = (*SHAPES, MIXTURE),
    seen: Callable[[str], None] = lambda text: None,
) -> list[Report]:
    """Check every technique of a package folder, or one that is installed. Raises UsageError where there is neither.

    `seen` is told what begins.
    """
    folder, names = _resolved(target)
    return [_check_one(name, _job(name, folder, shapes, limits), limits, seen) for name in names]


def _job(name: str, folder: Path | None, shapes: Sequence[str], limits: Limits) -> dict[str, Any]:
    """What the process is told."""
    return {
        "parent": os.getpid(),
        "technique": name,
        "folder": None if folder is None else str(folder),
        "shapes": list(shapes),
        "memory_bytes": limits.memory_bytes,
        "file_bytes": limits.file_bytes,
    }


def _resolved(target: str) -> tuple[Path | None, list[str]]:
    path = Path(target)
    if (path / "pyproject.toml").is_file():
        return path.resolve(), list(source.read(path).techniques)
    known = registry.entries("technique")
    if target in known:
        return None, [target]
    if path.is_dir():
        return path, list(source.read(path).techniques)
    if path.exists() or len(path.parts) > 1:
        raise UsageError(f"{target} is no folder; give the folder of a plugin package, or the name of an installed technique.")
    raise UsageError(f"{target!r} is no folder here and no installed technique. {UnknownName('technique', target, known)}")


def _check_one(name: str, job: dict[str, Any], limits: Limits, seen: Callable[[str], None]) -> Report:
    started_s = time.monotonic()
    about: dict[str, str] = {}
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="effbench-check-", ignore_cleanup_errors=True) as scratch:
        for message in _messages(job, Path(scratch), limits):
            if "about" in message:
                about = message["about"]
            elif "started" in message:
                seen(" on ".join(filter(None, (f"{name}: {message['started']}", message["shape"]))))
            elif "clause" in message:
                outcomes.append(Outcome(**message))
    return Report(technique=name, about=about, outcomes=tuple(outcomes), took_s=round(time.monotonic() - started_s, 2))


def _messages(job: dict[str, Any], scratch: Path, limits: Limits) -> Iterator[dict[str, Any]]:
    """What the process says, and at its end, if that is not as it should be, the outcome that follows from it."""
    (scratch / "work").mkdir()
    read_fd, write_fd = os.pipe()
    told = json.dumps({**job, "channel": write_fd})
    said = scratch / "said"
    with said.open("ab") as output:  # each clause starts with an empty file
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "effbench.plugins.child", told], cwd=scratch / "work", stdin=subprocess.DEVNULL,
            stdout=output, stderr=output, pass_fds=(write_fd,), start_new_session=True, env=_environment(scratch / "work"),
        )  # fmt: skip
    os.close(write_fd)
    last = {"started": LOADING, "shape": ""}
    began_s = clause_began_s = time.monotonic()
    reason = ""
    try:
        lines = _Lines(read_fd)
        while True:
            most_s = limits.loading_s if last["started"] == LOADING else limits.clause_s
            limit_s = min(clause_began_s + most_s, began_s + limits.total_s)
            message = lines.next(limit_s)
            if message is None:
                late_s = time.monotonic() - clause_began_s
                reason = f"it did not end within {late_s:.0f} s, so the check was ended"
                break
            if not message:  # the process is gone
                reason = _end_of(process, said)
                break
            if message.get("done"):
                break
            clause_began_s = time.monotonic()
            last = message if "started" in message else {"started": LOADING, "shape": ""} if "about" in message else last
            yield message
    finally:
        os.close(read_fd)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if reason:
        took_s = round(time.monotonic() - clause_began_s, 3)
        yield {"clause": last["started"], "shape": last["shape"], "status": "broken", "reason": reason, "took_s": took_s}


class _Lines:
    """JSON objects, one a line, from a pipe."""

    def __init__(self, fd: int):
        self.fd, self.rest = fd, b""

    def next(self, deadline_s: float) -> dict[str, Any] | None:
        """The next object; {} at the end of the pipe, None when the deadline (monotonic) has passed."""
        while True:
            line, newline, rest = self.rest.partition(b"\n")
            if newline:
                self.rest = rest
                try:
                    found = json.loads(line)
                except ValueError:  # something else wrote to the pipe
                    continue
                if isinstance(found, dict) and found:
                    return found
                continue
            ready, _, _ = select.select([self.fd], [], [], max(0.0, deadline_s - time.monotonic()))
            if not ready:
                return None
            data = os.read(self.fd, 1 << 16)
            if not data:
                return {}
            self.rest += data


def _end_of(process: subprocess.Popen[bytes], said: Path) -> str:
    """How a process ended that should not have, and the last line it said."""
    try:
        code = process.wait(timeout=END_S)
    except subprocess.TimeoutExpired:
        return "its process closed the pipe it answers on"
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    lines = said.read_bytes()[-TAIL_BYTES:].decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"its process {how}" + (f": {last}" if last else "")


def _environment(scratch: Path) -> dict[str, str]:
    """One thread, no network, caches in the temporary folder."""
    own = {**dict.fromkeys(ONE_THREAD, "1"), **dict.fromkeys(CACHES, str(scratch))}
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **own, **quiet}
