"""The dense feed-forward layer: every token uses all of its weights.

Paper: GLU Variants Improve Transformer (arXiv 2002.05202), section 2: SwiGLU, the form of the model's own layers.
Changes: nothing at width 1, the reference of its axis; else `intermediate_size`, in all layers.
Should improve: with a larger width quality, with a smaller one time and memory. It names the dense model that a mixture of
experts is held against, at equal active or at equal total weights.
Costs: 6 D F FLOPs per token and layer (D hidden size, F width), in proportion to the width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from effbench import surgery
from effbench.costs import num_experts
from effbench.schema import Spec
from effbench.technique import YES, Context, Paper, Params, Support, Technique, no

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class DenseParams(Params):
    """Parameters of `dense`."""

    width: float = Field(default=1.0, gt=0, le=4096, description="width of the layers over that of the model's own")


class Dense(Technique):
    """The model's own feed-forward layers, or wider or narrower ones."""

    name = "dense"
    axis = "ffn"
    summary = "dense feed-forward layers: every token uses all weights"
    paper = Paper(title="GLU Variants Improve Transformer", arxiv="2002.05202", where="section 2", year=2020)
    Params = DenseParams

    def supports(self, context: Context) -> Support:
        if experts := num_experts(context.config):
            return no(f"the model is a mixture of {experts} experts; leave dense out, or choose a dense model")
        if self.is_reference:
            return YES
        answer = surgery.supports_feed_forward(context)
        if not answer.ok:
            return answer
        if context.weights in ("path", "hub"):
            return no(
                f"loaded feed-forward layers cannot be made {self.params.width:g} times as wide; use random or trained weights"
            )
        if self._width(int(context.config["intermediate_size"])) < 1:
            return no(
                f"width {self.params.width:g} leaves nothing of {context.config['intermediate_size']}; choose a larger one"
            )
        return YES

    def configure(self, config: PretrainedConfig) -> None:
        if not self.is_reference:
            config.intermediate_size = self._width(config.intermediate_size)

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return None if self.is_reference else ("dense", {})

    @property
    def is_reference(self) -> bool:
        return bool(self.params.width == 1)

    def _width(self, own: int) -> int:
        width: float = self.params.width
        return round(own * width)
