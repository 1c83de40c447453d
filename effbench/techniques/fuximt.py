"""FuxiMT: experts in every eighth layer of a frozen Bloom, the only weights that train.

Paper: FuxiMT (arXiv 2505.14256): 8 experts, each a feed-forward layer, at sparse step 8 of BLOOMz-7B, between add & norm and the
feed-forward layer. The full text was not available: k, losses, initialisation and the schedule of the curriculum are not known.
Changes: layers i with (i + 1) mod `every` = 0. Inserted: h += gate · MoE(LN(h)) before the frozen layer, with a gate that starts
at zero, so that step 0 is the frozen model bit for bit. Upcycled (sparse upcycling, arXiv 2212.05055): experts in its place.
Should improve: translation between many languages for few trained weights, at FLOPs that grow with k and not with the experts.
Costs: memory of all experts, 2.15 GB in bf16 for each of three layers of 7b1; 5.7 % more FLOPs a token for k = 1, 11.4 % for 2.
Ours, since the paper's is not known: experts that are copies of the layer with `noise`, softmax routing, the balance loss, the
default of `renorm` (at k = 1 inserted weights stay probabilities, else the router had no gradient), and the data order "curriculum".
`experts_by: loop` is the reference in plain torch, one expert after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from effbench import families, registry
from effbench.costs import FeedForwardCost
from effbench.schema import Spec
from effbench.technique import YES, Context, Paper, Params, Support, Technique, no

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from effbench.layout import Layout

MLP = f"{families.BLOOM_LAYER}.mlp."


class FuxiMTParams(Params):
    """Parameters of `fuximt`."""

    experts: int = Field(default=8, ge=1, le=1024, description="E, experts of a layer")
    top_k: Literal[1, 2] = Field(default=2, description="k, experts that a token uses")
    every: int = Field(default=8, ge=1, description="sparse step: layers i with (i + 1) mod every = 0 have experts")
    form: Literal["inserted", "upcycled"] = Field(
        default="inserted", description="experts before the frozen feed-forward layer, or in its place"
    )
    order: Literal["curriculum", "shuffled"] = Field(
        default="curriculum",
        description="of the training data: from few languages and short pairs to all, or mixed from the start",
    )
    gate: Literal["scalar", "vector"] = Field(
        default="scalar", description="of the inserted form: one number a layer, or one a channel"
    )
    renorm: bool | None = Field(
        default=None,
        description="divide a token's k weights by their sum; default: yes, but not where k is 1 and the form inserted",
    )
    balance: float = Field(default=0.01, ge=0, le=10, description="coefficient of the load-balance loss, per layer")
    noise: float = Field(default=0.01, ge=0, le=1, description="of the experts' matrices, RMS over that of the layer they copy")
    experts_by: Literal["kernels", "loop"] = Field(
        default="kernels", description="this project's kernels, or plain torch in a loop"
    )

    @model_validator(mode="after")
    def _gated(self) -> FuxiMTParams:
        if self.form == "upcycled" and self.gate != "scalar":
            raise ValueError("an upcycled layer has no gate; leave gate out, or choose form inserted")
        return self

    @property
    def renormalised(self) -> bool:
        """Whether a token's weights sum to 1."""
        return self.renorm if self.renorm is not None else self.top_k > 1 or self.form == "upcycled"


class FuxiMT(Technique):
    """Experts in every n-th layer of a frozen Bloom."""

    name = "fuximt"
    axis = "ffn"
    summary = "experts in every n-th layer of a frozen Bloom; they alone train"
    paper = Paper(title="FuxiMT: Sparsifying Large Language Models for Chinese-Centric Multilingual Machine Translation",
                  arxiv="2505.14256", where="model architecture", year=2025)  # fmt: skip
    Params = FuxiMTParams
    workloads = ("fuximt",)
    small_params: ClassVar[Mapping[str, Any]] = {"every": 2, "experts": 4}
    stacked_weights: ClassVar[bool] = True
    converts_weights = True

    def supports(self, context: Context) -> Support:
        params, config = self.params, context.config
        if context.model_type != "bloom":
            return no(
                f"its experts go into layers of Bloom's form, and {context.model_type} has another; choose bloomz-560m or tiny-bloom"
            )
        if config.get("apply_residual_connection_post_layernorm"):
            return no(
                "this Bloom adds the normed values and not h, where there is no place for h += MoE(LN(h)); choose a BLOOMZ"
            )
        if params.top_k > params.experts:
            return no(
                f"top_k is {params.top_k} and there are {params.experts} experts; choose top_k from 1 to {params.experts}"
            )
        layers = int(config["num_hidden_layers"])
        if params.every > layers:
            return no(f"every {params.every} leaves none of the {layers} layers with experts; choose every from 1 to {layers}")
        for name in context.stack:
            other = registry.technique(name)
            if other.axis == "peft":
                return no(f"the experts alone train, and {name} says what else would; leave one of the two out")
            if other.quantised:
                return no(
                    f"packed experts have no biases, which these have, so {name} cannot hold them; choose fp32, bf16 or fp16"
                )
        return YES

    def configure(self, config: PretrainedConfig) -> None:
        params = self.params
        config.num_experts, config.num_experts_per_tok, config.decoder_sparse_step = params.experts, params.top_k, params.every
        config.moe_intermediate_size = 4 * config.hidden_size
        if params.experts_by == "loop":
            config.expert_kernels = "eager"
        config.n_shared_experts = int(params.form == "inserted")  # the frozen layer, which every token uses beside its experts

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        from effbench.modules.inserted_experts import Choices, put_experts

        p = self.params
        choices = Choices(form=p.form, experts=p.experts, top_k=p.top_k, renorm=p.renormalised, gate=p.gate, balance=p.balance,
                          noise=p.noise, by=p.experts_by)  # fmt: skip
        put_experts(model, choices, every=p.every)
        return model

    def trainable(self, model: PreTrainedModel) -> None:
        from effbench.modules.inserted_experts import train_experts_only

        train_experts_only(model)

    def layout(self, layout: Layout) -> None:
        params, config = self.params, layout.config
        layers = int(config["num_hidden_layers"])
        sparse, inserted = layers // params.every, params.form == "inserted"
        kept = []
        for weight in layout.weights:
            weight = replace(weight, trained=False)
            if not weight.path.startswith(MLP):
                kept.append(weight)
                continue
            if layers > sparse:
                kept.append(replace(weight, count=layers - sparse))
            if inserted:
                kept.append(replace(weight, path=weight.path.replace(MLP, f"{MLP}dense."), count=sparse))
        gate = 0 if not inserted else 1 if params.gate == "scalar" else int(config["hidden_size"])
        layout.weights = [*kept, *families.inserted_mixture(FeedForwardCost.of(config), sparse, gate=gate)]

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return "dense", {}
