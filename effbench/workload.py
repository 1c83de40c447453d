"""The workload contract: what work is done, and how much of it one step is.

A launch drives a session like this, with the probes around warm-up and window:

    session = workload.build(context)    # model on the device, data in memory
    session.check()                      # correctness gate; raises CorrectnessError
    session.quality() if quality_first   # training: the quality steps are the warm-up
    session.step() × warm-up             # not recorded
    session.begin(); session.step() × N  # the window; every step ends with the device synchronised
    session.quality() otherwise
    session.facts(), session.series()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from effbench.schema import Series, Spec

if TYPE_CHECKING:
    from effbench.flow import Flow


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step does. Model FLOPs and bytes are what the model needs, not what an implementation spends."""

    tokens: int  # tokens processed (training) or generated (inference)
    samples: int
    model_flops: float | None = None
    model_bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """Everything a workload may use. `clock()` gives s since the birth of the launch."""

    spec: Spec
    seed: int  # of this block: the same for a technique and its baseline
    clock: Callable[[], float]


class Session(ABC):
    """One built workload, ready to step."""

    step_work: Step
    quality_first: bool = False

    @abstractmethod
    def check(self) -> None:
        """The correctness gate, before any time is taken. Raises CorrectnessError."""

    @abstractmethod
    def step(self) -> None:
        """Do one unit of work and return with the device synchronised. Raises on a result that is not finite."""

    def begin(self) -> None:
        """Forget what earlier steps recorded: the window begins."""

    def quality(self) -> None:
        """Take the quality figures, kept for `facts`. Training sessions do their fixed number of quality steps here."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Numbers and texts no sensor gives, JSON only: params_total, weight_bytes, kv_cache_bytes, quality figures …"""

    def series(self) -> list[Series]:
        """Time series the session itself kept (token times), t_s on the launch's clock."""
        return []


class Workload(ABC):
    """A kind of work with its parameters. The class body is torch-free; `build` imports what it needs."""

    name: ClassVar[str]
    summary: ClassVar[str]
    trains: ClassVar[bool]
    throughput: ClassVar[str]  # which of the paper's throughput metrics this workload gives; "" for none
    whole_model: ClassVar[bool] = True  # False: it runs one layer, of a model or of a shape that is only a layer
    axes: ClassVar[tuple[str, ...]] = ()  # of techniques that change something in this work; (): all
    ranks: ClassVar[bool] = False  # whether it is the work of `nproc` processes, which find torch.distributed ready
    Params: ClassVar[type[BaseModel]]

    def __init__(self, params: BaseModel | Mapping[str, Any]):
        self.params: Any = params if isinstance(params, BaseModel) else self.Params(**params)

    @classmethod
    def trains_on(cls, params: Mapping[str, Any]) -> bool:
        """Whether work with these parameters trains; a workload that can do either says so by them."""
        return cls.trains

    def refusal(self, spec: Spec, config: Mapping[str, Any]) -> str | None:
        """Why this work cannot be done on this spec, as a sentence; None when it can. Torch-free.

        `config` holds the model's values as the techniques configure them; each technique has agreed already.
        """
        return None

    def stands_on(self, spec: Spec) -> str:
        """Names what `prepare` makes for this spec, the same for all specs that share it; "" for nothing. Torch-free."""
        return ""

    def prepare(self, spec: Spec) -> None:
        """Make and keep what this work stands on besides weights, unless it is there. Not part of any measured launch."""

    def rehearse(self, flow: Flow) -> None:
        """Do one step as sizes on the tape of `flow`, for the expected memory; a workload that does not say has none. Torch-free."""

    @abstractmethod
    def build(self, context: BuildContext) -> Session:
        """Build the model with its techniques and the data. Raises ModelError."""
