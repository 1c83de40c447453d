"""What is known of a spec before there is a model: its techniques, their context, the first refusal. Torch-free."""

from __future__ import annotations

from effbench import registry
from effbench.models import checkpoints
from effbench.schema import Spec
from effbench.technique import AXES, Context, Technique

ARCHITECTURE_AXES = ("attention", "position", "mixer", "ffn")  # what weights are trained with
NUM_BYTES = 256


def stack(spec: Spec) -> list[Technique]:
    """The techniques of a spec with their parameters, in axis order."""
    refs = sorted(spec.techniques, key=lambda ref: AXES.index(ref.axis))
    kinds = [(registry.technique(ref.name), ref.params) for ref in refs]
    return [kind(kind.Params.model_validate(dict(params))) for kind, params in kinds]


def architecture(techniques: list[Technique]) -> list[Technique]:
    """Those that decide which weights there are."""
    return [t for t in techniques if t.axis in ARCHITECTURE_AXES]


def context(spec: Spec, *, trains: bool | None = None) -> Context:
    """What a technique may know of a spec; `trains` is the workload's unless said."""
    model_type, config = checkpoints.config_values(spec.model)
    return Context(
        config=config,
        model_type=model_type,
        device=spec.device,
        trains=registry.workload(spec.workload).trains if trains is None else trains,
        weights=spec.model.weights,
        params=spec.params,
        stack=tuple(ref.name for ref in spec.techniques),
        location=spec.model.location,
        seed=spec.seed,
    )


def refusal(spec: Spec, *, trains: bool | None = None) -> str | None:
    """Why this spec cannot be built, as a sentence that names the technique; None when it can."""
    known = context(spec, trains=trains)
    vocabulary = int(known.config.get("vocab_size") or NUM_BYTES)
    if vocabulary < NUM_BYTES:
        return f"{spec.model.name}: its vocabulary of {vocabulary} holds no bytes; text is fed as bytes and needs {NUM_BYTES}"
    for technique in stack(spec):
        answer = technique.supports(known)
        if not answer.ok:
            return f"{technique.name}: {answer.reason}"
    return None
