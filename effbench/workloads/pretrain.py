"""Pretraining on real text, from new weights: one step is one batch forward, backward and an AdamW update.

The axis "architecture pretraining" of EfficientLLM (section 5.3): TT, memory, energy, and quality at equal tokens.
"""

from __future__ import annotations

from effbench.flow import Flow
from effbench.workload import BuildContext, Session, Workload
from effbench.workloads._params import TrainingParams


class Pretrain(Workload):
    """Train from new weights on the base part of the text."""

    name = "pretrain"
    summary = "train from new weights on real text: TT, and loss, bits per byte and accuracy at equal tokens"
    trains = True
    throughput = "tt"
    Params = TrainingParams

    def rehearse(self, flow: Flow) -> None:
        flow.train(self.params.batch_size, self.params.seq_len, checkpointing=self.params.activation_checkpointing)

    def build(self, context: BuildContext) -> Session:
        from effbench.workloads._training import TrainingSession

        return TrainingSession(context, self.params, domain="base")
