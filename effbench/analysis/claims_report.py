"""The claims as `effbench claims` prints them: a table for people, one JSON document for programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.analysis.claims import ANSWERS, CLAIMS, Finding, Shown, results_of

if TYPE_CHECKING:
    from rich.console import RenderableType

_COLOURS = {"supported": "green", "contradicted": "red", "not shown": "yellow", "not measured yet": "dim"}


def read(folders: Sequence[Path]) -> tuple[list[Finding], tuple[str, ...]]:
    """The verdict on every claim from the results in these folders, and a warning for what could not be read."""
    return results_of(folders, CLAIMS)


def document(findings: Sequence[Finding]) -> dict[str, Any]:
    """One JSON document: `count` of each verdict, and `claims` as `Finding.to_json` gives them. What is missing is null."""
    count = {answer: sum(finding.answer == answer for finding in findings) for answer in ANSWERS}
    return {"count": count, "claims": [finding.to_json() for finding in findings]}


def renderables(findings: Sequence[Finding]) -> list[RenderableType]:
    """A table of all claims for a terminal: what was printed, the verdict, and what each part shows on which hardware."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        "claim", "what it says", "printed [grade]", "verdict", "what these results show", box=box.HORIZONTALS, pad_edge=False,
        title=Text("Published claims, held against these results", "bold"), title_justify="left", show_lines=True,
    )  # fmt: skip
    for finding in findings:
        claim = finding.claim
        printed = "\n".join(f"{text.text} [{text.grade}]" for text in claim.printed)
        shown = "\n".join(sentence(line) for line in finding.shown) or finding.why
        table.add_row(
            f"{claim.id}\n{claim.paper}", Text(claim.sentence), Text(printed), Text(finding.answer, _COLOURS[finding.answer]),
            Text(shown),
        )  # fmt: skip
    count = document(findings)["count"]
    totals = ", ".join(f"{number} {answer}" for answer, number in count.items())
    grades = "Grades: P primary, S reported by a secondary source, D derived here and not published, F read off a figure, ? not found."
    return [table, Text(f"{len(findings)} claims: {totals}."), Text(grades)]


def sentence(line: Shown) -> str:
    """What one hardware shows of one part, as one line of text."""
    count = f"{line.num} comparison{'s' if line.num != 1 else ''}" + (
        f", {line.held} for it and {line.failed} against" if line.num > 1 else ""
    )
    number = f"{line.ratio:.3g} [{line.lower:.3g}, {line.upper:.3g}]"
    marks = (" · screening" if line.screening else "") + (" · beside" if line.beside else "")
    return f"{line.hardware} · {line.part}: {line.answer}; {line.quantity} {number}, expected {line.expected}; {count}{marks}"
