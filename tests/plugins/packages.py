"""Plugin packages for tests: installing one where only a test sees it, and writing one that goes wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import indent

ROOT = Path(__file__).parent.parent.parent
FOREIGN = ROOT / "tests" / "plugin_package"
# pip without a network; the same as environment variables for commands that a test does not write itself.
OFFLINE = ["--no-index", "--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]

HEAD = '''"""Goes wrong, as the test says.

Paper: none.
Changes: what it should not.
Should improve: nothing.
Costs: nothing.
"""

import os

from effbench.technique import YES, Paper, Params, Technique, no
'''
CLASS = '''

class Wrong(Technique):
    """Goes wrong."""

    name = "wrong"
    axis = "kernel"
    summary = "goes wrong"
    paper = Paper(title="none")

    def supports(self, context):
        return YES

'''


def install(folder: Path, target: Path) -> Path:
    """Install a package from a copy of its folder into `target`, which belongs on PYTHONPATH then."""
    copy = target.parent / f"{target.name}-source"
    shutil.copytree(folder, copy)
    command = [sys.executable, "-m", "pip", "install", *OFFLINE, "--target", str(target), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def effbench(*arguments: object, path: Path | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with the packages in `path` beside the installed ones."""
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, "-m", "effbench.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def wrong(folder: Path, body: str, *, head: str = HEAD, of: str = CLASS, licence: str = "MIT", name: str = "wrong") -> Path:
    """Write a package with one technique, whose class ends with `body`."""
    folder.mkdir()
    declared = f'license = "{licence}"\n' if licence else ""
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "effbench-wrong"\nversion = "1.0"\n{declared}\n'
        f'[project.entry-points."effbench.techniques"]\n{name} = "effbench_wrong:Wrong"\n'
    )
    (folder / "effbench_wrong.py").write_text(head + of.replace('"wrong"', f'"{name}"') + indent(body, "    "))
    return folder
