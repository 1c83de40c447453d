"""What is here: techniques, workloads, models, suites, protocols and probes, without loading a heavy library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench import registry
from effbench.errors import EffbenchError
from effbench.models.shapes import shape_names
from effbench.protocol import PROTOCOLS

if TYPE_CHECKING:
    from rich.console import Console

SUITES = Path("suites")


def listing() -> dict[str, list[dict[str, Any]]]:
    """Everything that can be named, by kind; one JSON object each. A plugin that cannot be loaded says why."""
    return {
        "techniques": [_described("technique", name) for name in registry.entries("technique")],
        "workloads": [_described("workload", name) for name in registry.entries("workload")],
        "models": [{"name": name} for name in shape_names()],
        "suites": [{"name": str(path)} for path in sorted(SUITES.rglob("*.yaml"))] if SUITES.is_dir() else [],
        "protocols": [{"name": p.name, "summary": p.summary} for p in PROTOCOLS.values()],
        "probes": [{"name": name, "from": entry.distribution} for name, entry in registry.entries("probe").items()],
    }


def _described(kind: registry.Kind, name: str) -> dict[str, Any]:
    entry = registry.find(kind, name)
    try:
        found = registry.load(kind, name)
    except EffbenchError as error:
        return {"name": name, "from": entry.distribution, "error": str(error)}
    about: dict[str, Any] = {"name": name, "summary": found.summary, "from": f"{entry.distribution} {entry.version}"}
    about["parameters"] = {
        key: {"default": field.get_default(call_default_factory=True), "description": field.description or ""}
        for key, field in found.Params.model_fields.items()
    }
    if kind == "technique":
        about |= {"axis": found.axis, "paper": found.paper.title, "arxiv": found.paper.arxiv}
    return about


def print_listing(console: Console, found: dict[str, list[dict[str, Any]]]) -> None:
    """The listing for people."""
    from rich.table import Table

    techniques = Table("technique", "axis", "what it does", "parameters", "paper", title="Techniques", title_justify="left")
    for row in found["techniques"]:
        paper = f"arXiv {row['arxiv']}" if row.get("arxiv") else row.get("paper", "")
        techniques.add_row(row["name"], row.get("axis", ""), row.get("error") or row["summary"], _parameters(row), paper)
    workloads = Table("workload", "what it does", "parameters", title="Workloads", title_justify="left")
    for row in found["workloads"]:
        workloads.add_row(row["name"], row.get("error") or row["summary"], _parameters(row))
    protocols = Table("protocol", "what it is", title="Protocols", title_justify="left")
    for row in found["protocols"]:
        protocols.add_row(row["name"], row["summary"])
    for table in (techniques, workloads, protocols):
        console.print(table)
    console.print(f"Models: {', '.join(row['name'] for row in found['models'])}")
    console.print(f"Suites: {', '.join(row['name'] for row in found['suites']) or 'none below ' + str(SUITES)}")


def _parameters(row: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value['default']}" for key, value in row.get("parameters", {}).items())
