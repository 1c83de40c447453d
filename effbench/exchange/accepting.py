"""A verified bundle becomes rows of a results directory, marked as submitted.

    bundle ── private copy ── verify (its own process) ── submission file ── launches with traces ── rows

The submission comes first: from then on its rows count as submitted, whatever happens before the last of them is written. A run that
was killed half-way is finished by running it again, and a bundle that is there already is left alone. What is in the directory is
never overwritten: what is known and equal is left alone, what is known and differs refuses the whole bundle.

`python -m effbench.exchange.accepting BUNDLE RESULTS [KNOWN ...]` does the same and prints one JSON object, so that an
application needs to decode nothing of a bundle in its own process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from effbench.errors import BundleError, EffbenchError, StoreError, UsageError
from effbench.exchange import limits
from effbench.exchange.contents import Contents
from effbench.exchange.levels import SUBMISSIONS, Submission, read_submission, write_submission
from effbench.exchange.locking import one_at_a_time
from effbench.exchange.queue import TOKEN
from effbench.exchange.report import Report, refusals
from effbench.schema import SCHEMA_VERSION, CaseRecord, Launch, Trace
from effbench.store import IDENTITY, Store

CHILD_LIMIT_S = 120.0
MAX_REMARKS, LONGEST_REMARK, LONGEST_FIELD = 50, 300, 200
Verify = Callable[..., Report]
Read = Callable[[Path], Contents]


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """What `accept` did: rows and launches that it wrote, none where they were there already."""

    bundle_sha256: str
    verdict: str
    remarks: tuple[str, ...]
    rows: int
    rows_written: int
    launches_written: int


def accept(
    bundle: Path, store: Store, *, known: Sequence[Path] = (), verify: Verify | None = None, read: Read | None = None
) -> Accepted:
    """Verify a bundle and write its rows into `store`. `known` are other results directories, whose rows it must not repeat.

    `verify` and `read` are `verify.verify` and `bundle.contents_of`. Raises BundleError for a bundle that is refused, naming
    the reasons, UsageError where there is no such file, and StoreError where the directory cannot be read or written."""
    verify, read = verify or _verify, read or _contents_of
    with _private_copy(bundle) as copy, one_at_a_time(store.path / SUBMISSIONS):
        sha256 = hashlib.sha256(copy.read_bytes()).hexdigest()
        earlier = read_submission(store.path, sha256)
        report = verify(copy, results=[*known, *([] if earlier else [store.path])])
        if report.verdict == "rejected":
            raise BundleError("verdict", _refused(bundle, report))
        contents = read(copy)
        rows, launches = _new(contents, store, earlier)
        submission = earlier or _submission(sha256, report, contents, rows, launches)
        if earlier is None:
            write_submission(store.path, submission)
        for launch in launches:
            store.write_launch(launch, contents.traces.get(launch.launch_id, Trace()))
        for row in rows:
            store.write_case(row)
    return Accepted(
        bundle_sha256=sha256, verdict=submission.verdict, remarks=submission.remarks, rows=len(contents.cases),
        rows_written=len(rows), launches_written=len(launches),
    )  # fmt: skip


def accept_in_child(bundle: Path, results: Path, known: Iterable[Path] = (), *, limit_s: float = CHILD_LIMIT_S) -> Accepted:
    """`accept` in a process of its own. Raises BundleError with what it said, or StoreError where it gave no answer in time."""
    command = [sys.executable, "-P", "-m", "effbench.exchange.accepting", *map(str, (bundle, results, *known))]
    own = {name: value for name, value in os.environ.items() if name != TOKEN}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False, env=own)
        said: dict[str, Any] = json.loads(done.stdout or "{}")
    except (subprocess.TimeoutExpired, OSError, ValueError) as fault:
        raise StoreError(
            f"Accepting {bundle.name} gave no answer ({type(fault).__name__}). Run it again to finish it."
        ) from None
    if "refused" in said:
        raise BundleError("accept", said["refused"])
    if "rows_written" not in said:
        raise StoreError(f"Accepting {bundle.name} ended with code {done.returncode}. Run it again to finish it.")
    return Accepted(**{**said, "remarks": tuple(said["remarks"])})


def main(arguments: Sequence[str]) -> int:
    """The child of `accept_in_child`: one JSON object on stdout."""
    bundle, results, *known = map(Path, arguments)
    try:
        print(json.dumps(asdict(accept(bundle, Store(results), known=known))))
    except EffbenchError as error:
        print(json.dumps({"refused": str(error)}))
        return 1
    return 0


def _verify(path: Path, *, results: Sequence[Path]) -> Report:
    from effbench.exchange.verify import verify

    return verify(path, results=results)


def _contents_of(path: Path) -> Contents:
    from effbench.exchange.bundle import contents_of

    return contents_of(path)


@contextlib.contextmanager
def _private_copy(bundle: Path) -> Iterator[Path]:
    """What is verified is what is read: nobody else can change the copy. Raises UsageError."""
    with tempfile.TemporaryDirectory(prefix="effbench-accept-") as folder:
        copy = Path(folder) / "bundle.zip"
        try:
            if not bundle.is_file():
                raise UsageError(f"{bundle} is no file. Name a bundle that `effbench submit` wrote.")
            if bundle.stat().st_size > limits.BUNDLE_BYTES:
                raise UsageError(f"{bundle} has more than the {limits.BUNDLE_BYTES / 1e6:.0f} MB that a bundle may have.")
            shutil.copyfile(bundle, copy)
        except OSError as fault:
            raise UsageError(f"{bundle} cannot be read: {fault.strerror or fault}.") from None
        yield copy


def _new(contents: Contents, store: Store, earlier: Submission | None) -> tuple[list[CaseRecord], list[Launch]]:
    """The rows and launches that are not there yet. Raises BundleError where one that is there would change, where all of them are
    there from elsewhere, and for what this effbench could not read again."""
    if newer := [row.run_id for row in contents.cases if row.schema_version > SCHEMA_VERSION]:
        said = f"Rows of a later schema than {SCHEMA_VERSION} ({_named(newer)}): update effbench to accept them."
        raise BundleError("schema", said)
    rows, launches = {row.run_id: row for row in contents.cases}, dict(contents.launches)
    known_rows, known_launches = _ids(store, "runs") & rows.keys(), _ids(store, "launches") & launches.keys()
    if others := known_rows - set(earlier.run_ids if earlier else ()):
        there = [row for row in store.cases() if row.run_id in others]
        _refuse_other([row.run_id for row in there if row != rows[row.run_id]], "rows", store)
    if others := known_launches - set(earlier.launch_ids if earlier else ()):
        kept = [launch for launch in store.launches() if launch.launch_id in others]
        _refuse_other([i.launch_id for i in kept if not _same(i, store, launches[i.launch_id], contents)], "launches", store)
    if earlier is None and len(known_rows) == len(rows):
        said = f"All {len(rows)} rows of the bundle are in {store.path} already; there is nothing to accept."
        raise BundleError("known", said)
    return (
        [row for run_id, row in rows.items() if run_id not in known_rows],
        [launch for launch_id, launch in launches.items() if launch_id not in known_launches],
    )


def _refuse_other(ids: Sequence[str], what: str, store: Store) -> None:
    if ids:
        said = f"{len(ids)} {what} are in {store.path} with other content ({_named(ids)}); nothing was written."
        raise BundleError("known", said)


def _ids(store: Store, name: str) -> frozenset[str]:
    identity = IDENTITY[name]
    return frozenset(map(str, store.table(name, [identity])[0][identity].to_pylist()))


def _same(there: Launch, store: Store, launch: Launch, contents: Contents) -> bool:
    """Whether a known launch and its trace are those of the bundle."""
    ours, theirs = store.trace(launch.launch_id), contents.traces.get(launch.launch_id, Trace())
    pairs = list(zip(ours.series, theirs.series, strict=False))
    equal = len(ours.series) == len(theirs.series) and all(
        (a.name, a.unit, a.scope, a.source) == (b.name, b.unit, b.scope, b.source)
        and np.array_equal(a.t_s, b.t_s, equal_nan=True)
        and np.array_equal(a.values, b.values, equal_nan=True)
        for a, b in pairs
    )
    return equal and there == launch


def _named(ids: Sequence[str]) -> str:
    return ", ".join(one[:12] for one in ids[:3]) + (" …" if len(ids) > 3 else "")


def _submission(
    sha256: str, report: Report, contents: Contents, rows: Sequence[CaseRecord], launches: Sequence[Launch]
) -> Submission:
    return Submission(
        bundle_sha256=sha256,
        accepted_at=datetime.now(UTC).isoformat(timespec="seconds"),
        contact=_text(contents.manifest.get("contact"), LONGEST_FIELD),
        licence=_text(contents.manifest.get("licence"), LONGEST_FIELD),
        verdict=report.verdict,
        remarks=remarks_of(report),
        run_ids=tuple(row.run_id for row in rows),
        launch_ids=tuple(launch.launch_id for launch in launches),
    )


def remarks_of(report: Report) -> tuple[str, ...]:
    """The findings of a report as one line each, cut to what a page can show."""
    lines = [_text(f"{f.where}: {f.message}" if f.where else f.message, LONGEST_REMARK) for f in report.findings]
    more = len(lines) - MAX_REMARKS
    return (*lines[:MAX_REMARKS], *([f"and {more} more"] if more > 0 else []))


def _text(value: object, longest: int) -> str:
    """One line of printable text."""
    text = "" if value is None else "".join(letter if letter.isprintable() else " " for letter in str(value))
    return " ".join(text.split())[:longest]


def _refused(bundle: Path, report: Report) -> str:
    reasons = [_text(f"{f.check}: {f.message}", LONGEST_REMARK) for f in refusals(report.findings)]
    more = f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
    return f"{bundle} is rejected, nothing was written: {'; '.join(reasons[:5])}{more}. `effbench verify` shows all of it."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
