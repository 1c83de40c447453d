"""The rooms: every import that must never be, broken on purpose in a copy, is caught by name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINT = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
RUFF = [str(Path(sys.executable).parent / "ruff"), "check", "--no-cache", "--select", "TID251"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the packages, so that they can be broken."""
    folder = tmp_path_factory.mktemp("rooms")
    for part in ("effbench", "leaderboard_app"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(
        ROOT / "kernels" / "effbench_kernels", folder / "effbench_kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def judge(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"}
    )


BREAKS = [
    ("effbench/techniques/mqa.py", "import effbench.techniques.mha", "techniques know neither each other"),
    ("effbench/techniques/mqa.py", "import effbench.workloads.generate", "a technique never reaches a workload"),
    ("effbench/techniques/mqa.py", "import effbench.runner", "a technique never reaches a workload"),
    ("effbench/techniques/mqa.py", "import effbench.store", "a technique never reaches a workload"),
    ("effbench/store.py", "import torch", "the reading arm never reaches torch"),
    ("effbench/metrics.py", "import torch", "the reading arm never reaches torch"),
    ("effbench/analysis/rank.py", "import effbench.runner", "the reading arm never reaches torch"),
    ("leaderboard_app/figures/style.py", "import effbench.models.builders", "the reading arm never reaches torch"),
    ("effbench/recompute.py", "import effbench.surgery", "the reading arm never reaches torch"),
    ("effbench/runner.py", "import effbench.store", "the measuring arm returns records"),
    ("effbench/scheduler.py", "import effbench.analysis.rank", "the measuring arm returns records"),
    ("effbench/plugins/check.py", "import effbench.exchange.landlock", "the measuring arm returns records"),
    ("effbench/exchange/verify.py", "import effbench.plugins.contract", "the reading arm never reaches torch"),
    ("effbench_kernels/__init__.py", "import effbench.errors", "the kernels know nothing of effbench"),
    ("effbench/scheduler.py", "import effbench_kernels", "only techniques and workloads use the kernels"),
    ("effbench/hardware.py", "import pynvml", "only probes/nvml speaks to NVML"),
    ("effbench/progress.py", "import streamlit", "only the app uses streamlit"),
    ("effbench/registry.py", "import effbench.suite", "rooms: a higher room may use lower ones"),
]


def test_the_rooms_are_in_order(copy):
    found = judge(copy, LINT)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize(("file", "line", "contract"), BREAKS, ids=[f"{f}: {line}" for f, line, _ in BREAKS])
def test_a_forbidden_import_is_caught(copy, file, line, contract):
    path = copy / file
    text = path.read_text()
    path.write_text(f"{text}\n{line}\n")
    try:
        found = judge(copy, LINT)
    finally:
        path.write_text(text)
    assert found.returncode != 0
    broken = [row for row in found.stdout.splitlines() if " BROKEN" in row]
    assert any(contract in row for row in broken), found.stdout


@pytest.mark.parametrize(("file", "name"), [("effbench/hardware.py", "pynvml"), ("effbench/store.py", "streamlit")])
def test_the_linter_also_refuses_them_at_once(copy, file, name):
    path = copy / file
    text = path.read_text()
    path.write_text(f"import {name}\n{text}")
    try:
        found = judge(copy, [*RUFF, file])
    finally:
        path.write_text(text)
    assert "TID251" in found.stdout


COMMANDS = [
    ["list"],
    ["show", "--results", "nowhere"],
    ["show", "--results", "results"],
    ["show", "--results", "results", "--json"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_list_and_show_load_nothing_heavy(command, tmp_path):
    from effbench.store import Store
    from tests.records import make_case

    Store(tmp_path / "results").write_case(make_case())
    script = (
        "import sys, effbench.cli\n"
        f"sys.argv = ['effbench', *{command!r}]\n"
        "try: effbench.cli.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'pandas', 'duckdb', 'transformers', 'scipy', 'pynvml'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.splitlines()[-1] == "[]", found.stdout + found.stderr


def test_claims_without_pandas_name_the_extra_that_is_missing(tmp_path):
    script = (
        "import sys; sys.modules['pandas'] = None; sys.argv = ['effbench', 'claims']; from effbench.cli import main; main()"
    )
    found = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 2
    assert "effbench[app]" in found.stderr


def test_no_package_hides_the_one_named_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_file_of_a_shelf_has_an_entry_point_and_every_entry_point_a_file():
    from effbench import registry

    for kind in registry.KINDS:
        shelf = ROOT / "effbench" / f"{kind}s"
        files = {path.stem for path in shelf.glob("*.py") if not path.stem.startswith("_")}
        named = {
            e.target.partition(":")[0].rpartition(".")[2]
            for e in registry.entries(kind).values()
            if e.distribution == "effbench"
        }
        # Helpers of a shelf are private; probes share a sampler that other files name.
        helpers = {"sampling", "gpu_processes", "gpu_select", "gpu_source"} if kind == "probe" else set()
        assert files - helpers == named, f"{shelf}: run `make setup` after adding an entry point to pyproject.toml"
