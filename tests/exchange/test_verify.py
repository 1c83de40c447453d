"""The verdict on a bundle: it is made in a process that can hurt nothing, and whatever happens there is a report."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import effbench.cli.exchange
from effbench.cli.app import main
from effbench.errors import BundleError, UsageError
from effbench.exchange import landlock, limits, sandbox
from effbench.exchange.bundle import write_bundle
from effbench.exchange.report import Finding
from effbench.exchange.verify import brief, clean, verify
from effbench.store import Store
from tests.exchange.bundles import Members, make_store, signed, with_rows

ROOT = Path(__file__).parents[2]
HTML = "<script>alert(1)</script>\x1b[2J\u202e"
assert effbench.cli.exchange, "its commands join the application"


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["effbench", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed results as a bundle."""
    path = tmp_path_factory.mktemp("real") / "real.zip"
    write_bundle(Store(ROOT / "results" / "reference"), path, contact="someone@example.org", licence="CC-BY-4.0")
    return path


def test_what_was_measured_is_accepted(real: Path) -> None:
    report = verify(real)
    assert report.verdict in ("accepted", "accepted with remarks"), report.findings
    assert (report.rows, report.launches) == (12, 36)
    assert report.notes == () or landlock.version() < 4


def test_what_is_here_already_is_refused(real: Path) -> None:
    report = verify(real, results=[ROOT / "results" / "reference"])
    assert report.verdict == "rejected"


def test_a_changed_number_is_refused(members: Members, tmp_path: Path) -> None:
    def faster(rows: list[Any]) -> None:
        for metric in rows[0]["metrics"]:
            if metric["name"] == "tokens_per_s":
                metric["value"] *= 2

    (tmp_path / "x.zip").write_bytes(signed(with_rows(members, "runs.parquet", faster)))
    assert verify(tmp_path / "x.zip").verdict == "rejected"


def test_a_file_that_is_none_is_the_callers_fault(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "pipe"):
        with pytest.raises(UsageError, match="effbench submit"):
            verify(path)


def test_a_large_file_is_refused_without_being_read(tmp_path: Path) -> None:
    with (tmp_path / "large.zip").open("wb") as file:
        file.truncate(1 << 40)
    began_s = time.monotonic()
    report = verify(tmp_path / "large.zip")
    assert report.verdict == "rejected"
    assert report.findings[0].check == "size"
    assert time.monotonic() - began_s < 5


# The sandbox.


@pytest.mark.parametrize(
    "attempt",
    [
        "open('{outside}/x', 'w')",
        "__import__('os').mkdir('{outside}/x')",
        "__import__('os').unlink('{outside}/there')",
        "open('{outside}/there').read()",
        "__import__('os').truncate('{outside}/there', 0)",
        "__import__('os').rename('request.json', '{outside}/x')",
        "__import__('os').listdir('/')",
        "__import__('socket').create_connection(('127.0.0.1', {port}))",
        "__import__('socket').socket().bind(('127.0.0.1', 0))",
        "__import__('os').execv('/bin/sh', ['sh', '-c', 'true'])",
    ],
)
@pytest.mark.skipif(landlock.version() < 4, reason="this kernel has no Landlock that refuses TCP")
def test_the_process_reaches_nothing_outside_its_folder(attempt: str, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = attempt.format(outside=tmp_path, port=server.getsockname()[1])
        outcome = sandbox.run(exec, code)
    assert "PermissionError" in outcome.refusal, outcome
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "secret"


def test_no_file_is_written_even_where_that_is_allowed() -> None:
    assert "File too large" in sandbox.run(exec, "import os; os.write(os.open('x', os.O_WRONLY | os.O_CREAT), b'a')").refusal


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("bytearray(10**9)", "500 MB"),
        ("x = []\nwhile True: x.append(bytes(10**6))", "500 MB"),
        ("import os; os.kill(os.getpid(), 9)", "killed"),
        ("import os; os.kill(os.getpid(), 11)", "crashed"),
        ("import os; os._exit(3)", "code 3"),
        ("import os; os.write(1, b'{'); os._exit(0)", "no report"),
        ("import os; os.write(1, b'[' * 100_000); os._exit(0)", "no report"),
        ("import os\nwhile True: os.write(1, bytes(65536))", "report is more than"),
        ("raise SystemExit(0)", "no report"),
        ("import json; json.loads('[' * 100_000)", "RecursionError"),
        ("[open('/dev/null') for _ in range(100)]", "PermissionError"),
        ("import effbench.store, os; os.environ['HOME']", "KeyError"),
    ],
)
def test_every_end_of_the_process_is_an_outcome(code: str, reason: str) -> None:
    outcome = sandbox.run(exec, code)
    assert reason in outcome.refusal
    assert outcome.check == "limits"


@pytest.mark.alone
def test_time_is_limited_both_ways() -> None:
    began_s = time.monotonic()
    assert "more than 1 s of CPU" in sandbox.run(exec, "while True: pass", cpu_s=1).refusal
    assert 1 < time.monotonic() - began_s < limits.WALL_S
    began_s = time.monotonic()
    assert "more than 0.7 s" in sandbox.run(exec, "import time; time.sleep(60)", wall_s=0.7).refusal
    assert time.monotonic() - began_s < 5


