"""Commands for whoever keeps a board: take in rows of another hand, and measure them again."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from effbench.errors import StoreError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from effbench.exchange.levels import Attempt
    from effbench.schema import Case, CaseRecord, Spec
    from effbench.store import Store

IntoOption = Annotated[Path, typer.Option("--into", help="directory of results that the new row goes to")]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-spec", help="use the environment variables, folders and downloads that the submitted spec names"),
]


@app.command()
def accept(
    bundle: Annotated[Path, typer.Argument(help="bundle that `effbench submit` wrote")],
    results: ResultsOption = DEFAULT_RESULTS,
    known: Annotated[
        list[Path] | None, typer.Option("--known", help="directory whose runs the bundle must not repeat; may be repeated")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Verify a bundle and put its rows into a directory of results, marked as submitted.

    Example: effbench accept bundle.zip --results results/local
    """
    from effbench.exchange import accepting
    from effbench.store import Store

    others = [folder for folder in known or default_results() if folder.resolve() != results.resolve()]
    done = accepting.accept(bundle, Store(results), known=others)
    if as_json:
        print(json.dumps(vars(done)))
        return
    for remark in done.remarks:
        say(f"Remark: {remark}")
    there = f"; {done.rows - done.rows_written} were there already" if done.rows_written < done.rows else ""
    print(f"{done.verdict.capitalize()}: {done.rows_written} rows and {done.launches_written} launches in {results}{there}.")
    print(f"They are marked as submitted. Measure one again: effbench reproduce RUN_ID --results {results}")


