"""From a checked suite to cases: every default filled in, `auto` resolved, content named by digest, refusals said.

Nothing here loads torch: `effbench plan` answers at once, and what it shows is what `run` will do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from typing import Any

from effbench import registry
from effbench.errors import EffbenchError, SuiteError
from effbench.models import builders, text, weights
from effbench.models.context import expected_cost
from effbench.models.memory import Memory, expected_memory
from effbench.protocol import protocol
from effbench.schema import Case, ModelRef, Spec, TechniqueRef
from effbench.suite import Entry, Stack, Suite, axis_order, filled
from effbench.technique import AXES

DEFAULT_PRECISION = {"cpu": "fp32", "cuda": "bf16"}
TIGHT = 0.85  # of a device's memory: what is expected beyond it may not fit, with what is no tensor
# What takes less memory than a stack has, tried in this order where no batch is small enough; by what a workload's throughput is.
LIGHTER = {"st": (("lora",), ("nf4", "lora")), "it": (("int4",), ("nf4",))}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line may say about a suite. `device` is resolved: cpu or cuda; no memory is refused where none is known."""

    device: str = "cpu"
    protocol: str | None = None
    only: str | None = None
    memory_bytes: float | None = None
    device_name: str = "this device"


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
            added = Case(spec=case.baseline, skip_reason=_refusal(case.baseline, options))
            rows[case.baseline.spec_id] = wanted[added.case_id] = added
    return [_linked(case, rows) for case in wanted.values()]


def _case(suite: Suite, options: Options, entry: Entry, model: str, stack: Stack) -> Case:
    spec = _spec(suite, options, entry, model, stack)
    other = entry.baseline if entry.baseline is not None else _baseline_stack(spec)
    baseline = None if other is None else _spec(suite, options, entry, model, other)
    refusal = _refusal(spec, options)
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
        threads=entry.threads or max(1, len(os.sched_getaffinity(0)) // entry.nproc),
        protocol=name,
        time_limit_s=entry.time_limit_s or protocol(name).time_limit_s,
        environment=entry.environment,
        workload_identity=registry.find("workload", entry.workload).identity,
        nproc=entry.nproc,
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


def _refusal(spec: Spec, options: Options) -> str | None:
    return builders.refusal(spec) or _too_large(spec, options)


def _too_large(spec: Spec, options: Options) -> str | None:
    """Why a spec does not fit the device, and what would; None where it fits, or where one of the two is not known."""
    expected, limit = expected_memory(spec), options.memory_bytes
    if expected is None or limit is None or expected.peak_bytes <= limit:
        return None
    return (
        f"needs about {_gb(expected.peak_bytes)} GB of tensors, {options.device_name} has {_gb(limit)} GB; "
        f"{_what_fits(spec, expected, limit)}"
    )


def _what_fits(spec: Spec, expected: Memory, limit: float) -> str:
    """The smallest change that would fit: fewer sequences, activations made again, or a lighter stack."""
    amount = next((key for key in ("batch_size", "tokens") if spec.params.get(key, 1) > 1), None)
    if amount is not None:
        one, now = _with(spec, {amount: 1}), spec.params[amount]
        if (least := _peak(one)) <= limit:
            most = 1 + int((limit - least) / (expected.peak_bytes - least) * (now - 1))  # it grows evenly
            return f"choose {amount} up to {most}"
    again = _with(spec, {"activation_checkpointing": True})
    if spec.params.get("activation_checkpointing") is False and _peak(again) <= limit:
        return "choose activation_checkpointing"
    for names in LIGHTER.get(registry.workload(spec.workload).throughput, ()):
        lighter = _with_techniques(spec, names)
        if builders.refusal(lighter) is None and _peak(lighter) <= limit:
            return f"choose {' + '.join(names)}"
    return "choose a smaller model, or a device with more memory"


def _with(spec: Spec, params: Mapping[str, Any]) -> Spec:
    return replace(spec, params={**spec.params, **params})


def _with_techniques(spec: Spec, names: Sequence[str]) -> Spec:
    """The spec with these techniques in the place of those on their axes."""
    new = [_ref(name, {}) for name in names]
    taken = {ref.axis for ref in new}
    kept = [ref for ref in spec.techniques if ref.axis not in taken]
    return replace(spec, techniques=tuple(sorted((*kept, *new), key=lambda ref: AXES.index(ref.axis))))


def _peak(spec: Spec) -> float:
    found = expected_memory(spec)
    return inf if found is None else found.peak_bytes


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3g}"


def memory_of(spec: Spec, options: Options) -> dict[str, Any] | None:
    """Expected bytes of a spec's tensors by kind, and whether they fit: yes, tight, no or unknown."""
    expected, limit = expected_memory(spec), options.memory_bytes
    if expected is None:
        return None
    share = None if limit is None else expected.peak_bytes / limit
    fits = "unknown" if share is None else "no" if share > 1 else "tight" if share > TIGHT else "yes"
    return {"peak_bytes": expected.peak_bytes, **asdict(expected), "device_bytes": limit, "fits": fits}


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


def describe(cases: list[Case], options: Options) -> Iterator[dict[str, Any]]:
    """One JSON object per case for `plan --json`."""
    for case in cases:
        refused = builders.refusal(case.spec) is not None
        yield {
            "case_id": case.case_id,
            "name": case_name(case.spec),
            "baseline": case_name(case.baseline) if case.baseline else None,
            "baseline_case_id": case.baseline_case_id,
            "skip_reason": case.skip_reason,
            "new_weights": builders.new_weights(case.spec),
            "expected": None if refused else expected_cost(case.spec),
            "memory": None if refused else memory_of(case.spec, options),
            "blocks": protocol(case.spec.protocol).blocks,
            "spec": case.spec.to_json(),
        }
