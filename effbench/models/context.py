"""What is known of a spec before there is a model: its techniques, their context, the first refusal. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from effbench import families, registry
from effbench.costs import FeedForwardCost, feed_forward_costs, native_cost, touched_share
from effbench.layout import ITEM_BYTES, Layout
from effbench.models import checkpoints
from effbench.schema import Spec
from effbench.surgery import LAYER, attention_cost
from effbench.technique import AXES, Context, Technique

ARCHITECTURE_AXES = ("attention", "position", "mixer", "ffn")  # what weights are trained with
NUM_BYTES = 256
MIXER_COSTS = (
    "mixer_flops_per_token", "mixer_decode_flops_per_token", "kv_cache_bytes_per_token", "cache_read_bytes_per_token",
)  # fmt: skip
FEED_FORWARD_COSTS = ("ffn_flops_per_token", "ffn_weights", "ffn_active_weights", "ffn_read_bytes_per_step")


def stack(spec: Spec) -> list[Technique]:
    """The techniques of a spec with their parameters, in axis order."""
    refs = sorted(spec.techniques, key=lambda ref: AXES.index(ref.axis))
    kinds = [(registry.technique(ref.name), ref.params) for ref in refs]
    return [kind(kind.Params.model_validate(dict(params))) for kind, params in kinds]


def architecture(techniques: list[Technique]) -> list[Technique]:
    """Those that decide which weights there are; one that converts weights comes after them."""
    return [t for t in techniques if t.axis in ARCHITECTURE_AXES and not t.converts_weights]


def context(spec: Spec, *, trains: bool | None = None) -> Context:
    """What a technique may know of a spec; `trains` is the workload's unless said."""
    model_type, config = checkpoints.config_values(spec.model)
    return Context(
        config=config,
        model_type=model_type,
        device=spec.device,
        trains=registry.workload(spec.workload).trains_on(spec.params) if trains is None else trains,
        weights=spec.model.weights,
        params=spec.params,
        stack=tuple(ref.name for ref in spec.techniques),
        location=spec.model.location,
        seed=spec.seed,
        layout=_layout(model_type, config, architecture(stack(spec))),
    )


def layout(spec: Spec) -> Layout | None:
    """The tensors of a spec's model as its whole stack changes them; None for a family that is not known."""
    model_type, config = checkpoints.config_values(spec.model)
    return _layout(model_type, config, stack(spec))


def _layout(model_type: str, config: Mapping[str, Any], techniques: list[Technique]) -> Layout | None:
    if model_type not in families.FAMILIES:
        return None
    values = SimpleNamespace(**config)
    for technique in techniques:
        technique.configure(values)  # the values are all a hook may touch
    found = families.layout(model_type, vars(values))
    for technique in techniques:
        technique.layout(found)
    return found


def refusal(spec: Spec, *, trains: bool | None = None) -> str | None:
    """Why this spec cannot be built, as a sentence that names the technique; None when it can."""
    known = context(spec, trains=trains)
    workload = registry.workload(spec.workload)
    if known.model_type == LAYER and workload.whole_model:
        return (
            f"{spec.model.name} is the shape of one layer and {spec.workload} runs whole models; choose the workload moe_layer"
        )
    if spec.nproc > 1 and not workload.ranks:
        return f"{spec.workload} is the work of one process, and nproc is {spec.nproc}; leave it out"
    for ref in spec.techniques:
        if (belongs := registry.technique(ref.name).workloads) and spec.workload not in belongs:
            return f"{ref.name}: it is part of the workload {' or '.join(belongs)} and changes nothing in {spec.workload}; leave it out"
        if workload.axes and ref.axis not in workload.axes:
            return f"{ref.name}: a technique of axis {ref.axis} changes nothing in {spec.workload}; leave it out"
    vocabulary = int(known.config.get("vocab_size") or NUM_BYTES)
    if vocabulary < NUM_BYTES:
        return f"{spec.model.name}: its vocabulary of {vocabulary} holds no bytes; text is fed as bytes and needs {NUM_BYTES}"
    if spec.model.weights == "path" and known.model_type in families.FAMILIES:
        wrong = checkpoints.mismatch(spec.model, families.layout(known.model_type, known.config))
        if wrong is not None:
            return f"{spec.model.name}: {wrong}"
    for technique in stack(spec):
        answer = technique.supports(known)
        if not answer.ok:
            return f"{technique.name}: {answer.reason}"
    return workload(spec.params).refusal(spec, configured(spec))


