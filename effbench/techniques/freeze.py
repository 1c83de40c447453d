"""Freeze: train some of the decoder's layers as they are, without adapters; the first ones are frozen.

Paper: EfficientLLM (arXiv 2505.13840), section 5.4 ("Freeze", the first 8 layers); Parameter-Efficient Transfer Learning for NLP
(arXiv 1902.00751), section 3, fine-tunes the top layers in the same way.
Changes: which weights ask for a gradient: with `first: N` the decoder layers above the N-th, the last norm and an untied output
head; with `last: N` the last N decoder layers and nothing else, as the paper's released configurations have it. Embeddings never,
of tokens or positions. The row's facts list the trained layers.
Should improve: time and memory, since there is no backward pass below the lowest trained layer, nor activations kept for it.
Costs: 12 bytes for each trained weight beside its fp32 copy, as full fine-tuning; what the frozen layers would have learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from effbench import registry
from effbench.costs import feed_forward_costs
from effbench.schema import Spec
from effbench.technique import YES, Context, Paper, Params, Support, Technique, no

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from effbench.layout import Layout


class FreezeParams(Params):
    """Parameters of `freeze`; one of the two."""

    first: int | None = Field(default=None, ge=1, description="frozen decoder layers, counted from the first; default 8")
    last: int | None = Field(default=None, ge=1, description="instead: train the last so many decoder layers only")

    @model_validator(mode="after")
    def _one(self) -> FreezeParams:
        if self.first is not None and self.last is not None:
            raise ValueError("give first or last, not both")
        return self


class Freeze(Technique):
    """Train the upper layers only."""

    name = "freeze"
    axis = "peft"
    summary = "train the layers above the first N, the others frozen"
    paper = Paper(title="EfficientLLM: Efficiency in Large Language Models", arxiv="2505.13840", where="section 5.4", year=2025)
    Params = FreezeParams
    small_params: ClassVar[Mapping[str, Any]] = {"first": 1}

    def supports(self, context: Context) -> Support:
        if not context.trains:
            return no("freezing changes training; choose a training workload such as finetune")
        if context.model_type == "bloom":
            return no("Bloom's layers and last norm have names that freeze does not know; use full, or lora")
        packed = next((name for name in context.stack if registry.technique(name).quantised), "")
        if packed:
            return no(f"weights in {packed} take no gradient; train an adapter on them, such as lora")
        if any(registry.technique(name).axis == "mixer" for name in context.stack):
            return no("attention-free mixers have layers of another number; use full")
        layers = int(context.config["num_hidden_layers"])
        if self.params.last is not None and self.params.last > layers:
            return no(f"there are {layers} decoder layers and last is {self.params.last}; choose last up to {layers}")
        if self.params.last is None and self._first >= layers:
            return no(f"first {self._first} freezes all of the {layers} decoder layers; choose first up to {layers - 1}")
        return YES

    def trainable(self, model: PreTrainedModel) -> None:
        layers = model.get_decoder().layers
        frozen = len(layers) - self.params.last if self.params.last is not None else self._first
        model.requires_grad_(False)
        if self.params.last is None:
            model.get_decoder().norm.requires_grad_(True)
            model.get_output_embeddings().requires_grad_(True)
            model.get_input_embeddings().requires_grad_(False)  # which may be the head
        for layer in layers[frozen:]:
            layer.requires_grad_(True)

    def layout(self, layout: Layout) -> None:
        mixtures = [bool(cost.experts) for cost in feed_forward_costs(layout.config)]
        layers = len(mixtures)
        frozen = layers - self.params.last if self.params.last is not None else self._first
        split = []
        for weight in layout.weights:
            if "*" not in weight.path:
                split.append(replace(weight, trained=self.params.last is None and weight.kind in ("norm", "head")))
                continue
            # What not every layer has is a part of the mixtures, or of the dense layers beside them.
            sparse = weight.kind != "feed_forward" or ".mlp.shared" in weight.path
            below = frozen if weight.count == layers else mixtures[:frozen].count(sparse)
            if below:
                split.append(replace(weight, count=below, trained=False))
            if weight.count > below:
                split.append(replace(weight, count=weight.count - below))
        layout.weights = split

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return "full", {}

    @property
    def _first(self) -> int:
        return self.params.first or 8
