"""Relative position bias: a learned number per head and distance is added to the attention scores.

Paper: Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer (T5, arXiv 1910.10683), section 2.1.
Changes: 32 buckets of distances (one each up to 15, logarithmic up to 128, one for the rest), one bias per head and bucket,
shared by all layers; queries and keys are not rotated. T5 does not scale its scores; here they keep the model's 1/√D.
Should improve: what EfficientLLM calls "Relate" had its lowest memory and latency; it does not define it, this is T5's.
Costs: an additive mask of B × H × T × S numbers (B only where rows are padded), made once per forward and read by every layer,
so no flash kernel runs: memory and traffic grow with T × S × H. The library's rotation by the angle zero stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from effbench.costs import query_heads, sliding_window
from effbench.layout import Layout, Weight
from effbench.modules.attention_forms import bias_mask
from effbench.modules.position_support import remove_rotation, supports_other_positions
from effbench.schema import Spec
from effbench.technique import Context, Paper, Params, Support, Technique, no

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from effbench.flow import Flow


KERNELS_WITHOUT_BIAS = ("flash_attention", "flex_attention")


class RelativeBiasParams(Params):
    """Parameters of `relative_bias`, named as T5 names them."""

    num_buckets: int = Field(default=32, ge=2, le=4096, description="buckets of distances; half of them exact")
    max_distance: int = Field(default=128, ge=2, le=1 << 20, description="from here on all distances share the last bucket")


class RelativeBias(Technique):
    """T5's bias by distance."""

    name = "relative_bias"
    axis = "position"
    summary = "T5's learned bias per head and distance on the attention scores, instead of rotation"
    paper = Paper(
        title="Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
        arxiv="1910.10683",
        where="section 2.1",
        year=2019,
    )
    Params = RelativeBiasParams

    def supports(self, context: Context) -> Support:
        buckets, distance = self.params.num_buckets, self.params.max_distance
        if distance <= buckets // 2:
            return no(f"max_distance {distance} leaves {buckets} buckets no logarithmic half; use more than {buckets // 2}")
        kernel = next((name for name in context.stack if name in KERNELS_WITHOUT_BIAS), None)
        if kernel:
            return no(f"{kernel} takes no additive mask, which the bias is; use sdpa or eager_attention")
        if "nsa" in context.stack:
            return no("nsa scores blocks and not single distances, so it has no place for a bias; use mha, gqa or mqa")
        window = sliding_window(context.config)
        if window:
            return no(f"the model's sliding window of {window} is not combined with a bias; use a model without a window")
        return supports_other_positions(context, self.name)

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        from effbench.modules.positions import add_relative_bias

        add_relative_bias(model, self.params.num_buckets, self.params.max_distance)
        return model

    def layout(self, layout: Layout) -> None:
        heads = query_heads(layout.config)
        remove_rotation(layout)
        layout.weights += [
            Weight(path="model.positions.weight", kind="embedding", shape=(self.params.num_buckets, heads)),
            Weight(path="model.positions.buckets", kind="other", shape=(self.params.max_distance + 1,), bits=64, trained=False),
        ]

    def flow(self, flow: Flow) -> None:
        flow.mask = bias_mask

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return "rope", {}
