"""The source of a plugin as a bundle carries it: text files of one folder, read and never run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from effbench.errors import UsageError
from effbench.exchange import limits
from effbench.exchange.opening import is_plugin_path
from effbench.exchange.privacy import Scrubber

SKIPPED_FOLDERS = frozenset({"__pycache__", "build", "dist", "node_modules", "venv"})


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files by their path inside the plugin. It is not changed on the way: its digest says which code was measured."""

    files: Mapping[str, bytes]
    remaining: tuple[str, ...]  # private parts in it, a sentence each
    left_out: tuple[str, ...]


def source_of(path: Path, scrub: Scrubber) -> Source:
    """The source files at `path`, a folder or one file. Raises UsageError."""
    if not path.exists():
        raise UsageError(f"{path} is not there. --plugin names the folder with the plugin's pyproject.toml, or one file.")
    files, left_out = dict[str, bytes](), []
    for place in [path] if path.is_file() else sorted(_walk(path)):
        name = place.name if path.is_file() else place.relative_to(path).as_posix()
        if place.is_symlink() or not place.is_file():
            left_out.append(f"plugin/{name}: a link or no file.")
        elif not is_plugin_path(name):
            left_out.append(f"plugin/{name}: not source text, or a name that a bundle cannot carry.")
        else:
            files[name] = place.read_bytes()
    size = sum(len(data) for data in files.values())
    if not files or len(files) > limits.PLUGIN_FILES_COUNT or size > limits.PLUGIN_BYTES:
        raise UsageError(
            f"{path} has {len(files)} source files of {size:,} bytes; a bundle carries 1 to {limits.PLUGIN_FILES_COUNT} of at "
            f"most {limits.PLUGIN_BYTES:,}. Name the folder of the plugin alone."
        )
    return Source(files=files, remaining=tuple(_private(files, scrub)), left_out=tuple(left_out))


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [n for n in folders if not n.startswith(".") and n not in SKIPPED_FOLDERS and not n.endswith(".egg-info")]
        yield from (Path(parent) / name for name in names if not name.startswith("."))


def _private(files: Mapping[str, bytes], scrub: Scrubber) -> Iterator[str]:
    for name, data in files.items():
        for kind in scrub.found_in(data.decode("utf-8", "replace")):
            yield f"plugin/{name} has a {kind}."
