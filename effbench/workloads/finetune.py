"""Fine-tuning: adapt a model to a part of the text that its base weights have never seen.

The axis "training and tuning" of EfficientLLM (section 5.4): ST, memory, energy, and held-out loss at equal steps and batch.
"""

from __future__ import annotations

from pydantic import Field

from effbench.flow import Flow
from effbench.workload import BuildContext, Session, Workload
from effbench.workloads._params import TrainingParams


class FinetuneParams(TrainingParams):
    """Parameters of `finetune`."""

    learning_rate: float = Field(default=5e-4, gt=0, le=10, description="constant learning rate")
    weight_decay: float = Field(default=0.0, ge=0, le=10, description="AdamW weight decay")


class Finetune(Workload):
    """Adapt weights to the held-out module family of the text."""

    name = "finetune"
    summary = "adapt weights to text their base has not seen: ST, and training and held-out loss at equal steps"
    trains = True
    throughput = "st"
    Params = FinetuneParams

    def rehearse(self, flow: Flow) -> None:
        flow.train(self.params.batch_size, self.params.seq_len, checkpointing=self.params.activation_checkpointing)

    def build(self, context: BuildContext) -> Session:
        from effbench.workloads._training import TrainingSession

        return TrainingSession(context, self.params, domain="adapt")
