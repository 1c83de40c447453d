"""Sinusoidal absolute positions: sines and cosines of the position are added to the token's embedding.

Paper: Attention Is All You Need (arXiv 1706.03762), section 3.5.
Changes: sin and cos of p / 10000^(2i/E) are added to the hidden states before the first layer, divided by √E where the paper
multiplies the embeddings by √E (section 3.4), so the scale of the model stays; queries and keys are not rotated.
Should improve: nothing over rotation; it needs no weights and has no last position. EfficientLLM measures it beside RoPE.
Costs: E sines per token; the library's rotation by the angle zero stays in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from effbench.modules.attention_forms import sinusoidal_rows
from effbench.modules.position_support import remove_rotation, supports_other_positions
from effbench.schema import Spec
from effbench.technique import Context, Paper, Support, Technique

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from effbench.flow import Flow
    from effbench.layout import Layout


class Sinusoidal(Technique):
    """Sines and cosines of the absolute position."""

    name = "sinusoidal"
    axis = "position"
    summary = "sinusoidal absolute positions, added to the embeddings, instead of rotation"
    paper = Paper(title="Attention Is All You Need", arxiv="1706.03762", where="section 3.5", year=2017)

    def supports(self, context: Context) -> Support:
        return supports_other_positions(context, self.name)

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        from effbench.modules.positions import add_sinusoidal_positions

        add_sinusoidal_positions(model)
        return model

    def layout(self, layout: Layout) -> None:
        remove_rotation(layout)

    def flow(self, flow: Flow) -> None:
        flow.added = sinusoidal_rows

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return "rope", {}
