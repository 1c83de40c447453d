"""`plugin check`: what is right is kept, what is wrong is named, and nothing that a technique does here reaches further."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from effbench.errors import UsageError
from effbench.plugins.check import Limits, Report, check
from effbench.plugins.contract import CLAUSES, MIXTURE, SHAPES
from effbench.plugins.new import write_package
from tests.plugins.packages import CLASS, HEAD, effbench, wrong

ONE = ("tiny-llama",)
SMALL = Limits(clause_s=60, memory_bytes=1 << 30, file_bytes=1 << 20)


def broken(report: Report) -> dict[str, str]:
    """Clause → first reason."""
    return {o.clause: o.reason for o in reversed(report.outcomes) if o.status == "broken"}


@pytest.mark.alone
def test_the_worked_example_keeps_the_contract_within_a_minute(tmp_path: Path) -> None:
    folder = write_package("half_width", "attention", tmp_path)
    before = sorted(folder.rglob("*"))
    done = effbench("plugin", "check", folder, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    (report,) = json.loads(done.stdout)["techniques"]
    assert report["verdict"] == "kept"
    assert report["licence"] == "Apache-2.0" and "2305.13245" in report["paper"] and report["axis"] == "attention"
    assert {o["clause"] for o in report["outcomes"]} == {"found", "files", *(clause.name for clause in CLAUSES)}
    built = {o["shape"] for o in report["outcomes"] if o["clause"] == "training" and o["status"] == "kept"}
    assert built == set(SHAPES)
    refused = [o for o in report["outcomes"] if o["shape"] == MIXTURE and o["status"] == "not asked"]
    assert refused and all("mixtral" in o["reason"] for o in refused)
    assert report["took_s"] <= 60
    assert sorted(folder.rglob("*")) == before, "it left something in the package"


SLOPPY_HEAD = HEAD.replace("Costs: nothing.\n", "").replace("import os\n", "import os\nimport random\n")
SLOPPY = """
def apply(self, model):
    import torch

    with torch.no_grad():
        model.lm_head.weight.add_(random.random())
    try:
        open("{outside}", "w")
    except OSError:
        pass
    return model

def layout(self, layout):
    layout.change(lambda w: w.kind == "head", count=3)

def baseline(self, spec):
    return "mha", {{}}
"""


def test_each_fault_has_its_reason(tmp_path: Path) -> None:
    outside = tmp_path / "left_behind"
    folder = wrong(tmp_path / "sloppy", SLOPPY.format(outside=outside), head=SLOPPY_HEAD, licence="")
    (report,) = check(str(folder), SMALL, shapes=ONE)
    found = broken(report)
    assert "no line 'Costs:'" in found["documented"]
    assert "declares no licence" in found["licence"]
    assert "baseline 'mha' is of axis attention" in found["baseline"]
    assert "other weights in" in found["seed"]
    assert "the same seed gave the losses" in found["training"]
    assert "the hook layout says 656,000 weights and the built model has 590,464" in found["plan"]
    assert str(outside) in found["files"]
    assert report.verdict == "broken" and not outside.exists()
    assert {o.status for o in report.outcomes if o.clause in ("forward", "decode", "parameters")} == {"kept"}


GREEDY = """
def apply(self, model):
    if model.config.use_cache:
        open("big", "wb").write(bytes(4 << 20))
    else:
        self.kept = bytearray(8 << 30)
    return model
"""


def test_memory_and_files_have_limits(tmp_path: Path) -> None:
    (report,) = check(str(wrong(tmp_path / "greedy", GREEDY)), SMALL, shapes=ONE)
    found = broken(report)
    assert "File too large" in found["forward"] and "(effbench_wrong.py, line " in found["forward"]
    assert "more memory than the 1.1 GB that the check allows" in found["training"]


def test_tensors_count_as_memory_and_a_refusal_needs_a_reason(tmp_path: Path) -> None:
    body = "\ndef apply(self, model):\n    import torch\n\n    model.kept = torch.zeros(1 << 31)\n    return model\n"
    of = CLASS.replace("return YES", 'return no("no") if context.trains else YES')
    (report,) = check(str(wrong(tmp_path / "tensors", body, of=of)), SMALL, shapes=ONE)
    found = broken(report)
    assert "more memory than the 1.1 GB that the check allows" in found["forward"]
    assert "without a usable reason: 'no'" in found["refusal"] and "training" not in found


NOISY = """
def apply(self, model):
    import torch

    if model.config.use_cache:
        model.lm_head.register_forward_hook(lambda module, given, out: out + torch.randn(out.shape))
    else:
        os.mkdir({outside!r})
    return model
