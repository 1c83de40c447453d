"""Rows made for the claims: stacks with parameters, and any metric with an interval of a chosen width."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pandas as pd

from effbench.analysis.claims import CLAIMS
from effbench.analysis.frame import frame_of
from effbench.schema import Case, CaseRecord, TechniqueRef, canonical_json
from tests.records import GPU, make_case, make_spec, make_value

METRICS = tuple(dict.fromkeys(name for claim in CLAIMS for part in claim.parts for name in part.metrics()))


def make_row(
    workload: str,
    stack: str,
    *,
    model: str = "tiny-llama",
    hardware: str = GPU,
    protocol: str = "publish",
    half: float = 0.01,
    params: dict[str, Any] | None = None,
    baseline: CaseRecord | None = None,
    ratios: dict[str, float] | None = None,
    source: str = "host clock",
    **metrics: float,
) -> CaseRecord:
    """One row; `stack` as a label has it, "lora(r=8) + bf16". `ratios`: paired to `baseline`, with the same relative half-width."""
    device = "cuda" if hardware == GPU else "cpu"
    spec = make_spec(workload, (), model=model, device=device, protocol=protocol, **(params or {}))
    spec = replace(spec, techniques=tuple(_technique(text) for text in stack.split(" + ")))
    case = Case(spec=spec, baseline_case_id=baseline.case_id if baseline else None)
    values = tuple(
        make_value(name, value, half=half, n=5, ratio=(ratios or {}).get(name), ratio_half=half, source=source)
        for name, value in metrics.items()
    )
    return replace(
        make_case(workload, spec.stack, hardware=hardware, model=model, protocol=protocol, baseline=None, metrics=values),
        spec=canonical_json(spec.to_json()),
        case_id=case.case_id,
        baseline_case_id=case.baseline_case_id,
        run_id=hashlib.sha256(f"{case.case_id} {hardware}".encode()).hexdigest()[:32],
    )


def _technique(text: str) -> TechniqueRef:
    name, _, inside = text.partition("(")
    given = dict(item.split("=") for item in inside.rstrip(")").split(",") if item)
    params = {key: int(value) if value.isdigit() else value for key, value in given.items()}
    return TechniqueRef(name=name, axis="mixer", params=params, given=tuple(params))


def made_frame(rows: Iterable[CaseRecord]) -> pd.DataFrame:
    """The frame of these rows with every metric that a claim asks for."""
    return frame_of(list(rows), metrics=METRICS)


def widened(rows: Iterable[CaseRecord], half: float = 0.95) -> list[CaseRecord]:
    """The same rows with intervals so wide that nothing can be said."""
    return [
        replace(
            row,
            metrics=tuple(
                replace(m, lower=m.value * (1 - half) - 1e-3, upper=m.value * (1 + half) + 1e-3, ratio=None)
                for m in row.metrics
                if m.value is not None
            ),
        )
        for row in rows
    ]
