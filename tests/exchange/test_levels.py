"""Where rows come from: what is kept, what a damaged file may do, and that the board shows it and ranks accordingly."""

from __future__ import annotations

import io
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from effbench.analysis import table
from effbench.analysis.index import ResultIndex
from effbench.analysis.origins import NO_ORIGINS, Origins
from effbench.analysis.rank import latest
from effbench.errors import DamagedFile
from effbench.exchange.agreement import Agreement
from effbench.exchange.levels import (
    REPRODUCTIONS,
    SUBMISSIONS,
    Attempt,
    Submission,
    fingerprint,
    levels_of,
    read_levels,
    read_submission,
    write_attempt,
    write_submission,
)
from effbench.schema import CaseRecord
from effbench.store import Store
from leaderboard_app.static import write_html
from tests.commands import effbench
from tests.records import make_board, make_case

SHA, OTHER = "a" * 64, "b" * 64


def submission(*run_ids: str, sha256: str = SHA, **changes: Any) -> Submission:
    known: dict[str, Any] = {
        "accepted_at": "2026-11-30T10:00:00+00:00", "contact": "ada@example.org", "licence": "CC-BY-4.0", "verdict": "accepted",
        "remarks": ("a remark",), "launch_ids": (),
    }  # fmt: skip
    return Submission(bundle_sha256=sha256, run_ids=run_ids, **(known | changes))


def attempt(by: str = "ours", outcome: Any = "reproduced", *, same_hardware: bool = True) -> Attempt:
    line = Agreement(
        name="tokens_per_s",
        of="value",
        verdict="agrees",
        measure="ratio",
        middle=1.01,
        lower=0.99,
        upper=1.03,
        tolerance=0.1,
        headline=True,
    )
    here = {"hardware": "cpu", "env_id": "e"}
    return Attempt(by_run_id=by, at="2026-11-30T11:00:00+00:00", outcome=outcome, same_hardware=same_hardware, metrics=(line,),
                   submitted=here, here=here)  # fmt: skip


def test_rows_are_measured_here_unless_a_submission_names_them(tmp_path: Path) -> None:
    assert dict(levels_of([tmp_path, tmp_path / "none"])) == {}
    write_submission(tmp_path, submission("r1", "r2"))
    assert dict(levels_of([tmp_path])) == {"r1": "submitted", "r2": "submitted"}
    levels = read_levels([tmp_path])
    assert levels.of("another") == "measured here"
    assert levels.submissions["r1"] == submission("r1", "r2") == read_submission(tmp_path, SHA)
    assert levels.bundles == {"r1": SHA, "r2": SHA}
    assert read_submission(tmp_path, OTHER) is None
    assert [path.name for path in (tmp_path / SUBMISSIONS).iterdir()] == [f"{SHA}.json"]


def test_only_the_newest_attempt_on_the_same_hardware_raises_a_row(tmp_path: Path) -> None:
    write_submission(tmp_path, submission("r1"))
    for outcome, same, level in (
        ("other hardware", False, "submitted"),
        ("cannot tell", True, "submitted"),
        ("reproduced", True, "reproduced"),
        ("other hardware", False, "reproduced"),
        ("differs", True, "submitted"),
    ):
        write_attempt(tmp_path, "r1", attempt(outcome=outcome, same_hardware=same))
        assert levels_of([tmp_path])["r1"] == level, outcome
    assert len(read_levels([tmp_path]).attempts["r1"]) == 5, "no attempt is forgotten"


def test_a_reproduction_of_a_row_that_no_bundle_brought_gives_no_level(tmp_path: Path) -> None:
    write_attempt(tmp_path, "ours", attempt())
    assert dict(levels_of([tmp_path])) == {}
    assert read_levels([tmp_path]).of("ours") == "measured here"


@pytest.mark.parametrize("run_id", ["../../etc/passwd", "a/b", "", ".", "x" * 400, "\ud800", "zażółć"])
def test_a_run_id_never_becomes_a_path(tmp_path: Path, run_id: str) -> None:
    path = write_attempt(tmp_path, run_id, attempt())
    assert path.parent == tmp_path / REPRODUCTIONS
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"{}", b"\xff\xfe", b'{"format": 2}', b"[" * 100_000, b'{"format": 1, "run_ids": "r1"}'],
)
def test_a_damaged_file_is_named_the_rest_works_and_no_row_gains_trust(tmp_path: Path, content: bytes) -> None:
    store = Store(tmp_path)
    rows = [make_case(techniques=(name,)) for name in ("gqa", "mqa")]
    for row in rows:
        store.write_case(row)
    write_submission(tmp_path, submission(rows[0].run_id))
    (tmp_path / SUBMISSIONS / f"{OTHER}.json").write_bytes(content)
    levels = read_levels([tmp_path])
    assert len(levels.warnings) == 1 and f"{OTHER}.json" in levels.warnings[0]
    assert levels.submissions.keys() == {rows[0].run_id}
    assert levels.of(rows[1].run_id) == "submitted", "it may be of the bundle whose file is damaged"
    assert levels.bundles[rows[1].run_id] == "unknown"
    (tmp_path / SUBMISSIONS / f"{OTHER}.json").unlink()
    assert read_levels([tmp_path]).of(rows[1].run_id) == "measured here"


def test_a_damaged_reproduction_lowers_a_row_and_is_not_written_over(tmp_path: Path) -> None:
    write_submission(tmp_path, submission("r1"))
    path = write_attempt(tmp_path, "r1", attempt())
    path.write_bytes(path.read_bytes()[:-9])
    levels = read_levels([tmp_path])
    assert levels.of("r1") == "submitted"
    assert path.name in levels.warnings[0]
    with pytest.raises(DamagedFile):
        write_attempt(tmp_path, "r1", attempt())


