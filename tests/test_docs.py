"""The documentation says what the code says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from effbench import registry
from effbench.metrics import METRICS
from effbench.protocol import PROTOCOLS
from effbench.suite import Entry, SuiteFile

ROOT = Path(__file__).parent.parent
METHODOLOGY = (ROOT / "docs" / "methodology.md").read_text()
FOLDERS = ("techniques", "papers")
PAGES = METHODOLOGY + "".join(page.read_text() for folder in FOLDERS for page in (ROOT / "docs" / folder).glob("*.md"))
README = (ROOT / "README.md").read_text()


def test_the_generated_parts_are_up_to_date():
    found = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_every_metric_is_in_the_docs():
    for name in METRICS:
        assert f"`{name}`" in METHODOLOGY


def test_every_protocol_and_suite_key_is_in_the_docs():
    for name in (*PROTOCOLS, *SuiteFile.model_fields, *Entry.model_fields):
        assert f"`{name}`" in METHODOLOGY, name


def test_every_hook_of_a_contract_is_in_the_docs():
    from effbench.technique import Technique
    from effbench.workload import Session

    for contract in (Technique, Session):
        for name, value in vars(contract).items():
            if callable(value) and not name.startswith("_") and name != "Params":
                assert f"`{name}`" in METHODOLOGY, f"{contract.__name__}.{name}"


def test_every_technique_workload_and_probe_is_in_the_docs():
    for kind in registry.KINDS:
        for name, entry in registry.entries(kind).items():
            if entry.distribution == "effbench":
                assert f"`{name}`" in PAGES, name


def test_the_readme_begins_with_the_two_commands_and_every_target_it_names_exists():
    commands = re.findall(r"^make ([a-z-]+)", README, re.MULTILINE)
    assert commands[:2] == ["run", "test"]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(commands) <= targets


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"
