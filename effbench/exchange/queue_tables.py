"""The tables of the queue of submissions, and records from their rows. Knows no files.

The database itself refuses every change of state but those of the queue, and writes each into an audit trail that lets nobody
alter or delete a line, whoever connects to it.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, replace
from typing import Any, Literal

from effbench.errors import UsageError
from effbench.exchange.report import Finding, Report, Severity

State = Literal["received", "verified", "accepted", "rejected"]
Decision = Literal["accepted", "rejected"]
FINDINGS_COUNT, TEXT_CHARACTERS = 50, 300  # of a report, as it is kept
VERSION = 1
SCHEMA = f"""
CREATE TABLE bundles (
  digest TEXT PRIMARY KEY CHECK (length(digest) = 64), name TEXT NOT NULL, num_bytes INTEGER NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('received', 'verified', 'accepted', 'rejected')),
  received_at TEXT NOT NULL, changed_at TEXT NOT NULL, changed_by TEXT NOT NULL, why TEXT NOT NULL DEFAULT '', report TEXT,
  kept INTEGER NOT NULL DEFAULT 1
);
CREATE INDEX by_state ON bundles (state, received_at);
CREATE TABLE audit (
  number INTEGER PRIMARY KEY AUTOINCREMENT, digest TEXT NOT NULL REFERENCES bundles (digest),
  at TEXT NOT NULL, who TEXT NOT NULL, before TEXT, after TEXT NOT NULL, why TEXT NOT NULL
);
CREATE TRIGGER arrives BEFORE INSERT ON bundles WHEN NEW.state != 'received'
  BEGIN SELECT RAISE(ABORT, 'a bundle begins as received'); END;
CREATE TRIGGER arrived AFTER INSERT ON bundles
  BEGIN INSERT INTO audit (digest, at, who, after, why) VALUES (NEW.digest, NEW.changed_at, NEW.changed_by, NEW.state, NEW.why); END;
CREATE TRIGGER moves BEFORE UPDATE OF state ON bundles
  WHEN (OLD.state || '>' || NEW.state) NOT IN ('received>verified', 'received>rejected', 'verified>accepted', 'verified>rejected')
  BEGIN SELECT RAISE(ABORT, 'no such change of state'); END;
CREATE TRIGGER moved AFTER UPDATE OF state ON bundles
  BEGIN INSERT INTO audit (digest, at, who, before, after, why)
    VALUES (NEW.digest, NEW.changed_at, NEW.changed_by, OLD.state, NEW.state, NEW.why); END;
CREATE TRIGGER same BEFORE UPDATE OF digest, name, num_bytes, received_at ON bundles
  BEGIN SELECT RAISE(ABORT, 'what was received does not change'); END;
CREATE TRIGGER stays BEFORE DELETE ON bundles BEGIN SELECT RAISE(ABORT, 'nothing is deleted'); END;
CREATE TRIGGER audit_stays BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'the audit trail is append-only'); END;
CREATE TRIGGER audit_same BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'the audit trail is append-only'); END;
PRAGMA user_version = {VERSION};
"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One uploaded bundle. `name` and the report's texts are of another hand: show them as text only."""

    digest: str
    name: str
    num_bytes: int
    state: State
    received_at: str
    changed_at: str
    changed_by: str
    why: str
    report: Report | None


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of the audit trail. `before` is None where the bundle arrived."""

    number: int
    digest: str
    at: str
    who: str
    before: State | None
    after: State
    why: str


def create(db: sqlite3.Connection) -> None:
    """Make the tables inside the caller's transaction, which `executescript` would end."""
    statement = ""
    for line in SCHEMA.splitlines():
        statement += f"{line}\n"
        if sqlite3.complete_statement(statement):
            db.execute(statement)
            statement = ""


def entry_of(row: sqlite3.Row | None) -> Entry:
    """Raises UsageError where there is no row."""
    if row is None:
        raise UsageError("No such bundle is in the queue.")
    fields: dict[str, Any] = {name: row[name] for name in Entry.__dataclass_fields__ if name != "report"}
    return Entry(**fields, report=_report(row["report"]))


def _report(text: str | None) -> Report | None:
    try:
        return None if text is None else Report.from_json(json.loads(text))
    except (ValueError, KeyError, TypeError):
        return None


def shortened(report: Report) -> Report:
    """The report as a page can show it: refusals first, each text cut to a line, with the same verdict."""
    first = sorted(report.findings, key=lambda finding: finding.severity != "refused")[:FINDINGS_COUNT]
    kept = [replace(f, check=one_line(f.check), message=one_line(f.message), where=one_line(f.where)) for f in first]
    if more := len(report.findings) - len(kept):
        severity: Severity = "refused" if report.verdict == "rejected" else "remark"
        kept.append(Finding(check="report", severity=severity, message=f"and {more} more findings"))
    return replace(report, findings=tuple(kept), notes=tuple(map(one_line, report.notes[:FINDINGS_COUNT])))


def one_line(value: str) -> str:
    """One line of printable text."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in value).split())[:TEXT_CHARACTERS]