def test_the_fingerprint_changes_with_every_file_and_only_then(tmp_path: Path) -> None:
    seen = [fingerprint([tmp_path])]
    write_submission(tmp_path, submission("r1"))
    seen.append(fingerprint([tmp_path]))
    write_attempt(tmp_path, "r1", attempt())
    seen.append(fingerprint([tmp_path]))
    write_attempt(tmp_path, "r1", attempt())
    seen.append(fingerprint([tmp_path]))
    assert len(set(seen)) == 4
    Store(tmp_path).write_case(make_case())
    (tmp_path / SUBMISSIONS / ".lock").touch()
    assert fingerprint([tmp_path]) == seen[-1] == read_levels([tmp_path]).state


def same_case(count: int) -> list[CaseRecord]:
    """One case on one machine, measured again and again."""
    return [replace(make_case(), run_id=f"r{i}", started_at=f"2026-11-2{i}T10:00:00+00:00") for i in range(count)]


def test_a_row_of_another_hand_replaces_none_but_those_of_its_bundle(tmp_path: Path) -> None:
    rows = same_case(6)
    origins = Origins(bundles={"r2": SHA, "r3": SHA, "r4": OTHER, "r5": OTHER})
    kept, replaced = latest(rows, origins.bundles)
    assert [row.run_id for row in kept] == ["r1", "r3", "r5"]
    assert [row.run_id for row in replaced] == ["r0", "r2", "r4"]
    assert [row.run_id for row in latest(rows)[0]] == ["r5"]
    store = Store(tmp_path)
    for row in rows:
        store.write_case(row)
    index = ResultIndex([tmp_path])
    index.refresh(origins)
    assert list(index.frame().index) == ["r1", "r3", "r5"] and index.replaced == 3
    index.refresh(NO_ORIGINS)
    assert list(index.frame().index) == ["r1", "r3", "r5"], "nothing is read again until the state says that it changed"
    index.refresh(replace(NO_ORIGINS, state="changed"))
    assert list(index.frame().index) == ["r5"]


def printed(rows: list[CaseRecord], origins: Origins) -> str:
    console = Console(width=200, file=io.StringIO())
    for renderable in table.rich_tables(rows, origins=origins):
        console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_show_marks_rows_of_another_hand_and_explains_only_the_marks_it_used(tmp_path: Path) -> None:
    rows = [make_case(techniques=("gqa",)), make_case(techniques=("mqa",)), make_case(techniques=("lora",))]
    plain = printed(rows, NO_ORIGINS)
    assert "†" not in plain and "‡" not in plain and "hand" not in plain
    write_submission(tmp_path, submission(rows[0].run_id, rows[1].run_id))
    shown = printed(rows, Origins(**read_levels([tmp_path]).described()))
    assert "gqa †" in shown and "mqa †" in shown and "lora †" not in shown
    assert "† submitted: of another hand" in shown and "‡" not in shown
    write_attempt(tmp_path, rows[1].run_id, attempt())
    shown = printed(rows, Origins(**read_levels([tmp_path]).described()))
    assert "mqa ‡" in shown and "‡ reproduced:" in shown


def test_the_command_shows_levels_and_names_what_it_cannot_read(tmp_path: Path) -> None:
    store, row = Store(tmp_path), make_case()
    store.write_case(row)
    write_submission(tmp_path, submission(row.run_id))
    done = effbench("show", "--results", tmp_path, "--json")
    assert [found["level"] for found in json.loads(done.stdout)["rows"]] == ["submitted"]
    (tmp_path / SUBMISSIONS / f"{SHA}.json").write_text("{")
    done = effbench("show", "--results", tmp_path)
    assert f"{SHA}.json cannot be read" in done.stderr and "gqa †" in done.stdout


def test_the_static_board_marks_rows_of_another_hand_and_says_what_the_mark_means(tmp_path: Path) -> None:
    rows = [make_case(techniques=("gqa",)), make_case(techniques=("mqa",))]
    write_submission(tmp_path, submission(rows[0].run_id))
    origins = Origins(**read_levels([tmp_path]).described())
    write_html(rows, tmp_path / "marked.html", origins=origins)
    write_html(rows, tmp_path / "plain.html")
    marked, plain = ((tmp_path / name).read_text(encoding="utf-8") for name in ("marked.html", "plain.html"))
    assert marked.count('<abbr title="submitted">†</abbr>') == 1
    assert re.search(r"<bdi>gqa</bdi> <abbr", marked) and "<li>† submitted: of another hand" in marked
    assert "†" not in plain and "another hand" not in plain


def test_levels_cost_little_beside_a_hundred_thousand_rows(tmp_path: Path) -> None:
    """What a page pays for levels at each view: one listing; and an index when a file has changed: one look at the ids."""
    for number in range(50):
        ids = [f"{number:04x}{i:028x}" for i in range(100)]
        write_submission(tmp_path, submission(*ids, sha256=f"{number:064x}"))
    began_s = time.process_time()
    levels = read_levels([tmp_path])
    read_s = time.process_time() - began_s
    assert len(levels.by_run_id) == 5_000
    began_s = time.process_time()
    for _ in range(10):
        assert fingerprint([tmp_path]) == levels.state
    assert (time.process_time() - began_s) / 10 < 0.05
    assert read_s < 2.0


def test_a_board_of_rows_measured_here_is_as_it_was(tmp_path: Path) -> None:
    rows = make_board(60)
    assert table.document(rows)["rows"] == [row | {"level": "measured here"} for row in table.leaderboard(latest(rows)[0])]
