"""FP8: weights and activations of linear layers as 8-bit floating point (4 exponent bits, 3 of fraction), multiplied as such.

Paper: FP8 Formats for Deep Learning (arXiv 2209.05433), sections 3 and 4 (E4M3); torchao's
`Float8DynamicActivationFloat8WeightConfig` with a scale for each row of both sides.
Changes: every linear layer of the decoder's blocks holds fp8 weights and quantises its input at every use.
Should improve: bytes of these weights by two from 16 bits, and products, whose rate doubles on matrix units that know fp8.
Costs: a pass over the activations; about 3 % of a layer's output is rounding. GPUs of compute capability 8.9 and above only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from effbench import hardware
from effbench.layout import Weight
from effbench.modules.quantisation import StoredFormat
from effbench.technique import Context, Paper, Support, no

if TYPE_CHECKING:
    from torch import nn


class FP8(StoredFormat):
    """8-bit floating point by torchao."""

    name = "fp8"
    summary = "8-bit floating-point weights and activations, a scale for each row (torchao, GPU)"
    paper = Paper(title="FP8 Formats for Deep Learning", arxiv="2209.05433", where="sections 3 and 4", year=2022)
    nominal_bits = 8.0
    library = "torchao"
    group = tile = 16  # the fp8 products of torch take widths that are multiples of 16

    def supports(self, context: Context) -> Support:
        if context.device != "cuda":
            return no(
                "fp8 products need a GPU of compute capability 8.9 or above (Ada, Hopper, Blackwell); choose int8 on a CPU"
            )
        gpu = hardware.device(name := hardware.hardware_name("cuda"))
        if gpu is not None and "fp8" not in gpu.flops_per_s:
            return no(f"fp8 products need a GPU of compute capability 8.9 or above, and the {name} is older; choose int8")
        if context.trains:
            return no("fp8 as it is here is for inference; fine-tune on nf4 or int8 instead")
        return super().supports(context)

    def pack(self, layer: nn.Linear) -> nn.Module:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

        quantize_(layer, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
        return layer

    def bits(self, weight: Weight, item_bytes: int) -> float:
        """8 bits, and an fp32 scale for each output."""
        return 8 + 32 / weight.shape[1]
