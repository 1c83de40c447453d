"""What computes the experts of a mixture: this project's kernels, or one of transformers' implementations.

Paper: none for the implementations; MegaBlocks (arXiv 2211.15841), section 5, for experts as grouped matrix products.
Changes: the code that runs the experts. Weights, router and routing stay, and so does the result, to rounding.
Should improve: time, by how products of different sizes are grouped; `batched_mm` suits a few tokens, `grouped_mm` many.
Costs: `batched_mm` copies the weights of every pair of token and expert; `eager` is a loop over experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from effbench import surgery
from effbench.costs import num_experts
from effbench.schema import Spec
from effbench.technique import YES, Context, Paper, Params, Support, Technique, no

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class ExpertKernelsParams(Params):
    """Parameters of `expert_kernels`."""

    implementation: Literal["grouped_mm", "eager", "batched_mm", "effbench"] = Field(
        default="grouped_mm", description="transformers' default, its loop, its batched product, or this project's kernels"
    )


class ExpertKernels(Technique):
    """Which code runs the experts."""

    name = "expert_kernels"
    axis = "kernel"
    summary = "experts by transformers' implementations or by this project's kernels"
    paper = Paper(
        title="MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", arxiv="2211.15841", where="section 5", year=2022
    )
    Params = ExpertKernelsParams

    def supports(self, context: Context) -> Support:
        if surgery.stacked_weights(context) or num_experts(context.config):
            return YES
        return no(
            f"there are no experts whose kernels can be chosen in a {context.model_type} model; add the technique moe, or choose "
            "a model with experts"
        )

    def configure(self, config: PretrainedConfig) -> None:
        config.expert_kernels = self.params.implementation

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        from effbench_kernels import transformers as library  # registers the name "effbench" with the library

        if library.has_experts(model):
            model.set_experts_implementation(self.params.implementation)
        return model

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return None if self.is_reference else ("expert_kernels", {})

    @property
    def is_reference(self) -> bool:
        return bool(self.params.implementation == "grouped_mm")
