"""What all benchmarks share: paired blocks in random order, the A/A, verdicts, and the report they print.

    block 0: ours  peer  ours again   ┐   ratio ours again / ours: the A/A, what this machine can tell apart at all
    block 1: peer  ours again  ours   ├─▶ ratio ours / peer      : the comparison, from the same blocks
    block 2: …                        ┘

These machines are shared and noisy: identical code differs by 30 %. So things are compared within a block only, the
block is the replica (effbench.stats), the number of blocks is set before anything is seen (a count and a limit of time,
never a look at the result), and a target is met only when the whole interval says so. What other processes took of the
machine meanwhile is measured, and where that is much, being slow proves nothing.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from effbench import provenance, stats
from effbench.stats import Interval

Answer = Literal["met", "missed", "undecided here"]
Arm = Callable[[], Mapping[str, float | None]]

ROOT = Path(__file__).resolve().parents[1]
UNITS = ("_s", "_ms", "_ratio", "_share", "_count", "_mb")  # a key of the JSON line ends with its unit


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much to run. `tiny` proves in seconds that the script works; its figures mean nothing."""

    blocks: int | None = None  # None: as many as the script plans
    limit_s: float = 420.0  # no block begins that would probably end after this
    seed: int = 1
    tiny: bool = False

    def plan(self, full: int, tiny: int = 2) -> int:
        """Blocks to run."""
        return self.blocks or (tiny if self.tiny else full)


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a figure has to lie: at most `upper`, at least `lower`."""

    text: str
    upper: float | None = None
    lower: float | None = None


def judge(interval: Interval, target: Target) -> Answer:
    """Met or missed only when the whole interval lies on one side of the target."""
    low, high = interval.lower, interval.upper
    if low is None or high is None:
        return "undecided here"
    if (target.upper is not None and low > target.upper) or (target.lower is not None and high < target.lower):
        return "missed"
    if (target.upper is None or high <= target.upper) and (target.lower is None or low >= target.lower):
        return "met"
    return "undecided here"


def judge_beside(interval: Interval, target: Target, control: Interval) -> Answer:
    """The verdict on a ratio near 1, given its A/A: what identical code does not show cannot be shown of different code."""
    answer, of_control = judge(interval, target), judge(control, target)
    if answer == "met" and of_control != "met":
        return "undecided here"
    if answer == "missed" and of_control == "missed":
        return "undecided here"
    return answer


def judge_agreement(interval: Interval, control: Interval, tolerance: float) -> Answer:
    """Whether two things agree within `tolerance` beyond the spread of the A/A.

    The spread widens the tolerance. Where it is larger than the tolerance itself the machine cannot show agreement, since
    a wide A/A would then excuse anything; a difference outside the widened tolerance is a difference all the same.
    """
    if control.lower is None or control.upper is None:
        return "undecided here"
    spread = max(abs(math.log(control.lower)), abs(math.log(control.upper)))
    reach = (1.0 + tolerance) * math.exp(spread)
    answer = judge(interval, Target(text="", lower=1.0 / reach, upper=reach))
    return "undecided here" if answer == "met" and spread > math.log(1.0 + tolerance) else answer


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One row of the report. `key` names it in the JSON line and ends with its unit."""

    key: str
    title: str
    interval: Interval
    target: str = ""
    verdict: Answer | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if not self.key.endswith(UNITS):
            raise ValueError(f"the key {self.key!r} does not end with a unit: {', '.join(UNITS)}")

    def to_json(self) -> dict[str, Any]:
        found = self.interval
        plain = {"value": found.value, "lower": found.lower, "upper": found.upper, "n": found.n}
        extra = {"target": self.target, "verdict": self.verdict, "note": self.note}
        return {**plain, **{k: v for k, v in extra.items() if v}}


def against(key: str, title: str, interval: Interval, target: Target, note: str = "") -> Figure:
    """A figure with a plain target."""
    return Figure(key=key, title=title, interval=interval, target=target.text, verdict=judge(interval, target), note=note)


def single(value: float | None, *reasons: str) -> Interval:
    """One observation: a value without an interval, or a missing one with its reasons."""
    return Interval(value, None, None, 0 if value is None else 1, reasons)


