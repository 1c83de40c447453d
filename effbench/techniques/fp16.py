"""Half precision: 16-bit floating point with a small range (5 exponent bits, 10 of fraction).

Paper: Mixed Precision Training (arXiv 1710.03740), sections 3.1 (fp32 copy of trained weights) and 3.2 (loss scaling).
Changes: `dtype` = float16. In training, trained weights stay in fp32, matrix products run under autocast, the loss is scaled.
Should improve: bytes as bf16 does, with eight times finer steps; speed where the device has fp16 matrix units.
Costs: values above 65,504 overflow. Slow on most CPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from effbench.schema import Spec
from effbench.technique import YES, Context, Paper, Support, Technique

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class FP16(Technique):
    """16-bit floating point with 5 exponent bits."""

    name = "fp16"
    axis = "precision"
    summary = "half precision: half the bytes of fp32, finer than bf16, smaller range"
    nominal_bits = 16.0
    paper = Paper(title="Mixed Precision Training", arxiv="1710.03740", where="sections 3.1 and 3.2", year=2017)

    def supports(self, context: Context) -> Support:
        return YES

    def configure(self, config: PretrainedConfig) -> None:
        config.dtype = "float16"

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return "bf16", {}
