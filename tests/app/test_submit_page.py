"""The submit page as a visitor and a maintainer use it: every control, hostile texts, no token, a wrong one, the right one."""

from __future__ import annotations

import hashlib
import os
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from effbench.exchange import accepting, limits
from effbench.exchange.bundle import write_bundle
from effbench.exchange.levels import read_levels, write_attempt, write_submission
from effbench.exchange.queue import FOLDER, TOKEN, Queue
from effbench.exchange.report import Finding, Report
from effbench.store import Store
from leaderboard_app import data, submissions
from tests.app.pages import APP, REFERENCE, ROOT, VIEWS, opened, sound, stored, texts
from tests.exchange.test_levels import attempt, submission
from tests.records import make_case

PAGE = VIEWS / "submit.py"
SECRET = "the-maintainers-token"
HOSTILE = "<img src=x onerror=alert(1)> **b** [x](javascript:alert(1)) $x$ :red[r] `c` \u202e"
BYTES = b"PK bundle"


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    monkeypatch.setenv(FOLDER, str(tmp_path / "queue"))
    monkeypatch.setenv("EFFBENCH_RESULTS", os.pathsep.join(map(str, (tmp_path / "results", tmp_path / "other"))))
    monkeypatch.delenv(TOKEN, raising=False)
    return Queue(tmp_path / "queue")


Judge = Callable[..., None]


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Judge:
    """Let verification find these things; the real one has its own tests, and one here."""

    def finding(*findings: Finding, notes: Sequence[str] = ()) -> None:
        def verify(path: Path, *, results: Sequence[Path] = ()) -> Report:
            digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            return Report(bundle_sha256=digest, rows=2, launches=6, findings=findings, notes=tuple(notes))

        module = types.ModuleType("effbench.exchange.verify")
        module.verify = verify  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "effbench.exchange.verify", module)

    finding()
    return finding


def uploaded(app: AppTest, content: bytes = BYTES, name: str = "bundle.zip") -> AppTest:
    app.file_uploader(key="file").set_value((name, content, "application/zip"))
    return sound(app.button(key="send").click().run())


def signed_in(app: AppTest, digest: str, token: str = SECRET) -> AppTest:
    app.text_input(key="token").set_value(token).run()
    return sound(app.selectbox(key="bundle").set_value(digest).run())


def signed(app: AppTest, who: str = "Ada", why: str = "it follows") -> AppTest:
    app.text_input(key="who").set_value(who)
    app.text_input(key="why").set_value(why)
    return app


def table(app: AppTest, column: str) -> object:
    return next(element.value for element in app.dataframe if column in element.value.columns)


def keys(app: AppTest) -> set[str]:
    return {button.key for button in app.button}


def test_a_good_bundle_is_received_and_its_report_shown_at_once(queue: Queue, judge: Judge) -> None:
    judge(notes=["no Landlock on this kernel"])
    app = uploaded(opened(PAGE))
    assert app.success[0].value == submissions.VERDICTS["accepted"]
    assert "2 rows, 6 launches" in texts(app) and "no Landlock on this kernel" in texts(app)
    (entry,) = queue.entries()
    assert (entry.state, entry.name) == ("verified", "bundle.zip")
    assert queue.bytes_of(entry.digest).read_bytes() == BYTES
    assert list(table(app, "state")["state"]) == ["verified"]
    assert list(table(app, "to")["to"]) == ["verified", "received"]


def test_a_refused_bundle_says_why_and_is_rejected(queue: Queue, judge: Judge) -> None:
    judge(Finding(check="recompute", severity="refused", message="al_s is 2 in the row and 1 from the traces", where="row 1"))
    app = uploaded(opened(PAGE))
    assert app.error[0].value == submissions.VERDICTS["rejected"]
    assert list(table(app, "found")["found"]) == ["al_s is 2 in the row and 1 from the traces"]
    assert queue.entries()[0].state == "rejected"
    assert "0 received, 0 verified, 0 accepted, 1 rejected." in texts(app)


