"""Generation: prefill a prompt, then decode with a KV cache, greedily, a fixed number of new tokens.

The axis "inference" of EfficientLLM (section 5.5): IT, TTFT, TPOT, KV-cache bytes. One step is one batch of requests;
minimum and maximum of new tokens are equal, and throughput counts the tokens that were really made in the window.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from effbench.technique import Params
from effbench.workload import BuildContext, Session, Workload


class GenerateParams(Params):
    """Parameters of `generate`; defaults suit the tiny shapes."""

    batch_size: int = Field(default=2, ge=1, le=65536, description="requests per step")
    prompt_tokens: int = Field(default=64, ge=1, le=1 << 20, description="tokens of each prompt")
    new_tokens: int = Field(default=32, ge=2, le=1 << 20, description="tokens made for each request, neither more nor less")
    decode_engine: Literal["auto", "eager", "static", "cuda_graph", "compile"] = Field(
        default="auto", description="auto is eager on a CPU and cuda_graph on CUDA"
    )
    validation_tokens: int = Field(default=8192, ge=0, le=10**9, description="held-out tokens that quality stands on; 0: none")


class Generate(Workload):
    """Prefill and greedy decode."""

    name = "generate"
    summary = "prefill, then decode with a KV cache: IT, TTFT, TPOT, cache bytes"
    trains = False
    throughput = "it"
    Params = GenerateParams

    def build(self, context: BuildContext) -> Session:
        from effbench.workloads._generation import GenerateSession

        return GenerateSession(context, self.params)
