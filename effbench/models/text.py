"""Real text as bytes: what training and quality figures stand on, the same on every machine and without a network.

    builtin        source files of sympy 1.14.0 (torch brings it), listed with their SHA-256 in text_sympy_1_14_0.txt
    PATH           any file, or every file below a folder
    hub:DATASET    the column `text` of a data set, as hub:NAME, hub:NAME:CONFIGURATION or either with @REVISION

A token is a byte (0 to 255), so every vocabulary of 256 or more fits and bits per byte need no tokenizer.
Two domains: `base` is what a model is first trained on; `adapt` is a family of modules it never saw (sympy's physics),
what fine-tuning adapts to. A built-in file is held out for validation when its digest says so; of any other text the
last tenth of each file is held out and both domains are the whole text.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from effbench.errors import MissingExtra, ModelError
from effbench.schema import Spec, digest

Part = Literal["train", "validation"]
Domain = Literal["base", "adapt"]

BUILTIN = "builtin"
SYMPY_VERSION = "1.14.0"
LISTING = Path(__file__).with_name(f"text_sympy_{SYMPY_VERSION.replace('.', '_')}.txt")
FAMILIES: dict[Domain, tuple[str, ...]] = {
    "base": ("calculus", "concrete", "core", "functions", "logic", "series", "sets", "simplify", "solvers"),
    "adapt": ("physics",),
}
HELD_OUT_ONE_IN = 8  # built-in files
HELD_OUT_TAIL = 0.1  # of each file of any other text
HUB_BYTES = 32_000_000  # a data set is read up to here


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """Bytes of one text by part and domain; arrays are uint8, shape (N,), read-only. Quality compares at equal digests."""

    source: str
    digest: str
    parts: Mapping[tuple[Part, Domain], np.ndarray]

    def split(self, part: Part, domain: Domain = "base") -> np.ndarray:
        """The bytes of one part, uint8 (N,)."""
        return self.parts[part, domain]

    def batches(self, part: Part, *, batch_size: int, seq_len: int, seed: int, domain: Domain = "base") -> Iterator[np.ndarray]:
        """Endless batches of random windows, int64 (batch_size, seq_len + 1), the same for the same seed.

        Inputs are [:, :-1], targets [:, 1:]. Windows are drawn uniformly with replacement.
        """
        data = self._long_enough(part, domain, seq_len)
        random = np.random.default_rng(seed)
        window = np.arange(seq_len + 1)
        while True:
            starts = random.integers(0, len(data) - seq_len, size=batch_size)
            yield data[starts[:, None] + window].astype(np.int64)

    def validation(self, *, batch_size: int, seq_len: int, num_tokens: int, domain: Domain = "base") -> Iterator[np.ndarray]:
        """The fixed held-out windows, in order and spread evenly, int64 (≤ batch_size, seq_len + 1).

        They hold at most `num_tokens` targets (at least one window) and no target twice.
        """
        data = self._long_enough("validation", domain, seq_len)
        available = (len(data) - 1) // seq_len
        wanted = min(available, max(1, num_tokens // seq_len))
        starts = (np.arange(wanted) * available // wanted) * seq_len
        for first in range(0, wanted, batch_size):
            yield data[starts[first : first + batch_size, None] + np.arange(seq_len + 1)].astype(np.int64)

    def _long_enough(self, part: Part, domain: Domain, seq_len: int) -> np.ndarray:
        data = self.split(part, domain)
        if len(data) <= seq_len:
            raise ModelError(
                f"The {part} part of the text {self.source!r} has {len(data):,} bytes, too few for windows of {seq_len + 1:,}."
                " Give a longer text or a shorter sequence."
            )
        return data


def text_of(spec: Spec) -> Text:
    """The text that a spec names. Raises ModelError when it is no longer what was planned."""
    text = read_text(spec.text)
    if spec.text_digest and text.digest != spec.text_digest:
        raise ModelError(f"The text {spec.text!r} has changed since this was planned. Plan and run again.")
    return text


def text_digest(source: str) -> str:
    """Identity of a text by content; of the built-in one without reading it."""
    return _listing_digest() if source == BUILTIN else read_text(source).digest


def read_text(source: str) -> Text:
    """Read a text, once per process. Raises ModelError, or MissingExtra for a data set without its library."""
    if source == BUILTIN:
        return _builtin()
    if source.startswith("hub:"):
        return _hub(source)
    return _path(str(Path(source).expanduser().resolve()))


@cache
def _listing() -> tuple[tuple[str, Domain, str], ...]:
    """(SHA-256, domain, path inside sympy) of every built-in file."""
    rows = (line.split() for line in LISTING.read_text().splitlines() if not line.startswith("#"))
    return tuple((sha256, "adapt" if domain == "adapt" else "base", path) for sha256, domain, path in rows)


@cache
def _listing_digest() -> str:
    return digest({"builtin": _listing(), "held_out_one_in": HELD_OUT_ONE_IN})


@cache
def _builtin() -> Text:
    root = _sympy_folder()
    pieces: dict[tuple[Part, Domain], list[bytes]] = {(p, d): [] for p in ("train", "validation") for d in FAMILIES}
    for sha256, domain, path in _listing():
        try:
            content = (root / path).read_bytes()
        except OSError:
            raise _wrong_sympy(f"the file {path} is missing") from None
        if hashlib.sha256(content).hexdigest() != sha256:
            raise _wrong_sympy(f"the file {path} is another one")
        pieces["validation" if int(sha256[:8], 16) % HELD_OUT_ONE_IN == 0 else "train", domain].append(content)
    return Text(source=BUILTIN, digest=_listing_digest(), parts={key: _array(b"".join(v)) for key, v in pieces.items()})


def _sympy_folder() -> Path:
    found = importlib.util.find_spec("sympy")  # finds, does not import
    if found is None or not found.origin:
        raise _wrong_sympy("it is not installed")
    return Path(found.origin).parent


def _wrong_sympy(what: str) -> ModelError:
    try:
        version = metadata.version("sympy")
    except metadata.PackageNotFoundError:
        version = "none"
    return ModelError(
        f"The built-in text is made of files of sympy {SYMPY_VERSION}; {what} (found version: {version})."
        f" Try: pip install --force-reinstall --no-deps sympy=={SYMPY_VERSION}"
    )


@cache
def _path(source: str) -> Text:
    root = Path(source)
    if not root.exists():
        raise ModelError(f"There is no text at {source}. Give a file, a folder, {BUILTIN!r} or hub:DATASET.")
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    try:
        contents = {p.relative_to(root).as_posix(): p.read_bytes() for p in files}
    except OSError as error:
        raise ModelError(f"The text {source} cannot be read: {error.strerror} ({error.filename}).") from error
    return _with_tails(source, contents)


@cache
def _hub(source: str) -> Text:
    name, _, revision = source.removeprefix("hub:").partition("@")
    name, _, configuration = name.partition(":")
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise MissingExtra("datasets", "eval", f"The text {source!r}") from None
    try:
        rows = load_dataset(name, configuration or None, split="train", revision=revision or None, streaming=True)
        pieces, size = [], 0
        for row in islice(rows, HUB_BYTES):
            pieces.append(str(row["text"]).encode())
            size += len(pieces[-1])
            if size >= HUB_BYTES:
                break
    except KeyError:
        raise ModelError(f"The data set {name!r} has no column named text; give one that has.") from None
    except Exception as error:  # the library raises many kinds: offline, gated, not found, damaged
        raise ModelError(
            f"The data set {name!r} cannot be read: {error} Check the name, your login and the network."
        ) from error
    return _with_tails(source, {"": b"\n".join(pieces)})


def _with_tails(source: str, contents: Mapping[str, bytes]) -> Text:
    """A text of whole files; the last tenth of each is held out, and both domains are the same."""
    cuts = {name: len(content) - int(len(content) * HELD_OUT_TAIL) for name, content in contents.items()}
    train = _array(b"".join(content[: cuts[name]] for name, content in contents.items()))
    validation = _array(b"".join(content[cuts[name] :] for name, content in contents.items()))
    identity = digest({name: hashlib.sha256(content).hexdigest() for name, content in contents.items()})
    parts: dict[tuple[Part, Domain], np.ndarray] = {}
    for domain in FAMILIES:
        parts["train", domain], parts["validation", domain] = train, validation
    return Text(source=source, digest=identity, parts=parts)


def _array(content: bytes) -> np.ndarray:
    return np.frombuffer(content, dtype=np.uint8)  # read-only, as bytes are


def _write_listing() -> None:
    """List the files of the installed sympy anew: `python -m effbench.models.text`, for a new version only."""
    root, lines = _sympy_folder(), [f"# Files of sympy {SYMPY_VERSION}: SHA-256, domain, path inside the package."]
    for domain, families in FAMILIES.items():
        for path in sorted(p for family in families for p in (root / family).rglob("*.py")):
            relative, content = path.relative_to(root), path.read_bytes()
            if len(content) >= 2000 and not {"tests", "benchmarks"} & set(relative.parts):
                lines.append(f"{hashlib.sha256(content).hexdigest()} {domain} {relative.as_posix()}")
    LISTING.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    _write_listing()
