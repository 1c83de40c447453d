"""Full fine-tuning: every weight is trained.

Paper: Universal Language Model Fine-tuning for Text Classification (arXiv 1801.06146), section 3.2, at one learning rate for all layers;
with `offload`, ZeRO-Offload (arXiv 2101.06840), section 4: the fp32 weights, the optimizer's states and its step are on the host.
Changes: nothing but that every parameter asks for a gradient.
Should improve: quality, given data and memory; it is the reference of its axis.
Costs: a gradient and two AdamW moments for every weight, 12 bytes per parameter beside its fp32 copy; with `offload` in bf16 2
for the weight and 2 for its gradient on the device, and every one of both crosses between device and host at each step.
Deviation: DeepSpeed's ZeRO-3, the paper's full*, also moves the weights to the host and overlaps the transfers; this does neither.
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

    from effbench.flow import Flow
    from effbench.layout import Layout


class FullParams(Params):
    """Parameters of `full`."""

    offload: bool = Field(default=False, description="fp32 weights, AdamW's states and its step in host memory (GPU)")


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
        if self.params.offload and "fp16" in context.stack:
            return no("offload keeps gradients in 16 bits, where torch's scaler of fp16 losses takes none; choose bf16")
        return YES

    def trainable(self, model: PreTrainedModel) -> None:
        model.requires_grad_(True)
        self._dtypes = {p: p.dtype for p in model.parameters()}  # before a session makes them fp32

    def optimizer(self, model: PreTrainedModel, args: OptimizerArgs) -> torch.optim.Optimizer | None:
        if not self.params.offload:
            return None
        from effbench.modules.offload import HostAdamW

        return HostAdamW(self._dtypes, lr=args.learning_rate, betas=args.betas, weight_decay=args.weight_decay)

    def layout(self, layout: Layout) -> None:
        if self.params.offload:
            layout.state_bytes = 0.0

    def flow(self, flow: Flow) -> None:
        if self.params.offload:
            flow.tape.masters = False

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return None if self.is_reference else ("full", {})

    @property
    def is_reference(self) -> bool:
        return not self.params.offload
