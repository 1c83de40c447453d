"""A foreign package, installed as any other: found by its entry point, listed, planned, run, checked and submitted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from effbench.plugins.check import check
from tests.plugins.packages import FOREIGN, effbench, install

SUITE = """\
name: foreign
protocol: smoke
cases:
  - workload: generate
    params: {batch_size: 2, prompt_tokens: 16, new_tokens: 4}
    model: tiny-llama
    techniques: [sparse_relu]
    threads: 1
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(FOREIGN, tmp_path_factory.mktemp("environment") / "site")


def test_it_is_unknown_before_it_is_installed(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(SUITE)
    done = effbench("plan", tmp_path / "suite.yaml", "--device", "cpu")
    assert done.returncode == 2 and "unknown technique 'sparse_relu'" in done.stderr


def test_it_is_listed_with_its_package_and_paper(installed: Path) -> None:
    done = effbench("list", "--json", path=installed)
    found = {row["name"]: row for row in json.loads(done.stdout)["techniques"]}["sparse_relu"]
    assert found["from"] == "sparse-relu 2.1.0" and found["axis"] == "ffn" and found["arxiv"] == "2310.04564"


def test_it_is_planned_with_its_baseline(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(SUITE)
    done = effbench("plan", tmp_path / "suite.yaml", "--device", "cpu", "--json", path=installed)
    assert done.returncode == 0, done.stderr
    cases = {case["name"]: case for case in json.loads(done.stdout)["cases"]}
    own = cases["generate/tiny-llama/sparse_relu"]
    assert own["skip_reason"] is None and own["baseline"] == "generate/tiny-llama/dense"
    (ref,) = (t for t in own["spec"]["techniques"] if t["name"] == "sparse_relu")
    assert ref["identity"].startswith("sparse-relu:sparse_relu@2.1.0+") and "missing" not in ref["identity"]


def test_it_is_checked_where_it_is_installed_and_where_it_is_not(installed: Path) -> None:
    by_name = effbench("plugin", "check", "sparse_relu", path=installed)
    assert by_name.returncode == 0, by_name.stdout + by_name.stderr
    assert "sparse_relu (sparse-relu 2.1.0, MIT, axis ffn)" in by_name.stdout and "It keeps the contract." in by_name.stdout
    assert "tiny-llama, tiny-qwen2, tiny-mistral" in by_name.stdout
    assert "Not asked on tiny-mixtral: refused: sparse_relu: the model is a mixture" in by_name.stdout
    (report,) = check(str(FOREIGN), shapes=("tiny-llama",))
    assert report.about["distribution"] == "sparse-relu" and report.about["licence"] == "MIT" and report.verdict == "kept"
    assert not list(FOREIGN.rglob("*.pyc")) and not list(FOREIGN.rglob("*.egg-info"))


def test_it_is_measured_beside_its_baseline_and_submitted_with_its_source(installed: Path, tmp_path: Path) -> None:
    suite, results, bundle = tmp_path / "suite.yaml", tmp_path / "results", tmp_path / "bundle.zip"
    suite.write_text(SUITE)
    done = effbench("run", suite, "--device", "cpu", "--results", results, path=installed)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {
        tuple(row["techniques"]): row for row in json.loads(effbench("show", "--results", results, "--json").stdout)["rows"]
    }
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert set(rows) == {("sparse_relu",), ("dense",)}
    assert rows["sparse_relu",]["baseline_case_id"] == rows["dense",]["case_id"]

    told = ["--contact", "me@example.org", "--licence", "CC-BY-4.0", "--yes"]
    sent = effbench("submit", "--results", results, "--plugin", FOREIGN, "--out", bundle, *told)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    assert "src/sparse_relu/technique.py" in sent.stdout
    verified = effbench("verify", bundle, "--json")  # where the package is not installed
    assert verified.returncode == 0, verified.stdout + verified.stderr
    report = json.loads(verified.stdout)
    assert report["verdict"].startswith("accepted") and report["rows"] == 2
