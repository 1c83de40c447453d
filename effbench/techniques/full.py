"""Full fine-tuning: every weight is trained.

Paper: Universal Language Model Fine-tuning for Text Classification (arXiv 1801.06146), section 3.2, at one learning rate for all layers;
with `offload`, ZeRO-Offload (arXiv 2101.06840), section 4: the optimizer's states and its step are on the host.
Changes: nothing but that every parameter asks for a gradient.
Should improve: quality, given data and memory; it is the reference of its axis.
Costs: a gradient and two AdamW moments for every weight, 12 bytes per parameter beside its fp32 copy; with `offload` 4 on the
device, and every gradient and every weight crosses to the host and back at each step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from effbench import registry
from effbench.schema import Spec
from effbench.technique import YES, Context, OptimizerArgs, Paper, Params, Support, Technique, no

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class FullParams(Params):
    """Parameters of `full`."""

    offload: bool = Field(default=False, description="AdamW's states and its step in host memory (GPU)")


class Full(Technique):
    """Train every weight."""

    name = "full"
    axis = "peft"
    summary = "full fine-tuning: every weight is trained"
    paper = Paper(
        title="Universal Language Model Fine-tuning for Text Classification", arxiv="1801.06146", where="section 3.2", year=2018
    )
    Params = FullParams

    def supports(self, context: Context) -> Support:
        if not context.trains:
            return no("full fine-tuning changes training; choose a training workload such as finetune")
        packed = next((name for name in context.stack if registry.technique(name).quantised), "")
        if packed:
            return no(f"weights in {packed} take no gradient; train an adapter on them, such as lora")
        if self.params.offload and context.device != "cuda":
            return no("offload moves states from a GPU to the host, and here everything is on the host; leave it out")
        return YES

    def trainable(self, model: PreTrainedModel) -> None:
        model.requires_grad_(True)

    def optimizer(self, model: PreTrainedModel, args: OptimizerArgs) -> torch.optim.Optimizer | None:
        if not self.params.offload:
            return None
        from effbench.modules.offload import HostAdamW

        return HostAdamW(model.parameters(), lr=args.learning_rate, betas=args.betas, weight_decay=args.weight_decay)

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return None if self.is_reference else ("full", {})

    @property
    def is_reference(self) -> bool:
        return not self.params.offload
