"""Full fine-tuning: every weight is trained.

Paper: Universal Language Model Fine-tuning for Text Classification (arXiv 1801.06146), section 3.2, at one learning rate for all layers.
Changes: nothing but that every parameter asks for a gradient.
Should improve: quality, given data and memory; it is the reference of its axis.
Costs: a gradient and two AdamW moments for every weight, 12 bytes per parameter beside its fp32 copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from effbench.technique import YES, Context, Paper, Support, Technique, no

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Full(Technique):
    """Train every weight."""

    name = "full"
    axis = "peft"
    summary = "full fine-tuning: every weight is trained"
    paper = Paper(
        title="Universal Language Model Fine-tuning for Text Classification", arxiv="1801.06146", where="section 3.2", year=2018
    )

    def supports(self, context: Context) -> Support:
        if not context.trains:
            return no("full fine-tuning changes training; choose a training workload such as finetune")
        return YES

    def trainable(self, model: PreTrainedModel) -> None:
        model.requires_grad_(True)

    @property
    def is_reference(self) -> bool:
        return True
