"""LoRA+: LoRA whose B learns at a multiple of the learning rate of A.

Paper: LoRA+: Efficient Low Rank Adaptation of Large Models (arXiv 2402.12354), section 4: η_B = ratio × η_A.
Changes: the optimizer's groups; the graph is LoRA's, so a difference of speed or memory between the two is noise.
Should improve: how fast the change is learned.
Costs: nothing beside LoRA's. With peft's groups weight decay spares one-dimensional parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from effbench.modules.adapters import Adapter, AdapterParams
from effbench.technique import OptimizerArgs, Paper

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class LoRAPlusParams(AdapterParams):
    """Parameters of `lora_plus`."""

    ratio: float = Field(default=16.0, ge=1, le=1000, description="learning rate of B over that of A")


class LoRAPlus(Adapter):
    """LoRA with two learning rates."""

    name = "lora_plus"
    summary = "LoRA with a higher learning rate for B than for A"
    paper = Paper(
        title="LoRA+: Efficient Low Rank Adaptation of Large Models", arxiv="2402.12354", where="section 4", year=2024
    )
    Params = LoRAPlusParams

    def optimizer(self, model: PreTrainedModel, args: OptimizerArgs) -> torch.optim.Optimizer:
        import torch
        from peft.optimizers import create_loraplus_optimizer

        found: torch.optim.Optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=args.learning_rate, loraplus_lr_ratio=self.params.ratio, betas=args.betas,
            loraplus_weight_decay=args.weight_decay, fused=next(model.parameters()).is_cuda,
        )  # fmt: skip
        found.param_groups = [group for group in found.param_groups if group["params"]]
        return found
