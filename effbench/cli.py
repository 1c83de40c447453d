"""The command line: the only place where the measuring and the reading arm meet.

Heavy modules are imported inside the command that needs them, so that `list` and `show` answer at once.

    effbench run suites/quick.yaml && effbench show
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from effbench import __version__
from effbench.errors import EffbenchError, UsageError
from effbench.schema import FINISHED

if TYPE_CHECKING:
    from rich.console import Console

    from effbench.planning import Options
    from effbench.scheduler import Environment
    from effbench.schema import Case, CaseRecord, Launch
    from effbench.store import Store

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

EXIT_FAILED_CASES, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
LOOSE_FILES_HINT = 200

ResultsOption = Annotated[Path, typer.Option("--results", help="directory of results")]
DeviceOption = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes the GPU where there is one")]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON document instead of a table")]
OnlyOption = Annotated[str | None, typer.Option(help="glob over workload/model/techniques, for example 'generate/*/mqa'")]
MemoryOption = Annotated[str | None, typer.Option(help="plan for a device with so much memory instead of this one: 141GB")]
ProtocolOption = Annotated[str | None, typer.Option(help="smoke, quick or publish, instead of the suite's own")]
DEFAULT_RESULTS = Path("results/local")


def main() -> NoReturn:
    """Entry point: an error that effbench can explain is one sentence on stderr, never a traceback."""
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except EffbenchError as error:
        _fail(str(error), EXIT_USAGE)
    except KeyboardInterrupt:
        _fail("Interrupted.", EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            format_message = getattr(error, "format_message", None)
            message = format_message() if format_message else str(error)
            _fail(f"{message} Try: effbench --help", EXIT_USAGE)
        raise


@app.callback(invoke_without_command=True)
def version(show_version: Annotated[bool, typer.Option("--version", help="print the version and stop")] = False) -> None:
    """Check what an efficiency technique for language models really costs and saves, on your own hardware."""
    if show_version:
        print(f"effbench {__version__}")
        raise typer.Exit


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
        print_listing(_console(), found)


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

    _console().print(plan_table(str(suite), cases, options.device_name, _memory_text(options.memory_bytes)))


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
    console = _console()
    if len(pending) < len(cases):
        console.print(f"{len(cases) - len(pending)} of {len(cases)} cases are here already; --fresh measures them again.")
    statuses = _measure(console, store, suite, pending, earlier, where, deadline_s) if pending else []
    for warning in store.compact().warnings:
        _say(warning)
    _show_cases(console, store, {case.case_id for case in cases}, where.env_id)
    console.print(f"Browse them: make board   (or: effbench board --results {results})", soft_wrap=True)
    unfinished = sum(status not in FINISHED for status in statuses)
    if unfinished:
        _say(f"{unfinished} of {len(cases)} cases failed or are invalid; the table says why. Run again to try them again.")
        raise typer.Exit(EXIT_FAILED_CASES)


@app.command()
def show(
    results: Annotated[list[Path] | None, typer.Option("--results", help="directory of results; may be repeated")] = None,
    suite: Annotated[str | None, typer.Option(help="only this suite")] = None,
    workload: Annotated[str | None, typer.Option(help="only this workload")] = None,
    model: Annotated[str | None, typer.Option(help="only this model")] = None,
    technique: Annotated[str | None, typer.Option(help="only stacks with this technique")] = None,
    columns: Annotated[
        Literal["default", "paper", "all", "costs"], typer.Option(help="which metrics; costs: expected beside measured")
    ] = "default",
    as_json: JsonOption = False,
) -> None:
    """The leaderboard in the terminal.

    Example: effbench show --workload generate --columns paper
    """
    from effbench.analysis import growth, table

    wanted = {"suite": suite, "workload": workload, "model": model}
    metrics = None if as_json else table.metrics_read(columns)
    found, warnings, loose = _read(results or _default_results(), table.CASE_COLUMNS, metrics)
    rows = [r for r in found if all(value in (None, getattr(r, key)) for key, value in wanted.items())]
    rows = [r for r in rows if technique is None or technique in r.techniques]
    for warning in warnings:
        _say(warning)
    if loose > LOOSE_FILES_HINT:
        _say(f"{loose} loose files make this slow. Try: effbench compact")
    if as_json:
        print(json.dumps(table.document(rows)))
    elif rows:
        for renderable in [*table.rich_tables(rows, columns=columns), *(growth.tables(rows) if columns == "costs" else ())]:
            _console().print(renderable)
    else:
        _say("There are no results here. Try: effbench run suites/quick.yaml")


@app.command()
def claims(
    results: Annotated[list[Path] | None, typer.Option("--results", help="directory of results; may be repeated")] = None,
    as_json: JsonOption = False,
) -> None:
    """What the founding papers claimed, and what these results show of it.

    Example: effbench claims --results results/reference
    """
    from importlib.util import find_spec

    from effbench.errors import MissingExtra

    if not find_spec("pandas"):
        raise MissingExtra("pandas", "app", "Judging claims")
    from effbench.analysis import claims_report

    findings, warnings = claims_report.read(results or _default_results())
    for warning in warnings:
        _say(warning)
    if as_json:
        print(json.dumps(claims_report.document(findings)))
    else:
        for renderable in claims_report.renderables(findings):
            _console().print(renderable)


@app.command()
def board(
    results: Annotated[list[Path] | None, typer.Option("--results", help="directory of results; may be repeated")] = None,
    port: Annotated[int, typer.Option(help="port on this machine", min=1, max=65535)] = 8501,
) -> None:
    """The leaderboard in the browser.

    Example: effbench board --results results/local --results results/reference
    """
    from importlib.util import find_spec

    from effbench.errors import MissingExtra

    if not all(find_spec(name) for name in ("streamlit", "plotly", "duckdb", "pandas")):
        raise MissingExtra("streamlit", "app", "The board")
    found = find_spec("leaderboard_app")
    assert found and found.submodule_search_locations, "leaderboard_app is part of this distribution"
    script = Path(found.submodule_search_locations[0]) / "app.py"
    folders = os.pathsep.join(str(path.resolve()) for path in results or _default_results())
    options = ["--server.port", str(port), "--server.address", "localhost", "--browser.gatherUsageStats", "false"]
    os.environ["EFFBENCH_RESULTS"] = folders
    os.execv(sys.executable, [sys.executable, "-m", "streamlit", "run", str(script), *options])


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
        _console().print(examination.render(report))


@app.command()
def export(
    out: Annotated[Path | None, typer.Argument(help="file to write: .csv, .parquet or .json")] = None,
    results: Annotated[list[Path] | None, typer.Option("--results", help="directory of results; may be repeated")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="write the board as one page that needs no server")] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="compute every metric from the traces again and compare")
    ] = False,
) -> None:
    """Write all rows to one file, or the board as one page; with --recompute, prove each number from its raw trace first.

    Example: effbench export rows.csv --recompute
             effbench export --html board.html
    """
    from effbench.analysis import export as exporting
    from effbench.store import Store

    if out is None and html is None:
        raise UsageError(
            "Nothing to write was named. `effbench export rows.csv` writes the rows, `--html board.html` the board."
        )
    stores = [Store(path) for path in results or _default_results()]
    differing = 0
    if recompute:
        for store in stores:
            report = exporting.recompute(store)
            for line in report.lines:
                _say(line)
            differing += report.differing
            print(f"{store.path}: {report.same} of {report.rows} rows recomputed from their traces agree.")
    found = [store.cases() for store in stores]
    rows = list({row.run_id: row for read in found for row in read}.values())
    warnings = [warning for read in found for warning in read.warnings]
    for warning in warnings:
        _say(warning)
    if out is not None:
        print(f"{exporting.write(rows, out)} rows written to {out}")
    if html is not None:
        from leaderboard_app.static import write_html

        written = write_html(rows, html, sources=[str(store.path) for store in stores], warnings=warnings)
        left_out = f"; {written.left_out} more did not fit" if written.left_out else ""
        print(f"A board of {written.rows} rows written to {html} ({written.num_bytes / 1e6:.1f} MB){left_out}.")
    if differing:
        raise typer.Exit(EXIT_FAILED_CASES)


@app.command()
def compact(results: ResultsOption = DEFAULT_RESULTS) -> None:
    """Merge small result files into few; nothing is lost when it is interrupted.

    Example: effbench compact --results results/local
    """
    from effbench.store import Store

    done = Store(results).compact()
    for warning in done.warnings:
        _say(warning)
    print(f"{done.files} files merged, {done.rows} rows kept, {done.leftovers} leftovers removed.")


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
    rows = store.cases(columns=["case_id", "env_id", "status"], metrics=())
    finished = {row.case_id for row in rows if row.env_id == env_id and row.status in FINISHED}
    pending = [case for case in cases if case.case_id not in finished]
    if not pending:
        return pending, ()
    return pending, [launch for launch in store.launches() if launch.env_id == env_id]


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
        _fail(
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


def _read(
    folders: Iterable[Path], columns: Iterable[str], metrics: Iterable[str] | None
) -> tuple[list[CaseRecord], list[str], int]:
    """Rows of these folders with only what a table needs, warnings, and how many loose files there are."""
    from effbench.store import Store

    rows: list[CaseRecord] = []
    warnings: list[str] = []
    loose = 0
    for folder in folders:
        store = Store(folder)
        found = store.cases(columns, metrics)
        rows.extend(found)
        warnings.extend(found.warnings)
        loose += store.loose_files
    return rows, warnings, loose


def _default_results() -> list[Path]:
    named = os.environ.get("EFFBENCH_RESULTS")
    if named:
        return [Path(path) for path in named.split(os.pathsep)]
    return [DEFAULT_RESULTS, Path("results/reference")]


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


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _fail(text: str, code: int) -> NoReturn:
    _say(text)
    sys.exit(code)


if __name__ == "__main__":
    main()
