"""The technique contract: what changes a model, its numbers or its training.

A technique's file is a torch-free declaration (name, axis, paper, parameters); heavy code is imported inside hooks.
Hooks run in this order, each over the whole stack in axis order, and all but `supports` are optional:

    supports → configure(config) → load(context) or the library's own builder → quantise(block) for each block
    → apply(model) → trainable(model) → optimizer(model, args) → finish(model)

`layout`, `flow`, `cost` and `baseline` are asked without a model. There is one technique per axis in a stack.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from effbench.schema import Spec

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from effbench.flow import Flow
    from effbench.layout import Layout

AXES = ("attention", "position", "mixer", "ffn", "peft", "precision", "parallel", "kernel")


class Params(BaseModel):
    """Base of every parameter model: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a technique comes from. `arxiv` is an id or empty; `where` names section or equation."""

    title: str
    arxiv: str = ""
    where: str = ""
    year: int | None = None


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a technique may know before there is a model. `config` holds the shape's configuration values.

    `layout` holds the model's tensors as the architecture techniques of the stack change them; None for a family that
    effbench/families.py does not know, and for a shape that is only a layer.
    """

    config: Mapping[str, Any]
    model_type: str
    device: str
    trains: bool
    weights: str
    params: Mapping[str, Any] = field(default_factory=dict)  # the workload's
    stack: tuple[str, ...] = ()
    location: str | None = None
    seed: int = 0
    layout: Layout | None = None


@dataclass(frozen=True, kw_only=True)
class Support:
    """Yes, or no with a reason a person can act on."""

    ok: bool
    reason: str = ""


YES = Support(ok=True)


def no(reason: str) -> Support:
    """A refusal; `reason` says what to change."""
    return Support(ok=False, reason=reason)


@dataclass(frozen=True, kw_only=True)
class OptimizerArgs:
    """What the workload asks of an optimizer."""

    learning_rate: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Analytic cost of one layer for one sequence; a multiply-add is 2 FLOPs. None: it does not apply.

    Cached elements become bytes with the dtype of the stack. "Decode" is the last step of a request.
    """

    flops_per_token: float  # forward, mean over the tokens of a sequence
    decode_flops_per_token: float | None = None
    cache_elements_per_token: float | None = None
    decode_read_elements: float | None = None  # cached elements that the step must read
    source: str = ""


class Technique(ABC):
    """One technique with its parameters. Subclasses declare the class attributes and override hooks."""

    name: ClassVar[str]
    axis: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[Paper]
    Params: ClassVar[type[BaseModel]] = Params
    # The workloads it is part of, where it changes nothing in any other; () where it is for every one.
    workloads: ClassVar[tuple[str, ...]] = ()
    # Parameters that suit a model of two layers and contexts of some dozen tokens; the contract test takes them.
    small_params: ClassVar[Mapping[str, Any]] = {}
    # The part of a loaded checkpoint that this technique cannot convert and starts anew, such as "attention"; or "".
    new_weights: str = ""
    # Whether it changes weights that are there: `trained` ones are then trained without it and converted afterwards.
    converts_weights: bool = False
    # Whether it stacks the weights of several experts in one parameter, which is no linear layer that adapters find.
    stacked_weights: ClassVar[bool] = False
    # Whether its modules choose their own attention kernels, so that one of axis `kernel` would change nothing.
    own_kernels: ClassVar[bool] = False
    # Bits a weight of this number format by its name, scales not counted; None for what is no number format.
    nominal_bits: ClassVar[float | None] = None
    # Whether it stores weights in a form that takes no gradient, and whether adapters can read that form back in training.
    quantised: ClassVar[bool] = False
    readable: ClassVar[bool] = True

    def __init__(self, params: BaseModel | None = None):
        self.params: Any = params if params is not None else self.Params()

    @abstractmethod
    def supports(self, context: Context) -> Support:
        """Whether this can be done here; never a silent half."""

    def configure(self, config: PretrainedConfig) -> None:
        """Change the model's configuration in place, before it is built."""

    def load(self, context: Context) -> PreTrainedModel | None:
        """Build all of the model itself (an attention-free mixer), or None to leave it to the library."""
        return None

    def quantise(self, block: nn.Module) -> None:
        """Put the linear layers and experts of one block of the model in their stored form, in place.

        The weights of `block` lie on the device in the model's dtype. Called block by block while the model is made, so that
        no more than one block is ever there at full size.
        """

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        """Change the built model; return it or a wrapper."""
        return model

    def trainable(self, model: PreTrainedModel) -> None:
        """Set `requires_grad` of the parameters; by default what `apply` left is kept."""

    def optimizer(self, model: PreTrainedModel, args: OptimizerArgs) -> torch.optim.Optimizer | None:
        """An optimizer of its own, or None for the workload's AdamW."""
        return None

    def finish(self, model: PreTrainedModel) -> PreTrainedModel:
        """Last change before the measurement (merge, compile); return the model."""
        return model

    def layout(self, layout: Layout) -> None:
        """Change the list of the model's tensors as the other hooks change the model: what a plan knows of its bytes."""

    def flow(self, flow: Flow) -> None:
        """Put forms of this technique's own into the flow of a step, where it changes what a layer makes and keeps.

        What a plan knows of the memory of activations and caches; adapters, packed weights and what is trained it knows by `layout`.
        """

    def cost(self, context: Context) -> Cost | None:
        """Analytic FLOPs and bytes of this choice, or None where the generic model cost holds."""
        return None

    def baseline(self, spec: Spec) -> tuple[str, Mapping[str, Any]] | None:
        """(name, parameters) of the technique this one is compared with on the same axis; None: the axis left out."""
        return None

    @property
    def is_reference(self) -> bool:
        """Whether this technique is the origin of its axis and has no baseline (mha, full, fp32)."""
        return False
