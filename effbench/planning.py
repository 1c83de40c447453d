"""From a checked suite to cases: every default filled in, `auto` resolved, content named by digest, refusals said.

Nothing here loads torch: `effbench plan` answers at once, and what it shows is what `run` will do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from effbench import registry
from effbench.errors import EffbenchError, SuiteError
from effbench.models import builders, text, weights
from effbench.models.context import expected_cost
from effbench.protocol import protocol
from effbench.schema import Case, ModelRef, Spec, TechniqueRef
from effbench.suite import Entry, Stack, Suite, axis_order, filled

DEFAULT_PRECISION = {"cpu": "fp32", "cuda": "bf16"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line may say about a suite. `device` is resolved: cpu or cuda."""

    device: str = "cpu"
    protocol: str | None = None
    only: str | None = None


def plan(suite: Suite, options: Options) -> list[Case]:
    """Every case of a suite, duplicates dropped, baselines that the suite does not list added. Raises SuiteError."""
    wanted: dict[str, Case] = {}
    problems: list[str] = []
    for index, entry, model, stack in suite.stacks():
        try:
            case = _case(suite, options, entry, model, stack)
        except EffbenchError as error:
            problems.append(f"{suite.where('cases', index, 'model')}: {error}")
            continue
        if _selected(case, options.only):
            wanted.setdefault(case.case_id, case)
    if problems:
        raise SuiteError(dict.fromkeys(problems))
    rows = {case.spec.spec_id: case for case in wanted.values()}
    for case in list(wanted.values()):
        if case.baseline and case.baseline.spec_id not in rows:
            added = Case(spec=case.baseline, skip_reason=_refusal(case.baseline))
            rows[case.baseline.spec_id] = wanted[added.case_id] = added
    return [_linked(case, rows) for case in wanted.values()]


def _case(suite: Suite, options: Options, entry: Entry, model: str, stack: Stack) -> Case:
    spec = _spec(suite, options, entry, model, stack)
    other = entry.baseline if entry.baseline is not None else _baseline_stack(spec)
    baseline = None if other is None else _spec(suite, options, entry, model, other)
    refusal = _refusal(spec)
    if refusal or (baseline is not None and baseline.spec_id == spec.spec_id):
        baseline = None
    return Case(spec=spec, baseline=baseline, skip_reason=refusal)


def _linked(case: Case, rows: Mapping[str, Case]) -> Case:
    """The case with the id of its baseline's row; a baseline that cannot run leaves the case without one."""
    if case.baseline is None:
        return case
    row = rows[case.baseline.spec_id]
    if row.skip_reason:
        return replace(case, baseline=None)
    return replace(case, baseline_case_id=row.case_id)


def _spec(suite: Suite, options: Options, entry: Entry, model: str, stack: Stack) -> Spec:
    """One resolved spec. Raises EffbenchError (unknown model, no such folder, text that cannot be read)."""
    name = options.protocol or suite.file.protocol
    workload = registry.workload(entry.workload)
    spec = Spec(
        workload=entry.workload,
        params=workload.Params.model_validate(dict(entry.params)).model_dump(mode="json"),
        model=ModelRef(name=model, weights=entry.weights, location=entry.location),
        techniques=techniques(stack, options.device),
        text=suite.file.text,
        text_digest=text.text_digest(suite.file.text),
        seed=suite.file.seed,
        device=options.device,
        threads=entry.threads or len(os.sched_getaffinity(0)),
        protocol=name,
        time_limit_s=entry.time_limit_s or protocol(name).time_limit_s,
        environment=entry.environment,
        workload_identity=registry.find("workload", entry.workload).identity,
    )
    return replace(spec, model=replace(spec.model, digest=weights.weights_digest(spec)))


def techniques(stack: Stack, device: str) -> tuple[TechniqueRef, ...]:
    """A stack in axis order with every parameter filled in, and the device's default precision where it names none."""
    refs = [_ref(name, params) for name, params in axis_order(stack)]
    if not any(ref.axis == "precision" for ref in refs):
        refs.append(_ref(DEFAULT_PRECISION[device], {}, filled_in=True))
    return tuple(refs)


def _ref(name: str, params: Mapping[str, Any], *, filled_in: bool = False) -> TechniqueRef:
    axis, identity = registry.technique(name).axis, registry.find("technique", name).identity
    return TechniqueRef(
        name=name, axis=axis, params=filled(name, params), identity=identity, given=tuple(params), filled_in=filled_in
    )


def _baseline_stack(spec: Spec) -> Stack | None:
    """What a spec is compared with when the suite names nothing: DESIGN's rule. None: it is its own reference."""
    asked = [ref for ref in spec.techniques if not ref.filled_in]
    if not asked:
        return None
    if len(asked) > 1:
        return tuple((ref.name, {key: ref.params[key] for key in ref.given}) for ref in asked[:-1])
    technique = registry.technique(asked[0].name)
    instance = technique(technique.Params.model_validate(dict(asked[0].params)))
    if instance.is_reference:
        return None
    other = instance.baseline(spec)
    return () if other is None else ((other[0], dict(other[1])),)


def _refusal(spec: Spec) -> str | None:
    return builders.refusal(spec)


def _selected(case: Case, only: str | None) -> bool:
    """Whether `--only` matches: a glob over workload/model/techniques, or a part of it."""
    if not only:
        return True
    from fnmatch import fnmatchcase

    name = case_name(case.spec)
    return fnmatchcase(name, only) or fnmatchcase(name, f"*{only}*")


def case_name(spec: Spec) -> str:
    """workload/model/technique+technique with the parameters given, as `plan` shows it and `--only` matches it."""
    return f"{spec.workload}/{spec.model.name}/{spec.label.replace(' + ', '+').replace(' ', '-')}"


def describe(cases: list[Case]) -> Iterator[dict[str, Any]]:
    """One JSON object per case for `plan --json`."""
    for case in cases:
        yield {
            "case_id": case.case_id,
            "name": case_name(case.spec),
            "baseline": case_name(case.baseline) if case.baseline else None,
            "baseline_case_id": case.baseline_case_id,
            "skip_reason": case.skip_reason,
            "new_weights": builders.new_weights(case.spec),
            "expected": None if case.skip_reason else expected_cost(case.spec),
            "blocks": protocol(case.spec.protocol).blocks,
            "spec": case.spec.to_json(),
        }
