"""docs/plugins.md, as somebody follows it: its commands, in order, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from effbench.plugins.new import SUMMARIES
from effbench.technique import AXES, Technique
from tests.app.browser import browser, serve
from tests.plugins.packages import ROOT

PAGE = (ROOT / "docs" / "plugins.md").read_text()
COMMANDS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
BOARD = "effbench board --results results/board"
# What pip is told where there is no network, and where it installs without touching what this test runs in.
PIP = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def follow(folder: Path) -> str:
    """Run every command of the page; what they said."""
    (folder / "bin").mkdir()
    for name, command in (("effbench", "-m effbench.cli"), ("python", "")):
        shim = folder / "bin" / name
        shim.write_text(f'#!/bin/sh\nexec {sys.executable} {command} "$@"\n')
        shim.chmod(0o755)
    site = folder / "site"
    own = {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(site), "PIP_TARGET": str(site), **PIP}
    (folder / "empty").mkdir()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(COMMANDS)], cwd=folder / "empty", env={**os.environ, "COLUMNS": "200", **own},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.alone
def test_the_commands_of_the_page_lead_to_rows_on_a_board(tmp_path: Path) -> None:
    said = follow(tmp_path)
    assert "It keeps the contract." in said
    assert said.count("1 passed") == 2
    assert "effbench_paired_heads.py" in said, "the source is in the bundle"
    assert re.search(r"^Accepted( with remarks)?: 2 rows", said, re.MULTILINE), said
    shown = said[said.rindex("They are marked as submitted") :]
    assert "paired_heads" in shown
    with serve(environment={"EFFBENCH_RESULTS": str(tmp_path / "empty" / "results" / "board")}) as server, browser() as found:
        page = found.new_page()
        page.goto(server.url)
        page.get_by_text("† submitted: of another hand").first.wait_for(timeout=60_000)
        page.get_by_text("paired_heads").first.wait_for(timeout=60_000)


def test_the_page_ends_with_the_board_and_names_every_axis_and_hook_that_is_there() -> None:
    assert BOARD in PAGE.split("```sh\n")[-1]
    for axis in AXES:
        assert f"| `{axis}` |" in PAGE and axis in SUMMARIES
    for hook in re.findall(r"^\| `(\w+)` \|", PAGE.partition("| hook |")[2], re.MULTILINE):
        assert hasattr(Technique, hook)
