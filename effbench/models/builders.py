"""From a spec to a model with its techniques. Torch-free until `build`, so that a plan can ask for refusals.

    supports → configure → weights (a technique's `load`, else effbench.models.weights) → quantise, block by block → apply
    the session goes on: trainable → optimizer → finish

Precision: a precision technique sets `config.dtype` and the weights are built in it. A training session then calls
`to_master_weights` (trained weights to fp32, frozen ones stay) and computes under `mixed_precision`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from effbench.errors import ModelError
from effbench.families import FAMILIES
from effbench.models import weights
from effbench.models.accounting import (
    compute_dtype,
    expected_decode,
    generation_cost,
    model_facts,
    model_flops_per_token,
    params_active,
    params_total,
)
from effbench.models.context import architecture, context, new_weights, refusal, stack
from effbench.models.storage import weight_bytes
from effbench.schema import Spec
from effbench.technique import Technique

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "Built",
    "build",
    "compute_dtype",
    "context",
    "expected_decode",
    "generation_cost",
    "mixed_precision",
    "model_facts",
    "model_flops_per_token",
    "new_weights",
    "nominal_bits",
    "params_active",
    "params_total",
    "preload",
    "refusal",
    "stack",
    "to_master_weights",
    "weight_bytes",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Built:
    """A model with `apply` done, its techniques in axis order and its configuration."""

    model: PreTrainedModel
    techniques: tuple[Technique, ...]
    config: PretrainedConfig


def build(spec: Spec, *, trains: bool, seed: int, device: str) -> Built:
    """Build the model of a spec on `device`; equal seeds give equal weights. Raises ModelError where a technique refuses."""
    import torch

    reason = refusal(spec, trains=trains)
    if reason is not None:
        raise ModelError(reason)
    techniques, known = stack(spec), context(spec, trains=trains)
    torch.manual_seed(seed)
    config = weights.configuration(spec.model)
    for technique in techniques:
        technique.configure(config)
    config.dtype = config.dtype or "float32"
    config.use_cache = not trains
    early = architecture(techniques)
    formats = [technique.quantise for technique in techniques if technique.quantised]
    loaded = (technique.load(known) for technique in techniques if technique not in early)
    model = next((m for m in loaded if m is not None), None)
    model = weights.load(spec, config, device, early, formats) if model is None else weights.applied(model, early)
    model = weights.applied(model, [t for t in techniques if t not in early])
    model.train(trains)
    return Built(model=model, techniques=tuple(techniques), config=model.config)


def nominal_bits(techniques: Iterable[Technique]) -> float | None:
    """Bits a weight by the name of the stack's number format; None where no technique states them."""
    return next((t.nominal_bits for t in techniques if t.nominal_bits is not None), None)


def to_master_weights(model: PreTrainedModel) -> None:
    """Keep trained weights in fp32 (Mixed Precision Training, arXiv 1710.03740, section 3.1); frozen ones stay as they are."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def mixed_precision(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """Matrix products in the dtype of the configuration: autocast for half precisions, nothing for fp32."""
    import torch

    dtype = compute_dtype(model)
    if dtype == torch.float32:
        return nullcontext()
    autocast: AbstractContextManager[Any] = torch.autocast(next(model.parameters()).device.type, dtype=dtype)
    return autocast


def preload() -> None:
    """Import what builds need and read the text: a fork server does it once, for all its children."""
    import importlib

    from effbench.models.text import BUILTIN, read_text

    for module in ("peft", "safetensors.torch", "transformers.initialization"):
        importlib.import_module(module)
    for family in FAMILIES:
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    read_text(BUILTIN)
