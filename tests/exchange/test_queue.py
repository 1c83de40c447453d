"""The queue of submissions: states, who may decide, the audit trail, many at once, a writer that is killed."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from effbench.errors import StoreError, UsageError
from effbench.exchange import limits, queue
from effbench.exchange.queue import BY_VERIFICATION, TOKEN, Queue, folder, may_decide
from effbench.exchange.report import Finding, Report

SECRET = "a-long-tøken"
HOSTILE = "<script>alert(1)</script>\n\x1b[2J\u202e**b** \ud800"


def report(digest: str = "0" * 64, *, refused: bool = False, findings: int = 0) -> Report:
    severity = "refused" if refused else "remark"
    found = tuple(Finding(check="digits", severity=severity, message=f"finding {i}") for i in range(findings or refused))
    return Report(bundle_sha256=digest, rows=2, launches=4, findings=found, notes=("no Landlock here",))


def verified(of: Queue, content: bytes = b"bundle") -> str:
    digest = of.receive(content, "b.zip").digest
    of.verified(digest, report(digest))
    return digest


@pytest.fixture
def of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    monkeypatch.setenv(TOKEN, SECRET)
    return Queue(tmp_path / "queue")


def test_a_bundle_is_received_verified_and_decided_and_every_step_is_in_the_trail(of: Queue) -> None:
    entry = of.receive(b"bundle", "my bundle.zip")
    assert (entry.state, entry.num_bytes, entry.report) == ("received", 6, None)
    assert entry.digest == hashlib.sha256(b"bundle").hexdigest()
    assert of.bytes_of(entry.digest).read_bytes() == b"bundle"
    entry = of.verified(entry.digest, report(entry.digest, findings=1))
    assert (entry.state, entry.why) == ("verified", "accepted with remarks")
    assert entry.report == report(entry.digest, findings=1)
    entry = of.decide(entry.digest, "accepted", token=SECRET, who="Ada", why="looks right")
    assert (entry.state, entry.changed_by, entry.why) == ("accepted", "Ada", "looks right")
    steps = [(event.before, event.after, event.who) for event in reversed(of.trail(entry.digest))]
    assert steps == [(None, "received", "visitor"), ("received", "verified", BY_VERIFICATION), ("verified", "accepted", "Ada")]
    assert of.entries() == [replace(entry, report=None)]
    assert of.entries(("received",)) == []
    assert of.counts() == {"accepted": 1}


def test_what_verification_refuses_is_rejected_by_it_with_the_reasons(of: Queue) -> None:
    digest = of.receive(b"bundle", "b.zip").digest
    entry = of.verified(digest, report(digest, refused=True))
    assert (entry.state, entry.changed_by, entry.why) == ("rejected", BY_VERIFICATION, "finding 0")
    with pytest.raises(UsageError, match="is rejected and cannot become accepted"):
        of.decide(digest, "accepted", token=SECRET, who="Ada", why="all the same")


def test_a_later_report_does_not_undo_a_decision(of: Queue) -> None:
    digest = verified(of)
    of.decide(digest, "rejected", token=SECRET, who="Ada", why="no")
    assert of.verified(digest, report(digest)).state == "rejected"
    assert len(of.trail(digest)) == 3


@pytest.mark.parametrize("given", ["", "wrong", SECRET + " ", SECRET.upper(), "tøken", "\ud800"])
def test_without_the_token_nobody_decides(of: Queue, given: str) -> None:
    digest = verified(of)
    with pytest.raises(UsageError, match="Only a maintainer"):
        of.decide(digest, "accepted", token=given, who="Eve", why="because")
    assert of.entry(digest).state == "verified"


@pytest.mark.parametrize("known", [None, ""])
def test_without_a_token_in_the_environment_no_text_is_one(
    of: Queue, monkeypatch: pytest.MonkeyPatch, known: str | None
) -> None:
    digest = verified(of)
    monkeypatch.delenv(TOKEN)
    if known is not None:
        monkeypatch.setenv(TOKEN, known)
    assert not may_decide("") and not may_decide(SECRET) and not queue.can_decide()
    with pytest.raises(UsageError, match="Only a maintainer"):
        of.decide(digest, "accepted", token="", who="Eve", why="because")


def test_the_token_is_compared_in_constant_time(of: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(queue.hmac, "compare_digest", lambda a, b: asked.append((a, b)) or False)
    assert not may_decide("x")
    assert asked == [(b"x", SECRET.encode())]


@pytest.mark.parametrize(("who", "why"), [("", "reason"), ("Ada", ""), (" ", "\n")])
def test_a_decision_has_a_name_and_a_reason(of: Queue, who: str, why: str) -> None:
    with pytest.raises(UsageError, match="a name and a reason"):
        of.decide(verified(of), "rejected", token=SECRET, who=who, why=why)


def test_only_a_verified_bundle_is_accepted_and_an_unknown_one_is_none(of: Queue) -> None:
    digest = of.receive(b"bundle", "b.zip").digest
    with pytest.raises(UsageError, match="is received and cannot become accepted"):
        of.decide(digest, "accepted", token=SECRET, who="Ada", why="hurry")
    assert of.decide(digest, "rejected", token=SECRET, who="Ada", why="junk").state == "rejected"
    with pytest.raises(UsageError, match="No bundle ffff"):
        of.decide("f" * 64, "accepted", token=SECRET, who="Ada", why="?")
    assert of.entry("f" * 64) is None


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM audit",
        "UPDATE audit SET who = 'nobody'",
        "DELETE FROM bundles",
        "UPDATE bundles SET state = 'received'",
        "UPDATE bundles SET name = 'other'",
        "UPDATE bundles SET digest = 'f'",
        "INSERT INTO bundles (digest, name, num_bytes, state, received_at, changed_at, changed_by)"
        f" VALUES ('{'e' * 64}', '', 1, 'accepted', '', '', '')",
        f"INSERT INTO audit (digest, at, who, after, why) VALUES ('{'e' * 64}', '', '', 'accepted', '')",
    ],
)
def test_the_database_refuses_to_forget_or_to_skip_a_state(of: Queue, statement: str) -> None:
    digest = verified(of)
    of.decide(digest, "accepted", token=SECRET, who="Ada", why="fine")
    before = of.trail()
    with closing(sqlite3.connect(of.path / queue.DATABASE)) as db:
        db.execute("PRAGMA foreign_keys = ON")
        with pytest.raises(sqlite3.IntegrityError):
            db.execute(statement)
    assert of.trail() == before
    assert of.entry(digest).state == "accepted"


def test_the_same_bytes_are_one_entry_and_lost_bytes_come_back(of: Queue) -> None:
    digest = of.receive(b"bundle", "first.zip").digest
    assert of.receive(b"bundle", "second.zip").name == "first.zip"
    assert len(of.entries()) == len(of.trail()) == 1
    of.bytes_of(digest).unlink()
    of.receive(b"bundle", "third.zip")
    assert of.bytes_of(digest).read_bytes() == b"bundle"


def test_texts_of_another_hand_become_one_line(of: Queue) -> None:
    digest = of.receive(b"bundle", HOSTILE * 50).digest
    found = Finding(check=HOSTILE, severity="remark", message=HOSTILE * 50, where=HOSTILE)
    entry = of.verified(
        digest, Report(bundle_sha256=digest, rows=1, launches=1, findings=(found,) * 3_000, notes=(HOSTILE,) * 99)
    )
    texts = [entry.name, *(text for f in entry.report.findings for text in (f.check, f.message, f.where)), *entry.report.notes]
    assert all(text.isprintable() and len(text) <= 300 for text in texts)
    assert entry.report.verdict == "accepted with remarks"
    assert len(entry.report.findings) == 51
    assert entry.report.findings[-1].message == "and 2950 more findings"


def test_too_large_and_empty_uploads_are_refused_in_a_sentence(of: Queue) -> None:
    with pytest.raises(UsageError, match=r"25\.0 MB; a bundle has at most 25 MB"):
        of.receive(b"\0" * (limits.BUNDLE_BYTES + 1), "b.zip")
    with pytest.raises(UsageError, match="empty"):
        of.receive(b"", "b.zip")
    assert not of.path.exists(), "nothing was made for them"


def test_decided_bytes_make_room_rejected_ones_before_accepted_ones_and_those_that_wait_never(
    of: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "TOTAL_BYTES", 30)
    took, junk, waits = (verified(of, letter * 10) for letter in (b"t", b"j", b"w"))
    of.decide(took, "accepted", token=SECRET, who="Ada", why="yes")
    of.decide(junk, "rejected", token=SECRET, who="Ada", why="no")
    for number, there in ((b"1", {took, waits}), (b"2", {waits})):
        of.receive(number * 10, "new.zip")
        assert {digest for digest in (took, junk, waits) if of.bytes_of(digest).exists()} == there
    with pytest.raises(UsageError, match="queue is full"):
        of.receive(b"3" * 10, "new.zip")


def test_a_full_queue_refuses_but_lets_go_of_rejected_bytes_first(of: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "TOTAL_BYTES", 25)
    junk = of.receive(b"j" * 10, "junk.zip").digest
    of.verified(junk, report(junk, refused=True))
    good = [of.receive(letter * 10, "good.zip").digest for letter in (b"a", b"b")]
    assert not of.bytes_of(junk).exists()
    assert of.entry(junk).state == "rejected", "its record stays"
    with pytest.raises(UsageError, match="queue is full"):
        of.receive(b"c" * 10, "more.zip")
    assert all(of.bytes_of(digest).exists() for digest in good)
    assert len(of.entries()) == 3


def test_a_queue_of_many_that_wait_is_full(of: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "WAITING_COUNT", 2)
    first = verified(of, b"1")
    of.receive(b"2", "b.zip")
    with pytest.raises(UsageError, match="queue is full"):
        of.receive(b"3", "b.zip")
    of.decide(first, "rejected", token=SECRET, who="Ada", why="no")
    assert of.receive(b"3", "b.zip").state == "received"


def test_where_there_is_no_queue_nothing_is_shown_and_nothing_made(tmp_path: Path) -> None:
    of = Queue(tmp_path / "none")
    assert (of.entries(), of.trail(), of.counts(), of.entry("0" * 64)) == ([], [], {}, None)
    assert not of.path.exists()


def test_a_folder_that_cannot_be_written_or_a_damaged_database_is_a_sentence(tmp_path: Path, of: Queue) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file, not a folder"):
        Queue(tmp_path / "file").receive(b"bundle", "b.zip")
    of.receive(b"bundle", "b.zip")
    (of.path / queue.DATABASE).write_bytes(b"this is no database " * 100)
    for use in (lambda: of.entries(), lambda: of.receive(b"other", "b.zip")):
        with pytest.raises(StoreError, match="cannot be used"):
            use()


def test_a_later_version_is_not_touched(of: Queue) -> None:
    of.receive(b"bundle", "b.zip")
    with closing(sqlite3.connect(of.path / queue.DATABASE)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="later effbench"):
        of.entries()


def test_the_folder_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(queue.FOLDER, raising=False)
    assert folder() == Path("results/queue")
    monkeypatch.setenv(queue.FOLDER, "elsewhere")
    assert folder() == Path("elsewhere")


def intact(of: Queue) -> None:
    """What must hold whatever happened: a sound database, whole bytes for every entry, a trail that ends where each entry is."""
    with closing(sqlite3.connect(of.path / queue.DATABASE)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        assert not db.execute("PRAGMA foreign_key_check").fetchall()
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    last = {event.digest: event.after for event in reversed(of.trail(limit=100_000))}
    entries = of.entries(limit=100_000)
    assert last == {entry.digest: entry.state for entry in entries}
    for entry in entries:
        assert hashlib.sha256(of.bytes_of(entry.digest).read_bytes()).hexdigest() == entry.digest


def test_a_hundred_uploads_at_once(of: Queue) -> None:
    contents = [os.urandom(200_000) for _ in range(100)]
    with ThreadPoolExecutor(100) as pool:
        entries = list(pool.map(lambda content: Queue(of.path).receive(content, "b.zip"), contents))
        again = list(pool.map(lambda _: Queue(of.path).receive(contents[0], "b.zip"), range(100)))
    assert {entry.digest for entry in entries} == {hashlib.sha256(content).hexdigest() for content in contents}
    assert {entry.digest for entry in again} == {entries[0].digest}
    assert of.counts() == {"received": 100}
    intact(of)


WRITER = """
import os, sys
from pathlib import Path
from effbench.exchange.queue import Queue
from effbench.exchange.report import Finding, Report
of, number = Queue(Path(sys.argv[1])), 0
print("ready", flush=True)
while True:
    number += 1
    digest = of.receive(os.urandom(60_000), f"{os.getpid()}-{number}.zip").digest
    bad = (Finding(check="c", severity="refused", message="m"),) if number % 3 == 0 else ()
    of.verified(digest, Report(bundle_sha256=digest, rows=1, launches=1, findings=bad))
    if number % 3 == 1:
        of.decide(digest, "accepted", token="secret", who="w", why="y")
"""


def test_a_writer_that_is_killed_at_any_moment_leaves_the_queue_intact(of: Queue) -> None:
    chance = random.Random(7)
    for number in range(10):
        command = [sys.executable, "-c", WRITER, str(of.path)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, TOKEN: "secret"})
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        time.sleep(chance.uniform(0, 0.15))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if number % 2:
            of.receive(b"after %d" % number, "after.zip")
            intact(of)
            kept = {path.name for path in (of.path / queue.BUNDLES).iterdir()}
            assert kept == {f"{entry.digest}.zip" for entry in of.entries(limit=100_000)}, "no leftover stays"
    assert of.counts()["received"] >= 5


def test_many_processes_make_the_database_once(tmp_path: Path) -> None:
    script = "import os, sys; from pathlib import Path; from effbench.exchange.queue import Queue\n"
    script += "sys.stdin.read(1); Queue(Path(sys.argv[1])).receive(os.urandom(999), 'b.zip')"
    path = tmp_path / "queue"
    children = [subprocess.Popen([sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE) for _ in range(6)]
    for child in children:
        child.communicate(b"x")
    assert [child.returncode for child in children] == [0] * 6
    assert Queue(path).counts() == {"received": 6}
    intact(Queue(path))
