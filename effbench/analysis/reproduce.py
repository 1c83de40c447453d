"""From one row to the suite file that measures it again, and the commands that run it. Text only: nothing is planned or run here.

The suite names everything that the row's spec resolved (seed, threads, processes, workload parameters, time limit), so that planning it on the
same source gives the same `case_id`. Of a technique it names what the row's suite had named, so that the new row has the same label;
the defaults of then stand beside it as a comment. What a file cannot bring along (a plugin, a folder, another version) is said.
A record may come from anyone: no text of it reaches a comment or a command unchecked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from effbench.errors import UsageError
from effbench.protocol import PROTOCOLS
from effbench.schema import Case, CaseRecord, Spec, TechniqueRef

OWN_DISTRIBUTION = "effbench:"
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")  # what YAML reads as a text without quotes …
_NOT_PLAIN = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n", "nan", "inf"})  # … and what it does not
_NOT_PRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff\u200b-\u200f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """How to measure a row again. `inexact` has a sentence for each thing that may make the result another case."""

    file_name: str
    suite: str  # YAML
    commands: tuple[str, ...]
    inexact: tuple[str, ...]


def reproduction(record: CaseRecord, baseline: Spec | None = None) -> Reproduction:
    """The suite of exactly this row, and of its baseline where `baseline` is the spec that it was compared with.

    Raises UsageError when the row's spec cannot be read."""
    spec = read_spec(record.spec)
    if spec is None:
        raise UsageError(f"Row {record.run_id} has no spec that this effbench can read, so there is nothing to plan.")
    name = f"reproduce-{re.sub(r'[^A-Za-z0-9]', '', record.case_id)[:12] or 'row'}"
    file_name = f"{name}.yaml"
    return Reproduction(
        file_name=file_name,
        suite=_suite(name, record, spec, baseline),
        commands=tuple(_commands(record, spec, file_name)),
        inexact=tuple(_inexact(record, spec, baseline)),
    )


