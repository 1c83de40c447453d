"""The application that commands join, the options they share, and how an error leaves it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from effbench import __version__
from effbench.errors import EffbenchError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

EXIT_FAILED_CASES, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

ResultsOption = Annotated[Path, typer.Option("--results", help="directory of results")]
FoldersOption = Annotated[list[Path] | None, typer.Option("--results", help="directory of results; may be repeated")]
DeviceOption = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes the GPU where there is one")]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON document instead of a table")]
DEFAULT_RESULTS = Path("results/local")


def main() -> NoReturn:
    """Entry point: an error that effbench can explain is one sentence on stderr, never a traceback."""
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except EffbenchError as error:
        fail(str(error), EXIT_USAGE)
    except KeyboardInterrupt:
        fail("Interrupted.", EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            format_message = getattr(error, "format_message", None)
            message = format_message() if format_message else str(error)
            fail(f"{message} Try: effbench --help", EXIT_USAGE)
        raise


@app.callback(invoke_without_command=True)
def version(show_version: Annotated[bool, typer.Option("--version", help="print the version and stop")] = False) -> None:
    """Check what an efficiency technique for language models really costs and saves, on your own hardware."""
    if show_version:
        print(f"effbench {__version__}")
        raise typer.Exit


def default_results() -> list[Path]:
    named = os.environ.get("EFFBENCH_RESULTS")
    if named:
        return [Path(path) for path in named.split(os.pathsep)]
    return [DEFAULT_RESULTS, Path("results/reference")]


def terminal() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200)


def say(text: str) -> None:
    print(text, file=sys.stderr)


def fail(text: str, code: int) -> NoReturn:
    say(text)
    sys.exit(code)
