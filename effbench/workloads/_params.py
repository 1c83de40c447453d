"""Parameters that training workloads share; torch-free, so that a suite is checked without loading anything."""

from __future__ import annotations

from pydantic import Field

from effbench.technique import Params


class TrainingParams(Params):
    """What a training workload can be told; defaults suit the tiny shapes."""

    batch_size: int = Field(default=8, ge=1, le=65536, description="sequences per step")
    seq_len: int = Field(default=128, ge=8, le=1 << 20, description="tokens per sequence")
    quality_steps: int = Field(default=20, ge=0, le=10**6, description="steps from the start to the quality figures; 0: none")
    validation_tokens: int = Field(default=8192, ge=1, le=10**9, description="held-out tokens that quality stands on")
    learning_rate: float = Field(default=1e-3, gt=0, le=10, description="constant learning rate")
    weight_decay: float = Field(default=0.1, ge=0, le=10, description="AdamW weight decay")
    activation_checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")
