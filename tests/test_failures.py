"""When things go wrong: a launch that ends badly is a row with its reason, the others go on, the exit code says so."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from effbench.store import Store
from tests.commands import EFFBENCH, ROOT, effbench, environment, suite

WAYS = {
    "raise": "raised: RuntimeError: this step always fails",
    "hang": "time_limit: no result after 3 s",
    "nan": "nan_loss",
    "memory": "out_of_memory",
    "killed": "killed: SIGKILL",
    "exit": "exited: code 7 without a result",
    "incorrect": "incorrect: one is not two",
    "print": "killed: SIGABRT",
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One run of a suite in which every case but two goes wrong in its own way."""
    folder = tmp_path_factory.mktemp("failures")
    done = effbench("run", suite(folder, "work", *WAYS, "work"), "--results", folder / "results")
    return done, Store(folder / "results")


def test_every_way_to_fail_becomes_a_row_with_its_reason(ran):
    rows = {row.spec: row for row in ran[1].cases()}
    reasons = sorted(row.reason for row in rows.values() if row.status == "failed")
    assert reasons == sorted(WAYS.values())


def test_the_others_go_on_and_the_exit_code_says_that_some_failed(ran):
    done, store = ran
    assert [row.status for row in store.cases()].count("ok") == 2
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_a_failed_launch_keeps_its_traceback_and_what_it_printed(ran):
    details = {launch.reason: launch.detail for launch in ran[1].launches()}
    assert 'RuntimeError("this step always fails")' in details[WAYS["raise"]]
    assert "said by the launch" in details[WAYS["print"]]


def test_failed_cases_run_again_and_finished_ones_do_not(ran, tmp_path):
    folder = ran[1].path.parent
    before = len(ran[1].cases())
    again = effbench("run", folder / "faulty.yaml", "--results", folder / "results", "--only", "faulty/*")
    assert "2 of 10 cases are here already" in again.stdout
    assert len(ran[1].cases()) == before + len(WAYS)


def test_a_technique_that_does_not_fit_is_a_skipped_row_and_no_failure(tmp_path):
    path = suite(tmp_path, "work")
    path.write_text(path.read_text() + "    techniques: [picky]\n")
    done = effbench("run", path, "--results", tmp_path / "results")
    (row,) = Store(tmp_path / "results").cases()
    assert (row.status, row.reason) == ("skipped", "picky: picky needs an abacus; use another technique")
    assert done.returncode == 0


def one_sentence(done, code=2):
    """stderr is one clear sentence or line, and no traceback."""
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_results_directory_that_cannot_be_written_is_named_before_anything_is_measured(tmp_path):
    path = suite(tmp_path, "work")
    for folder in ("/proc/nothing", tmp_path / "faulty.yaml"):
        assert str(folder) in one_sentence(effbench("run", path, "--results", folder))


def test_a_full_disk_is_one_sentence_and_loses_nothing_that_was_written(tmp_path):
    path, results = suite(tmp_path, "work"), tmp_path / "results"
    assert effbench("run", path, "--results", results).returncode == 0

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    command = [*EFFBENCH, "run", str(path), "--results", str(results), "--fresh"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, preexec_fn=small_files)
    assert str(results) in one_sentence(done)
    assert len(Store(results).cases()) == 1
    assert not Store(results).cases().warnings


def test_a_damaged_file_is_named_and_the_rest_is_shown(tmp_path):
    results = tmp_path / "results"
    effbench("run", suite(tmp_path, "work"), "--results", results)
    (results / "runs" / "broken.parquet").write_bytes(b"PAR1 this is not parquet")
    done = effbench("show", "--results", results)
    assert done.returncode == 0
    assert "broken.parquet" in done.stderr
    assert "faulty" in done.stdout


def test_a_newer_schema_is_refused_with_both_versions(tmp_path, monkeypatch):
    results = tmp_path / "results"
    script = (
        "import effbench.schema as s; s.SCHEMA_VERSION = 999\n"
        "import effbench.store as store; store.SCHEMA_VERSION = 999\n"
        "from tests.records import make_case\n"
        f"store.Store({str(results)!r}).write_case(make_case())\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    text = one_sentence(effbench("show", "--results", results))
    assert "999" in text
    assert "1" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "suites/quik.yaml"], "Did you mean: quick.yaml"),
        (["run", "suites/quick.yaml", "--budget", "soon"], "'soon'"),
        (["run", "suites/quick.yaml", "--only", "nothing/like/this"], "matches no case"),
        (["run", "suites/quick.yaml", "--protocol", "quik"], "Did you mean: quick?"),
        (["run", "suites/quick.yaml", "--device", "cuda"], "cuda"),
        (["plan", "suites"], "cannot be read"),
        (["shw"], "No such command"),
        (["export", "rows.xls", "--results", "nowhere"], "Known: .csv, .parquet, .json"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_that_says_what_would_work(arguments, says):
    assert says in one_sentence(effbench(*arguments))


def test_environment_variables_of_a_spec_reach_a_cold_process(tmp_path):
    path = suite(tmp_path, "work")
    path.write_text(path.read_text() + "    environment: {OMP_NUM_THREADS: '1'}\n")
    done = effbench("run", path, "--results", tmp_path / "results")
    assert done.returncode == 0, done.stderr
    assert {launch.spec.environment["OMP_NUM_THREADS"] for launch in Store(tmp_path / "results").launches()} == {"1"}
