"""NF4: weights in 4 bits whose 16 levels are quantiles of a normal distribution, with a scale for every 64 of them.

Paper: QLoRA (arXiv 2305.14314), section 3: 4-bit NormalFloat, and Double Quantization of the scales.
Changes: every linear layer of the decoder's blocks is bitsandbytes' `Linear4bit`; the rest stays in the compute dtype.
Should improve: bytes of these weights, 4.5 bits each (4.127 with double quantisation) for 16: the memory of a frozen base in
fine-tuning, and the time of steps that memory bandwidth bounds where the kernels read packed weights.
Costs: weights are expanded at every use; rounding is about 9 % of the output of a layer of normally distributed weights.
"""

from __future__ import annotations

from effbench.modules.quantisation import FourBit
from effbench.technique import Paper


class NF4(FourBit):
    """4-bit NormalFloat by bitsandbytes."""

    name = "nf4"
    summary = "4-bit NormalFloat weights, a scale for every 64 of them (bitsandbytes)"
    paper = Paper(title="QLoRA: Efficient Finetuning of Quantized LLMs", arxiv="2305.14314", where="section 3", year=2023)
