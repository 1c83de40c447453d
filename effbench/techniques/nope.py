"""No positions at all: the causal mask alone tells the order.

Paper: The Impact of Positional Encoding on Length Generalization in Transformers (arXiv 2305.19466), section 3.
Changes: queries and keys are not rotated and nothing is added.
Should improve: generalisation to longer sequences than trained on, says the paper; EfficientLLM measures it beside RoPE.
Costs: quality at small depth, where order must be inferred; the library's rotation by the angle zero stays in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from effbench.modules.position_support import remove_rotation, supports_other_positions
from effbench.schema import Spec
from effbench.technique import Context, Paper, Support, Technique

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from effbench.layout import Layout


class NoPE(Technique):
    """No positional encoding."""

    name = "nope"
    axis = "position"
    summary = "no positional encoding: the causal mask alone tells the order"
    paper = Paper(
        title="The Impact of Positional Encoding on Length Generalization in Transformers",
        arxiv="2305.19466",
        where="section 3",
        year=2023,
    )

    def supports(self, context: Context) -> Support:
        return supports_other_positions(context, self.name)

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        from effbench.modules.positions import remove_rotation

        remove_rotation(model)
        return model

    def layout(self, layout: Layout) -> None:
        remove_rotation(layout)

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return "rope", {}
