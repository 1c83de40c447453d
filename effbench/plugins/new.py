"""A new plugin package from a template: one technique of an axis that really changes something, its test and its metadata.

effbench-NAME/
    pyproject.toml           the entry point that effbench finds it by, and the licence
    effbench_NAME.py         the technique
    tests/test_NAME.py
    README.md
"""

from __future__ import annotations

import importlib.util
import keyword
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from string import Template

from effbench import registry
from effbench.errors import UsageError, did_you_mean
from effbench.technique import AXES

TEMPLATES = Path(__file__).parent / "templates"
NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
MAX_NAME = 40
YAML_WORDS = ("true", "false", "null")  # which a suite would not read as names
# What the worked example of each axis does, as `effbench list` shows it.
SUMMARIES: dict[str, str] = {
    "attention": "groups of query heads share a key and a value head",
    "position": "rotary positions interpolated: a longer context in the same angles",
    "mixer": "attention-free: a gated running mean of values",
    "ffn": "squared ReLU in the gated feed-forward layers",
    "peft": "train the norms only, everything else frozen",
    "precision": "8-bit integer weights, one scale for each output row",
    "parallel": "feed-forward layers in shards, one after another",
    "kernel": "attention in chunks of queries",
}


def write_package(name: str, axis: str, out: Path) -> Path:
    """Write the package of a new technique below `out` and return its folder. Raises UsageError; nothing is overwritten."""
    _check(name, axis)
    folder = out / f"effbench-{name.replace('_', '-')}"
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"{folder} is there already and nothing is overwritten; choose another name, or --out.")
    files = package_files(name, axis)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".effbench-") as unfinished:
            for path, content in files.items():
                target = Path(unfinished) / "package" / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(content, encoding="utf-8")
            (Path(unfinished) / "package").rename(folder)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror or error}; choose another --out.") from None
    return folder


def package_files(name: str, axis: str) -> Mapping[str, str]:
    """Path and content of every file of a package."""
    technique = _template(f"{axis}.py")
    body = _template(f"{axis}_test.py")
    values = {
        "name": name,
        "axis": axis,
        "summary": SUMMARIES[axis],
        "distribution": f"effbench-{name.replace('_', '-')}",
        "module": f"effbench_{name}",
        "class_name": _class_name(name, technique),
        "imports": "import torch\n" if "torch." in body else "",
    }
    values["body"] = Template(body).substitute(values).rstrip()
    wanted = {
        "pyproject.toml": _template("pyproject.toml"),
        "README.md": _template("README.md"),
        f"effbench_{name}.py": technique,
        f"tests/test_{name}.py": _template("test.py"),
    }
    return {path: Template(content).substitute(values) for path, content in wanted.items()}


def _check(name: str, axis: str) -> None:
    if axis not in AXES:
        raise UsageError(f"There is no axis {axis!r}.{did_you_mean(axis, AXES)} The axes are {', '.join(AXES)}.")
    if not NAME.fullmatch(name) or len(name) > MAX_NAME or keyword.iskeyword(name) or name in YAML_WORDS:
        raise UsageError(
            f"{_shown(name)} is no name for a technique; use lower-case letters, digits and single underscores, begin with a "
            f"letter, at most {MAX_NAME} characters, and no word of Python or YAML."
        )
    known = registry.entries("technique")
    if name in known:
        raise UsageError(f"The name {name!r} is taken by {known[name].distribution}; choose another.")
    if importlib.util.find_spec(f"effbench_{name}") is not None:
        raise UsageError(f"There is a module effbench_{name} already, so {name!r} would hide it; choose another name.")


def _class_name(name: str, technique: str) -> str:
    """SquaredRelu of squared_relu; a word that the file uses already gets an ending."""
    camel = "".join(part.capitalize() for part in name.split("_"))
    taken = keyword.iskeyword(camel) or re.search(rf"\b{camel}(Params)?\b", technique)
    return f"{camel}Technique" if taken else camel


def _template(name: str) -> str:
    return (TEMPLATES / f"{name}.txt").read_text(encoding="utf-8")


def _shown(name: str) -> str:
    return repr(name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}…")
