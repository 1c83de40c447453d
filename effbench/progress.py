"""What a person sees while a suite runs. It moves only between launches: nothing of ours draws while a case is measured."""

from __future__ import annotations

import json
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from effbench.planning import case_name
from effbench.protocol import protocol
from effbench.scheduler import BudgetSpent, CaseDone, Event, LaunchDone, LaunchStarted, groups
from effbench.schema import Case, Spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

MARKS = {"ok": "[green]✓[/]", "skipped": "[yellow]–[/]", "failed": "[red]✗[/]", "invalid": "[red]![/]"}


class RunDisplay:
    """A bar over launches on a terminal, plain lines elsewhere. A context manager."""

    def __init__(self, console: Console, cases: Sequence[Case]):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.console = console
        todo = groups([case for case in cases if not case.skip_reason])
        specs = [({s.spec_id for case in g for s in (case.spec, case.baseline) if s}, g[0].spec.protocol) for g in todo]
        self.num_cases, self.done_cases = len(cases), 0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("launches  {task.fields[left]}"),
        )
        self.bar = Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal)
        total = sum(len(spec_ids) * protocol(name).blocks for spec_ids, name in specs)
        self.task = self.bar.add_task("starting", total=total, left="")
        self.started_s, self.launches = time.monotonic(), 0

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def show(self, event: Event) -> None:
        """Say what just happened."""
        if isinstance(event, LaunchStarted):
            verb = "training" if event.preparing else f"block {event.block + 1}/{event.num_blocks}"
            self.bar.update(self.task, description=f"{case_name(event.spec)} · {verb}", refresh=True)
        elif isinstance(event, LaunchDone):
            self.launches += 1
            self.bar.update(self.task, advance=1, left=self._left(), refresh=True)
            if event.launch.status != "ok":
                self._line(f"{MARKS[event.launch.status]} {case_name(event.launch.spec)}: {event.launch.reason}")
        elif isinstance(event, CaseDone):
            self.done_cases += 1
            record = event.record
            name = case_name(Spec.from_json(json.loads(record.spec)))
            reason = f": {record.reason}" if record.reason else ""
            self._line(f"{MARKS[record.status]} {name}{reason}  [dim]{self.done_cases}/{self.num_cases} cases[/]")
        elif isinstance(event, BudgetSpent):
            self._line(f"The budget is spent; {event.cases_left} cases are left. Run again to go on from here.")

    def _line(self, text: str) -> None:
        from rich.text import Text

        self.bar.console.print(Text.from_markup(text), soft_wrap=True)
        self.bar.refresh()

    def _left(self) -> str:
        task = self.bar.tasks[0]
        if not task.total or not self.launches:
            return ""
        seconds = (time.monotonic() - self.started_s) / self.launches * max(0.0, task.total - task.completed)
        return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"
