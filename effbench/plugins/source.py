"""A package of techniques in a folder that is not installed: what its pyproject.toml declares, and how it is found all the same.

Nothing of the package runs when it is read. `register` puts its modules on the path and its entry points where the registry
looks, as installing would; only for the process that asks.
"""

from __future__ import annotations

import atexit
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effbench import registry
from effbench.errors import UsageError

GROUP = "effbench.techniques"
MAX_PYPROJECT_BYTES = 1 << 20
NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9])?")  # of a package or an entry point
TARGET = re.compile(r"[\w.]+:[\w.]+")


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a folder with a pyproject.toml declares. `techniques` maps names to module:Class; `licence` may be ""."""

    folder: Path
    distribution: str
    version: str
    licence: str
    techniques: Mapping[str, str]

    @property
    def paths(self) -> tuple[Path, ...]:
        """Folders that hold its modules."""
        return tuple(path for path in (self.folder / "src", self.folder) if path.is_dir())


def read(folder: Path) -> Source:
    """Read the pyproject.toml of a folder. Raises UsageError in one sentence where it declares no technique."""
    folder = folder.resolve()
    path = folder / "pyproject.toml"
    try:
        if path.stat().st_size > MAX_PYPROJECT_BYTES:
            raise UsageError(f"{path} is larger than {MAX_PYPROJECT_BYTES:,} bytes; give the folder of a plugin package.")
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{folder} has no pyproject.toml; give the folder of a plugin package.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {' '.join(str(error).split())}.") from None
    project = _table(document.get("project"))
    found = _table(_table(project.get("entry-points")).get(GROUP))
    name = project.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UsageError(
            f"{path}: [project] has the name {name!r}, which is none of a package; use letters, digits and hyphens."
        )
    techniques: dict[str, str] = {}
    for own, target in found.items():
        if not NAME.fullmatch(own) or not isinstance(target, str) or not TARGET.fullmatch(target):
            raise UsageError(f'{path}: the entry point {own!r} = {target!r} is not of the form name = "module:Class".')
        techniques[own] = target
    if not techniques:
        raise UsageError(
            f'{path} declares no technique; add [project.entry-points."{GROUP}"] with a line name = "module:Class".'
        )
    return Source(
        folder=folder,
        distribution=name,
        version=_line(project.get("version")) or "0",
        licence=_licence(project),
        techniques=techniques,
    )


def register(folder: Path) -> Source:
    """Make the techniques of a folder known to this process as if the package were installed. Raises UsageError."""
    source = read(folder)
    beside = Path(tempfile.mkdtemp(prefix="effbench-plugin-"))
    atexit.register(shutil.rmtree, beside, ignore_errors=True)
    write_metadata(source, beside)
    sys.path[:0] = [str(path) for path in (beside, *source.paths)]
    for cached in (registry.entries, registry.load):
        cached.cache_clear()
    return source


def write_metadata(source: Source, folder: Path) -> None:
    """The metadata that importlib finds an installed package by."""
    info = folder / f"{re.sub(r'[-_.]+', '_', source.distribution).lower()}-0.dist-info"
    info.mkdir(parents=True)
    licence = f"License-Expression: {source.licence}\n" if source.licence else ""
    head = f"Metadata-Version: 2.4\nName: {source.distribution}\nVersion: {source.version}\n{licence}"
    (info / "METADATA").write_text(head, encoding="utf-8")
    lines = "".join(f"{name} = {target}\n" for name, target in source.techniques.items())
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{lines}", encoding="utf-8")


def _licence(project: Mapping[str, Any]) -> str:
    """An SPDX expression, the first line of the older table's text, or a classifier."""
    declared = project.get("license")
    if isinstance(declared, Mapping):
        declared = declared.get("text") or declared.get("file")
    if declared:
        return _line(declared)
    classifiers = project.get("classifiers")
    lines = [str(line) for line in classifiers] if isinstance(classifiers, list) else []
    return next((_line(line.rpartition(" :: ")[2]) for line in lines if line.startswith("License ::")), "")


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _line(value: Any) -> str:
    """The first line of a text; "" for what is none."""
    return value.strip().splitlines()[0].strip() if isinstance(value, str) and value.strip() else ""
