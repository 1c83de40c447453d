"""Every error a user can meet, one class per cause; the command line prints the message and nothing else.

EffbenchError                 anything effbench can explain
├── SuiteError                a suite file: names file, line, key, what was given, what would work
├── UnknownName               a technique, workload, model or probe that nobody provides
├── NameCollision             two packages provide the same name
├── MissingExtra              a library that an optional part needs; carries the pip line
├── ModelError                weights, text or a model that cannot be built as asked
├── ProbeError                a sensor that cannot be read; carries a reason code for the record
├── CorrectnessError          the gate before the measurement failed: no number is worth taking
├── ContractError             a technique does not do what effbench/technique.py promises of it
├── MetricError                a figure that cannot stand for what it is given as (a loss as quality)
├── LaunchError               a launch ended without a result; carries the status of its row
├── StoreError                results cannot be read or written
│   ├── DamagedFile           one file is not readable parquet of ours
│   └── NewerSchema           written by a later effbench
├── BundleError               a submitted bundle is refused; carries the check that says so and where
└── UsageError                a command line that asks for the impossible

A message says what happened, what was given and what would work. Foreign errors are mapped once, at the border.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EffbenchError(Exception):
    """Base of all errors that effbench explains in one sentence."""


class SuiteError(EffbenchError):
    """A suite that cannot be run. `problems` holds one line per fault, each with file, line and key."""

    def __init__(self, problems: Iterable[str]):
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class UnknownName(EffbenchError):
    """Nobody provides this name."""

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        self.kind, self.name, self.known = kind, name, sorted(known)
        super().__init__(f"Unknown {kind} {name!r}.{did_you_mean(name, self.known)} Known: {', '.join(self.known)}.")


class NameCollision(EffbenchError):
    """Two packages provide the same name; neither is loaded."""


class MissingExtra(EffbenchError):
    """An optional library is absent."""

    def __init__(self, library: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs {library}, which is not installed. Try: pip install 'effbench[{extra}]'")


class ModelError(EffbenchError):
    """A model, its weights or its text cannot be had as asked."""


class ProbeError(EffbenchError):
    """A sensor cannot be read. `reason` is the code that goes into the record."""

    def __init__(self, reason: str, message: str = ""):
        self.reason = reason
        super().__init__(message or reason)


class CorrectnessError(EffbenchError):
    """The correctness gate failed, so nothing is measured."""


class ContractError(EffbenchError):
    """A technique does not do what the contract promises of it."""


class MetricError(EffbenchError):
    """A figure cannot stand for what it is given as."""


class LaunchError(EffbenchError):
    """A launch ended without a result. `reason` is a short code, `detail` what is known (a traceback)."""

    def __init__(self, reason: str, message: str, detail: str = ""):
        self.reason, self.detail = reason, detail
        super().__init__(message)


class StoreError(EffbenchError):
    """Results cannot be read or written."""


class DamagedFile(StoreError):
    """One file of the store cannot be read; the others can."""


class NewerSchema(StoreError):
    """The file was written by a later effbench than this one."""


class BundleError(EffbenchError):
    """A submitted bundle is refused. `check` names the rule it breaks, `where` the member, row or launch."""

    def __init__(self, check: str, message: str, where: str = ""):
        self.check, self.message, self.where = check, message, where
        super().__init__(f"{where}: {message}" if where else message)


class UsageError(EffbenchError):
    """The command line asks for something that cannot be."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return ' Did you mean: a, b?' for near misses of `given`, else an empty string."""
    close = difflib.get_close_matches(given, list(known), n=3, cutoff=0.6)
    return f" Did you mean: {', '.join(close)}?" if close else ""
