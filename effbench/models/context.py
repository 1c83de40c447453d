"""What is known of a spec before there is a model: its techniques, their context, the first refusal. Torch-free."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from effbench import registry
from effbench.costs import SoftmaxCost
from effbench.models import checkpoints
from effbench.schema import Spec
from effbench.surgery import attention_cost
from effbench.technique import AXES, Context, Technique

ARCHITECTURE_AXES = ("attention", "position", "mixer", "ffn")  # what weights are trained with
NUM_BYTES = 256
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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


def new_weights(spec: Spec) -> str:
    """The part of a loaded checkpoint that cannot be converted and starts anew, such as "attention"; "" for none."""
    if spec.model.weights not in ("path", "hub"):
        return ""
    return ", ".join(dict.fromkeys(t.new_weights for t in stack(spec) if t.new_weights))


def expected_cost(spec: Spec) -> dict[str, Any]:
    """Analytic cost of the token mixers of a spec, all layers, one sequence, before anything is built.

    From the `cost` hook of the first technique that has one, else that of softmax attention as the model has it.
    """
    known, techniques = context(spec), stack(spec)
    values = SimpleNamespace(**known.config)
    for technique in techniques:
        technique.configure(values)  # the values are all a hook may touch
    found = next((cost for t in techniques if (cost := t.cost(known)) is not None), None)
    cost = found or attention_cost(known, SoftmaxCost.of(vars(values)))
    layers, width = int(known.config["num_hidden_layers"]), ITEM_BYTES[str(getattr(values, "dtype", None) or "float32")]

    trains = registry.workload(spec.workload).trains

    def scaled(value: float | None, by: int) -> float | None:
        return None if value is None else value * by

    return {
        "mixer_flops_per_token": scaled(cost.flops_per_token, layers),
        "mixer_decode_flops_per_token": None if trains else scaled(cost.decode_flops_per_token, layers),
        "kv_cache_bytes_per_token": None if trains else scaled(cost.cache_elements_per_token, layers * width),
        "cache_read_bytes_per_token": None if trains else scaled(cost.decode_read_elements, layers * width),
        "source": cost.source,
    }
