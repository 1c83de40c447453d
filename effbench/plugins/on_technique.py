"""The clauses of the contract that ask about the technique itself; each raises ContractError with what is wrong."""

from __future__ import annotations

import ast
import inspect
import sys
from dataclasses import replace
from importlib import metadata
from typing import Any

from effbench import registry
from effbench.errors import ContractError
from effbench.models import builders
from effbench.models.shapes import shape_names
from effbench.plugins.on_models import LEAST_REASON
from effbench.plugins.small import SHAPES, instance, modes, spec_of
from effbench.schema import Spec, TechniqueRef
from effbench.technique import AXES

DOCUMENTED = ("Paper:", "Changes:", "Should improve:", "Costs:")


def asked_of_every_shape(technique: str, shape: str = "") -> None:
    for name in shape_names():
        for trains in (False, True):
            reason = builders.refusal(spec_of(name, technique, trains=trains))
            if reason is not None and len(reason) <= LEAST_REASON + len(technique):
                raise ContractError(f"{name}: a refusal without a usable reason: {reason!r}; say what to change")


def baseline(technique: str, shape: str = "") -> None:
    kind = registry.technique(technique)
    for name in SHAPES:
        for trains in modes(technique, name):
            spec = spec_of(name, technique, trains=trains)
            own = instance(spec, technique)
            other = own.baseline(spec)
            if own.is_reference and other is not None:
                raise ContractError(f"it is the reference of its axis and names the baseline {other[0]!r}")
            if other is None:
                continue
            _check_baseline(technique, kind.axis, spec, other[0], dict(other[1]))


def _check_baseline(technique: str, axis: str, spec: Spec, name: str, params: dict[str, Any]) -> None:
    if name == technique:
        raise ContractError("it is its own baseline")
    kind = registry.technique(name)
    if kind.axis != axis:
        raise ContractError(f"its baseline {name!r} is of axis {kind.axis}")
    filled = kind.Params.model_validate(params).model_dump(mode="json")
    rest = tuple(t for t in spec.techniques if t.axis != axis)
    refused = builders.refusal(replace(spec, techniques=(TechniqueRef(name=name, axis=axis, params=filled), *rest)))
    if refused is not None:
        raise ContractError(f"its baseline cannot be built where it can, on {spec.model.name}: {refused}")


def baselines_end(technique: str, shape: str = "") -> None:
    seen, name = [technique], technique
    while not registry.technique(name)().is_reference:
        spec = spec_of("tiny-llama", name, trains=True)
        other = instance(spec, name).baseline(spec)
        if other is None:
            break
        name = other[0]
        if name in seen:
            raise ContractError(f"baselines go in a circle: {', '.join((*seen, name))}")
        seen.append(name)


def cost(technique: str, shape: str = "") -> None:
    spec = spec_of("tiny-llama", technique, trains=False)
    found = instance(spec, technique).cost(builders.context(spec))
    if found is None:
        return
    if not found.flops_per_token > 0:
        raise ContractError(f"its cost is {found.flops_per_token:g} FLOPs a token")
    if not found.source:
        raise ContractError("its cost names no source")


def documented(technique: str, shape: str = "") -> None:
    kind = registry.technique(technique)
    opening = sys.modules[kind.__module__].__doc__ or ""
    faults = [
        (kind.name != technique, f"it calls itself {kind.name!r}"),
        (kind.axis not in AXES, f"its axis {kind.axis!r} is not among {', '.join(AXES)}"),
        (not kind.summary or kind.summary.endswith("."), "`summary` is a phrase without a full stop"),
        (not kind.paper.title, "`paper` has no title"),
        (not opening, "its file does not open with a docstring that names the paper"),
        *((word not in opening, f"the docstring of its file has no line {word!r}") for word in DOCUMENTED),
        *(
            (not field.description, f"its parameter {name} is not described")
            for name, field in kind.Params.model_fields.items()
        ),
    ]
    for wrong, what in faults:
        if wrong:
            raise ContractError(what)
    try:
        kind.Params()
    except ValueError as error:
        raise ContractError(f"a parameter has no default: {' '.join(str(error).split())}") from error


def licensed(technique: str, shape: str = "") -> None:
    if not licence_of(registry.find("technique", technique).distribution):
        raise ContractError("its package declares no licence; add `license` to [project] in pyproject.toml")


def licence_of(distribution: str) -> str:
    """The licence that the metadata of an installed package declares, or ""."""
    found = metadata.metadata(distribution)
    classes = [line.rpartition(" :: ")[2] for line in found.get_all("Classifier") or () if line.startswith("License ::")]
    declared: list[str] = [text for key in ("License-Expression", "License") for text in found.get_all(key) or ()]
    return next((line.strip() for line in (*declared, *classes) if line.strip()), "")


def independent(technique: str, shape: str = "") -> None:
    tree = ast.parse(inspect.getsource(sys.modules[registry.technique(technique).__module__]))
    imported = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    if others := sorted(name for name in imported if name.startswith("effbench.techniques")):
        raise ContractError(f"it imports another technique: {', '.join(others)}; techniques know nothing of each other")
