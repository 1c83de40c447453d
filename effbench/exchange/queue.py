"""Bundles that wait for a decision: an SQLite database and, beside it, the bytes that were uploaded, by digest.

    received ──▶ verified ──▶ accepted
        └────────────┴──────▶ rejected        by verification at once, or by a maintainer

Nothing of a bundle is opened here. A bundle's entry and its bytes appear together: the bytes are published inside the transaction
that adds the entry, and bytes without an entry, which a killed writer leaves, are removed by the next one. The database itself
refuses every other change of state, and writes each change to an audit trail that it lets nobody alter.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from effbench.errors import StoreError, UsageError
from effbench.exchange import limits
from effbench.exchange.locking import one_at_a_time
from effbench.exchange.queue_tables import VERSION, Decision, Entry, Event, State, create, entry_of, one_line, shortened
from effbench.exchange.report import Report
from effbench.files import publish, remove_leftovers, unlink

WAITING: tuple[State, ...] = ("received", "verified")
TOKEN = "EFFBENCH_MAINTAINER_TOKEN"
FOLDER, DEFAULT_FOLDER = "EFFBENCH_QUEUE", Path("results/queue")
DATABASE, BUNDLES = "queue.sqlite", "bundles"
TOTAL_BYTES = 3_000_000_000  # of all bundles kept
WAITING_COUNT, ENTRIES_COUNT = 1_000, 100_000
PATIENCE_S = 120.0  # for the others' transactions: a hundred uploads at once wait for each other
BY_VERIFICATION = "verification"


def folder() -> Path:
    """Where the queue is: EFFBENCH_QUEUE, else results/queue."""
    return Path(os.environ.get(FOLDER) or DEFAULT_FOLDER)


def can_decide() -> bool:
    """Whether this process knows a maintainer's token at all."""
    return bool(os.environ.get(TOKEN))


def may_decide(token: str) -> bool:
    """Whether this is the maintainer's token, compared in constant time; without one in the environment nobody may."""
    wanted = os.environ.get(TOKEN, "")
    given = token.encode("utf-8", "backslashreplace")
    return hmac.compare_digest(given, wanted.encode("utf-8", "backslashreplace")) and bool(wanted)


