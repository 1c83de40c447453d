"""A report of `plugin check` for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from effbench.plugins.check import ON_MODELS, Outcome, Report

if TYPE_CHECKING:
    from rich.console import Console

VERDICTS = {
    "kept": "It keeps the contract.",
    "broken": "It breaks the contract.",
    "untried": "Nothing is wrong, but it refuses every small model on a CPU, so nothing was shown.",
}
STYLES = {"kept": "green", "broken": "bold red"}


def print_reports(console: Console, reports: list[Report]) -> None:
    """One table for each technique, then its verdict."""
    from rich.markup import escape
    from rich.table import Table

    for report in reports:
        about = report.about
        package = f"{about['distribution']} {about['version']}, {about['licence'] or 'no licence'}" if about else "not loaded"
        axis = f", axis {about['axis']}" if about else ""
        table = Table("promise", "", "on", "why", title=escape(f"{report.technique} ({package}{axis})"), title_justify="left")
        for row in _rows([o for o in report.outcomes if o.status != "not asked"]):
            promise, status, shapes, reason = map(escape, row)
            table.add_row(promise, f"[{STYLES[status]}]{status}[/]", shapes, reason)
        console.print(table)
        for line in dict.fromkeys(f"Not asked on {o.shape}: {o.reason}" for o in report.outcomes if o.status == "not asked"):
            console.print(escape(line))
        console.print(escape(f"{VERDICTS[report.verdict]} Checked in {report.took_s:.0f} s."))


def _rows(outcomes: list[Outcome]) -> list[tuple[str, str, str, str]]:
    """Outcomes of one clause that ended alike share a row: promise, status, shapes, reason."""
    grouped: dict[tuple[str, str, str, bool], list[str]] = {}
    for outcome in outcomes:
        key = (outcome.promise, outcome.status, outcome.reason, outcome.clause in ON_MODELS)
        grouped.setdefault(key, []).append(outcome.shape)
    return [
        (promise, status, ", ".join(filter(None, shapes)) if on_models else "", reason)
        for (promise, status, reason, on_models), shapes in grouped.items()
    ]
