"""Commands that read results."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from effbench.cli.app import (
    DEFAULT_RESULTS,
    EXIT_FAILED_CASES,
    FoldersOption,
    JsonOption,
    ResultsOption,
    app,
    default_results,
    say,
    terminal,
)
from effbench.errors import UsageError

if TYPE_CHECKING:
    from effbench.schema import CaseRecord

LOOSE_FILES_HINT = 200


@app.command()
def show(
    results: FoldersOption = None,
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
    from effbench.analysis.origins import Origins
    from effbench.exchange.levels import read_levels

    wanted = {"suite": suite, "workload": workload, "model": model}
    metrics = None if as_json else table.metrics_read(columns)
    folders = results or default_results()
    found, warnings, loose = _read(folders, table.CASE_COLUMNS, metrics)
    levels = read_levels(folders)
    origins = Origins(**levels.described())
    rows = [r for r in found if all(value in (None, getattr(r, key)) for key, value in wanted.items())]
    rows = [r for r in rows if technique is None or technique in r.techniques]
    for warning in (*warnings, *levels.warnings):
        say(warning)
    if loose > LOOSE_FILES_HINT:
        say(f"{loose} loose files make this slow. Try: effbench compact")
    if as_json:
        print(json.dumps(table.document(rows, origins=origins)))
    elif rows:
        tables = table.rich_tables(rows, columns=columns, origins=origins)
        for renderable in [*tables, *(growth.tables(rows) if columns == "costs" else ())]:
            terminal().print(renderable)
    else:
        say("There are no results here. Try: effbench run suites/quick.yaml")


@app.command()
def claims(
    results: FoldersOption = None,
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

    findings, warnings = claims_report.read(results or default_results())
    for warning in warnings:
        say(warning)
    if as_json:
        print(json.dumps(claims_report.document(findings)))
    else:
        for renderable in claims_report.renderables(findings):
            terminal().print(renderable)


@app.command()
def board(
    results: FoldersOption = None,
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
    folders = os.pathsep.join(str(path.resolve()) for path in results or default_results())
    options = ["--server.port", str(port), "--server.address", "localhost", "--browser.gatherUsageStats", "false"]
    options += ["--server.maxUploadSize", "25"]  # MB: what a bundle may have at most
    os.environ["EFFBENCH_RESULTS"] = folders
    os.execv(sys.executable, [sys.executable, "-m", "streamlit", "run", str(script), *options])


@app.command()
def export(
    out: Annotated[Path | None, typer.Argument(help="file to write: .csv, .parquet or .json")] = None,
    results: FoldersOption = None,
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
    stores = [Store(path) for path in results or default_results()]
    differing = 0
    if recompute:
        for store in stores:
            report = exporting.recompute(store)
            for line in report.lines:
                say(line)
            differing += report.differing
            print(f"{store.path}: {report.same} of {report.rows} rows recomputed from their traces agree.")
            if report.younger:
                print(f"Younger than some rows, so not in them: {', '.join(report.younger)}.")
    found = [store.cases() for store in stores]
    rows = list({row.run_id: row for read in found for row in read}.values())
    warnings = [warning for read in found for warning in read.warnings]
    for warning in warnings:
        say(warning)
    if out is not None:
        print(f"{exporting.write(rows, out)} rows written to {out}")
    if html is not None:
        from effbench.analysis.origins import Origins
        from effbench.exchange.levels import read_levels
        from leaderboard_app.static import write_html

        levels = read_levels(store.path for store in stores)
        sources, unread = [str(store.path) for store in stores], [*warnings, *levels.warnings]
        written = write_html(rows, html, sources=sources, warnings=unread, origins=Origins(**levels.described()))
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
        say(warning)
    print(f"{done.files} files merged, {done.rows} rows kept, {done.leftovers} leftovers removed.")


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
