"""Running the command line in tests, as a user does: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
EFFBENCH = [sys.executable, "-m", "effbench.cli"]


def environment(**more: str) -> dict[str, str]:
    """The test's environment with the faulty plugin beside the installed packages."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "faulty_plugin"), "COLUMNS": "200", **more}


def effbench(*arguments: object, cwd: Path = ROOT, timeout_s: float = 120, **more: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    command = [*EFFBENCH, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=timeout_s)


def require_sound(results: Path, bundle: Path) -> None:
    """What rows say of themselves holds together: they can be submitted, and the verifier accepts them."""
    sent = effbench(
        "submit", "--results", results, "--contact", "a@example.org", "--licence", "CC-BY-4.0", "--out", bundle, "--yes"
    )
    assert sent.returncode == 0, sent.stdout + sent.stderr
    checked = effbench("verify", bundle)
    assert checked.returncode == 0, checked.stdout


def suite(folder: Path, *hows: str, protocol: str = "smoke", **params: object) -> Path:
    """A suite of the faulty workload, one case for each way to go."""
    lines = ["name: faulty", f"protocol: {protocol}", "cases:"]
    for number, how in enumerate(hows):
        more = "".join(f", {key}: {value}" for key, value in params.items())
        lines += ["  - workload: faulty", f"    params: {{how: {how}, label: c{number}{more}}}", "    model: tiny-llama"]
        lines += ["    threads: 1", "    time_limit_s: 3"]
    path = folder / "faulty.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path
