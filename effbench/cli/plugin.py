"""Commands for a technique of one's own: a new package, and its check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from effbench.cli.app import EXIT_FAILED_CASES, JsonOption, app, terminal
from effbench.errors import UsageError

plugin = typer.Typer(no_args_is_help=True, help="Bring a technique of your own.", rich_markup_mode=None)
app.add_typer(plugin, name="plugin")


@plugin.command()
def new(
    name: Annotated[str, typer.Argument(help="name of the technique, such as half_width")],
    axis: Annotated[
        str, typer.Option(help="what it changes: attention, position, mixer, ffn, peft, precision, parallel, kernel")
    ],
    out: Annotated[Path, typer.Option(help="where the folder is written")] = Path(),
) -> None:
    """Write a small package with a technique that works, its test and its metadata.

    Example: effbench plugin new half_width --axis ffn
    """
    from effbench.plugins.new import write_package

    folder = write_package(name, axis, out)
    print(f"{folder} holds a technique of axis {axis} that works. What comes next:")
    print(f"  edit                      {folder / f'effbench_{name}.py'}")
    print(f"  python -m pytest          {folder}")
    print(f"  effbench plugin check     {folder}")
    print(f"  python -m pip install     {folder}")


@plugin.command()
def check(
    target: Annotated[str, typer.Argument(help="folder of a plugin package, or name of an installed technique")],
    clause_limit: Annotated[float, typer.Option(help="longest time for one clause on one model, in s")] = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Try a technique against the contract of the built-in ones, on small models, in a process with limits.

    Exit code 0: it keeps the contract; 1: it breaks it, or refuses everything; 2: there is no such technique.

    Example: effbench plugin check ./effbench-half-width
    """
    from effbench.plugins import check as checking
    from effbench.plugins.show import print_reports

    if not 0 < clause_limit <= 3600:
        raise UsageError(f"--clause-limit {clause_limit:g} is no time of up to an hour, in s. Try: 60")
    limits = checking.Limits(clause_s=clause_limit, total_s=5 * clause_limit)
    console = terminal()
    with console.status("plugin check") as status:
        reports = checking.check(target, limits, seen=status.update)
    if as_json:
        print(json.dumps({"techniques": [report.to_json() for report in reports]}, indent=1))
    else:
        print_reports(console, reports)
    if any(report.verdict != "kept" for report in reports):
        raise typer.Exit(EXIT_FAILED_CASES)
