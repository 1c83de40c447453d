"""From comparisons to one verdict: of a part on one hardware, of a claim on it, and of the claim.

A part holds on one hardware where at least half of its comparisons show it, more of them than chance alone would, and no more
than chance would show the contrary; it fails where more than chance show the contrary. An interval of 95 % errs to one side in
one of 40 comparisons, so one contrary finding among many is no counter-example. A part that says "up to" holds where more
than chance show it, and fails where every comparison shows the contrary.

A claim is contradicted where a part of it fails, and supported where all of its parts hold. A verdict over all hardware needs
agreement: supported here and contradicted there is "not shown", and the finding says where is what.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from effbench.analysis.claims.types import Answer, Claim, Finding, Line, Part, Shown, Specs
from effbench.errors import StoreError

ONE_SIDED = 0.025  # how often a 95 % interval lies wholly on the wrong side of the truth
BY_CHANCE = 0.05  # how often more comparisons than `expected_by_chance` may do so together
MOST_LINES = 8  # comparisons of a part and hardware that are shown one by one
_OF: Mapping[int, Answer] = {1: "supported", 0: "not shown", -1: "contradicted"}


class Index(Protocol):
    """What the claims need of `index.ResultIndex`."""

    def frame(self, *, metrics: Sequence[str], where: Mapping[str, Sequence[str]], spec: bool = False) -> pd.DataFrame: ...

    def distinct(self, column: str) -> Sequence[str]: ...

    def specs(self, run_ids: Sequence[str]) -> dict[str, str]: ...


def findings_of(index: Index, claims: Iterable[Claim]) -> list[Finding]:
    """Judge claims on all results of an index: the rows of one workload and hardware at a time, and only the metrics needed.

    No comparison reaches over two of either, so memory is that of the largest of them."""

    def specs(run_ids: Sequence[str]) -> dict[str, str]:
        try:
            return index.specs(run_ids)
        except StoreError:  # a file was merged while it was read; the files' state has changed, so all is judged again
            return {}

    claims = list(claims)
    parts = {(claim.id, part): part for claim in claims for part in claim.parts}
    shown: dict[tuple[str, Part], list[Shown]] = {key: [] for key in parts}
    for workload in sorted({part.workload for part in parts.values()} & set(index.distinct("workload"))):
        asked = {key: part for key, part in parts.items() if part.workload == workload}
        names = tuple(dict.fromkeys(name for part in asked.values() for name in part.metrics()))
        for hardware in sorted(index.distinct("hardware")):
            frame = index.frame(metrics=names, where={"workload": [workload], "hardware": [hardware], "status": ["ok"]})
            techniques = techniques_of(frame)
            for key, part in asked.items():
                shown[key] += show(part, frame, specs, techniques)
    return [conclude(claim, [line for part in claim.parts for line in shown[claim.id, part]]) for claim in claims]


def judge(claim: Claim, frame: pd.DataFrame, specs: Specs) -> Finding:
    """The verdict on one claim, from a frame that has the metrics of all its parts."""
    return conclude(claim, [line for part in claim.parts for line in show(part, frame, specs)])


def conclude(claim: Claim, shown: Sequence[Shown]) -> Finding:
    """The verdict on a claim from what was shown of its parts."""
    by_hardware = {
        name: _of_parts(claim, {line.part: line.answer for line in shown if line.hardware == name})
        for name in sorted({line.hardware for line in shown if not line.beside})
    }
    answers = set(by_hardware.values())
    if not answers:
        return Finding(claim=claim, answer="not measured yet", why=_unmeasured(claim), shown=tuple(shown))
    clear = answers & {"supported", "contradicted"}
    answer: Answer = clear.pop() if len(clear) == 1 else "not shown"
    return Finding(claim=claim, answer=answer, why=_why(by_hardware, shown), by_hardware=by_hardware, shown=tuple(shown))


def show(part: Part, frame: pd.DataFrame, specs: Specs, techniques: Set[str] | None = None) -> list[Shown]:
    """What the rows show of one part, one entry a hardware. `techniques`: those of the frame, where they are known already."""
    if any(name not in frame for name in part.metrics()) or not part.may_answer(techniques or techniques_of(frame)):
        return []
    keep = (frame["status"] == "ok") & (frame["workload"] == part.workload)
    if not keep.any():
        return []
    judged = part.judged(frame if keep.all() else frame[keep], specs)
    return [_shown(part, str(name), lines) for name, lines in judged.groupby("hardware", sort=True)]


def techniques_of(frame: pd.DataFrame) -> Set[str]:
    """The names of all techniques in these rows."""
    return {part.partition("(")[0] for label in frame["label"].unique() for part in str(label).split(" + ")}


def _shown(part: Part, hardware: str, lines: pd.DataFrame) -> Shown:
    held, failed, num = int((lines["answer"] > 0).sum()), int((lines["answer"] < 0).sum()), len(lines)
    telling = lines.sort_values(["answer", "started_at"], ascending=[not part.somewhere, False], kind="stable")
    if failed and held:  # both sides of the finding are worth seeing
        telling = pd.concat([telling[telling["answer"] == sign].head(MOST_LINES // 2) for sign in (-1, 1, 0)])
    return Shown(
        part=part.says, quantity=part.quantity(), expected=part.expected(), hardware=hardware,
        answer=_of_counts(part, held, failed, num), beside=part.beside,
        ratio=float(lines["ratio"].median()), lower=float(lines["lower"].min()), upper=float(lines["upper"].max()),
        num=num, held=held, failed=failed, screening=bool(lines["screening"].any()),
        lines=tuple(_line(row) for row in telling.head(MOST_LINES).to_dict("records")),
    )  # fmt: skip


def _of_counts(part: Part, held: int, failed: int, num: int) -> Answer:
    enough = 1 if part.exact else expected_by_chance(num) + 1
    if part.somewhere:
        return "supported" if held >= enough else "contradicted" if failed == num else "not shown"
    if failed >= enough:
        return "contradicted"
    return "supported" if held >= max(enough, math.ceil(num / 2)) else "not shown"


def expected_by_chance(num: int) -> int:
    """The most comparisons of `num` that chance alone puts on one side with a probability above BY_CHANCE."""
    if num > 200:  # the normal approximation, rounded up
        return math.ceil(num * ONE_SIDED + 1.645 * math.sqrt(num * ONE_SIDED * (1 - ONE_SIDED)))
    tail, count = 1.0, 0
    while True:  # tail: the probability of at least `count`
        tail -= math.comb(num, count) * ONE_SIDED**count * (1 - ONE_SIDED) ** (num - count)
        if tail <= BY_CHANCE:
            return count
        count += 1


def _of_parts(claim: Claim, answers: Mapping[str, Answer]) -> Answer:
    counted = [answers.get(part.says) for part in claim.parts if not part.beside]
    if "contradicted" in counted:
        return "contradicted"
    return "supported" if all(answer == "supported" for answer in counted) else "not shown"


def _line(row: Mapping[Any, Any]) -> Line:
    return Line(
        model=str(row["model"]), setting=str(row["setting"]), what=str(row["what"]), ratio=float(row["ratio"]),
        lower=float(row["lower"]), upper=float(row["upper"]), screening=bool(row["screening"]), answer=_OF[int(np.sign(row["answer"]))],
        run_ids=tuple(row["run_ids"]),
    )  # fmt: skip


def _unmeasured(claim: Claim) -> str:
    if claim.needs:
        return claim.needs
    return f"No rows compare these yet; the workload {' or '.join(claim.workloads)} measures them."


def _why(by_hardware: Mapping[str, Answer], shown: Sequence[Shown]) -> str:
    """A sentence: which parts say what, where."""
    count = {answer: sum(value == answer for value in by_hardware.values()) for answer in _OF.values()}
    where = ", ".join(f"{answer} on {number}" for answer, number in count.items() if number)
    num = sum(line.num for line in shown if not line.beside)
    note = " Screening rows claim nothing below 10 %." if any(line.screening for line in shown) else ""
    return f"{num} comparison{'s' if num != 1 else ''}; of {len(by_hardware)} hardware: {where}.{note}"


def results_of(folders: Sequence[Path], claims: Iterable[Claim]) -> tuple[list[Finding], tuple[str, ...]]:
    """Findings on the results in these folders, and a warning for each thing that could not be read."""
    from effbench.analysis.index import ResultIndex

    index = ResultIndex(list(folders))
    index.refresh()
    return findings_of(index, claims), tuple(index.warnings)
