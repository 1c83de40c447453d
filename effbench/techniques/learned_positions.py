"""Learned absolute positions: a trained row per position is added to the token's embedding.

Paper: Convolutional Sequence to Sequence Learning (arXiv 1705.03122), section 3.1; compared with sinusoids in arXiv 1706.03762.
Changes: a table (positions × E) is added to the hidden states before the first layer; queries and keys are not rotated.
Should improve: nothing over rotation but its simplicity; EfficientLLM measures it beside RoPE.
Costs: the table's weights, and no position beyond its end. Time is saved hardly at all: the library's rotation by the angle
zero stays in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from effbench.layout import Layout, Weight
from effbench.modules.attention_forms import learned_rows
from effbench.modules.position_support import remove_rotation, supports_other_positions
from effbench.schema import Spec
from effbench.surgery import context_tokens
from effbench.technique import Context, Paper, Params, Support, Technique, no

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from effbench.flow import Flow


class LearnedPositionsParams(Params):
    """Parameters of `learned_positions`."""

    max_positions: int | None = Field(
        default=None, ge=1, le=1 << 20, description="rows of the table; null: the model's max_position_embeddings"
    )


class LearnedPositions(Technique):
    """A learned row per absolute position."""

    name = "learned_positions"
    axis = "position"
    summary = "learned absolute positions, added to the embeddings, instead of rotation"
    paper = Paper(title="Convolutional Sequence to Sequence Learning", arxiv="1705.03122", where="section 3.1", year=2017)
    Params = LearnedPositionsParams

    def supports(self, context: Context) -> Support:
        answer = supports_other_positions(context, self.name)
        rows = self.params.max_positions or int(context.config.get("max_position_embeddings") or 0)
        tokens = context_tokens(context.params)
        if answer.ok and tokens > rows:
            return no(
                f"a sequence of {tokens} tokens has no row in a table of {rows} positions; "
                f"set max_positions to {tokens} or more, or shorten the sequence"
            )
        return answer

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        from effbench.modules.positions import add_learned_positions

        add_learned_positions(model, self.params.max_positions or model.config.max_position_embeddings)
        return model

    def layout(self, layout: Layout) -> None:
        rows, hidden = self.params.max_positions or layout.config["max_position_embeddings"], layout.config["hidden_size"]
        remove_rotation(layout)
        layout.weights.append(Weight(path="model.positions.weight", kind="embedding", shape=(int(rows), int(hidden))))

    def flow(self, flow: Flow) -> None:
        flow.added = learned_rows

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return "rope", {}
