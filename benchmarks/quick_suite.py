"""Wall time of `effbench run suites/quick.yaml`, as a user runs it, into an empty results directory.

Twice: with an empty cache of trained weights (the very first run on a machine, which trains the small base models), then
with the cache that this left. The number of cases, that all of them are ok, and that all three workloads are among them
is checked in the rows that were written.

One run has its replicas inside it: the suite goes through its blocks one after another, so the time of a third of the
suite is known as many times as there are blocks. The total is what is outside launches (start, training of base weights,
writing, table), taken as it was, plus the number of blocks × the interval of a block's time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from benchmarks import common
from benchmarks.common import ROOT, Figure, Options, Report, Target, single
from effbench import stats
from effbench.stats import Interval
from effbench.store import Store

EFFBENCH = Path(sys.executable).with_name("effbench")
SUITE = "suites/quick.yaml"
WALL = Target(text="at most 4 minutes", upper=240.0)
CASES = Target(text="12 to 16", lower=12.0, upper=16.0)
TINY = ("--protocol", "smoke", "--only", "generate/small-llama/*")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run: its wall time, what was written, and what it said when it failed or took too long."""

    wall_s: float
    store: Store
    trouble: str = ""


def run(options: Options) -> Report:
    """A cold run, then a warm one; each is stopped when the script's time is over."""
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="effbench-bench-") as name:
        folder = Path(name)
        figures: list[Figure] = []
        notes: list[str] = []
        for arm in ("cold", "warm"):
            left_s = max(options.limit_s - (time.monotonic() - began_s), 30.0)
            done = _run(folder, arm, left_s, TINY if options.tiny else ())
            figures += _figures(arm, done)
            notes += [f"{arm}: {done.trouble}"] if done.trouble else []
    blocks = next((f.interval.n for f in figures if f.interval.n > 1), 0)
    return Report(
        name="quick_suite",
        compares=f"wall time of `effbench run {SUITE}` with a cold and with a warm cache of trained weights",
        pairs=blocks,
        figures=figures,
        notes=[*notes, "Nothing is compared between the two runs, so there is no A/A; n counts the blocks inside a run."],
    )


def _run(folder: Path, arm: str, limit_s: float, more: tuple[str, ...]) -> Outcome:
    """Run the suite in a process of its own; an interrupt ends it when its time is up, which loses nothing finished."""
    results = folder / arm
    command = [str(EFFBENCH), "run", SUITE, "--device", "cpu", "--results", str(results), *more]
    environment = {**os.environ, "EFFBENCH_CACHE": str(folder / "cache")}
    common.say(f"{arm}: {' '.join(command)}")
    began_s = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        _, said = process.communicate(timeout=limit_s)
        trouble = "" if process.returncode == 0 else f"exit {process.returncode}: {said.strip()[-500:]}"
    except subprocess.TimeoutExpired:
        process.terminate()  # effbench takes it for Ctrl-C
        process.communicate()
        trouble = f"stopped after {limit_s:.0f} s, not finished"
    return Outcome(wall_s=time.perf_counter() - began_s, store=Store(results), trouble=trouble)


def _figures(arm: str, done: Outcome) -> list[Figure]:
    rows = done.store.cases(columns=["status", "reason", "workload", "case_id"], metrics=())
    inside_s = _block_times(done.store)
    ok, workloads = sum(row.status == "ok" for row in rows), {row.workload for row in rows}
    why = "".join(sorted({f"; {row.status}: {row.reason}" for row in rows if row.status != "ok"})[:1])
    total = _total(done.wall_s, inside_s)
    count = Interval(float(len(rows)), float(len(rows)), float(len(rows)), 1)
    wall_verdict = common.judge(total, WALL)
    if done.trouble:
        wall_verdict = "missed" if done.wall_s > 240.0 else "undecided here"
    return [
        Figure(
            key=f"{arm}_wall_s", title=f"{arm} cache: the whole run", interval=total, target=WALL.text, verdict=wall_verdict,
            note=f"{done.wall_s:.1f} s observed",
        ),
        Figure(key=f"{arm}_block_s", title="  one block of every case", interval=stats.block_interval(inside_s)),
        Figure(key=f"{arm}_outside_s", title="  outside launches", interval=single(done.wall_s - sum(inside_s))),
        Figure(
            key=f"{arm}_cases_count", title="  cases written", interval=count, target=CASES.text,
            verdict=common.judge(count, CASES), note=f"{ok} ok; {', '.join(sorted(workloads))}{why}",
        ),
    ]  # fmt: skip


def _block_times(store: Store) -> list[float]:
    """Time inside launches for each block number, in s: from a launch's birth to the end of its last phase."""
    found: dict[int, float] = defaultdict(float)
    for launch in store.launches():
        found[launch.block] += max((window.end_s for window in launch.windows.values()), default=0.0)
    return [found[block] for block in sorted(found)]


def _total(wall_s: float, inside_s: list[float]) -> Interval:
    """The run's wall time with the interval that its blocks give; its value is what was observed."""
    block = stats.block_interval(inside_s)
    if block.lower is None or block.upper is None:
        return single(wall_s)
    outside_s, count = wall_s - sum(inside_s), len(inside_s)
    return Interval(wall_s, outside_s + count * block.lower, outside_s + count * block.upper, count)
