"""RWKV-4: a decaying weighted mean of past values in place of attention.

Paper: RWKV: Reinventing RNNs for the Transformer Era (arXiv 2305.13048), section 3.
Changes: the whole model is the library's RWKV-4, as wide and as deep as the shape; the width of its channel mixing makes the
number of parameters equal (within 2 %).
Should improve: memory and time of long contexts, since the state has one size whatever the length.
Costs: quality where exact recall of the context counts. The recurrence is PyTorch here, in chunks of tokens; without a fused
kernel training keeps several numbers per token, channel and position of a chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from effbench.modules.mixer_costs import (
    TOLERANCE,
    RWKVCost,
    parameter_ratio,
    plan_cost,
    rwkv_size,
    rwkv_weights,
    supports_mixer,
)
from effbench.modules.mixer_forms import use_rwkv
from effbench.technique import Context, Cost, Paper, Support, Technique, no

if TYPE_CHECKING:
    from pydantic import BaseModel
    from transformers import PretrainedConfig, PreTrainedModel

    from effbench.flow import Flow
    from effbench.layout import Layout


class RWKV(Technique):
    """An RWKV-4 model at the shape's number of parameters."""

    name = "rwkv"
    axis = "mixer"
    summary = "attention-free: RWKV-4 at equal parameters"
    paper = Paper(title="RWKV: Reinventing RNNs for the Transformer Era", arxiv="2305.13048", where="section 3", year=2023)

    own_kernels: ClassVar[bool] = True  # there is no attention for an attention kernel to compute

    def __init__(self, params: BaseModel | None = None):
        super().__init__(params)
        self._config: Any = None

    def supports(self, context: Context) -> Support:
        answer = supports_mixer(context, self.name)
        if not answer.ok:
            return answer
        layers = int(context.config["num_hidden_layers"])
        if layers < 2:
            return no(f"RWKV's initialisation needs 2 layers or more and the shape has {layers}; choose a deeper shape")
        ratio = parameter_ratio(context, rwkv_size(context))
        if abs(ratio - 1) > TOLERANCE:
            return no(
                f"the layers hold {ratio:.3f} of the shape's parameters however narrow their channel mixing, and "
                f"{TOLERANCE:.0%} off is allowed; choose a shape with a wider feed-forward part"
            )
        return answer

    def configure(self, config: PretrainedConfig) -> None:
        self._config = config  # a precision technique sets its dtype before `load` reads it

    def load(self, context: Context) -> PreTrainedModel:
        from effbench.modules.mixers import build_rwkv

        return build_rwkv(rwkv_size(context), context, getattr(self._config, "dtype", None) or "float32")

    def layout(self, layout: Layout) -> None:
        layout.weights = list(rwkv_weights(rwkv_size(layout), int(layout.config["vocab_size"])))

    def flow(self, flow: Flow) -> None:
        use_rwkv(flow, rwkv_size(flow.layout))

    def cost(self, context: Context) -> Cost:
        size = rwkv_size(context)
        return plan_cost(context, size, RWKVCost.of(size))
