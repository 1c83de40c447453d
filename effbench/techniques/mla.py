"""Multi-head latent attention: keys and values of all heads are made from one small cached vector per token.

Paper: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
Changes: every attention module; queries and keys/values pass through low-rank latents with RMSNorm on both, positions go
through a decoupled RoPE part whose key all heads share. The defaults are the paper's proportions of the head dimension.
Should improve: cache size and decode traffic ((d_c + d_R) elements per token and layer), at the capacity of MHA.
Costs: FLOPs (decode scores on latents cost 2 s H (2 d_c + d_R)), more and smaller matrix products; new attention weights.
Deviations: no bias where the model's own projections had one; no YaRN factor on the scale.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from effbench import families, surgery
from effbench.costs import MLACost, head_dim, query_heads
from effbench.forms import latent_attention
from effbench.schema import Spec
from effbench.technique import Context, Cost, Paper, Params, Support, Technique, no

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from effbench.flow import Flow
    from effbench.layout import Layout


class MLAParams(Params):
    """Parameters of `mla`; those left out take the paper's proportions."""

    kv_rank: int | None = Field(default=None, ge=1, description="d_c, cached latent width; default 4 head dimensions")
    rope_dim: int | None = Field(default=None, ge=2, description="d_R, even; default half a head dimension")
    q_rank: int | None = Field(default=None, ge=1, description="d_q, query latent width; default 0.3 of the hidden size")


class MLA(Technique):
    """Low-rank joint compression of keys and values."""

    name = "mla"
    axis = "attention"
    summary = "multi-head latent attention: one cached latent per token instead of keys and values"
    paper = Paper(
        title="DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
        arxiv="2405.04434",
        where="section 2.1",
        year=2024,
    )
    Params = MLAParams
    new_weights = "attention"

    def supports(self, context: Context) -> Support:
        answer = surgery.supports_replaced_attention(context)
        if not answer.ok:
            return answer
        found = self._cost(context.config)
        if found.rope_dim % 2:
            return no(f"rope_dim is {found.rope_dim} and RoPE turns pairs; choose an even number")
        if found.kv_rank + found.rope_dim >= 2 * found.heads * found.dim:
            return no(
                f"kv_rank {found.kv_rank} and rope_dim {found.rope_dim} cache no less than multi-head attention, which keeps "
                f"{2 * found.heads * found.dim} elements per token; choose a smaller kv_rank"
            )
        return answer

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        from effbench.modules.mla import MLAAttention
        from effbench.modules.replace import replace_attention

        cost = self._cost(model.config.to_dict())
        replace_attention(model, lambda config, layer: MLAAttention(config, layer, cost))
        narrow = copy.copy(model.config)
        narrow.head_dim = cost.rope_dim  # the width that RoPE turns
        rotary = model.base_model.rotary_emb
        model.base_model.rotary_emb = type(rotary)(config=narrow).to(rotary.inv_freq.device)
        return model

    def layout(self, layout: Layout) -> None:
        cost, layers = self._cost(layout.config), int(layout.config["num_hidden_layers"])
        layout.remove(lambda w: w.kind == "attention" or "rotary_emb" in w.path)
        layout.weights += [
            *families.latent_attention(cost, layers, "q_a_norm", "kv_a_norm"),
            families.rotary_table(cost.rope_dim),
        ]

    def flow(self, flow: Flow) -> None:
        cost = self._cost(flow.layout.config)
        flow.mixer, flow.turned = latent_attention(cost), cost.rope_dim

    def cost(self, context: Context) -> Cost:
        return surgery.attention_cost(context, self._cost(context.config))

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return "mha", {}

    def _cost(self, config: Mapping[str, Any]) -> MLACost:
        dim, hidden = head_dim(config), int(config["hidden_size"])
        return MLACost(
            hidden=hidden,
            heads=query_heads(config),
            dim=dim,
            value_dim=dim,
            q_rank=self.params.q_rank or max(1, round(0.3 * hidden)),
            kv_rank=self.params.kv_rank or 4 * dim,
            rope_dim=self.params.rope_dim or max(2, dim // 2),
        )
