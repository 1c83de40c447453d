"""The manifest of a bundle: who gives it under what licence, and the size and SHA-256 of every other member.

It is canonical JSON, so that one manifest has one text: a second key of the same name, a number that is none and text that
is no UTF-8 do not exist in it.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

import effbench
from effbench.errors import BundleError, UsageError
from effbench.exchange import limits
from effbench.schema import canonical_json

NAME = "manifest.json"
FORMAT_VERSION = 1
PLAIN_ID = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,149}"  # of a run or a launch: also a file name on every system

Count = Annotated[int, Field(ge=0)]
_SHOWN = r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]"
Line = Annotated[str, StringConstraints(pattern=rf"^{_SHOWN}*[^\s\x00-\x1f\x7f-\x9f]{_SHOWN}*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Member(_Strict):
    """One file of the bundle, unpacked."""

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    bytes: Count


class Counts(_Strict):
    """What the tables hold; checked again once they are decoded."""

    rows: Count
    launches: Count
    samples: Count


class Manifest(_Strict):
    """Everything that a bundle says of itself."""

    format: Literal["effbench-bundle"] = "effbench-bundle"
    format_version: Literal[1] = 1
    effbench_version: Annotated[Line, StringConstraints(max_length=100)]
    contact: Annotated[Line, StringConstraints(max_length=limits.CONTACT_CHARACTERS)]
    licence: Annotated[Line, StringConstraints(max_length=limits.LICENCE_CHARACTERS)]
    private_kept: bool = False  # whether names, paths and device identifiers were left in
    counts: Counts
    members: dict[str, Member]

    def to_bytes(self) -> bytes:
        return canonical_json(self.model_dump()).encode()


def of(**fields: Any) -> Manifest:
    """The manifest of a bundle that is being made. Raises UsageError where contact or licence cannot stand in it."""
    try:
        return Manifest(effbench_version=effbench.__version__, **fields)
    except ValidationError as fault:
        name = str(fault.errors(include_url=False)[0]["loc"][0])
        most = {"contact": limits.CONTACT_CHARACTERS, "licence": limits.LICENCE_CHARACTERS}.get(name)
        raise UsageError(f"--{name} {fields.get(name)!r} is not one line of 1 to {most} characters.") from None


def read(data: bytes) -> Manifest:
    """Raises BundleError."""
    if len(data) > limits.MANIFEST_BYTES:
        raise refusal(f"it has {len(data):,} bytes; at most {limits.MANIFEST_BYTES:,} are read")
    try:
        value: Any = json.loads(data.decode())
    except UnicodeDecodeError as fault:
        raise refusal(f"byte {fault.start} is not UTF-8") from None
    except RecursionError:
        raise refusal("it is nested too deeply") from None
    except ValueError as fault:
        raise refusal(f"it is not JSON ({fault})") from None
    version = value.get("format_version") if isinstance(value, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise refusal(f"it has format version {version}; this effbench reads {FORMAT_VERSION}. Update effbench to verify it")
    try:
        found = Manifest.model_validate(value)
        same = found.to_bytes() == data
    except ValidationError as fault:
        first = fault.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part)[:100] for part in first["loc"]) or "the document"
        raise refusal(f"{place}: {first['msg']}") from None
    except (ValueError, RecursionError) as fault:  # a lone surrogate, written as an escape
        raise refusal(f"it cannot be written again ({fault})") from None
    if not same:
        raise refusal("it is not canonical JSON (sorted keys, no spaces, no key twice)")
    return found


def is_plain_id(text: str) -> bool:
    return re.fullmatch(PLAIN_ID, text) is not None


def refusal(message: str) -> BundleError:
    return BundleError("manifest", f"{message}.", NAME)
