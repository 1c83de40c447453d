"""The probe contract: what watches a launch from beside the work.

    birth ──┬── build ──┬── idle ── warm-up ──┤ window ├── idle ──┬── result()
    at_birth, __init__  __enter__                              __exit__

A probe is constructed before the build, so that a process it forks shares nothing of the model.

A probe only records raw series; what they mean is computed in `recompute.py`, for runner, verifier and app alike.
A probe never raises for a sensor that fails: the reading is missing with a reason, and the work goes on.
Whatever has to be sampled over time is sampled in a process of its own; nothing spins while a case is measured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from effbench.schema import Series


@dataclass(frozen=True, kw_only=True)
class Capability:
    """One thing a probe can or cannot measure here; `remedy` is a step that would change a no."""

    what: str
    available: bool
    detail: str = ""
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class ProbeContext:
    """What a probe needs to know of its launch. `clock()` gives s since birth, the same in every process."""

    device: str  # "cpu" or "cuda"
    pid: int
    threads: int
    clock: Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What a probe saw: raw series, facts no series holds, and flags on the whole launch (reason codes)."""

    series: tuple[Series, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()


class Probe(ABC):
    """A context manager around idle, warm-up, window and idle. Construct, enter, exit, then ask for the result."""

    name: ClassVar[str]
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    def __init__(self, context: ProbeContext):
        self.context = context

    @classmethod
    def at_birth(cls) -> None:
        """Called first of all in the launch's process, before anything is imported or built. Must be quick."""

    @classmethod
    @abstractmethod
    def capabilities(cls) -> list[Capability]:
        """What this machine lets the probe measure, for `effbench doctor`. Never raises."""

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(self, *exc: object) -> None: ...

    def window_begins(self) -> None:
        """Called immediately before the measured window, device synchronised. Must be quick."""

    def window_ended(self) -> None:
        """Called immediately after the measured window, device synchronised. Must be quick."""

    @property
    def wants_idle(self) -> bool:
        """Whether idle stretches before and after the window would tell this probe something."""
        return False

    @abstractmethod
    def result(self) -> ProbeResult:
        """What was seen; called once, after exit."""