def read_spec(text: str) -> Spec | None:
    """The spec of a row or launch; None where it is not one."""
    try:
        return Spec.from_json(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _suite(name: str, record: CaseRecord, spec: Spec, baseline: Spec | None) -> str:
    """The YAML, YAML 1.2 by way of JSON: every value that is not a plain word is written as JSON, which YAML contains."""
    about = record.provenance
    against = _stack(baseline.techniques if baseline else spec.techniques)
    lines = [
        f"# Measures one row again: {_comment(record.label)}, {_comment(record.workload)} of {_comment(record.model)}.",
        f"# Row {_comment(record.run_id)}, measured {_comment(record.started_at)} on {_comment(record.hardware)}",
        f"# by effbench {_comment(about.get('effbench_version'))}, commit {_comment(about.get('git_commit'))}.",
        f"name: {name}",
        f"protocol: {_value(spec.protocol)}",
        f"seed: {_value(spec.seed)}",
        f"text: {_value(spec.text)}",
        "cases:",
        f"  - workload: {_value(spec.workload)}",
        f"    params: {_value(spec.params)}",
        f"    model: {_value(spec.model.name)}",
        f"    weights: {_value(spec.model.weights)}",
        *([f"    location: {_value(spec.model.location)}"] if spec.model.location is not None else []),
        "    techniques:",
        f"      - {_value(_stack(spec.techniques))}",
        *(f"      # {line}" for line in _defaults(spec.techniques)),
        f"    baseline: {_value(against)}" + ("" if baseline else "  # itself: compared with nothing"),
        *(f"    # {line}" for line in (_defaults(baseline.techniques) if baseline else ())),
        f"    threads: {_value(spec.threads)}",
        *([f"    nproc: {_value(spec.nproc)}"] if spec.nproc != 1 else []),
        f"    time_limit_s: {_value(spec.time_limit_s)}",
        *([f"    environment: {_value(spec.environment)}"] if spec.environment else []),
    ]
    return "\n".join(lines) + "\n"


def _commands(record: CaseRecord, spec: Spec, file_name: str) -> Iterator[str]:
    commit = str(record.provenance.get("git_commit") or "").removesuffix("+changes")
    if re.fullmatch(r"[0-9a-f]{7,40}", commit):
        yield f"git checkout {commit}"
    device = f" --device {spec.device}" if spec.device in ("cpu", "cuda") else ""
    yield f"effbench run {file_name}{device} --fresh"


def _inexact(record: CaseRecord, spec: Spec, baseline: Spec | None) -> Iterator[str]:
    """Everything that the file and the commands cannot promise."""
    about = record.provenance
    if record.baseline_case_id and baseline is None:
        yield "What the row was compared with is not in these results, so its baseline and its ratios cannot be made again."
    elif Case(spec=spec, baseline=baseline).case_id != record.case_id:
        yield "The row's case_id does not follow from its spec and its baseline: another version or another hand wrote it."
    if baseline and (other := _beyond_the_stack(spec, baseline)):
        yield f"The baseline differs in more than its techniques ({', '.join(other)}), which a suite cannot say."
    commit = str(about.get("git_commit") or "")
    if not commit:
        yield "The row names no commit: the same source can only be told by its source_digest."
    elif commit.endswith("+changes"):
        yield "The row was measured with files changed since its commit, so the source may differ."
    stacks = [*spec.techniques, *(baseline.techniques if baseline else ())]
    parts = {ref.name: ref.identity for ref in stacks} | {spec.workload: spec.workload_identity}
    for name, identity in parts.items():
        if not identity.startswith(OWN_DISTRIBUTION):
            whence = (
                f"comes from a plugin: install {identity} first"
                if identity
                else "comes from a package that the row does not name"
            )
            yield f"{name!r} {whence}."
    if spec.model.weights == "path":
        yield f"The weights are a local folder, {spec.model.location!r}: it must hold the same files (digest {spec.model.digest[:12]})."
    if spec.model.weights == "hub":
        yield f"The weights come from a hub, {spec.model.location!r}: that needs a network and the same revision."
    if spec.text.startswith("hub:"):
        yield f"The text comes from a hub, {spec.text!r}: that needs a network and the same content."
    elif spec.text != "builtin":
        yield f"The text is a local path, {spec.text!r}: it must hold the same content (digest {spec.text_digest[:12]})."
    if spec.environment:
        names = ", ".join(sorted(map(str, spec.environment)))
        yield f"The suite sets environment variables ({names}): read what they do before you run it."
    if spec.protocol not in PROTOCOLS:
        yield f"The protocol {spec.protocol!r} is not known here."
    if spec.device not in ("cpu", "cuda"):
        yield f"The device {spec.device!r} cannot be asked for."


def _beyond_the_stack(spec: Spec, baseline: Spec) -> list[str]:
    """The fields, other than the techniques and what follows from them, in which a baseline differs."""
    names = (
        "workload",
        "params",
        "text_digest",
        "seed",
        "device",
        "threads",
        "nproc",
        "protocol",
        "time_limit_s",
        "environment",
    )
    found = [name for name in names if getattr(spec, name) != getattr(baseline, name)]
    same_model = (spec.model.name, spec.model.weights) == (baseline.model.name, baseline.model.weights)
    return found if same_model else [*found, "model"]


def _stack(techniques: Sequence[TechniqueRef]) -> list[Any]:
    """A stack as a suite names it, with the parameters that were given and without the device's default precision."""
    asked = [ref for ref in techniques if not ref.filled_in]
    given = [{key: ref.params[key] for key in ref.given if key in ref.params} for ref in asked]
    return [{ref.name: params} if params else ref.name for ref, params in zip(asked, given, strict=True)]


def _defaults(techniques: Sequence[TechniqueRef]) -> Iterator[str]:
    for ref in techniques:
        left = {key: value for key, value in ref.params.items() if key not in ref.given}
        if left:
            yield f"defaults of {_comment(ref.name)} then: {_comment(_value(left), 2_000)}"


def _value(value: Any) -> str:
    """A value as YAML 1.2 in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_value(str(key))}: {_value(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _NOT_PLAIN:
        return value
    text = json.dumps(value, ensure_ascii=False)
    return _NOT_PRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _comment(value: Any, longest: int = 120) -> str:
    """A text that stays in its line of comment."""
    text = _NOT_PRINTABLE.sub("?", " ".join(str(value or "unknown").split()))
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:longest]