def test_remarks_are_shown_beside_the_verdict(queue: Queue, judge: Judge) -> None:
    judge(Finding(check="clocks", severity="remark", message="clocks fell"))
    app = uploaded(opened(PAGE))
    assert app.warning[0].value == submissions.VERDICTS["accepted with remarks"]
    assert list(table(app, "severity")["severity"]) == ["remark"]


def test_sending_nothing_or_too_much_is_said(queue: Queue, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    app = opened(PAGE)
    sound(app.button(key="send").click().run())
    assert "Choose a file first." in texts(app)
    monkeypatch.setattr(limits, "BUNDLE_BYTES", 5)
    app = uploaded(opened(PAGE))
    assert "It was not received." in texts(app) and "a bundle has at most" in texts(app)
    assert not queue.path.exists()


def test_the_same_bundle_twice_is_one_entry(queue: Queue, judge: Judge) -> None:
    app = uploaded(uploaded(opened(PAGE)), name="again.zip")
    assert len(queue.entries()) == 1
    assert app.success


def test_a_verifier_that_cannot_answer_leaves_the_bundle_received(
    queue: Queue, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        from effbench.errors import StoreError

        raise StoreError("the temporary folder is full")

    monkeypatch.setattr(sys.modules["effbench.exchange.verify"], "verify", broken)
    app = uploaded(opened(PAGE))
    assert "the temporary folder is full" in texts(app)
    (entry,) = queue.entries()
    assert entry.state == "received"
    judge()
    monkeypatch.setenv(TOKEN, SECRET)
    app = signed_in(opened(PAGE), entry.digest)
    assert "It has not been verified yet" in texts(app)
    assert app.button(key="accept").disabled
    sound(app.button(key="again").click().run())
    assert queue.entry(entry.digest).state == "verified"
    assert not app.button(key="accept").disabled


def test_without_a_token_in_the_environment_the_page_only_receives(queue: Queue, judge: Judge) -> None:
    app = uploaded(opened(PAGE))
    assert "This page only receives" in texts(app)
    assert not app.text_input and not keys(app) & {"accept", "reject", "again"}


def test_a_wrong_token_decides_nothing(queue: Queue, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, SECRET)
    app = uploaded(opened(PAGE))
    assert not keys(app) & {"accept", "reject"}
    app = signed_in(app, queue.entries()[0].digest, token="open-sesame")
    assert "not the maintainer's token" in app.error[0].value
    assert not keys(app) & {"accept", "reject"}
    assert app.text_input(key="token").proto.type == app.text_input(key="token").proto.PASSWORD
    assert "open-sesame" not in texts(app) and dict(app.query_params) == {}


def test_the_right_token_rejects_with_a_reason(queue: Queue, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, SECRET)
    digest = uploaded(opened(PAGE)) and queue.entries()[0].digest
    app = signed_in(opened(PAGE), digest)
    sound(app.button(key="reject").click().run())
    assert "a name and a reason" in texts(app) and queue.entry(digest).state == "verified"
    sound(signed(app, why="the licence is missing").button(key="reject").click().run())
    entry = queue.entry(digest)
    assert (entry.state, entry.changed_by, entry.why) == ("rejected", "Ada", "the licence is missing")
    assert not keys(app) & {"accept", "reject"}, "there is nothing left to decide"
    assert SECRET not in texts(app)


def test_accepting_writes_the_rows_and_the_board_shows_them_as_submitted(
    queue: Queue, judge: Judge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(TOKEN, SECRET)
    rows = [make_case("generate", ("gqa",)), make_case("generate", ("mha",), baseline=None)]
    asked = []

    def child(path: Path, results: Path, known: Sequence[Path]) -> accepting.Accepted:
        asked.append((path.read_bytes(), results, list(known)))
        write_submission(results, submission(rows[0].run_id, contact=HOSTILE, remarks=(HOSTILE,)))
        Store(results).write_case(rows[0])
        return accepting.Accepted(bundle_sha256="", verdict="accepted", remarks=(), rows=1, rows_written=1, launches_written=0)

    monkeypatch.setattr(submissions, "accept_in_child", child)
    stored(tmp_path / "other", [rows[1]])
    digest = uploaded(opened(PAGE)) and queue.entries()[0].digest
    app = signed(signed_in(opened(PAGE), digest))
    assert str(tmp_path / "results") in texts(app), "the page says where the rows go"
    sound(app.button(key="accept").click().run())
    assert queue.entry(digest).state == "accepted"
    assert asked == [(BYTES, tmp_path / "results", [tmp_path / "other"])]
    board = opened(APP)
    frame = board.dataframe[0].value
    assert dict(zip(frame["techniques"], frame["level"], strict=True)) == {"gqa": "submitted", "mha": "measured here"}
    assert "level" in board.dataframe[0].proto.column_order
    assert "† submitted: of another hand" in texts(board)


@pytest.fixture(scope="module")
def reference_bundle(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_bundle(
        Store(REFERENCE), tmp_path_factory.mktemp("bundle") / "b.zip", contact="me@example.org", licence="CC-BY-4.0"
    ).data


def test_a_real_bundle_goes_from_the_upload_to_the_board(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reference_bundle: bytes
) -> None:
    monkeypatch.setenv(TOKEN, SECRET)
    app = uploaded(opened(PAGE), reference_bundle)
    (entry,) = queue.entries()
    assert entry.state == "verified" and "12 rows, 36 launches" in texts(app)
    app = signed(signed_in(opened(PAGE), entry.digest))
    sound(app.button(key="accept").click().run())
    assert queue.entry(entry.digest).state == "accepted"
    assert set(read_levels([tmp_path / "results"]).by_run_id) == {row.run_id for row in Store(REFERENCE).cases()}
    assert set(opened(APP).dataframe[0].value["level"]) == {"submitted"}


def test_an_upload_cut_off_half_way_is_rejected_with_a_reason(queue: Queue, reference_bundle: bytes) -> None:
    app = uploaded(opened(PAGE), reference_bundle[: len(reference_bundle) // 2])
    assert app.error[0].value == submissions.VERDICTS["rejected"]
    assert len(table(app, "found")) == 1
    assert queue.entries()[0].state == "rejected"


def test_bytes_that_changed_in_the_folder_are_never_accepted(
    queue: Queue, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN, SECRET)
    monkeypatch.setattr(submissions, "accept_in_child", lambda *_: pytest.fail("it was accepted"))
    digest = uploaded(opened(PAGE)) and queue.entries()[0].digest
    queue.bytes_of(digest).write_bytes(b"another bundle")
    app = signed(signed_in(opened(PAGE), digest))
    sound(app.button(key="accept").click().run())
    assert "are not those that were received" in texts(app)
    assert queue.entry(digest).state == "verified"


def test_a_bundle_that_cannot_be_accepted_keeps_waiting_and_says_why(
    queue: Queue, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child itself runs: these bytes are no bundle, whatever the stand-in said."""
    monkeypatch.setenv(TOKEN, SECRET)
    digest = uploaded(opened(PAGE)) and queue.entries()[0].digest
    app = signed(signed_in(opened(PAGE), digest))
    sound(app.button(key="accept").click().run())
    assert "Nothing was decided." in texts(app)
    assert queue.entry(digest).state == "verified"


def test_hostile_texts_are_shown_as_text_only(queue: Queue, judge: Judge) -> None:
    judge(Finding(check=HOSTILE, severity="remark", message=HOSTILE, where=HOSTILE), notes=[HOSTILE])
    app = uploaded(opened(PAGE), name=f"{HOSTILE}.zip".replace("/", ""))
    rendered = [*app.markdown, *app.caption, *app.success, *app.warning, *app.error, *app.info]
    assert not any("onerror" in str(element.value) or "javascript" in str(element.value) for element in rendered)
    assert any("onerror" in str(element.value) for element in app.text)
    assert list(table(app, "check")["check"]) == ["<img src=x onerror=alert(1)> **b** [x](javascript:alert(1)) $x$ :red[r] `c`"]


def test_a_queue_that_cannot_be_made_or_read_is_said_and_the_rest_of_the_page_works(
    queue: Queue, judge: Judge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(FOLDER, str(tmp_path / "file" / "queue"))
    app = opened(PAGE)
    assert "Nothing can be received here." in texts(app) and "is a file" in texts(app)
    assert not app.file_uploader and "How to make a bundle" in texts(app)
    monkeypatch.setenv(FOLDER, str(queue.path))
    queue.receive(BYTES, "b.zip")
    (queue.path / "queue.sqlite").write_bytes(b"no database" * 100)
    app = opened(PAGE)
    assert "The queue cannot be read." in texts(app) and "How to make a bundle" in texts(app)


def test_looking_at_the_page_makes_nothing(queue: Queue) -> None:
    app = opened(PAGE)
    assert "No bundle has been received yet." in texts(app)
    assert not queue.path.exists()


def test_the_page_names_only_commands_and_options_that_exist(queue: Queue) -> None:
    import typer

    from effbench.cli import app as commands
    from effbench.cli import exchange  # noqa: F401  (it adds its commands)

    known = typer.main.get_command(commands).commands
    lines = [line for block in opened(PAGE).code for line in block.value.splitlines() if line.startswith("effbench")]
    assert len(lines) >= 7
    for line in lines:
        _, name, *rest = line.partition("#")[0].split()
        options = {option for parameter in known[name].params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= options, line
        for path in (word for word in rest if word.startswith("suites/")):
            assert (ROOT / path).is_file()


def test_the_page_says_what_the_board_reads(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFBENCH_RESULTS", "some/where:else")
    assert "some/where\nelse" in texts(opened(PAGE))


def test_a_script_that_only_waits_lets_others_be_served() -> None:
    turn = data.Turn(1)
    with turn:
        assert not turn._places.acquire(blocking=False)
        with turn.aside():
            assert turn._places.acquire(blocking=False)
            turn._places.release()
        assert not turn._places.acquire(blocking=False)
    with turn.aside():
        assert turn._places.acquire(blocking=False), "who holds no turn gives none away"
        assert not turn._places.acquire(blocking=False)


# -- the level on the run page


def test_the_run_page_says_whose_a_row_is_and_leads_to_the_row_measured_here(queue: Queue, tmp_path: Path) -> None:
    theirs, ours = make_case(techniques=("gqa",)), make_case(techniques=("gqa",), started_at="2026-11-29T10:00:00+00:00")
    folder = stored(tmp_path / "results", [theirs, ours])
    page = VIEWS / "run.py"
    assert "Submitted" not in texts(opened(page, run=theirs.run_id))
    write_submission(folder, submission(theirs.run_id, contact=HOSTILE, remarks=(HOSTILE,)))
    app = opened(page, run=theirs.run_id)
    assert app.info[0].value.startswith("Submitted: of another hand")
    said = "\n".join(element.value for element in app.text)
    assert f"contact: {HOSTILE}" in said and "licence: CC-BY-4.0" in said and f"remark: {HOSTILE}" in said
    assert not any("onerror" in str(element.value) for element in [*app.markdown, *app.caption, *app.info])
    write_attempt(folder, theirs.run_id, attempt(ours.run_id, "cannot tell"))
    write_attempt(folder, theirs.run_id, attempt(ours.run_id))
    app = opened(page, run=theirs.run_id)
    assert app.info[0].value.startswith("Reproduced: of another hand")
    said = "\n".join(element.value for element in app.text)
    assert "cannot tell, by row" in said and "every headline metric agrees" in said
    assert list(table(app, "tolerance")["found"]) == ["×1.010 (0.990–1.030)"]
    app.button(key=f"way_to_{ours.run_id}").click()
    beside = opened(page, run=ours.run_id)
    assert f"Measured to see whether submitted row {theirs.run_id} holds." in texts(beside)
    assert not any("hand" in element.value for element in beside.info)
    assert read_levels([folder]).of(theirs.run_id) == "reproduced"
