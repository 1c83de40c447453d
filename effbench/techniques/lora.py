"""LoRA: train a low-rank change of each linear layer, the weights themselves frozen.

Paper: LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685), section 4.1: h = W x + (α / r) B A x.
Changes: every linear layer but the output head gets A (r × in, Kaiming) and B (out × r, zero), in fp32; W gets no gradient.
Stacked experts get one pair for each expert; peft adds B A to their weights before the product, without dropout.
Should improve: memory of gradients and optimizer states, and the time their updates take.
Costs: two small matrix products per layer, forward and backward; the backward pass through W stays.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from effbench import surgery
from effbench.schema import Spec
from effbench.technique import YES, Context, Paper, Params, Support, Technique, no

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoRAParams(Params):
    """Parameters of `lora`, named as peft names them."""

    r: int = Field(default=16, ge=1, description="rank of the change")
    lora_alpha: int = Field(default=32, ge=1, description="α: the change is scaled by α / r")
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="dropout on the adapter's input")


class LoRA(Technique):
    """Low-rank adapters on every linear layer."""

    name = "lora"
    axis = "peft"
    summary = "low-rank adapters on every linear layer, base weights frozen"
    paper = Paper(
        title="LoRA: Low-Rank Adaptation of Large Language Models", arxiv="2106.09685", where="section 4.1", year=2021
    )
    Params = LoRAParams

    def supports(self, context: Context) -> Support:
        if not context.trains:
            return no("LoRA changes training; choose a training workload such as finetune")
        stacked = surgery.stacked_weights(context)
        if stacked and self.params.lora_dropout:
            return no(
                f"the experts of {stacked} are adapted by their weights, where a dropout of {self.params.lora_dropout:g} on inputs "
                "has no place; choose lora_dropout 0"
            )
        return YES

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.params.r,
            lora_alpha=self.params.lora_alpha,
            lora_dropout=self.params.lora_dropout,
            target_modules="all-linear",
            target_parameters=[name for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3] or None,
        )
        with warnings.catch_warnings():
            # peft 0.21 still asks for `is_gradient_checkpointing`, which transformers 5.23 has renamed.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            return get_peft_model(model, config)

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return "full", {}
