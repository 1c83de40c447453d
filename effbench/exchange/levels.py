"""Where a row comes from, at rest: which bundle brought it, and whether somebody has measured it again here.

    <results>/submissions/<sha256 of the bundle>.json   one an accepted bundle: which rows and launches it brought, and whose it is
    <results>/reproductions/<run id>.json               one a submitted row: every attempt to measure it again, oldest first

A row that no submission names was measured here. A submission is on the disk before the first of its rows, so no row of another
hand ever stands there without its mark. Where a submission cannot be read, every row of that directory that no other one names
counts as submitted: a damaged file may lower trust, never raise it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from effbench.errors import StoreError
from effbench.exchange.agreement import Agreement, Outcome
from effbench.files import damaged, publish
from effbench.schema import canonical_json
from effbench.store import Store

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Level = Literal["measured here", "submitted", "reproduced"]
MEASURED: Level = "measured here"
SUBMITTED: Level = "submitted"
REPRODUCED: Level = "reproduced"
MEANING: Mapping[Level, str] = {
    MEASURED: "the rows of this board's own runs",
    SUBMITTED: "of another hand: it follows from its traces and is plausible, which a coherent forgery would be too",
    REPRODUCED: "of another hand, and measured again here on the same hardware with the same outcome",
}
MARKS: Mapping[Level, str] = {MEASURED: "", SUBMITTED: "†", REPRODUCED: "‡"}
SUBMISSIONS, REPRODUCTIONS = "submissions", "reproductions"
FORMAT = 1
UNKNOWN = "unknown"  # the bundle of a row whose submission cannot be read

Record = TypeVar("Record", "Submission", "Attempts")


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One accepted bundle. `contact`, `licence` and `remarks` are texts of another hand: show them as text only."""

    format: int = FORMAT
    bundle_sha256: str
    accepted_at: str  # UTC, ISO 8601
    contact: str
    licence: str
    verdict: str
    remarks: tuple[str, ...]
    run_ids: tuple[str, ...]
    launch_ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One row measured here to see whether a submitted one holds. Environments are `environment_of` the two rows."""

    by_run_id: str
    at: str
    outcome: Outcome
    same_hardware: bool
    metrics: tuple[Agreement, ...]
    submitted: Mapping[str, str]
    here: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Attempts:
    """All attempts on one submitted row, oldest first."""

    format: int = FORMAT
    run_id: str
    attempts: tuple[Attempt, ...]


@dataclass(frozen=True, kw_only=True)
class Levels:
    """What some results directories say of where their rows come from. `state` changes with the files."""

    submissions: Mapping[str, Submission] = field(default_factory=dict)  # by run id
    attempts: Mapping[str, tuple[Attempt, ...]] = field(default_factory=dict)  # by run id
    unnamed: frozenset[str] = frozenset()  # rows that may be of a submission that cannot be read
    warnings: tuple[str, ...] = ()
    state: str = ""

    def of(self, run_id: str) -> Level:
        """The level of a row. The newest attempt on the same hardware decides."""
        if run_id not in self.submissions and run_id not in self.unnamed:
            return MEASURED
        tried = [attempt for attempt in self.attempts.get(run_id, ()) if attempt.same_hardware]
        return REPRODUCED if tried and tried[-1].outcome == "reproduced" else SUBMITTED

    def __bool__(self) -> bool:
        """Whether any row was not measured here."""
        return bool(self.submissions or self.unnamed)

    @cached_property
    def by_run_id(self) -> Mapping[str, Level]:
        """The level of every row that was not measured here."""
        return {run_id: self.of(run_id) for run_id in (*self.submissions, *self.unnamed)}

    @cached_property
    def bundles(self) -> Mapping[str, str]:
        """For every row that was not measured here, the SHA-256 of the bundle that brought it."""
        return dict.fromkeys(self.unnamed, UNKNOWN) | {k: one.bundle_sha256 for k, one in self.submissions.items()}

    @cached_property
    def launch_ids(self) -> frozenset[str]:
        """The launches that bundles brought."""
        return frozenset(launch_id for one in self.submissions.values() for launch_id in one.launch_ids)

    def described(self) -> dict[str, Any]:
        """The fields of `analysis.origins.Origins`, for whoever shows rows."""
        return {"bundles": self.bundles, "levels": self.by_run_id, "marks": MARKS, "meanings": MEANING, "state": self.state}


def levels_of(folders: Iterable[Path]) -> Mapping[str, Level]:
    """The level of every row that was not measured here; every other row was. Never raises: `read_levels` says what was wrong."""
    return MappingProxyType(read_levels(folders).by_run_id)


def read_levels(folders: Iterable[Path]) -> Levels:
    """What these directories say, and a sentence for each file that cannot be read. Never raises."""
    folders = list(folders)
    state = fingerprint(folders)
    submissions: dict[str, Submission] = {}
    attempts: dict[str, tuple[Attempt, ...]] = {}
    warnings: list[str] = []
    hidden: list[Path] = []
    for folder in folders:
        before = len(warnings)
        for submission in _records(folder / SUBMISSIONS, Submission, warnings):
            for run_id in submission.run_ids:
                submissions.setdefault(run_id, submission)
        if len(warnings) > before:
            hidden.append(folder)
        for found in _records(folder / REPRODUCTIONS, Attempts, warnings):
            attempts[found.run_id] = (*attempts.get(found.run_id, ()), *found.attempts)
    unnamed = frozenset(run_id for folder in hidden for run_id in _run_ids(folder, warnings) if run_id not in submissions)
    return Levels(submissions=submissions, attempts=attempts, unnamed=unnamed, warnings=tuple(warnings), state=state)


def fingerprint(folders: Iterable[Path]) -> str:
    """Changes when a submission or reproduction is added, removed or rewritten; costs one listing of these folders."""
    marks = []
    for folder in folders:
        for name in (SUBMISSIONS, REPRODUCTIONS):
            for entry in _entries(folder / name):
                with suppress(OSError):
                    stat = entry.stat()
                    marks.append(f"{entry.path}:{stat.st_mtime_ns}:{stat.st_size}")
    return sha256("\n".join(sorted(marks)).encode("utf-8", "backslashreplace")).hexdigest()


def write_submission(folder: Path, submission: Submission) -> Path:
    """Keep a submission in a results directory. Raises StoreError."""
    return _publish(folder / SUBMISSIONS, submission.bundle_sha256, submission)


def read_submission(folder: Path, bundle_sha256: str) -> Submission | None:
    """The submission of a bundle; None where it was never accepted. Raises DamagedFile."""
    path = folder / SUBMISSIONS / _file_name(bundle_sha256)
    try:
        return _read(path, Submission)
    except FileNotFoundError:
        return None


def write_attempt(folder: Path, run_id: str, attempt: Attempt) -> Path:
    """Add an attempt to those on a submitted row; earlier ones stay. Raises StoreError and DamagedFile."""
    path = folder / REPRODUCTIONS / _file_name(run_id)
    try:
        earlier = _read(path, Attempts).attempts
    except FileNotFoundError:
        earlier = ()
    return _publish(path.parent, run_id, Attempts(run_id=run_id, attempts=(*earlier, attempt)))


def _publish(folder: Path, name: str, record: Submission | Attempts) -> Path:
    text = canonical_json(asdict(record))
    return publish(folder, _file_name(name), text.encode("utf-8", "backslashreplace"))


def _file_name(name: str) -> str:
    """A run id is a text of another hand: one that is no plain word is replaced by its digest."""
    plain = re.fullmatch(r"[A-Za-z0-9_-]{1,150}", name)
    return f"{name if plain else sha256(name.encode('utf-8', 'backslashreplace')).hexdigest()}.json"


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return [entry for entry in os.scandir(folder) if entry.name.endswith(".json") and not entry.name.startswith(".")]
    except OSError:
        return []


def _records(folder: Path, cls: type[Record], warnings: list[str]) -> Iterator[Record]:
    for path in sorted(Path(entry.path) for entry in _entries(folder)):
        try:
            yield _read(path, cls)
        except FileNotFoundError:
            continue
        except StoreError as fault:
            warnings.append(f"Skipped: {fault}")


_ADAPTERS: dict[str, Any] = {}  # making one takes longer than reading a file with it


def _adapter(cls: type[Record]) -> TypeAdapter[Record]:
    from pydantic import TypeAdapter

    if cls.__name__ not in _ADAPTERS:
        _ADAPTERS[cls.__name__] = TypeAdapter(cls)
    found: TypeAdapter[Record] = _ADAPTERS[cls.__name__]
    return found


def _read(path: Path, cls: type[Record]) -> Record:
    """Raises FileNotFoundError and DamagedFile."""
    from pydantic import ValidationError

    try:
        found: Record = _adapter(cls).validate_json(path.read_bytes())
        if found.format != FORMAT:
            raise ValueError(f"it has format {found.format}; this effbench reads {FORMAT}")
    except FileNotFoundError:
        raise
    except ValidationError as fault:
        first: Mapping[str, Any] = next(iter(fault.errors()), {})
        where = ".".join(map(str, first.get("loc", ())))
        raise damaged(path, ValueError(f"{where}: {first.get('msg', 'it is no JSON of ours')}")) from None
    except (OSError, ValueError) as fault:
        raise damaged(path, fault) from None
    return found


def _run_ids(folder: Path, warnings: list[str]) -> Sequence[str]:
    try:
        return [str(run_id) for run_id in Store(folder).table("runs", ["run_id"])[0]["run_id"].to_pylist()]
    except StoreError as fault:
        warnings.append(str(fault))
        return ()
