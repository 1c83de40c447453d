"""How fast the reading side answers: `effbench list`, and `effbench show` on 1,000 rows, compacted and loose.

Each answer is a fresh process started as a user starts it, with warm files; its wall time is one replica, and commands
take turns in an order drawn anew each round, with one of them twice as the A/A. The rows are whole ones, with every
metric, spec and provenance, written one by one through `effbench.store`; `show` ranks all and prints its first hundred,
`show --json` prints all. On loose files it has to say that compacting would help.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import common
from benchmarks.common import ROOT, Figure, Options, Report, Samples, Target, against, single
from effbench import stats
from effbench.store import Store

EFFBENCH = Path(sys.executable).with_name("effbench")
AT_ONCE = Target(text="< 1 s", upper=1.0)
LOOSE = Target(text="< 10 s", upper=10.0)


def run(options: Options) -> Report:
    """Loose first, then the same rows compacted; twenty rounds of the quick commands, five of the slow one."""
    num_rows = 20 if options.tiny else 1000
    with tempfile.TemporaryDirectory(prefix="effbench-bench-") as name:
        folder = Path(name)
        began_s = time.perf_counter()
        _write(folder, num_rows)
        write_s = time.perf_counter() - began_s
        loose, hints = _loose(folder, options)
        began_s = time.perf_counter()
        Store(folder).compact()
        compact_s = time.perf_counter() - began_s
        quick = _quick(folder, options)
    figures = [
        against("list_s", "effbench list", quick.interval("list", "wall_s"), AT_ONCE, _median(quick, "list")),
        against("show_s", f"effbench show, {num_rows} rows", quick.interval("show", "wall_s"), AT_ONCE, _median(quick, "show")),
        Figure(key="aa_ratio", title="A/A: show again / show", interval=quick.ratio("show again", "show", "wall_s")),
        Figure(key="show_json_s", title="effbench show --json", interval=quick.interval("show --json", "wall_s")),
        Figure(key="python_s", title="for scale: python -c pass", interval=quick.interval("python", "wall_s")),
        against("loose_s", f"effbench show, {num_rows} files", loose.interval("show", "wall_s"), LOOSE, _median(loose, "show")),
        *_hint(hints, num_rows),
        Figure(key="write_s", title=f"writing {num_rows} rows, each flushed", interval=single(write_s)),
        Figure(key="compact_s", title=f"compacting {num_rows} files", interval=single(compact_s)),
    ]
    return Report(
        name="listing",
        compares=f"wall time of fresh `effbench` processes on {num_rows} rows with all metrics",
        pairs=len(quick.blocks),
        figures=figures,
    )


def _write(folder: Path, num_rows: int) -> None:
    """Rows of several machines, models, workloads and techniques, as the tests of the store make them."""
    from tests.records import make_board

    store = Store(folder)
    for record in make_board(num_rows):
        store.write_case(record)


def _loose(folder: Path, options: Options) -> tuple[Samples, list[bool]]:
    """Times of `show` on loose files, and whether each answer gave the hint to compact."""
    hints: list[bool] = []

    def show() -> Mapping[str, float | None]:
        wall_s, said = _timed([str(EFFBENCH), "show", "--results", str(folder)])
        hints.append("effbench compact" in said)
        return {"wall_s": wall_s}

    show()
    hints.clear()
    blocks = min(5, options.plan(5))
    return common.run_blocks({"show": show}, blocks=blocks, seed=options.seed, limit_s=options.limit_s / 3), hints


def _quick(folder: Path, options: Options) -> Samples:
    show = [str(EFFBENCH), "show", "--results", str(folder)]
    commands = {
        "list": [str(EFFBENCH), "list"],
        "show": show,
        "show again": show,
        "show --json": [*show, "--json"],
        "python": [sys.executable, "-c", "pass"],
    }
    arms: dict[str, common.Arm] = {name: _arm(command) for name, command in commands.items()}
    for arm in () if options.tiny else arms.values():
        arm()  # files into the page cache, byte code onto the disk
    blocks = options.plan(20)
    return common.run_blocks(arms, blocks=blocks, seed=options.seed, limit_s=options.limit_s / 2, say=common.say)


def _arm(command: Sequence[str]) -> common.Arm:
    return lambda: {"wall_s": _timed(command)[0]}


def _timed(command: Sequence[str]) -> tuple[float, str]:
    """Wall time of a command and what it said on stderr. Raises RuntimeError when it failed."""
    began_s = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    wall_s = time.perf_counter() - began_s
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr[-2000:]}")
    return wall_s, done.stderr


def _median(samples: Samples, arm: str) -> str:
    middle = stats.per_launch([v for v in samples.values(arm, "wall_s") if v is not None])
    return "" if middle is None else f"median {middle:.3g} s"


def _hint(hints: Sequence[bool], num_rows: int) -> list[Figure]:
    """Whether loose files brought the hint to compact; a handful of files needs none."""
    if num_rows < 1000:
        return []
    share = single(sum(hints) / len(hints) if hints else None)
    verdict: common.Answer = "met" if share.value == 1.0 else "missed"
    return [Figure(key="hint_share", title="of it with a hint to compact", interval=share, target="every one", verdict=verdict)]
