"""bfloat16: 16-bit floating point with the range of fp32 (8 exponent bits, 7 of fraction).

Paper: A Study of BFLOAT16 for Deep Learning Training (arXiv 1905.12322), section 3.
Changes: `dtype` = bfloat16. In training, trained weights stay in fp32 and matrix products run under autocast; frozen ones are bf16.
Should improve: bytes of weights, activations and cache by two; speed where the device has bf16 matrix units.
Costs: three decimal digits; no loss scaling is needed. Slower than fp32 on CPUs without AVX512-BF16 or AMX.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from effbench.schema import Spec
from effbench.technique import YES, Context, Paper, Support, Technique

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class BF16(Technique):
    """16-bit floating point with 8 exponent bits."""

    name = "bf16"
    axis = "precision"
    summary = "bfloat16: half the bytes of fp32 at the same range"
    nominal_bits = 16.0
    paper = Paper(title="A Study of BFLOAT16 for Deep Learning Training", arxiv="1905.12322", where="section 3", year=2019)

    def supports(self, context: Context) -> Support:
        return YES

    def configure(self, config: PretrainedConfig) -> None:
        config.dtype = "bfloat16"

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return "fp32", {}
