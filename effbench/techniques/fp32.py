"""Single precision: weights, activations and cache in 32-bit floating point (8 exponent bits, 23 of fraction).

Paper: IEEE 754 binary32; no paper. On CUDA matrix products stay in full fp32: TF32 is not switched on.
Changes: `dtype` = float32.
Should improve: nothing; it is the reference of its axis and the numbers every other precision is compared with.
Costs: four bytes per element everywhere and no use of half-precision matrix units.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from effbench.technique import YES, Context, Paper, Support, Technique

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class FP32(Technique):
    """32-bit floating point."""

    name = "fp32"
    axis = "precision"
    summary = "single precision: 32-bit weights, activations and cache"
    nominal_bits = 32.0
    paper = Paper(title="IEEE Standard for Floating-Point Arithmetic (IEEE 754)", where="binary32", year=2008)

    def supports(self, context: Context) -> Support:
        return YES

    def configure(self, config: PretrainedConfig) -> None:
        config.dtype = "float32"

    @property
    def is_reference(self) -> bool:
        return True
