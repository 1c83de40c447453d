"""Commands that carry results to others: submit and verify."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effbench.cli.app import DEFAULT_RESULTS, EXIT_FAILED_CASES, FoldersOption, JsonOption, ResultsOption, app, say

if TYPE_CHECKING:
    from effbench.exchange.bundle import Written
    from effbench.exchange.report import Report

SHOWN_COUNT = 10
VERDICT_MEANING = "The numbers follow from the traces and are plausible; whether they are true, only measuring again shows."


@app.command()
def submit(
    contact: Annotated[str, typer.Option(help="who answers questions about these results; shown beside them")],
    licence: Annotated[str, typer.Option(help="of results and plugin, for example CC-BY-4.0")],
    results: ResultsOption = DEFAULT_RESULTS,
    plugin: Annotated[Path | None, typer.Option(help="source of the plugin that was measured: a folder or one file")] = None,
    out: Annotated[Path | None, typer.Option(help="the bundle; default: effbench-<digest>.zip here")] = None,
    keep_private: Annotated[bool, typer.Option("--keep-private", help="leave names, paths and device identifiers in")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="write it without asking")] = False,
) -> None:
    """Pack results, their raw traces and a plugin's source into one file; shows first what would leave this machine.

    Example: effbench submit --contact me@example.org --licence CC-BY-4.0
    """
    from effbench.exchange.bundle import make_bundle
    from effbench.exchange.levels import levels_of
    from effbench.store import Store

    made = make_bundle(
        Store(results), contact=contact, licence=licence, plugin=plugin, private_kept=keep_private, not_own=levels_of([results])
    )
    for line in _leaving(made, contact, licence, keep_private):
        print(line)
    if not yes:
        try:
            yes = typer.confirm("Write the bundle?")
        except typer.Abort:
            print()
    if not yes:
        say("Nothing was written.")
        raise typer.Exit(EXIT_FAILED_CASES)
    print(f"Written: {made.write(out or Path(f'effbench-{made.sha256[:12]}.zip'))}")
    print(f"SHA-256: {made.sha256}")


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="the file that `effbench submit` wrote")],
    results: FoldersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a bundle without running anything in it: form, hashes, every metric from its trace, physics, statistics.

    Example: effbench verify effbench-0123456789ab.zip --results results/local
    """
    from effbench.exchange import verify as verifying

    report = verifying.verify(bundle, results=results or ())
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        for line in _verdict(report):
            print(line)
    if report.verdict == "rejected":
        raise typer.Exit(EXIT_FAILED_CASES)


def _leaving(made: Written, contact: str, licence: str, private_kept: bool) -> Iterator[str]:
    """What leaves the machine, what was taken out, and what is left."""
    from effbench.exchange.verify import clean

    yield "This leaves your machine:"
    yield f"  {len(made.cases)} rows with the raw traces of {made.launches} launches ({made.samples:,} samples), {len(made.data):,} bytes"
    yield f"  contact {contact}, licence {licence}"
    if made.plugin:
        yield f"  source of the plugin, unchanged: {', '.join(made.plugin.files)}"
    said: dict[str, dict[str, None]] = {"hardware": dict.fromkeys(row.hardware for row in made.cases)}
    for row in made.cases:
        for key, value in row.provenance.items():
            said.setdefault(key, {})[str(value)] = None
        for key, value in json.loads(row.spec)["environment"].items():
            said.setdefault("environment variables", {})[f"{key}={value}"] = None
    for key, values in said.items():
        shown = "; ".join(clean(value) for value in list(values)[:SHOWN_COUNT])
        more = f" and {len(values) - SHOWN_COUNT} more" if len(values) > SHOWN_COUNT else ""
        yield f"  {key}: {shown}{more}"
    if private_kept:
        yield "Nothing was taken out: names, paths and device identifiers stay in (--keep-private)."
    elif made.removed:
        yield "Taken out:"
        for kind, count in sorted(made.removed.items()):
            yield f"  {kind}: {count} times, such as {clean(made.examples[kind])}"
    else:
        yield "There were no names of user or host, paths or device identifiers to take out."
    for title, sentences in (("Stays in, look whether you want that:", made.remaining), ("Not in the bundle:", made.left_out)):
        if sentences:
            yield title
            yield from (f"  {clean(sentence)}" for sentence in sentences)


def _verdict(report: Report) -> Iterator[str]:
    yield f"{report.verdict}: {report.rows} rows of {report.launches} launches, SHA-256 {report.bundle_sha256}"
    for finding in report.findings:
        place = f" [{finding.where}]" if finding.where else ""
        yield f"  {finding.severity}: {finding.message} ({finding.check}){place}"
    for note in report.notes:
        yield f"  not checked here: {note}"
    if report.verdict != "rejected":
        yield VERDICT_MEANING
