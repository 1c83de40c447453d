"""Small models with one technique, for the contract and for the tests of plugins. Torch-free at import.

A stack is the techniques alone plus the precision of the CPU; the workload is `generate`, in training `finetune`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from effbench import registry
from effbench.models import builders, text, weights
from effbench.planning import techniques
from effbench.schema import ModelRef, Spec
from effbench.technique import Technique

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SHAPES = ("tiny-llama", "tiny-qwen2", "tiny-mistral")  # one of each family with separate projections
MIXTURE = "tiny-mixtral"  # a plugin is also tried on a model that most techniques must refuse
LENGTH = 24  # tokens


class NotAsked(Exception):
    """There is nothing to try; the text is the reason."""


@cache
def spec_of(shape: str, *stack: str, trains: bool) -> Spec:
    """A resolved spec of these techniques with the parameters that suit a small model."""
    workload = "finetune" if trains else "generate"
    plain = Spec(
        workload=workload,
        params=registry.workload(workload).Params().model_dump(mode="json"),
        model=ModelRef(name=shape),
        techniques=techniques(tuple((name, dict(registry.technique(name).small_params)) for name in stack), "cpu"),
        text=text.BUILTIN,
        text_digest=text.text_digest(text.BUILTIN),
        seed=1,
        device="cpu",
        threads=1,
        protocol="quick",
        time_limit_s=60.0,
    )
    return replace(plain, model=replace(plain.model, digest=weights.weights_digest(plain)))


@cache
def modes(technique: str, shape: str) -> tuple[bool, ...]:
    """The values of `trains` under which this pair can be built."""
    return tuple(t for t in (False, True) if builders.refusal(spec_of(shape, technique, trains=t)) is None)


def tiny_model(shape: str, *stack: str, seed: int = 1, trains: bool = False) -> PreTrainedModel:
    """A model of a small shape with these techniques, on the CPU; in training its trained weights are fp32.

    Raises ModelError where a technique refuses.
    """
    found = builders.build(spec_of(shape, *stack, trains=trains), trains=trains, seed=seed, device="cpu")
    if trains:
        for part in found.techniques:
            part.trainable(found.model)
        builders.to_master_weights(found.model)
    return found.model


def built(technique: str, shape: str, *, seed: int = 1, trains: bool | None = None) -> PreTrainedModel:
    """`tiny_model` of one technique, in training only where it cannot serve. Raises NotAsked where it refuses both."""
    can = modes(technique, shape)
    if not can:
        raise NotAsked(f"refused: {builders.refusal(spec_of(shape, technique, trains=True))}")
    return tiny_model(shape, technique, seed=seed, trains=can[0] if trains is None else trains)


def instance(spec: Spec, technique: str) -> Technique:
    """The technique of a spec by name."""
    return next(t for t in builders.stack(spec) if t.name == technique)


def wake(model: PreTrainedModel) -> None:
    """Give weights that start at zero (LoRA's B, biases) a value, so that they take part."""
    import torch

    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if type(p.data) is torch.Tensor and p.is_floating_point() and not bool(p.any()):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.05)


def some_bytes(num_rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    """Token ids (num_rows, length), always the same."""
    import torch

    return torch.randint(0, 256, (num_rows, length), generator=torch.Generator().manual_seed(7))


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """Logits of `some_bytes`, without a cache."""
    import torch

    with torch.inference_mode(), builders.mixed_precision(model):
        found: torch.Tensor = model(input_ids=some_bytes(), use_cache=False).logits
    return found
