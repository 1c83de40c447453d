"""INT8: weights in 8 bits, a scale for each output; by default LLM.int8(), which multiplies in 8 bits as well.

Paper: LLM.int8() (arXiv 2208.07339), section 3: vector-wise quantisation, and activations above a threshold kept in 16 bits.
Changes: every linear layer of the decoder's blocks is bitsandbytes' `Linear8bitLt`, or with `library: torchao` a weight-only
form whose products are in the compute dtype. Stacked experts go on the kernels' 8-bit experts (weight-only).
Should improve: bytes of these weights by two from 16 bits.
Costs: activations are quantised at every use (bitsandbytes casts them to fp16 first); about 1 % of a layer's output is rounding.
Deviation: on adapters, bitsandbytes drops what it needs to read its weights back after one step of training.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field

from effbench.layout import Weight
from effbench.modules.quantisation import FormatParams, StoredFormat
from effbench.tape import Tape, Value
from effbench.technique import Paper

if TYPE_CHECKING:
    from torch import nn

    from effbench.flow import Flow


class INT8Params(FormatParams):
    """Parameters of `int8`."""

    library: Literal["bitsandbytes", "torchao"] = Field(
        default="bitsandbytes", description="LLM.int8() of bitsandbytes, or torchao's weight-only form"
    )
    threshold: float = Field(
        default=6.0, ge=0, description="activations above it are multiplied in 16 bits; 0: none (bitsandbytes)"
    )


class INT8(StoredFormat):
    """8-bit integers, a scale for each output."""

    name = "int8"
    summary = "8-bit integer weights: LLM.int8() (bitsandbytes), or weight-only (torchao)"
    paper = Paper(
        title="LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
        arxiv="2208.07339",
        where="section 3",
        year=2022,
    )
    nominal_bits = 8.0
    expert_kind = "int8"
    readable = False
    Params = INT8Params

    def __init__(self, params: BaseModel | None = None):
        super().__init__(params)
        self.library: str = self.params.library

    def pack(self, layer: nn.Linear) -> nn.Module:
        if self.params.library == "torchao":
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            quantize_(layer, Int8WeightOnlyConfig())
            return layer
        from effbench.modules.llm_int8 import Linear8bitLt

        # It tells of its fp16 casts at every call.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return Linear8bitLt(layer, self.params.threshold)

    def flow(self, flow: Flow) -> None:
        if self.library == "bitsandbytes":
            flow.tape.packed = llm_int8

    def bits(self, weight: Weight, item_bytes: int) -> float:
        """8 bits, and for each output a scale in fp32; torchao keeps an 8-bit zero point too."""
        return 8 + (32 if self.params.library == "bitsandbytes" else 40) / weight.shape[1]


def llm_int8(tape: Tape, x: Value, size: float, elements: float) -> Value:
    """bitsandbytes' product: inputs in 8 bits, results in 32, which become numbers in two steps on a CPU; in training x is kept.

    On a CPU training expands the weights instead, as every backward pass does.
    """
    cpu, weights = tape.device == "cpu", size * x.item
    integer = x.elements + 4 * elements
    work = tape.hold(weights if tape.grad and cpu else integer + (8 * elements if cpu else 0))
    out = tape.op(elements, x.item, (x,), (x,), extra=weights)
    del work
    return out