@dataclass(frozen=True)
class Samples:
    """What the arms gave: one mapping a block, from arm to figure to number."""

    blocks: tuple[Mapping[str, Mapping[str, float | None]], ...]

    def values(self, arm: str, key: str) -> list[float | None]:
        """One number a block; None where the arm did not run or gave nothing."""
        return [block.get(arm, {}).get(key) for block in self.blocks]

    def interval(self, arm: str, key: str) -> Interval:
        return stats.block_interval(self.values(arm, key))

    def ratio(self, arm: str, base: str, key: str) -> Interval:
        """Paired ratio of two arms over the blocks that have both."""
        return stats.paired_ratio(self.values(arm, key), self.values(base, key))


def run_blocks(
    arms: Mapping[str, Arm],
    *,
    blocks: int,
    seed: int,
    limit_s: float = math.inf,
    only_first: Mapping[str, int] | None = None,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] | None = None,
) -> Samples:
    """Run every arm once a block, in an order drawn from the seed.

    `only_first` gives expensive arms fewer blocks. A block that would probably end after `limit_s` (by the longest block
    of its size so far) does not begin.
    """
    began_s, done, longest_s = clock(), [], dict[int, float]()
    for index in range(blocks):
        order = [name for name in arms if index < (only_first or {}).get(name, blocks)]
        block_s = clock()
        if block_s - began_s + longest_s.get(len(order), 0.0) > limit_s:
            break
        random.Random(f"{seed}:{index}").shuffle(order)
        done.append({name: dict(arms[name]()) for name in order})
        longest_s[len(order)] = max(longest_s.get(len(order), 0.0), clock() - block_s)
        if say:
            say(f"block {index + 1} of at most {blocks}: {clock() - block_s:.1f} s ({', '.join(order)})")
    return Samples(tuple(done))


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a script found. `pairs` is the number of blocks that the comparisons stand on."""

    name: str
    compares: str
    pairs: int
    figures: Sequence[Figure]
    notes: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)  # of a peer, beside our own


def stay_on_one_core() -> None:
    """Keep this process and all it starts on one core: on a shared machine cores differ, and placement is chance."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def say(text: str) -> None:
    """Progress goes to stderr: stdout is the report."""
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What a figure was taken on, and how busy that was: a load above the number of cores makes it worth little."""
    where = provenance.environment("cpu").provenance
    packages = json.loads(where["packages"])
    return {
        "cpu": where["cpu"],
        "cores_count": int(where["cores"]),
        "memory_gb": float(where["memory_gb"]),
        "platform": where["platform"],
        "python": where["python"],
        "load_1min": os.getloadavg()[0],
        "versions": {"effbench": where["effbench_version"], "source": where["source_digest"][:12], **packages},
    }


def emit(report: Report, card: Mapping[str, Any], wall_s: float, out: TextIO = sys.stdout) -> None:
    """Print card, table and, as the last line, the same as one line of JSON."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=out, width=150, highlight=False)
    versions = {**card["versions"], **report.versions}
    named = ", ".join(f"{k} {v}" for k, v in versions.items())
    console.print(f"\n{report.name}: {report.compares}", markup=False)
    busy = f"others took {card['others_share']:.0%} of the cores"
    console.print(f"on {card['cpu']}, {card['cores_count']} cores, {card['memory_gb']:.0f} GB, {busy}; {report.pairs} blocks")
    console.print(f"python {card['python']}, {named}", markup=False)
    table = Table("figure", "value", "95 % interval", "n", "target", "verdict", "note")
    for row in report.figures:
        found = row.interval
        bounds = "–" if found.lower is None or found.upper is None else f"{found.lower:.4g} … {found.upper:.4g}"
        value = "–" if found.value is None else f"{found.value:.4g}"
        unit = row.key.rpartition("_")[2]
        note = row.note or ", ".join(found.reasons if found.value is None else ())
        table.add_row(f"{row.title} ({unit})", value, bounds, str(found.n), row.target, row.verdict or "", note)
    console.print(table)
    for note in report.notes:
        console.print(f"· {note}", markup=False)
    document = {
        "bench": report.name,
        "compares": report.compares,
        "machine": {**card, "versions": versions},
        "pairs_count": report.pairs,
        "figures": {row.key: row.to_json() for row in report.figures},
        "notes": list(report.notes),
        "wall_s": round(wall_s, 1),
    }
    print(json.dumps(document, ensure_ascii=False, allow_nan=False), file=out, flush=True)
