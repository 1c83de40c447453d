"""What the projectors of Llama-SMoP have in common: their sizes and costs, and the base of their declarations. Torch-free.

A projector maps pooled features of two encoders, audio and video, to embeddings of a language model:

    dense   one MLP for each of the two                                            (Llama-AVSR)
    jejr    joint experts, joint router: both go through one mixture               (the released form)
    jedr    joint experts, disjoint routers: one bank, a router for each
    dedr    disjoint experts, disjoint routers: a mixture for each
    loop    jejr, computed by the released loop over all experts

Shapes: D width of the features, H hidden width, O width of the language model, E experts of a router, K experts of a token.
Source: Llama-SMoP (arXiv 2505.14336) and its released code; the joint and disjoint forms but dedr are read by analogy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from effbench.costs import touched_share
from effbench.schema import Spec
from effbench.technique import YES, Context, Paper, Params, Support, Technique, no

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Kind = Literal["dense", "jejr", "jedr", "dedr", "loop"]
STREAMS = 2  # audio and video
PAPER = Paper(
    title="Scaling and Enhancing LLM-based AVSR: A Sparse Mixture of Projectors Approach", arxiv="2505.14336", year=2025
)


class DenseProjectorParams(Params):
    """The dense projector has no parameters of its own; its widths are the workload's."""


class MixtureParams(Params):
    """Parameters of a mixture of projectors; the defaults are those of the released command."""

    experts: int = Field(default=4, ge=1, le=32, description="E, experts that a router chooses from")
    top_k: Literal[1, 2, 4] = Field(default=2, description="k, experts that a token uses")
    balance: float = Field(default=0.01, ge=0, le=10, description="coefficient of the load-balance loss (mode train)")
    z: float = Field(default=0.001, ge=0, le=10, description="coefficient of the router's z-loss (mode train)")


@dataclass(frozen=True, kw_only=True)
class ProjectorForm:
    """One projector: what it is made of and what it costs. A multiply-add is 2 FLOPs; of FLOPs matrix products count alone."""

    kind: Kind
    inputs: int  # D
    hidden: int  # H
    outputs: int  # O
    experts: int = 1
    top_k: int = 1
    balance: float = 0.0
    z: float = 0.0

    @classmethod
    def of(cls, config: Mapping[str, Any], inputs: int, hidden: int) -> ProjectorForm:
        """Of a language model's configuration after an arm's `configure`, for features of width `inputs`."""
        return cls(inputs=inputs, hidden=hidden, outputs=int(config["hidden_size"]), **config["projector"])

    @property
    def routers(self) -> int:
        """Routers, each over E experts."""
        return {"dense": 0, "jedr": STREAMS, "dedr": STREAMS}.get(self.kind, 1)

    @property
    def banked(self) -> int:
        """Experts in all, or MLPs of the dense projector."""
        return {"dense": STREAMS, "dedr": STREAMS * self.experts}.get(self.kind, self.experts)

    @property
    def expert_weights(self) -> int:
        """Weights of one expert: two matrices with biases, and gain and shift of its LayerNorm."""
        return (self.inputs + 1) * self.hidden + (self.hidden + 1) * self.outputs + 2 * self.outputs

    def weights(self) -> int:
        """All of them."""
        return self.banked * self.expert_weights + self.routers * self.inputs * self.experts

    def active_weights(self) -> int:
        """Those that one token uses: its router, and k experts."""
        router = self.inputs * self.experts if self.routers else 0
        return self.top_k * self.expert_weights + router

    def read_weights(self, tokens: Sequence[int]) -> float:
        """Those that a step over so many tokens of each stream is expected to read: of the experts those that a token goes to."""
        routed = tokens if self.kind == "dedr" else [sum(tokens)]
        touched = sum(touched_share(self.experts, self.top_k, n) for n in routed) * self.experts
        experts = self.banked if self.kind == "dense" else touched
        return experts * self.expert_weights + self.routers * self.inputs * self.experts

    def flops_per_token(self) -> int:
        """Forward FLOPs of one token."""
        router = self.inputs * self.experts if self.routers else 0
        return 2 * (self.top_k * (self.inputs * self.hidden + self.hidden * self.outputs) + router)


class ProjectorArm(Technique):
    """An arm of the workload `smop`: a subclass names its kind."""

    axis = "ffn"
    workloads = ("smop",)
    paper = PAPER
    kind: ClassVar[Kind]

    def supports(self, context: Context) -> Support:
        found = self.params.model_dump()
        if found.get("top_k", 1) > found.get("experts", 1):
            fits = ", ".join(str(k) for k in (1, 2, 4) if k <= found["experts"])
            return no(f"top_k is {found['top_k']} and there are {found['experts']} experts; choose top_k from {fits}")
        return YES

    def configure(self, config: PretrainedConfig) -> None:
        config.projector = {"kind": self.kind, **self.params.model_dump()}

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return None if self.is_reference else ("smop_dense", {})

    @property
    def is_reference(self) -> bool:
        return self.kind == "dense"
