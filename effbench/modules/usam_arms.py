"""What the projectors of U-SAM have in common: what they cost, and the base of their declarations. Torch-free.

Kinds as `modules/tapm.py` names them. Shapes: T audio tokens, P prompt tokens, D width of the Q-Former, O of the language model,
E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from effbench.layout import Kind, Weight
from effbench.schema import Spec
from effbench.technique import YES, Context, Paper, Support, Technique, no

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ProjectorKind = Literal["soft", "top", "single", "aliased"]
PAPER = Paper(
    title="U-SAM: An audio language Model for Unified Speech, Audio, and Music Understanding", arxiv="2505.13880", year=2025
)


@dataclass(frozen=True, kw_only=True)
class ProjectorForm:
    """One arm. A multiply-add is 2 FLOPs; of FLOPs matrix products count alone."""

    kind: ProjectorKind
    experts: int = 1
    top_k: int = 1
    contrastive: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ProjectorForm:
        """Of a language model's configuration after an arm's `configure`."""
        return cls(**config["projector"])

    @property
    def stored(self) -> int:
        """Experts that have weights of their own."""
        return self.experts if self.kind in ("soft", "top") else 1

    @property
    def run(self) -> int:
        """Experts that are computed for a token."""
        return self.top_k if self.kind == "top" else self.experts

    @property
    def routed(self) -> bool:
        return self.kind != "single"

    def flops(self, tokens: int, prompts: int, width: int, out: int) -> int:
        """Forward, for so many audio and prompt tokens: prompts down, router, experts."""
        routed = 2 * prompts * out * width + 2 * tokens * 2 * width * self.experts if self.routed else 0
        return routed + 2 * tokens * width * out * self.run

    def weights(self, width: int, out: int) -> list[Weight]:
        """The tensors of the projector."""
        found = [
            weight("projector.experts.weight", "experts", self.stored, out, width),
            weight("projector.experts.bias", "experts", self.stored, out),
        ]
        if self.routed:
            found += [weight("projector.down.weight", "other", width, out), weight("projector.down.bias", "other", width)]
            found.append(weight("projector.router.weight", "router", self.experts, 2 * width))
        return found

    def idle_weights(self, width: int, out: int) -> int:
        """Weights of the experts that a token does not use."""
        return (self.stored - self.run) * (width + 1) * out if self.kind == "top" else 0


class UsamArm(Technique):
    """An arm of the workload `usam`: a subclass names its kind."""

    axis = "ffn"
    workloads = ("usam",)
    paper = PAPER
    kind: ClassVar[ProjectorKind]

    def supports(self, context: Context) -> Support:
        found = self.params.model_dump()
        if found.get("top_k", 1) > found.get("experts", 1):
            return no(
                f"top_k is {found['top_k']} and there are {found['experts']} experts; choose top_k from 1 to {found['experts']}"
            )
        return YES

    def configure(self, config: PretrainedConfig) -> None:
        config.projector = {"kind": self.kind, **self.params.model_dump()}

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        return None if self.is_reference else ("usam_single", {})

    @property
    def is_reference(self) -> bool:
        return self.kind == "single"


def weight(path: str, kind: Kind, *shape: int, count: int = 1) -> Weight:
    """A tensor that a plan knows of."""
    return Weight(path=path, kind=kind, shape=shape, count=count)