@app.command()
def reproduce(
    run_id: Annotated[str, typer.Argument(help="submitted row, or the beginning of its id")],
    results: FoldersOption = None,
    into: IntoOption = DEFAULT_RESULTS,
    trust_spec: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a submitted row's own case on this machine, and keep whether it says the same.

    Example: effbench reproduce 3fa94c21 --results results/local
    """
    from effbench.analysis.reproduce import reproduction
    from effbench.exchange import agreement, levels
    from effbench.exchange.queue_tables import one_line

    submitted = _submitted(run_id, results or default_results())
    made = reproduction(submitted.record, submitted.baseline)
    _check_reach(submitted.spec, trusted=trust_spec)
    cases, mine = _plan_again(made.suite, made.file_name, submitted)
    for sentence in made.inexact:
        say(one_line(sentence))
    here = _measure_again(cases, mine, into, Path(made.file_name))
    lines = agreement.agreements(submitted.record, here)
    attempt = levels.Attempt(
        by_run_id=here.run_id,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        outcome=agreement.outcome(submitted.record, here, lines),
        same_hardware=here.hardware == submitted.record.hardware,
        metrics=lines,
        submitted=agreement.environment_of(submitted.record),
        here=agreement.environment_of(here),
    )
    levels.write_attempt(submitted.store.path, submitted.record.run_id, attempt)
    _show_attempt(submitted.record, attempt, as_json=as_json)
    if attempt.outcome != "reproduced":
        raise typer.Exit(EXIT_FAILED_CASES)


@dataclass(frozen=True, kw_only=True)
class _Submitted:
    """A row of another hand, what it was compared with, and where it lies."""

    record: CaseRecord
    spec: Spec
    baseline: Spec | None
    store: Store


def _submitted(run_id: str, folders: Sequence[Path]) -> _Submitted:
    """The one submitted row whose id begins so. Raises UsageError."""
    from effbench.analysis.reproduce import read_spec
    from effbench.exchange.levels import read_levels
    from effbench.store import Store

    levels = read_levels(folders)
    for warning in levels.warnings:
        say(warning)
    found = sorted(known for known in levels.by_run_id if known.startswith(run_id))
    if run_id in found:
        found = [run_id]
    if len(found) != 1:
        where = ", ".join(map(str, folders))
        said = (
            f"{len(found)} submitted rows in {where} begin with {run_id!r}"
            if found
            else f"No submitted row {run_id!r} in {where}"
        )
        raise UsageError(
            f"{said}. A row that was measured here needs no reproduction; `effbench show --json` lists run ids and levels."
        )
    for store in map(Store, folders):
        if record := next((row for row in store.cases() if row.run_id == found[0]), None):
            break
    else:
        raise UsageError(
            f"Row {found[0]} was accepted, and is in none of {', '.join(map(str, folders))}. Run `effbench accept` again."
        )
    spec = read_spec(record.spec)
    if spec is None or record.status != "ok":
        raise UsageError(
            f"Row {record.run_id} is {record.status} or has no spec that this effbench can read: nothing to reproduce."
        )
    sides = [launch.spec for launch in store.launches() if launch.launch_id in record.baseline_launch_ids]
    return _Submitted(record=record, spec=spec, baseline=next(iter(sides), None), store=store)


def _check_reach(spec: Spec, *, trusted: bool) -> None:
    """Refuse what a stranger's spec would touch on this machine besides a model of the catalogue. Raises UsageError."""
    from effbench.exchange.queue_tables import one_line

    reaches = [f"sets environment variables ({', '.join(sorted(map(str, spec.environment)))})"] if spec.environment else []
    if spec.model.weights in ("path", "hub"):
        reaches.append(f"loads weights from {spec.model.location!r}")
    if spec.text != "builtin":
        reaches.append(f"reads text from {spec.text!r}")
    if reaches and not trusted:
        said = one_line(f"The submitted spec {' and '.join(reaches)}")
        raise UsageError(f"{said}. Read it, then use --trust-spec to run it all the same.")


def _plan_again(suite: str, file_name: str, submitted: _Submitted) -> tuple[list[Case], Case]:
    """The cases of the suite, and the one that is the submitted row's. Raises UsageError where it plans to another one here."""
    from effbench import provenance
    from effbench.planning import Options, plan
    from effbench.suite import read_suite

    device = provenance.resolve_device(submitted.spec.device if submitted.spec.device in ("cpu", "cuda") else "auto")
    name, memory_bytes = provenance.device_memory(device)
    with tempfile.TemporaryDirectory(prefix="effbench-reproduce-") as folder:
        path = Path(folder) / file_name
        path.write_text(suite, encoding="utf-8")
        cases = plan(read_suite(path), Options(device=device, memory_bytes=memory_bytes, device_name=name))
    wanted = _without_identities(submitted.spec)
    mine = next((case for case in cases if _without_identities(case.spec) == wanted), None)
    if mine is None:
        closest = _without_identities(cases[0].spec)
        unlike = ", ".join(sorted(key for key in wanted if wanted[key] != closest.get(key)))
        raise UsageError(
            f"The submitted spec plans to another one here: {unlike} differ. The same version of effbench would tell why."
        )
    if mine.skip_reason:
        raise UsageError(f"The case cannot run here: {mine.skip_reason}.")
    return cases, mine


def _without_identities(spec: Spec) -> dict[str, Any]:
    """What is asked of a run, whichever version of the sources answers: that is said by the environments of the two rows."""
    plain = replace(
        spec, workload_identity="", text="", techniques=tuple(replace(t, identity="") for t in spec.techniques)
    ).to_json()
    del plain["model"]["location"]
    for technique in plain["techniques"]:
        del technique["given"], technique["filled_in"]
    found: dict[str, Any] = json.loads(json.dumps(plain))
    return found


def _measure_again(cases: list[Case], mine: Case, into: Path, suite: Path) -> CaseRecord:
    """The new row of the case. Raises StoreError where the run left none that was measured."""
    from effbench import provenance
    from effbench.cli import measuring
    from effbench.store import Store

    store = Store(into)
    store.check_writable()
    where = provenance.environment(mine.spec.device)
    before = {row.run_id for row in store.cases(columns=["run_id"], metrics=())}
    measuring._measure(terminal(), store, suite, cases, (), where, None)
    rows = [
        row for row in store.cases() if row.run_id not in before and row.case_id == mine.case_id and row.env_id == where.env_id
    ]
    if not rows:
        raise StoreError(f"The run left no row of case {mine.case_id[:12]} in {into}. Run it again.")
    if rows[-1].status != "ok":
        raise StoreError(
            f"The case did not run here ({rows[-1].status}: {rows[-1].reason}), so nothing is said of the submitted row."
        )
    return rows[-1]


def _show_attempt(record: CaseRecord, attempt: Attempt, *, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        print(json.dumps({"run_id": record.run_id, **asdict(attempt)}))
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from effbench.metrics import metric

    table = Table(
        title=Text(f"{record.run_id} measured again as {attempt.by_run_id}"), title_justify="left", box=box.HORIZONTALS
    )
    for head in ("metric", "verdict", "here / submitted", "tolerance", "why"):
        table.add_column(head)
    shown = [line for line in attempt.metrics if line.headline or line.verdict == "differs"]
    for line in shown:
        sign = "×" if line.measure == "ratio" else ""
        bounds = "" if line.lower is None or line.upper is None else f" ({line.lower:.3f}–{line.upper:.3f})"
        found = "–" if line.middle is None else f"{sign}{line.middle:.3f}{bounds}"
        title = f"{metric(line.name).title}{' × baseline' if line.of != 'value' else ''}{' *' if line.headline else ''}"
        table.add_row(*map(Text, (title, line.verdict, found, f"{100 * line.tolerance:.3g} %", line.why)))
    terminal().print(table)
    if left := len(attempt.metrics) - len(shown):
        print(f"{left} more that are no headline metrics agree, or cannot be told; --json and the board's Run page list them.")
    said = {
        "reproduced": "Reproduced: every headline metric (*) agrees.",
        "differs": "Not reproduced: a headline metric (*) differs.",
    }
    other = "Recorded; on other hardware no row is reproduced, only what is counted and quality compare."
    unsure = "Not reproduced: not every headline metric (*) could be told to agree."
    print(said.get(attempt.outcome) or (other if attempt.outcome == "other hardware" else unsure))
