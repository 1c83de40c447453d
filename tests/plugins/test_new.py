"""A new package: of every axis, with tests that pass, and never over something that is there."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from effbench.errors import UsageError
from effbench.plugins.new import MAX_NAME, write_package
from effbench.technique import AXES
from tests.plugins.packages import effbench

# Every clause of the contract on every shape, for several packages in one process: what `plugin check` does for each by itself.
KEEPS = """
import sys
from pathlib import Path
from effbench.plugins import contract, source

names = [name for folder in sys.argv[1:] for name in source.register(Path(folder)).techniques]
contract.loads_light(names)
import torch
torch.set_num_threads(1)
asked = set()
for name in names:
    for clause in contract.CLAUSES:
        for shape in (*contract.SHAPES, contract.MIXTURE) if clause.on_models else ("",):
            try:
                clause.check(name, shape)
                asked.add((name, clause.name))
            except contract.NotAsked:
                pass
            except Exception as error:
                print("BROKEN", name, clause.name, shape, repr(error))
print(len(names), "techniques;", *(n for n in names if (n, "forward") not in asked), "not built")
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = tmp_path_factory.mktemp("new")
    return [write_package(f"my_{axis}", axis, out) for axis in AXES]


def test_the_tests_of_every_axis_pass_at_once(packages: list[Path]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, packages)]
    done = subprocess.run(command, cwd=packages[0].parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(AXES)} passed" in done.stdout


def test_every_axis_keeps_the_contract(packages: list[Path]) -> None:
    done = subprocess.run([sys.executable, "-c", KEEPS, *map(str, packages)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "BROKEN" not in done.stdout, done.stdout
    assert done.stdout.splitlines()[-1] == f"{len(AXES)} techniques; not built"


def test_every_file_is_clean(packages: list[Path]) -> None:
    ruff = str(Path(sys.executable).parent / "ruff")
    rules = "E,F,I,UP,B,SIM,RET,PTH,N"
    for command in (
        ["check", "--no-cache", "--extend-select", rules, "--ignore", "N806,N812"],
        ["format", "--no-cache", "--diff"],
    ):
        done = subprocess.run([ruff, *command, *map(str, packages)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_says_what_it_is(packages: list[Path]) -> None:
    for folder, axis in zip(packages, AXES, strict=True):
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        assert project["license"]
        assert project["entry-points"]["effbench.techniques"] == {f"my_{axis}": f"effbench_my_{axis}:My{axis.capitalize()}"}
        text = (folder / f"effbench_my_{axis}.py").read_text()
        assert all(word in text for word in ("Paper:", "Changes:", "Should improve:", "Costs:"))
        assert "${" not in "".join(path.read_text() for path in folder.rglob("*.*"))


HOSTILE = [
    "", " ", "-x", "--axis", "a-b", "Half", "1st", "_x", "x_", "a__b", "a.b", "a/b", "../x", "/tmp/x", "a b", "a\nb", "a;b", "$(id)",
    "é", "class", "true", "null", "x" * (MAX_NAME + 1), "a\x00b", "a'b", '"', "..",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_is_none_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no name for a technique") as refusal:
        write_package(name, "ffn", tmp_path)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_what_is_taken_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="taken by effbench"):
        write_package("lora", "peft", tmp_path)
    with pytest.raises(UsageError, match="module effbench_kernels"):
        write_package("kernels", "kernel", tmp_path)
    with pytest.raises(UsageError, match="Did you mean: attention"):
        write_package("mine", "atention", tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = write_package("mine", "ffn", tmp_path / "new" / "folder")
    (folder / "effbench_mine.py").write_text("changed")
    (tmp_path / "effbench-link").symlink_to(tmp_path / "nowhere")
    for name, out in (("mine", folder.parent), ("link", tmp_path)):
        with pytest.raises(UsageError, match="nothing is overwritten"):
            write_package(name, "ffn", out)
    assert (folder / "effbench_mine.py").read_text() == "changed"
    with pytest.raises(UsageError, match="cannot be written"):
        write_package("other", "ffn", folder / "README.md")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "effbench_mine.py", "pyproject.toml", "tests"]


@pytest.mark.parametrize("name", ["none", "params", "technique", "any", "support", "running_mean", "mean_cost", "paper"])
@pytest.mark.parametrize("axis", AXES)
def test_a_name_that_the_file_uses_itself_gives_another_class(tmp_path: Path, name: str, axis: str) -> None:
    folder = write_package(name, axis, tmp_path)
    tree = ast.parse((folder / f"effbench_{name}.py").read_text())
    classes = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert len(set(classes)) == len(classes)
    assert not imported & set(classes)


def test_the_command_says_what_comes_next_and_what_was_wrong(tmp_path: Path) -> None:
    done = effbench("plugin", "new", "half_width", "--axis", "ffn", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"effbench plugin check     {tmp_path / 'effbench-half-width'}" in done.stdout
    again = effbench("plugin", "new", "half_width", "--axis", "ffn", "--out", tmp_path)
    assert again.returncode == 2
    assert len(again.stderr.strip().splitlines()) == 1, again.stderr
    unknown = effbench("plugin", "new", "half_width", "--axis", "width")
    assert unknown.returncode == 2 and "There is no axis 'width'" in unknown.stderr
