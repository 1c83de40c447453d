"""How many bytes of tensors a step of a spec has alive at most, before anything is built. Torch-free.

    weights, optimizer      as they lie in memory all the time: trained ones in fp32 with two moments, frozen ones as stored
    gradients, activations, cache, logits     what of these is alive when the most is, from the flow of a step (effbench/flow.py)

What an allocator adds (rounding, fragments), the workspaces of libraries and a CUDA context (some 0.5 GB) are no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from effbench import registry
from effbench.costs import FeedForwardCost
from effbench.families import mixture
from effbench.flow import Flow
from effbench.layout import Layout
from effbench.models.context import configured, layout, stack
from effbench.schema import Spec
from effbench.surgery import LAYER
from effbench.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The peak by its parts, in B. Gradients, activations, cache and logits are those alive at that moment."""

    weights: float
    optimizer: float
    gradients: float
    activations: float
    cache: float
    logits: float

    @property
    def peak_bytes(self) -> float:
        return self.weights + self.optimizer + self.gradients + self.activations + self.cache + self.logits


def expected_memory(spec: Spec) -> Memory | None:
    """The expected peak; None where the workload, the model's family or a technique's layers do not say what they do."""
    workload = registry.workload(spec.workload)(spec.params)
    found = layout(spec) if workload.whole_model else _one_layer(configured(spec), spec.nproc)
    if found is None or type(workload).rehearse is Workload.rehearse:
        return None
    trains = workload.trains_on(spec.params)
    flow = Flow(found, device=spec.device, trains=trains)
    for technique in stack(spec):
        technique.flow(flow)
    try:
        workload.rehearse(flow)
    except KeyError:  # the layout has not the weights that a form reads, so the layers are of another form
        return None
    tape, parts = flow.tape, flow.tape.at_peak
    trained = sum(w.size for w in found.weights if w.trained) if trains else 0
    return Memory(
        weights=sum(w.size * tape.width(w) for w in found.weights),
        optimizer=trained * found.state_bytes + parts["optimizer"],
        gradients=parts["gradients"],
        activations=parts["activations"],
        cache=parts["cache"],
        logits=parts["logits"],
    )


def _one_layer(config: dict[str, Any], nproc: int) -> Layout:
    """The experts of one layer, or of several processes one's share of them, and nothing else; its router is not run."""
    layer = [w for w in mixture(FeedForwardCost.of(config), 1) if w.kind != "router"]
    shared_out = [replace(w, shape=(w.shape[0] // nproc, *w.shape[1:])) if w.kind == "experts" else w for w in layer]
    return Layout(model_type=LAYER, config={**config, "nproc": nproc}, weights=shared_out)