"""


def test_chance_in_a_forward_pass_and_a_file_outside_are_found(tmp_path: Path) -> None:
    outside = tmp_path / "left_behind"
    (report,) = check(str(wrong(tmp_path / "noisy", NOISY.format(outside=str(outside)))), SMALL, shapes=ONE)
    found = broken(report)
    assert "draw nothing at random in a forward pass" in found["seed"]
    assert "differs from a full forward" in found["decode"]
    assert f"it writes to {outside}" in found["training"] and str(outside) in found["files"]
    assert not outside.exists()


def test_a_technique_that_hangs_is_ended(tmp_path: Path) -> None:
    of = CLASS.replace("return YES", "while True: pass")
    (report,) = check(str(wrong(tmp_path / "hangs", "", of=of)), Limits(clause_s=3), shapes=ONE)
    last = report.outcomes[-1]
    assert (last.clause, last.status) == ("every shape", "broken") and "did not end within" in last.reason


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("os._exit(3)", "its process ended with exit code 3"),
        ("print('the last word', flush=True); os.kill(os.getpid(), 11)", "its process was ended by SIGSEGV: the last word"),
    ],
)
def test_a_technique_that_takes_its_process_along_is_reported(tmp_path: Path, body: str, reason: str) -> None:
    folder = wrong(tmp_path / "ends", f"\ndef configure(self, config):\n    {body}\n")
    (report,) = check(str(folder), SMALL, shapes=ONE)
    assert report.outcomes[-1].reason.startswith(reason)
    assert report.verdict == "broken"


@pytest.mark.parametrize(
    ("head", "of", "name", "reason"),
    [
        ("import torch\n" + HEAD, CLASS, "wrong", "loading wrong imports torch"),
        ("import no_such_library\n" + HEAD, CLASS, "wrong", "No module named 'no_such_library'"),
        ("import sys; sys.exit(0)\n", CLASS, "wrong", "SystemExit"),
        ("kept = bytearray(8 << 30)\n", CLASS, "wrong", "more memory than the 1.1 GB"),
        (HEAD, CLASS, "lora", "The name is built in and reserved"),
        (HEAD, CLASS.replace("(Technique)", ""), "wrong", "is no subclass of Technique"),
    ],
)
def test_a_package_that_cannot_be_loaded_is_reported(tmp_path: Path, head: str, of: str, name: str, reason: str) -> None:
    (report,) = check(str(wrong(tmp_path / "package", "", head=head, of=of, name=name)), SMALL)
    assert [o.clause for o in report.outcomes] == ["found"]
    assert reason in report.outcomes[0].reason, report.outcomes


def test_a_technique_that_refuses_everything_shows_nothing(tmp_path: Path) -> None:
    of = CLASS.replace("return YES", 'return no("it needs an abacus; use a machine with one")')
    (report,) = check(str(wrong(tmp_path / "package", "", of=of)), SMALL, shapes=ONE)
    assert report.verdict == "untried" and "abacus" in report.outcomes[-2].reason


def test_a_technique_that_talks_or_starts_others_leaves_nothing_behind(tmp_path: Path) -> None:
    body = f"""
def configure(self, config):
    print("x" * 10_000)
    if not os.environ.get("STARTED"):
        os.environ["STARTED"] = "1"
        os.spawnv(os.P_NOWAIT, {sys.executable!r}, [{sys.executable!r}, "-c", "import time; time.sleep(600)", {str(tmp_path)!r}])
"""
    (report,) = check(str(wrong(tmp_path / "talks", body)), SMALL, shapes=ONE)
    assert report.verdict == "kept", report
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(b"time.sleep(600)" in line and str(tmp_path).encode() in line for line in commands)


WRONG_TARGETS = {
    "": "has no pyproject.toml",
    "lroa": "no folder here and no installed technique. .*Did you mean: lora",
    "no/such/folder": "is no folder",
    "file.txt": "is no folder",
    "empty": "has no pyproject.toml",
    "not_toml": "is not TOML",
    "nameless": "has the name None",
    "no_technique": "declares no technique",
    "bad_target": "is not of the form",
    "outside": "has the name '../outside'",
    "binary": "is not TOML",
    "deep": "is not TOML",
}
PYPROJECTS = {
    "not_toml": b"[project\n",
    "nameless": b"[project]\nversion = '1'\n",
    "no_technique": b"[project]\nname = 'x'\n",
    "bad_target": b"[project]\nname = 'x'\n[project.entry-points.'effbench.techniques']\nx = 'x:Y\\nz = x:Z'\n",
    "outside": b"[project]\nname = '../outside'\n",
    "binary": bytes(range(256)),
    "deep": b"a = " + b"[" * 100_000,
}


@pytest.mark.parametrize("target", WRONG_TARGETS)
def test_what_is_no_plugin_is_refused_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("no plugin")
    Path("empty").mkdir()
    for name, content in PYPROJECTS.items():
        Path(name).mkdir()
        Path(name, "pyproject.toml").write_bytes(content)
    with pytest.raises(UsageError, match=WRONG_TARGETS[target]) as refusal:
        check(target)
    assert "\n" not in str(refusal.value)


def test_the_command_ends_with_one_or_two(tmp_path: Path) -> None:
    folder = wrong(tmp_path / "package", "", head="import no_such_library\n" + HEAD)
    done = effbench("plugin", "check", folder)
    assert done.returncode == 1 and "It breaks the contract." in done.stdout and "no_such_library" in done.stdout
    absent = effbench("plugin", "check", tmp_path / "nowhere")
    assert absent.returncode == 2 and len(absent.stderr.strip().splitlines()) == 1
    assert effbench("plugin", "check", "mqa", "--clause-limit", "0").returncode == 2
