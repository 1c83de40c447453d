"""Killed at any moment, a run loses no finished case, leaves no half file and no process, and goes on where it was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from effbench.store import Store
from tests.commands import EFFBENCH, ROOT, effbench, environment, suite

MOMENTS = 20


def ours(mark: str) -> list[int]:
    """Live processes whose environment carries the mark."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if (
                mark.encode() in (entry / "environ").read_bytes()
                and "Z" not in (entry / "stat").read_text().rpartition(")")[2][:3]
            ):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def kill_and_look(folder: Path, path: Path, after_s: float, *, whole_group: bool) -> Store:
    mark = f"EFFBENCH_TEST_MARK={random.random()}"
    name, _, value = mark.partition("=")
    command = [*EFFBENCH, "run", str(path), "--results", str(folder)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(**{name: value}), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    time.sleep(after_s)
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    time.sleep(1.0)
    assert ours(mark) == [], "a process of ours outlived the runner by a second"
    return Store(folder)


def ids(store: Store) -> set[str]:
    cases, launches = store.cases(), store.launches()
    assert not cases.warnings, cases.warnings
    assert not launches.warnings, launches.warnings
    for launch in launches:
        store.trace(launch.launch_id)  # a launch that can be read has its trace
    return {row.run_id for row in cases}


def test_a_run_killed_at_random_moments_loses_nothing_and_finishes_the_rest(tmp_path):
    killed_and_resumed(tmp_path, num_moments=MOMENTS, seed=7)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_the_same_at_many_more_moments(tmp_path, seed):
    killed_and_resumed(tmp_path, num_moments=3 * MOMENTS, seed=seed)


def killed_and_resumed(tmp_path: Path, *, num_moments: int, seed: int) -> None:
    """Kill a run of twelve cases again and again, then let it finish, and look for what was lost or done twice."""
    path, results = suite(tmp_path, *["work"] * 12, step_s=0.002), tmp_path / "results"
    moments = random.Random(seed)
    kept: set[str] = set()
    for number in range(num_moments):
        store = kill_and_look(results, path, moments.uniform(0.2, 5.0), whole_group=number % 2 == 1)
        now = ids(store)
        assert kept <= now, "a finished case was lost"
        kept = now
        finished = [row.case_id for row in store.cases()]
        assert len(finished) == len(set(finished)), "a finished case was repeated"
    done = effbench("run", path, "--results", results)
    assert done.returncode == 0, done.stderr
    finished = [row.case_id for row in Store(results).cases()]
    assert len(finished) == len(set(finished)) == 12
    assert kept <= ids(Store(results))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_is_finished_and_says_so(tmp_path, number):
    path, results = suite(tmp_path, *["work"] * 6, step_s=0.002), tmp_path / "results"
    command = [*EFFBENCH, "run", str(path), "--results", str(results)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs inherit it ignored
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list((results / "runs").glob("*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Interrupted." in said
    assert "Traceback" not in said
    assert len(ids(Store(results))) >= 1