@pytest.mark.alone
def test_two_are_at_work_and_others_wait() -> None:
    ends: list[float] = []

    def sleep() -> None:
        sandbox.run(exec, "import time; time.sleep(1.5)")
        ends.append(time.monotonic())

    threads = [threading.Thread(target=sleep) for _ in range(4)]
    began_s = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends)[1] - began_s >= 1.5
    assert sorted(ends)[2] - began_s >= 3.0, "the third began before one of the first two had ended"


def test_the_process_dies_with_whoever_started_it() -> None:
    code = 'from effbench.exchange import sandbox\nsandbox.run(exec, "import time; time.sleep(61.25)")'
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as parent:
        child = until(lambda: next(iter(children(parent.pid)), None))
        until(lambda: (Path(f"/proc/{child}/cmdline").read_bytes().startswith(os.fsencode(sys.executable))) or None)
        time.sleep(0.3)  # it has asked for this signal by then, or it looks who its parent is
        parent.kill()
    until(lambda: None if Path(f"/proc/{child}").exists() and "Z" not in state(child) else True)


def until(ask: Any, limit_s: float = 20.0) -> Any:
    end_s = time.monotonic() + limit_s
    while (found := ask()) is None:
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.02)
    return found


def children(pid: int) -> list[int]:
    return [int(each) for task in Path(f"/proc/{pid}/task").glob("*/children") for each in task.read_text().split()]


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def test_what_the_kernel_cannot_refuse_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(landlock, "version", lambda: 0)
    assert "no Landlock" in landlock.restrict(read=[], write=[tmp_path])[0]


def test_the_folder_of_locks_must_be_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sandbox.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"effbench-verify-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(sandbox.StoreError, match="somebody else"):
        sandbox.run(len, [])


# What a report can carry.


def test_texts_of_another_hand_are_one_harmless_line() -> None:
    shown = clean(f"a\n{HTML}" + "x" * 5000)
    assert shown.isprintable()
    assert len(shown) < limits.MESSAGE_CHARACTERS + 50


def test_refusals_come_first_and_the_rest_is_counted() -> None:
    remarks = [Finding(check="a", severity="remark", message=str(n)) for n in range(300)]
    found = brief([*remarks, Finding(check="b", severity="refused", message="no")])
    assert found["findings"][0]["check"] == "b"
    assert len(found["findings"]) == limits.FINDINGS_COUNT
    assert found["notes"] == ["101 more findings are not listed."]


def test_a_refusal_inside_comes_out_with_its_rule_and_place(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"<b>")
    (finding,) = verify(tmp_path / "x.zip").findings
    assert (finding.check, finding.severity) == ("form", "refused")
    assert str(BundleError("a", "b.", "c")) == "c: b."


# The commands.


def test_submit_shows_what_leaves_and_writes_nothing_unasked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_store(tmp_path / "results", environment={"SOME_TOKEN": "abc"})
    monkeypatch.chdir(tmp_path)
    given = ["submit", "--results", "results", "--contact", "someone@example.org", "--licence", "CC-BY-4.0"]
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert command(monkeypatch, *given) == 1
    shown = capsys.readouterr()
    assert "2 rows with the raw traces of 4 launches" in shown.out
    assert "someone@example.org" in shown.out
    assert "platform: Linux-6.8-x86_64" in shown.out
    assert "environment variables: SOME_TOKEN=abc" in shown.out
    assert "Nothing was written" in shown.err
    assert list(tmp_path.glob("*.zip")) == []
    assert command(monkeypatch, *given, "--yes") == 0
    (bundle,) = tmp_path.glob("effbench-*.zip")
    assert command(monkeypatch, *given, "--yes", "--out", "here.zip") == 0
    assert (tmp_path / "here.zip").read_bytes() == bundle.read_bytes()


def test_verify_says_the_verdict_and_exits_by_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, good: bytes, real: Path
) -> None:
    (tmp_path / "cut.zip").write_bytes(good[:-1])
    assert command(monkeypatch, "verify", tmp_path / "cut.zip") == 1
    assert "rejected" in capsys.readouterr().out
    assert command(monkeypatch, "verify", tmp_path / "cut.zip", "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert said["verdict"] == "rejected"
    assert said["findings"][0]["check"] == "form"
    assert command(monkeypatch, "verify", tmp_path / "absent.zip") == 2
    assert command(monkeypatch, "verify") == 2
    capsys.readouterr()
    assert command(monkeypatch, "verify", real) == 0
    assert "12 rows" in capsys.readouterr().out


def test_submit_names_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = ["submit", "--contact", "a", "--licence", "b", "--yes"]
    assert command(monkeypatch, *given, "--results", tmp_path / "absent") == 2
    assert "effbench run" in capsys.readouterr().err
    assert command(monkeypatch, "submit", "--licence", "b") == 2


def test_the_benchmark_of_a_bundle_runs() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "verify_bundle", "--tiny", "--blocks", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert figures["verify_s"]["value"] > 0
    assert not any("verdict" in figure for figure in figures.values())