def new_weights(spec: Spec) -> str:
    """The part of a loaded checkpoint that cannot be converted and starts anew, such as "attention"; "" for none."""
    if spec.model.weights not in ("path", "hub"):
        return ""
    return ", ".join(dict.fromkeys(t.new_weights for t in stack(spec) if t.new_weights))


def expected_cost(spec: Spec) -> dict[str, Any]:
    """Analytic cost of a spec before anything is built: of the token mixers, one sequence, and of the feed-forward layers.

    Mixers: from the `cost` hook of the first technique that has one, else softmax attention as the model has it.
    Feed-forward layers: as the techniques configure them; the bytes are those of one decode step of the whole batch.
    A workload that runs one layer has the cost of that layer, and no mixer. None: it does not apply.
    """
    techniques, values = stack(spec), configured(spec)
    whole = registry.workload(spec.workload).whole_model
    mixers = _mixer_cost(spec, techniques, values) if whole else dict.fromkeys((*MIXER_COSTS, "source"))
    return {**mixers, **_feed_forward_cost(spec, techniques, values, whole)}


def configured(spec: Spec) -> dict[str, Any]:
    """The configuration values of a spec as its techniques change them."""
    values = SimpleNamespace(**context(spec).config)
    for technique in stack(spec):
        technique.configure(values)  # the values are all a hook may touch
    return vars(values)


def _mixer_cost(spec: Spec, techniques: list[Technique], values: dict[str, Any]) -> dict[str, Any]:
    known, trains = context(spec), registry.workload(spec.workload).trains_on(spec.params)
    found = next((cost for t in techniques if (cost := t.cost(known)) is not None), None)
    cost = found or attention_cost(known, native_cost(values))
    layers, width = int(known.config["num_hidden_layers"]), _item_bytes(values)
    each = (
        (cost.flops_per_token, layers),
        (None if trains else cost.decode_flops_per_token, layers),
        (None if trains else cost.cache_elements_per_token, layers * width),
        (None if trains else cost.decode_read_elements, layers * width),
    )
    scaled = (None if value is None else value * by for value, by in each)
    return {**dict(zip(MIXER_COSTS, scaled, strict=True)), "source": cost.source}


def _feed_forward_cost(
    spec: Spec, techniques: list[Technique], values: dict[str, Any], whole_model: bool
) -> dict[str, float | None]:
    """Zero is no cost here: a mixer that replaces the whole layer leaves none that is known, so None."""
    mixed = any(t.axis == "mixer" for t in techniques)
    if mixed or not ("intermediate_size" in values or "moe_intermediate_size" in values):
        return dict.fromkeys(FEED_FORWARD_COSTS)
    layers = feed_forward_costs(values) if whole_model else [FeedForwardCost.of(values)]
    tokens = spec.params.get("tokens") or spec.params.get("batch_size", 1)
    trains = whole_model and registry.workload(spec.workload).trains_on(spec.params)
    found = (
        sum(layer.flops_per_token() for layer in layers),
        sum(layer.weights() for layer in layers),
        sum(layer.active_weights() for layer in layers),
        None if trains else _read_bytes(layout(spec) if whole_model else None, values, layers, tokens),
    )
    return dict(zip(FEED_FORWARD_COSTS, found, strict=True))


def _read_bytes(found: Layout | None, values: dict[str, Any], layers: list[FeedForwardCost], tokens: int) -> float:
    """Of the stored weights those that a step reads, all layers; where the tensors are not known, as if none were packed."""
    if found is None:
        return _item_bytes(values) * sum(layer.read_weights(tokens) for layer in layers)
    cost = FeedForwardCost.of(values)
    share = {"experts": touched_share(cost.experts, cost.top_k, tokens) if cost.experts else 1.0}
    kinds = ("feed_forward", "experts", "router")
    return sum(found.bytes_of(w) * share.get(w.kind, 1.0) for w in found.weights if w.kind in kinds)


def _item_bytes(values: dict[str, Any]) -> int:
    return ITEM_BYTES[str(values.get("dtype") or "float32")]
