"""Commands that look at this machine and measure on it."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from effbench.cli.app import (
    DEFAULT_RESULTS,
    EXIT_FAILED_CASES,
    EXIT_INTERRUPTED,
    DeviceOption,
    JsonOption,
    ResultsOption,
    app,
    fail,
    say,
    terminal,
)
from effbench.errors import UsageError
from effbench.schema import FINISHED

if TYPE_CHECKING:
    from rich.console import Console

    from effbench.planning import Options
    from effbench.scheduler import Environment
    from effbench.schema import Case, Launch
    from effbench.store import Store

OnlyOption = Annotated[str | None, typer.Option(help="glob over workload/model/techniques, for example 'generate/*/mqa'")]
MemoryOption = Annotated[str | None, typer.Option(help="plan for a device with so much memory instead of this one: 141GB")]
ProtocolOption = Annotated[str | None, typer.Option(help="smoke, quick or publish, instead of the suite's own")]


@app.command("list")
def list_names(as_json: JsonOption = False) -> None:
    """Techniques, workloads, models and suites that are here.

    Example: effbench list --json
    """
    from effbench.listing import listing, print_listing

    found = listing()
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print_listing(terminal(), found)


@app.command()
def plan(
    suite: Annotated[Path, typer.Argument(help="suite file")],
    only: OnlyOption = None,
    device: DeviceOption = "auto",
    protocol: ProtocolOption = None,
    memory: MemoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """What `run` would do: every case, its baseline, and what would be skipped and why.

    Example: effbench plan suites/quick.yaml --only 'generate/*'
    """
    from effbench.planning import describe

    options = _options(only, device, protocol, memory)
    cases = list(describe(_plan(suite, options), options))
    if as_json:
        print(json.dumps({"suite": str(suite), "cases": cases}, indent=1))
        return
    from effbench.plan_table import plan_table

    terminal().print(plan_table(str(suite), cases, options.device_name, _memory_text(options.memory_bytes)))


@app.command()
def run(
    suite: Annotated[Path, typer.Argument(help="suite file")],
    only: OnlyOption = None,
    results: ResultsOption = DEFAULT_RESULTS,
    device: DeviceOption = "auto",
    protocol: ProtocolOption = None,
    executor: Annotated[Literal["local"], typer.Option(help="where launches run")] = "local",
    memory: MemoryOption = None,
    budget: Annotated[str | None, typer.Option(help="stop on a whole block after this long: 90s, 9m, 2h")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="measure again what is there already")] = False,
) -> None:
    """Measure a suite; finished cases are kept and skipped when it runs again.

    Example: effbench run suites/quick.yaml --only 'generate/*' --budget 5m
    """
    from effbench import provenance
    from effbench.store import Store

    deadline_s = None if budget is None else time.monotonic() + _seconds(budget)
    cases = _plan(suite, _options(only, device, protocol, memory))
    store = Store(results)
    store.check_writable()
    where = provenance.environment(cases[0].spec.device)
    pending, earlier = (cases, ()) if fresh else _unfinished(store, cases, where.env_id)
    console = terminal()
    if len(pending) < len(cases):
        console.print(f"{len(cases) - len(pending)} of {len(cases)} cases are here already; --fresh measures them again.")
    statuses = _measure(console, store, suite, pending, earlier, where, deadline_s) if pending else []
    for warning in store.compact().warnings:
        say(warning)
    _show_cases(console, store, {case.case_id for case in cases}, where.env_id)
    console.print(f"Browse them: make board   (or: effbench board --results {results})", soft_wrap=True)
    unfinished = sum(status not in FINISHED for status in statuses)
    if unfinished:
        say(f"{unfinished} of {len(cases)} cases failed or are invalid; the table says why. Run again to try them again.")
        raise typer.Exit(EXIT_FAILED_CASES)


@app.command()
def doctor(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="measure copy bandwidth and matrix rate, and keep them")
    ] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """What this machine can measure, what it cannot, why, and what would change that.

    Example: effbench doctor --calibrate
    """
    from effbench import doctor as examination

    if calibrate:
        from effbench import calibrate as calibration
        from effbench import provenance

        calibration.run(provenance.resolve_device(device))
    report = examination.report()
    if as_json:
        print(json.dumps(examination.to_json(report), indent=1))
    else:
        terminal().print(examination.render(report))


def _options(only: str | None, device: str, protocol: str | None, memory: str | None) -> Options:
    """What the command line says, with the memory of the device at hand where it names none."""
    from effbench import provenance
    from effbench.planning import Options
    from effbench.protocol import protocol as preset

    if protocol:
        preset(protocol)
    resolved = provenance.resolve_device(device)
    name, found = ("the device", _bytes(memory)) if memory else provenance.device_memory(resolved)
    return Options(device=resolved, only=only, protocol=protocol, memory_bytes=found, device_name=name)


def _plan(suite: Path, options: Options) -> list[Case]:
    from effbench.planning import plan
    from effbench.suite import read_suite

    cases = plan(read_suite(suite), options)
    if not cases:
        raise UsageError(f"--only {options.only!r} matches no case of {suite}. `effbench plan {suite}` shows the names.")
    return cases


def _unfinished(store: Store, cases: Sequence[Case], env_id: str) -> tuple[Sequence[Case], Sequence[Launch]]:
    """Cases without a finished row of this environment, and launches of which complete blocks may be used again."""
    from effbench.exchange.levels import read_levels

    levels = read_levels([store.path])  # what a bundle brought was not measured here, whatever environment it names
    rows = [row for row in store.cases(["case_id", "env_id", "status"], metrics=()) if levels.of(row.run_id) == "measured here"]
    finished = {row.case_id for row in rows if row.env_id == env_id and row.status in FINISHED}
    pending = [case for case in cases if case.case_id not in finished]
    if not pending:
        return pending, ()
    if levels.unnamed:  # a submission that cannot be read: no launch can be told to be ours
        return pending, ()
    return pending, [i for i in store.launches() if i.env_id == env_id and i.launch_id not in levels.launch_ids]


def _measure(
    console: Console,
    store: Store,
    suite: Path,
    cases: Sequence[Case],
    earlier: Sequence[Launch],
    where: Environment,
    deadline_s: float | None,
) -> list[str]:
    """Run the cases, keep every record the moment it is there; statuses of the rows written."""
    from effbench import scheduler
    from effbench.executors.local import LocalExecutor
    from effbench.progress import RunDisplay

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite end is an interrupt
    statuses: list[str] = []
    seed = cases[0].spec.seed
    sweep = scheduler.Sweep(suite=suite.stem, seed=seed, cases=cases, environment=where, earlier=earlier, deadline_s=deadline_s)
    try:
        with RunDisplay(console, cases) as display, LocalExecutor() as executor:
            for event in scheduler.run(sweep, executor):
                if isinstance(event, scheduler.LaunchDone):
                    store.write_launch(event.launch, event.trace)
                elif isinstance(event, scheduler.CaseDone):
                    store.write_case(event.record)
                    statuses.append(event.record.status)
                display.show(event)
    except KeyboardInterrupt:
        fail(
            f"Interrupted. {len(statuses)} of {len(cases)} cases are kept in {store.path}; run again to go on.",
            EXIT_INTERRUPTED,
        )
    return statuses


def _show_cases(console: Console, store: Store, case_ids: set[str], env_id: str) -> None:
    """The newest row of each of these cases."""
    from effbench.analysis import table

    newest = {row.case_id: row for row in store.cases() if row.case_id in case_ids and row.env_id == env_id}
    for renderable in table.rich_tables(list(newest.values())):
        console.print(renderable)


def _seconds(text: str) -> float:
    """'90s', '9m', '2h' or a number of seconds. Raises UsageError."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    unit = text[-1:].lower()
    try:
        number = float(text[:-1]) * units[unit] if unit in units else float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise UsageError(f"--budget {text!r} is no length of time. Try: 90s, 9m or 2h.")
    return number


def _bytes(text: str) -> float:
    """'141GB', '80GiB', '500MB' or a number of bytes. Raises UsageError."""
    units = {"GIB": 2.0**30, "MIB": 2.0**20, "TB": 1e12, "GB": 1e9, "MB": 1e6, "B": 1.0}
    wanted = text.strip().upper()
    unit = next((unit for unit in units if wanted.endswith(unit)), "")
    try:
        number = float(wanted.removesuffix(unit)) * units.get(unit, 1.0)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise UsageError(f"--memory {text!r} is no amount of memory. Try: 141GB, 80GiB or 500MB.")
    return number


def _memory_text(nbytes: float | None) -> str:
    return "unknown memory, so nothing is refused for it" if nbytes is None else f"{nbytes / 1e9:.3g} GB"
