"""Mamba-2: a selective state space model in place of attention and feed-forward layers.

Paper: Transformers are SSMs (arXiv 2405.21060), sections 6 and 7; the first Mamba is arXiv 2312.00752.
Changes: the whole model is the library's Mamba-2, as wide as the shape and with as many parameters (within 2 %): the number
of layers follows, and on small shapes, where whole layers are too coarse, the state is smaller than asked for.
Should improve: memory and time of long contexts, since the state has one size whatever the length.
Costs: quality where exact recall of the context counts. The first Mamba's scan runs token by token without CUDA kernels;
Mamba-2's chunked form is matrix products everywhere, which is why it stands for the family here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from effbench import registry
from effbench.modules.mixer_costs import (
    TOLERANCE,
    MambaCost,
    mamba_size,
    mamba_weights,
    parameter_ratio,
    plan_cost,
    supports_mixer,
)
from effbench.modules.mixer_forms import use_mamba
from effbench.technique import Context, Cost, Paper, Params, Support, Technique, no

if TYPE_CHECKING:
    from pydantic import BaseModel
    from transformers import PretrainedConfig, PreTrainedModel

    from effbench.flow import Flow
    from effbench.layout import Layout


class MambaParams(Params):
    """Parameters of `mamba`."""

    state_size: int = Field(
        default=128, ge=16, le=1024, description="N; small shapes may get a smaller one, to meet the parameters"
    )
    expand: int = Field(default=2, ge=1, le=8, description="inner width over hidden size")


class Mamba(Technique):
    """A Mamba-2 model at the shape's number of parameters."""

    name = "mamba"
    axis = "mixer"
    summary = "attention-free: Mamba-2 at equal parameters"
    paper = Paper(title="Transformers are SSMs", arxiv="2405.21060", where="sections 6 and 7", year=2024)
    Params = MambaParams

    own_kernels: ClassVar[bool] = True  # there is no attention for an attention kernel to compute

    def __init__(self, params: BaseModel | None = None):
        super().__init__(params)
        self._config: Any = None

    def supports(self, context: Context) -> Support:
        answer = supports_mixer(context, self.name)
        if not answer.ok:
            return answer
        adapter = next(
            (n for n in context.stack if n not in ("full", self.name) and registry.technique(n).axis == "peft"), None
        )
        if adapter:
            return no(
                f"peft refuses Mamba's out_proj, whose weights kernels read directly, so {adapter} cannot cover it; use full"
            )
        ratio = parameter_ratio(context, self._size(context))
        if abs(ratio - 1) > TOLERANCE:
            return no(
                f"no whole number of layers comes within {TOLERANCE:.0%} of the shape's parameters (nearest: {ratio:.3f} of them); "
                "choose a deeper shape, or another expand or state_size"
            )
        return answer

    def configure(self, config: PretrainedConfig) -> None:
        self._config = config  # a precision technique sets its dtype before `load` reads it

    def load(self, context: Context) -> PreTrainedModel:
        from effbench.modules.mixers import build_mamba

        return build_mamba(self._size(context), context, getattr(self._config, "dtype", None) or "float32")

    def layout(self, layout: Layout) -> None:
        layout.weights = list(mamba_weights(self._size(layout), int(layout.config["vocab_size"])))

    def flow(self, flow: Flow) -> None:
        use_mamba(flow, self._size(flow.layout))

    def cost(self, context: Context) -> Cost:
        size = self._size(context)
        return plan_cost(context, size, MambaCost.of(size))

    def _size(self, context: Context | Layout) -> Any:
        return mamba_size(context, state=self.params.state_size, expand=self.params.expand)
