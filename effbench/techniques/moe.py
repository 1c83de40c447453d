"""Mixture of experts: in place of a feed-forward layer, E of them, of which a router gives each token the k best.

Paper: Outrageously Large Neural Networks (arXiv 1701.06538), section 2; balance loss from Switch Transformers (2101.03961),
equations 4 to 6; z-loss from ST-MoE (2202.08906), equation 5; granularity and shared experts from DeepSeekMoE (2401.06066).
Changes: the feed-forward layers, all or every n-th: y = Σ_k weight · expert(x) + shared(x), each expert F / granularity wide.
Should improve: quality at equal FLOPs per token, since more weights stand behind the same arithmetic.
Costs: memory of all E experts; bytes of a decode step, which grow with the batch until every expert is read; two loss terms.
Deviations: no token is ever dropped (no capacity factor); the defaults keep the active weights of the dense layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from effbench import families, surgery
from effbench.costs import FeedForwardCost
from effbench.schema import Spec
from effbench.technique import YES, Context, Paper, Params, Support, Technique, no

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from effbench.layout import Layout


class MoEParams(Params):
    """Parameters of `moe`; the width of an expert is that of the dense layer over `granularity`."""

    experts: int = Field(default=8, ge=1, le=4096, description="E, routed experts of a layer")
    top_k: int = Field(default=2, ge=1, description="k, routed experts that a token uses")
    shared: int = Field(default=0, ge=0, le=64, description="further experts that every token uses")
    granularity: int | None = Field(
        default=None, ge=1, description="dense width over an expert's; default k + shared: equal active weights; 1: full width"
    )
    every: int = Field(default=1, ge=1, description="replace every n-th layer; a divisor of the number of layers")
    score: Literal["softmax", "sigmoid"] = Field(default="softmax", description="of a token's router logits")
    renorm: bool = Field(default=True, description="divide a token's k weights by their sum")
    balance: float = Field(default=0.01, ge=0, le=10, description="coefficient of the load-balance loss, per layer")
    z: float = Field(default=0.001, ge=0, le=10, description="coefficient of the router's z-loss, per layer")
    upcycle: bool = Field(default=False, description="start from the dense layers' own weights and from the same function")


class MoE(Technique):
    """Top-k of E experts, with shared experts beside them or not."""

    name = "moe"
    axis = "ffn"
    summary = "mixture of experts: a router gives each token k of E feed-forward layers"
    paper = Paper(
        title="Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
        arxiv="1701.06538",
        where="section 2",
        year=2017,
    )
    Params = MoEParams
    stacked_weights: ClassVar[bool] = True

    def __init__(self, params: BaseModel | None = None):
        super().__init__(params)
        self.converts_weights = self.params.upcycle
        self.new_weights = "" if self.params.upcycle else "feed-forward"

    @property
    def granularity(self) -> int:
        """Dense width over the width of an expert."""
        return int(self.params.granularity or self.params.top_k + self.params.shared)

    def supports(self, context: Context) -> Support:
        answer = surgery.supports_feed_forward(context)
        if not answer.ok:
            return answer
        params, wide = self.params, int(context.config["intermediate_size"])
        layers = int(context.config["num_hidden_layers"])
        if params.top_k > params.experts:
            return no(
                f"top_k is {params.top_k} and there are {params.experts} experts; choose top_k from 1 to {params.experts}"
            )
        if wide % self.granularity:
            fits = ", ".join(str(g) for g in range(1, 65) if wide % g == 0)
            return no(f"a feed-forward width of {wide} is not {self.granularity} equal parts; choose granularity from {fits}")
        if layers % params.every:
            return no(f"every {params.every} does not divide the {layers} layers; choose a divisor")
        return self._supports_upcycling(context) if params.upcycle else YES

    def _supports_upcycling(self, context: Context) -> Support:
        """Only starts that compute the dense layer's function."""
        params, parts = self.params, self.granularity
        if context.weights == "random":
            return no(
                "upcycle starts from trained layers and these weights are random; use trained, path or hub, or leave it out"
            )
        if not params.renorm:
            return no("upcycle is exact only where a token's weights sum to 1; leave renorm true")
        if params.shared:
            return no(f"with {params.shared} shared experts the sum is not the dense layer's; upcycle with shared: 0")
        if params.experts % parts or params.top_k % parts:
            return no(
                f"a copy of the dense layer is {parts} experts (granularity), so {params.experts} experts and top_k {params.top_k} "
                f"are not whole copies and the start would not be exact; choose multiples of {parts}, or granularity 1"
            )
        return YES

    def configure(self, config: PretrainedConfig) -> None:
        params = self.params
        config.num_experts, config.num_experts_per_tok = params.experts, params.top_k
        config.moe_intermediate_size = config.intermediate_size // self.granularity
        config.n_shared_experts, config.decoder_sparse_step = params.shared, params.every
        config.scoring_func, config.norm_topk_prob = params.score, params.renorm

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        from effbench.modules.moe import MoEFeedForward, replace_feed_forward

        params, config = self.params, model.config.to_dict()
        act, cost = surgery.GATED_ACTIVATIONS[config["hidden_act"]], FeedForwardCost.of(config)

        def make() -> MoEFeedForward:
            return MoEFeedForward(
                cost, act, score=params.score, renorm=params.renorm, balance=params.balance, z=params.z,
                kernels=config.get("expert_kernels", "effbench"),
            )  # fmt: skip

        replace_feed_forward(model, make, every=params.every, upcycle=params.upcycle)
        return model

    def layout(self, layout: Layout) -> None:
        layers, every = int(layout.config["num_hidden_layers"]), self.params.every
        new = layers // every
        if new == layers:
            layout.remove(lambda w: w.kind == "feed_forward")
        for weight in [w for w in layout.weights if w.kind == "feed_forward"]:
            layout.change(lambda w, own=weight: w is own, count=layers - new)  # type: ignore[misc]
        layout.weights += families.mixture(FeedForwardCost.of(layout.config), new)

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        """Dense at equal active weights, the mean over the layers; an upcycled model has the one that it starts from."""
        params = self.params
        active = (params.top_k + params.shared) / self.granularity
        width = 1 + (active - 1) / params.every
        return "dense", {} if params.upcycle or width == 1 else {"width": width}