class Queue:
    """The queue of one folder. Nothing is created before the first `receive`."""

    def __init__(self, path: Path):
        self.path = path

    def check_writable(self) -> None:
        """Prove a write into the folder. Raises StoreError."""
        publish(self.path / BUNDLES, None, b"\0" * 4096)
        with self._writing():
            pass

    def receive(self, data: bytes, name: str, *, who: str = "visitor") -> Entry:
        """Keep an uploaded bundle; the same bytes twice are one entry. Raises UsageError (too large, queue full), StoreError."""
        if not data:
            raise UsageError("The file is empty. Choose a bundle that `effbench submit` wrote.")
        if len(data) > limits.BUNDLE_BYTES:
            raise UsageError(f"The file has {len(data) / 1e6:.1f} MB; a bundle has at most {limits.BUNDLE_BYTES / 1e6:.0f} MB.")
        digest, now = hashlib.sha256(data).hexdigest(), _now()
        with self._writing() as db:
            self._remove_orphans(db)
            if self._row(db, digest) is None:
                self._make_room(db, len(data))
                publish(self.path / BUNDLES, f"{digest}.zip", data)
                db.execute(
                    "INSERT INTO bundles (digest, name, num_bytes, state, received_at, changed_at, changed_by)"
                    " VALUES (?, ?, ?, 'received', ?, ?, ?)",
                    (digest, one_line(name), len(data), now, now, one_line(who)),
                )
            elif not self.bytes_of(digest).exists():  # let go when room was needed, or removed by hand
                self._make_room(db, len(data))
                publish(self.path / BUNDLES, f"{digest}.zip", data)
                db.execute("UPDATE bundles SET kept = 1 WHERE digest = ?", (digest,))
            return entry_of(self._row(db, digest))

    def verified(self, digest: str, report: Report) -> Entry:
        """Keep what verification said of a received bundle; a refused one is rejected at once. Changes nothing later."""
        short = shortened(report)
        short_text = json.dumps(short.to_json())
        passed = report.verdict != "rejected"
        why = report.verdict if passed else one_line("; ".join(f.message for f in short.findings if f.severity == "refused"))
        with self._writing() as db:
            db.execute(
                "UPDATE bundles SET state = ?, report = ?, changed_at = ?, changed_by = ?, why = ?"
                " WHERE digest = ? AND state = 'received'",
                ("verified" if passed else "rejected", short_text, _now(), BY_VERIFICATION, why, digest),
            )
            return entry_of(self._row(db, digest))

    def decide(self, digest: str, decision: Decision, *, token: str, who: str, why: str) -> Entry:
        """Accept or reject, which needs the maintainer's token, a name and a reason. Raises UsageError."""
        if not may_decide(token):
            raise UsageError(f"Only a maintainer decides, with the token that {TOKEN} holds where the board runs.")
        if not who.strip() or not why.strip():
            raise UsageError("A decision needs a name and a reason: both go into the audit trail.")
        with self._writing() as db:
            row = self._row(db, digest)
            if row is None:
                raise UsageError(f"No bundle {digest[:12]} is in the queue.")
            try:
                db.execute(
                    "UPDATE bundles SET state = ?, changed_at = ?, changed_by = ?, why = ? WHERE digest = ?",
                    (decision, _now(), one_line(who), one_line(why), digest),
                )
            except sqlite3.IntegrityError:
                raise UsageError(f"Bundle {digest[:12]} is {row['state']} and cannot become {decision}.") from None
            return entry_of(self._row(db, digest))

    def entry(self, digest: str) -> Entry | None:
        """One bundle; None where it is not known. Raises StoreError."""
        with self._reading() as db:
            row = None if db is None else self._row(db, digest)
        return None if row is None else entry_of(row)

    def entries(self, states: tuple[State, ...] = (), limit: int = 200) -> list[Entry]:
        """The newest bundles, all or those in some states, without their reports. Raises StoreError."""
        marks = ",".join("?" * len(states))
        where = f"WHERE state IN ({marks})" if states else ""
        with self._reading() as db:
            if db is None:
                return []
            found = db.execute(
                f"SELECT NULL AS report, * FROM bundles {where} ORDER BY received_at DESC, digest LIMIT ?", (*states, limit)
            )
            return [entry_of(row) for row in found]

    def counts(self) -> dict[str, int]:
        """How many bundles are in each state. Raises StoreError."""
        with self._reading() as db:
            return {} if db is None else dict(db.execute("SELECT state, count(*) FROM bundles GROUP BY state").fetchall())

    def trail(self, digest: str | None = None, limit: int = 200) -> list[Event]:
        """The newest lines of the audit trail, of all bundles or one. Raises StoreError."""
        with self._reading() as db:
            if db is None:
                return []
            query = "SELECT * FROM audit WHERE ?1 IS NULL OR digest = ?1 ORDER BY number DESC LIMIT ?2"
            return [Event(**dict(row)) for row in db.execute(query, (digest, limit))]

    def bytes_of(self, digest: str) -> Path:
        """Where the bytes of a bundle are kept."""
        return self.path / BUNDLES / f"{digest}.zip"

    # -- inside

    def _make_room(self, db: sqlite3.Connection, num_bytes: int) -> None:
        """Let go of the bytes of decided bundles where there is no room: the oldest rejected ones first, then the oldest accepted,
        whose rows are in the results. Raises UsageError when that is not enough."""
        waiting = db.execute("SELECT count(*) FROM bundles WHERE state IN ('received', 'verified')").fetchone()[0]
        entries, kept = db.execute("SELECT count(*), coalesce(sum(num_bytes * kept), 0) FROM bundles").fetchone()
        if waiting >= WAITING_COUNT or entries >= ENTRIES_COUNT:
            raise UsageError("The queue is full: too many bundles wait for a decision. Try again when some are decided.")
        query = "SELECT digest, num_bytes FROM bundles WHERE state IN ('rejected', 'accepted') AND kept"
        for digest, size in db.execute(f"{query} ORDER BY state = 'accepted', changed_at").fetchall():
            if kept + num_bytes <= TOTAL_BYTES:
                return
            unlink(self.bytes_of(digest))
            db.execute("UPDATE bundles SET kept = 0 WHERE digest = ?", (digest,))
            kept -= size
        if kept + num_bytes > TOTAL_BYTES:
            raise UsageError(
                f"The queue is full: {kept / 1e6:.0f} MB of {TOTAL_BYTES / 1e6:.0f} MB are taken. Try again when some are decided."
            )

    def _remove_orphans(self, db: sqlite3.Connection) -> None:
        """Bytes without an entry are those of a writer that was killed: whoever writes holds the lock that we have now."""
        bundles = self.path / BUNDLES
        known = {f"{digest}.zip" for (digest,) in db.execute("SELECT digest FROM bundles WHERE kept")}
        for path in bundles.glob("*.zip"):
            if path.name not in known:
                unlink(path)
        remove_leftovers(bundles)

    @staticmethod
    def _row(db: sqlite3.Connection, digest: str) -> sqlite3.Row | None:
        found: sqlite3.Row | None = db.execute("SELECT * FROM bundles WHERE digest = ?", (digest,)).fetchone()
        return found

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the write lock from its start; the database is made on the first use. Raises StoreError."""
        if not (self.path / DATABASE).exists():
            self._make()
        with self._connected("rw") as db:
            if not _version(db):
                self._make()
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")

    def _make(self) -> None:
        """Make the database; of many that come at once one does, and one that was killed while it did is finished."""
        with one_at_a_time(self.path), self._connected("rwc") as db:
            if not _version(db):
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("BEGIN IMMEDIATE")
                create(db)
                db.execute("COMMIT")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection | None]:
        """None where there is no queue yet. Raises StoreError."""
        if not (self.path / DATABASE).exists():
            yield None
            return
        with self._connected("rw") as db:
            yield db if _version(db) else None

    @contextlib.contextmanager
    def _connected(self, mode: str) -> Iterator[sqlite3.Connection]:
        path = self.path / DATABASE
        try:
            uri = f"{path.absolute().as_uri()}?mode={mode}"
            with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=PATIENCE_S, isolation_level=None)) as db:
                db.row_factory = sqlite3.Row
                for line in ("foreign_keys = ON", "trusted_schema = OFF", "synchronous = FULL"):
                    db.execute(f"PRAGMA {line}")
                if _version(db) > VERSION:
                    raise StoreError(f"{path} was written by a later effbench. Update effbench to read it.")
                yield db
        except sqlite3.Error as fault:
            raise StoreError(
                f"The queue in {self.path} cannot be used ({fault}). Name another folder with {FOLDER}, or restore the file."
            ) from None


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
