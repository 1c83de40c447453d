"""FP4: weights in 4 bits as a floating-point number of 1 sign, 2 exponent and 1 fraction bits, with a scale for every 64 of them.

Paper: The case for 4-bit precision: k-bit Inference Scaling Laws (arXiv 2212.09720), section 2 (float data types, block-wise
quantisation); Double Quantization from QLoRA (2305.14314). The library's levels are ±{0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1}.
Changes: every linear layer of the decoder's blocks is bitsandbytes' `Linear4bit`; the rest stays in the compute dtype.
Should improve: bytes of these weights, 4.5 bits each (4.127 with double quantisation) for 16, as nf4 does.
Costs: as nf4, with coarser levels where most weights are: rounding is about 11 to 12 % of a layer's output.
"""

from __future__ import annotations

from effbench.modules.quantisation import FourBit
from effbench.technique import Paper


class FP4(FourBit):
    """4-bit floating point by bitsandbytes."""

    name = "fp4"
    summary = "4-bit floating-point weights, a scale for every 64 of them (bitsandbytes)"
    paper = Paper(
        title="The case for 4-bit precision: k-bit Inference Scaling Laws", arxiv="2212.09720", where="section 2", year=2022
    )
