"""What the submit page does, without the page: receive, verify in another process, decide.

    upload ── queue (bytes and an entry) ── verify, a child with limits ── verified ── a maintainer ── accept, a child ── rows

Nothing of a bundle is opened in this process.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pandas as pd

from effbench.errors import StoreError, UsageError
from effbench.exchange.accepting import Accepted, accept_in_child
from effbench.exchange.locking import one_at_a_time
from effbench.exchange.queue import Queue, folder, may_decide
from effbench.exchange.queue_tables import Entry, Event
from effbench.exchange.report import Report
from leaderboard_app import data

VERDICTS = {
    "accepted": "Verified: every row follows from its traces, and nothing implausible was found. A maintainer decides next.",
    "accepted with remarks": "Verified, with remarks that a maintainer reads before deciding.",
    "rejected": "Rejected: the reasons are below. Nothing of it is shown on the board.",
}


def queue() -> Queue:
    return Queue(folder())


def problem(of: Queue) -> str:
    """Why nothing can be received, in a sentence; empty where the folder can be written or made. Writes nothing."""
    nearest = next(path for path in (of.path.absolute(), *of.path.absolute().parents) if path.exists())
    if not nearest.is_dir():
        return f"The queue's folder {of.path} cannot be made: {nearest} is a file."
    return "" if os.access(nearest, os.W_OK | os.X_OK) else f"The queue's folder {of.path} cannot be written here."


def take(of: Queue, content: bytes, name: str) -> Entry:
    """Keep an upload and verify it. Raises UsageError and StoreError."""
    with data.turn().aside():
        entry = of.receive(content, name)
        return check(of, entry) if entry.state == "received" else entry


def check(of: Queue, entry: Entry) -> Entry:
    """Verify a received bundle in a process of its own and keep what it said. Raises UsageError and StoreError."""
    from effbench.exchange.verify import verify

    with data.turn().aside():
        return of.verified(entry.digest, verify(of.bytes_of(entry.digest), results=list(data.folders())))


def accepted_into() -> Path:
    """The results directory that accepted rows go to: the board's first."""
    return data.folders()[0]


def accept(of: Queue, digest: str, *, token: str, who: str, why: str) -> Accepted:
    """Write the rows of a verified bundle into the results, in a process of its own, and keep the decision. Killed half-way, it
    is finished by doing it again. Raises UsageError and StoreError."""
    if not may_decide(token) or not who.strip() or not why.strip():
        of.decide(digest, "accepted", token=token, who=who, why=why)  # says what is missing
    with data.turn().aside(), one_at_a_time(of.path / "deciding"):
        entry = of.entry(digest)
        if entry is None or entry.state != "verified":
            raise UsageError(f"Bundle {digest[:12]} does not wait for a decision: it is {entry.state if entry else 'unknown'}.")
        path = of.bytes_of(digest)
        try:
            intact = hashlib.sha256(path.read_bytes()).hexdigest() == digest
        except OSError:
            intact = False
        if not intact:
            raise StoreError(
                f"The bytes of bundle {digest[:12]} are not those that were received. Ask for it to be sent again."
            )
        into = accepted_into()
        done = accept_in_child(path, into, [folder for folder in data.folders() if folder != into])
        of.decide(digest, "accepted", token=token, who=who, why=why)
        return done


def reject(of: Queue, digest: str, *, token: str, who: str, why: str) -> Entry:
    """Raises UsageError and StoreError."""
    if not may_decide(token):
        return of.decide(digest, "rejected", token=token, who=who, why=why)
    with one_at_a_time(of.path / "deciding"):
        return of.decide(digest, "rejected", token=token, who=who, why=why)


def entries_frame(entries: list[Entry]) -> pd.DataFrame:
    """One line a bundle."""
    lines = [
        {
            "bundle": entry.digest[:12],
            "state": entry.state,
            "file": entry.name,
            "megabytes": entry.num_bytes / 1e6,
            "received": entry.received_at,
            "changed": entry.changed_at,
            "by": entry.changed_by,
            "why": entry.why,
        }
        for entry in entries
    ]
    return pd.DataFrame(lines, columns=["bundle", "state", "file", "megabytes", "received", "changed", "by", "why"])


def findings_frame(report: Report) -> pd.DataFrame:
    """One line a finding, what refuses the bundle first."""
    ordered = sorted(report.findings, key=lambda finding: finding.severity != "refused")
    lines = [{"severity": f.severity, "check": f.check, "found": f.message, "where": f.where} for f in ordered]
    return pd.DataFrame(lines, columns=["severity", "check", "found", "where"])


def trail_frame(trail: list[Event]) -> pd.DataFrame:
    """One line a change of state, newest first."""
    lines = [{"at": e.at, "who": e.who, "from": e.before or "–", "to": e.after, "why": e.why} for e in trail]
    return pd.DataFrame(lines, columns=["at", "who", "from", "to", "why"])
