"""INT4: weights as 4-bit integers with scale and zero point for each group along the input; activations stay as they are.

Paper: The case for 4-bit precision (arXiv 2212.09720), section 2; group-wise round to nearest as torchao's
`Int4WeightOnlyConfig` does it (asymmetric, "tinygemm").
Changes: every linear layer of the decoder's blocks holds torchao's packed weights: on CUDA its `Int4WeightOnlyConfig`, on a CPU
the configuration of its prototypes, whose products read packed weights. Stacked experts go on the kernels' 4-bit experts.
Should improve: bytes of these weights, 4 + 32 / group bits each for 16, and decoding, which the bytes of weights bound.
Costs: for groups of 32 about 8 % of a layer's output is rounding where weights are normally distributed (6 % for uniform
ones); a prompt's products are no faster, or slower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from effbench.layout import Weight
from effbench.modules.quantisation import FormatParams, StoredFormat
from effbench.technique import Context, Paper, Support, no

if TYPE_CHECKING:
    from torch import nn


class INT4Params(FormatParams):
    """Parameters of `int4`."""

    group: Literal[32, 64, 128, 256] = Field(default=32, description="weights along the input that share scale and zero point")


class INT4(StoredFormat):
    """4-bit integers, weight-only, by torchao."""

    name = "int4"
    summary = "4-bit integer weights, scale and zero point for each group (torchao, weight-only)"
    paper = Paper(
        title="The case for 4-bit precision: k-bit Inference Scaling Laws", arxiv="2212.09720", where="section 2", year=2022
    )
    nominal_bits = 4.0
    library = "torchao"
    expert_kind = "int4"
    tile = 16
    Params = INT4Params

    def __init__(self, params: BaseModel | None = None):
        super().__init__(params)
        self.group: int = self.params.group

    def supports(self, context: Context) -> Support:
        if context.trains:
            return no("torchao's packed 4-bit weights have no backward pass here; fine-tune on nf4 instead")
        if context.device == "cuda" and self.params.compute != "bf16":
            return no(f"torchao's 4-bit kernels compute in bf16 on CUDA, not in {self.params.compute}; leave compute out")
        return super().supports(context)

    def pack(self, layer: nn.Linear) -> nn.Module:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        config: Any
        if layer.weight.is_cuda:
            config = Int4WeightOnlyConfig(group_size=self.group, int4_packing_format="tile_packed_to_4d")
        else:
            config = PrototypeInt4WeightOnlyConfig(group_size=self.group, set_inductor_config=False)
        quantize_(layer, config)
        return layer

    def bits(self, weight: Weight, item_bytes: int) -> float:
        """4 bits, and for each group a scale and a zero point in the compute dtype."""
        return 4 + 2 * 8 * item_bytes / self.group
