"""The verdict on a bundle. Nothing of it is opened in this process: that is done in the sandbox, which hands back a report.

    bundle ──bytes──▶ [ sandbox: opening → tables → evidence ] ──▶ Report

Nothing that a bundle holds is ever imported, run, unpickled or written to a path that it names.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from effbench.errors import UsageError
from effbench.exchange import limits, sandbox
from effbench.exchange.report import Finding, Report

BUNDLE, KNOWN = "bundle.zip", "known.json"


def verify(path: str | Path, *, results: Sequence[Path] = ()) -> Report:
    """Verify one bundle; `results` are directories whose runs it must not repeat.

    Whatever the bundle is, the answer is a report. Raises UsageError where there is no such file, StoreError where
    `results` or the folder for temporary files cannot be used."""
    data = read(path)
    digest = hashlib.sha256(data).hexdigest()
    if len(data) > limits.BUNDLE_BYTES:
        message = f"The file has more than {limits.BUNDLE_BYTES:,} bytes."
        return _report(digest, [Finding(check="size", severity="refused", message=message)])
    outcome = sandbox.run(examine, None, files={BUNDLE: data, KNOWN: _known(results)})
    if outcome.refusal:
        found = Finding(check=outcome.check, severity="refused", message=clean(outcome.refusal), where=clean(outcome.where))
        return _report(digest, [found], notes=outcome.notes)
    try:
        said = TypeAdapter(Report).validate_python({"bundle_sha256": digest, **outcome.value})
        return replace(said, notes=(*said.notes, *outcome.notes))
    except (TypeError, ValidationError):
        message = "The verifier's process gave a report that is none."
        return _report(digest, [Finding(check="limits", severity="refused", message=message)], notes=outcome.notes)


def read(path: str | Path) -> bytes:
    """The bytes of a bundle, or one more than a bundle may have. Raises UsageError where it is no readable file."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise UsageError(f"{path} is not a file. Name the bundle that `effbench submit` wrote.")
            return file.read(limits.BUNDLE_BYTES + 1)
    except OSError as fault:
        raise UsageError(f"{path} cannot be read: {fault.strerror}. Name the bundle that `effbench submit` wrote.") from None


def examine(_: None) -> dict[str, Any]:
    """Everything that looks inside a bundle. Runs in the sandbox, in a folder with the files. Raises BundleError."""
    from effbench.exchange.bundle import contents_of_bytes

    contents = contents_of_bytes(Path(BUNDLE).read_bytes())

    from effbench.exchange import evidence
    from effbench.exchange.known import Known

    found = evidence.findings(contents, Known.from_json(json.loads(Path(KNOWN).read_bytes())))
    return {"rows": len(contents.cases), "launches": len(contents.launches), **brief(found)}


def brief(findings: Iterable[Finding]) -> dict[str, Any]:
    """Findings as a report can carry them: refusals first, few and short, with a note on those left out."""
    ordered = sorted(findings, key=lambda finding: finding.severity != "refused")
    kept, left = ordered[: limits.FINDINGS_COUNT], len(ordered) - limits.FINDINGS_COUNT
    cleaned = [
        asdict(finding) | {key: clean(getattr(finding, key)) for key in ("check", "message", "where")} for finding in kept
    ]
    return {"findings": cleaned, "notes": [f"{left:,} more findings are not listed."] if left > 0 else []}


def clean(text: str) -> str:
    """A text of another hand on one line: nothing that a terminal obeys, and not too long."""
    line = " ".join(text.split())
    most = limits.MESSAGE_CHARACTERS
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line[:most])
    return shown if len(line) <= most else f"{shown}…"


def _known(results: Sequence[Path]) -> bytes:
    from effbench.exchange.known import Known
    from effbench.store import Store

    return json.dumps(Known.of([Store(folder) for folder in results]).to_json()).encode()


def _report(digest: str, findings: Sequence[Finding], *, notes: Sequence[str] = ()) -> Report:
    return Report(bundle_sha256=digest, rows=0, launches=0, findings=tuple(findings), notes=tuple(notes))
