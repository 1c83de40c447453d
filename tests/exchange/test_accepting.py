"""From a bundle to rows: in which order, what is never overwritten, what a kill leaves, and rows that are measured again."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from effbench.errors import BundleError, StoreError, UsageError
from effbench.exchange import limits
from effbench.exchange.accepting import Accepted, accept, accept_in_child
from effbench.exchange.bundle import write_bundle
from effbench.exchange.contents import Contents
from effbench.exchange.levels import levels_of, read_levels
from effbench.exchange.report import Finding, Report
from effbench.schema import SCHEMA_VERSION, CaseRecord
from effbench.store import Store
from tests.commands import EFFBENCH, ROOT, environment, suite
from tests.records import make_case, make_launch, make_trace

REFERENCE = ROOT / "results" / "reference"
HOSTILE = "<b>me</b>\n\x1b[2J" + "x" * 900


def bundle_contents(seed: int = 0, rows: int = 2, **manifest: str) -> Contents:
    """Rows with three launches each and three of a baseline that they share."""
    stacks = (("gqa",), ("mqa",), ("lora",))[:rows]
    shared = tuple(f"base-{seed}-{block}" for block in range(3))
    cases = [replace(make_case(techniques=stack, seed=seed), baseline_launch_ids=shared) for stack in stacks]
    ids = [launch_id for case in cases for launch_id in case.launch_ids] + list(shared)
    launches = {launch_id: make_launch(launch_id, block=i % 3) for i, launch_id in enumerate(ids)}
    traces = {launch_id: make_trace(20, seed=i) for i, launch_id in enumerate(ids)}
    return Contents(manifest={"contact": "ada@example.org", "licence": "CC-BY-4.0"} | manifest, cases=tuple(cases),
                    launches=launches, traces=traces)  # fmt: skip


def judged(*findings: Finding) -> Callable[..., Report]:
    def verify(path: Path, *, results: Sequence[Path] = ()) -> Report:
        return Report(bundle_sha256=hashlib.sha256(path.read_bytes()).hexdigest(), rows=2, launches=9, findings=findings)

    return verify


def bundle_file(folder: Path, content: bytes = b"bundle") -> Path:
    path = folder / "bundle.zip"
    path.write_bytes(content)
    return path


def accepted(bundle: Path, store: Store, contents: Contents, *findings: Finding) -> Accepted:
    return accept(bundle, store, verify=judged(*findings), read=lambda _: contents)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


def ids(records: Sequence[CaseRecord]) -> set[str]:
    return {record.run_id for record in records}


def test_an_accepted_bundle_is_rows_launches_traces_and_a_submission(tmp_path: Path) -> None:
    store, contents = Store(tmp_path / "results"), bundle_contents()
    remark = Finding(check="digits", severity="remark", message="looks round", where="row 1")
    done = accepted(bundle_file(tmp_path), store, contents, remark)
    assert (done.rows, done.rows_written, done.launches_written) == (2, 2, 9)
    assert ids(store.cases().rows) == ids(contents.cases)
    assert {launch.launch_id for launch in store.launches()} == set(contents.launches)
    for launch_id, trace in contents.traces.items():
        kept = store.trace(launch_id)
        assert [s.name for s in kept.series] == [s.name for s in trace.series]
        assert all(np.array_equal(a.values, b.values) for a, b in zip(kept.series, trace.series, strict=True))
    levels = read_levels([store.path])
    assert {levels.of(run_id) for run_id in ids(contents.cases)} == {"submitted"}
    submission = levels.submissions[contents.cases[0].run_id]
    assert (submission.contact, submission.licence) == ("ada@example.org", "CC-BY-4.0")
    assert (submission.verdict, submission.remarks) == ("accepted with remarks", ("row 1: looks round",))
    assert submission.bundle_sha256 == hashlib.sha256(b"bundle").hexdigest()
    assert set(submission.launch_ids) == set(contents.launches)


def test_a_rejected_bundle_leaves_no_trace_and_its_reasons_are_said(tmp_path: Path) -> None:
    store = Store(tmp_path / "results")
    found = [Finding(check="recompute", severity="refused", message=f"reason {i}") for i in range(9)]
    with pytest.raises(BundleError, match=r"recompute: reason 0; .*reason 4; and 4 more\."):
        accepted(bundle_file(tmp_path), store, bundle_contents(), *found)
    assert snapshot(store.path) == {}


def test_accepting_twice_changes_nothing(tmp_path: Path) -> None:
    store, contents = Store(tmp_path / "results"), bundle_contents()
    accepted(bundle_file(tmp_path), store, contents)
    before = snapshot(store.path)
    done = accepted(bundle_file(tmp_path), store, contents)
    assert (done.rows, done.rows_written, done.launches_written) == (2, 0, 0)
    assert snapshot(store.path) == before


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 10, 18, 19, 20])
def test_stopped_before_any_write_no_row_is_unmarked_and_running_again_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    contents, bundle = bundle_contents(), bundle_file(tmp_path)
    whole = Store(tmp_path / "whole")
    accepted(bundle, whole, contents)
    store = Store(tmp_path / "results")
    left = iter([False] * stop)

    def counting(write: Any) -> Any:
        def one(*arguments: Any) -> Any:
            if next(left, True):
                raise KeyboardInterrupt
            return write(*arguments)

        return one

    with monkeypatch.context() as patch:
        for name in ("effbench.store.publish", "effbench.exchange.levels.publish"):
            module, _, attribute = name.rpartition(".")
            patch.setattr(name, counting(getattr(sys.modules[module], attribute)))
        with pytest.raises(KeyboardInterrupt):
            accepted(bundle, store, contents)
    there = ids(store.cases().rows)
    assert there <= levels_of([store.path]).keys(), "no row of another hand stands there as measured here"
    for row in store.cases():
        assert {*row.launch_ids, *row.baseline_launch_ids} <= {launch.launch_id for launch in store.launches()}
    accepted(bundle, store, contents)
    assert store.cases().rows == whole.cases().rows
    assert store.launches().rows == whole.launches().rows
    assert len(store.files("runs")) == 2, "no row was written twice"
    assert {p.name for p in (store.path / "traces").iterdir()} == {p.name for p in (whole.path / "traces").iterdir()}


CHILD = """
import sys
from pathlib import Path
from effbench.exchange.accepting import accept
from effbench.store import Store
from tests.exchange.test_accepting import bundle_contents, judged
contents = bundle_contents(rows=3)
print("ready", flush=True)
accept(Path(sys.argv[1]), Store(sys.argv[2]), verify=judged(), read=lambda _: contents)
print("done", flush=True)
"""


def test_killed_at_any_moment_the_results_are_intact_and_the_next_run_finishes(tmp_path: Path) -> None:
    chance, bundle, contents = random.Random(11), bundle_file(tmp_path), bundle_contents(rows=3)
    stopped = 0
    for number in range(5):
        store = Store(tmp_path / f"results-{number}")
        command = [sys.executable, "-c", CHILD, str(bundle), str(store.path)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        time.sleep(chance.uniform(0, 0.06))
        child.send_signal(signal.SIGKILL)
        stopped += b"done" not in child.stdout.read()
        child.wait()
        child.stdout.close()
        read = store.cases()
        assert not read.warnings and not store.launches().warnings
        assert ids(read.rows) <= levels_of([store.path]).keys()
        accepted(bundle, store, contents)
        assert ids(store.cases().rows) == ids(contents.cases)
        assert len(store.cases()) == 3 and len(store.launches()) == len(contents.launches)
    assert stopped, "no child was killed while it wrote: the test shows nothing"


def test_a_known_row_is_never_overwritten(tmp_path: Path) -> None:
    store, contents = Store(tmp_path / "results"), bundle_contents()
    store.write_case(replace(contents.cases[0], hardware="ours"))
    before = snapshot(store.path)
    with pytest.raises(BundleError, match=r"1 rows are in .* with other content"):
        accepted(bundle_file(tmp_path), store, contents)
    assert snapshot(store.path) == before
    assert not levels_of([store.path])


@pytest.mark.parametrize("what", ["facts", "trace"])
def test_a_known_launch_is_never_overwritten(tmp_path: Path, what: str) -> None:
    store, contents = Store(tmp_path / "results"), bundle_contents()
    launch_id = next(iter(contents.launches))
    launch, trace = contents.launches[launch_id], contents.traces[launch_id]
    store.write_launch(
        replace(launch, reason="ours") if what == "facts" else launch, make_trace(7) if what == "trace" else trace
    )
    before = snapshot(store.path)
    with pytest.raises(BundleError, match=r"1 launches are in .* with other content"):
        accepted(bundle_file(tmp_path), store, contents)
    assert snapshot(store.path) == before


def test_what_is_known_and_equal_is_left_alone_and_keeps_its_level(tmp_path: Path) -> None:
    store, contents = Store(tmp_path / "results"), bundle_contents()
    ours = contents.cases[0]
    for launch_id in (*ours.launch_ids, *ours.baseline_launch_ids):
        store.write_launch(contents.launches[launch_id], contents.traces[launch_id])
    store.write_case(ours)
    before = snapshot(store.path)
    done = accepted(bundle_file(tmp_path), store, contents)
    assert (done.rows_written, done.launches_written) == (1, 3)
    after = snapshot(store.path)
    assert {name: after[name] for name in before} == before
    assert dict(levels_of([store.path])) == {contents.cases[1].run_id: "submitted"}
    with pytest.raises(BundleError, match="All 2 rows of the bundle are in"):
        accepted(bundle_file(tmp_path, b"the same rows in another file"), store, contents)


def test_rows_of_a_later_schema_would_close_the_whole_directory_and_are_refused(tmp_path: Path) -> None:
    store, contents = Store(tmp_path / "results"), bundle_contents()
    later = replace(contents, cases=(replace(contents.cases[0], schema_version=SCHEMA_VERSION + 1),))
    with pytest.raises(BundleError, match="later schema"):
        accepted(bundle_file(tmp_path), store, later)
    assert snapshot(store.path) == {}


def test_what_is_verified_is_what_is_read_though_the_file_changes_meanwhile(tmp_path: Path) -> None:
    bundle, contents, seen = bundle_file(tmp_path), bundle_contents(), []

    def verify(path: Path, *, results: Sequence[Path] = ()) -> Report:
        bundle.write_bytes(b"another bundle")
        return judged()(path)

    def read(path: Path) -> Contents:
        seen.append(path.read_bytes())
        return contents

    done = accept(bundle, Store(tmp_path / "results"), verify=verify, read=read)
    assert seen == [b"bundle"]
    assert done.bundle_sha256 == hashlib.sha256(b"bundle").hexdigest()


def test_known_directories_are_asked_but_not_its_own_when_it_finishes_what_was_begun(tmp_path: Path) -> None:
    asked = []

    def verify(path: Path, *, results: Sequence[Path] = ()) -> Report:
        asked.append(list(results))
        return judged()(path)

    store, other = Store(tmp_path / "results"), tmp_path / "other"
    for _ in range(2):
        accept(bundle_file(tmp_path), store, known=[other], verify=verify, read=lambda _: bundle_contents())
    assert asked == [[other, store.path], [other]]


def test_no_file_a_folder_or_a_large_file_is_a_sentence(tmp_path: Path) -> None:
    store = Store(tmp_path / "results")
    large = tmp_path / "large.zip"
    with large.open("wb") as file:
        file.truncate(limits.BUNDLE_BYTES + 1)
    for path, said in ((tmp_path / "none.zip", "is no file"), (tmp_path, "is no file"), (large, "more than the 25 MB")):
        with pytest.raises(UsageError, match=said):
            accepted(path, store, bundle_contents())
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="a file, not a folder"):
        accepted(bundle_file(tmp_path), Store(tmp_path / "file"), bundle_contents())


def test_texts_of_a_bundle_are_kept_as_one_short_line(tmp_path: Path) -> None:
    store, contents = Store(tmp_path / "results"), bundle_contents(contact=HOSTILE, licence=HOSTILE)
    found = [Finding(check="c", severity="remark", message=HOSTILE, where="w") for _ in range(80)]
    accepted(bundle_file(tmp_path), store, contents, *found)
    submission = next(iter(read_levels([store.path]).submissions.values()))
    assert submission.contact.startswith("<b>me</b> [2Jxxx") and len(submission.contact) == 200
    assert len(submission.remarks) == 51 and submission.remarks[-1] == "and 30 more"
    assert all(text.isprintable() for text in (submission.contact, submission.licence, *submission.remarks))


def test_the_child_says_what_it_refuses_and_an_end_without_an_answer_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is no file"):
        accept_in_child(tmp_path / "none.zip", tmp_path / "results")
    with pytest.raises(StoreError, match=r"gave no answer \(TimeoutExpired\)"):
        accept_in_child(tmp_path / "none.zip", tmp_path / "results", limit_s=0.01)


# -- does a row hold when it is measured again?


def command(*arguments: object, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """The command line with these commands, whether or not it has them yet."""
    start = [EFFBENCH[0], "-c", "from effbench.cli import accepting, main; main()"]
    return subprocess.run(
        [*start, *map(str, arguments)], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout_s
    )


def of_store(store: Store) -> Contents:
    launches = {launch.launch_id: launch for launch in store.launches()}
    return Contents(manifest={}, cases=store.cases().rows, launches=launches, traces={i: store.trace(i) for i in launches})


@pytest.fixture(scope="module")
def submitted(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A results directory with one submitted row, measured with the smoke protocol."""
    folder = tmp_path_factory.mktemp("submitted")
    done = command("run", suite(folder, "work"), "--results", folder / "theirs", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    store = Store(folder / "here")
    accepted(bundle_file(folder), store, of_store(Store(folder / "theirs")))
    return store


def test_reproduce_measures_the_same_case_and_links_the_rows(submitted: Store, tmp_path: Path) -> None:
    (row,) = submitted.cases().rows
    done = command("reproduce", row.run_id[:8], "--results", submitted.path, "--into", tmp_path / "mine", "--json")
    assert done.returncode == 1, "a smoke row claims nothing, so it earns nothing"
    said = json.loads(done.stdout[done.stdout.index('{"run_id"') :])
    (here,) = Store(tmp_path / "mine").cases().rows
    assert (said["run_id"], said["by_run_id"], said["outcome"]) == (row.run_id, here.run_id, "cannot tell")
    assert here.case_id == row.case_id and here.run_id != row.run_id
    levels = read_levels([submitted.path, tmp_path / "mine"])
    (attempt,) = levels.attempts[row.run_id]
    assert attempt.same_hardware and attempt.here["env_id"] == here.env_id
    assert {line.name: line.verdict for line in attempt.metrics}["params_total"] == "agrees"
    assert (levels.of(row.run_id), levels.of(here.run_id)) == ("submitted", "measured here")


@pytest.mark.long
@pytest.mark.alone
def test_an_honest_row_is_reproduced_on_its_own_machine(tmp_path: Path) -> None:
    """A step that sleeps takes the same time whenever it is measured, so this is the one row that must hold."""
    path = suite(tmp_path, "work", protocol="quick", step_s=0.05)
    path.write_text(path.read_text().replace("time_limit_s: 3", "time_limit_s: 60"))
    done = command("run", path, "--results", tmp_path / "theirs", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    store = Store(tmp_path / "here")
    accepted(bundle_file(tmp_path), store, of_store(Store(tmp_path / "theirs")))
    (row,) = store.cases().rows
    done = command("reproduce", row.run_id, "--results", store.path, "--into", store.path, timeout_s=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Reproduced: every headline metric (*) agrees." in done.stdout
    assert sorted(read_levels([store.path]).of(one.run_id) for one in store.cases()) == ["measured here", "reproduced"]


def test_reproduce_refuses_what_is_not_submitted_and_what_reaches_outside(submitted: Store, tmp_path: Path) -> None:
    done = command("reproduce", "nothing", "--results", submitted.path)
    assert done.returncode == 2 and "No submitted row 'nothing'" in done.stderr
    (row,) = submitted.cases().rows
    spec = json.loads(row.spec) | {"environment": {"LD_PRELOAD": "/tmp/evil.so"}}
    evil = Contents(manifest={}, cases=(replace(row, run_id="evil", spec=json.dumps(spec)),))
    store = Store(tmp_path / "results")
    accepted(bundle_file(tmp_path), store, evil)
    done = command("reproduce", "evil", "--results", store.path, "--into", tmp_path / "mine")
    assert done.returncode == 2 and "sets environment variables (LD_PRELOAD)" in done.stderr
    assert not (tmp_path / "mine").exists()


def test_accept_takes_a_real_bundle_once(tmp_path: Path) -> None:
    write_bundle(Store(REFERENCE), tmp_path / "b.zip", contact="me@example.org", licence="CC-BY-4.0")
    known = tmp_path / "nothing"
    done = command("accept", tmp_path / "b.zip", "--results", tmp_path / "results", "--known", known)
    assert done.returncode == 0, done.stderr
    assert "12 rows and 36 launches" in done.stdout and "marked as submitted" in done.stdout
    assert set(levels_of([tmp_path / "results"]).values()) == {"submitted"}
    done = command("accept", tmp_path / "b.zip", "--results", tmp_path / "results", "--known", known, "--json")
    assert (json.loads(done.stdout)["rows_written"], json.loads(done.stdout)["rows"]) == (0, 12)
    done = command("accept", tmp_path / "b.zip", "--results", tmp_path / "others", "--known", REFERENCE)
    assert done.returncode == 2 and "is rejected, nothing was written" in done.stderr
    assert snapshot(tmp_path / "others") == {}, "runs that are known are not repeated"


def test_accept_says_in_a_sentence_what_it_cannot_take(tmp_path: Path) -> None:
    done = command("accept", tmp_path / "none.zip", "--results", tmp_path / "results")
    assert (done.returncode, done.stdout) == (2, "")
    assert "is no file" in done.stderr and "Traceback" not in done.stderr


def test_a_submitted_row_never_stands_for_one_to_be_measured_here(tmp_path: Path) -> None:
    """Whatever environment a bundle names, ours included."""
    from effbench.cli.measuring import _unfinished
    from effbench.schema import Case, Spec

    contents = bundle_contents()
    cases = tuple(replace(case, env_id="ours") for case in contents.cases)
    launches = {name: replace(launch, env_id="ours") for name, launch in contents.launches.items()}
    store = Store(tmp_path / "results")
    accepted(bundle_file(tmp_path), store, replace(contents, cases=cases, launches=launches))
    wanted = [Case(spec=Spec.from_json(json.loads(case.spec))) for case in cases]
    wanted = [replace(case, baseline=Spec.from_json(json.loads(make_case(techniques=("mha",)).spec))) for case in wanted]
    assert [case.case_id for case in wanted] == [case.case_id for case in cases]
    assert _unfinished(store, wanted, "ours") == (wanted, [])
