"""Several processes that do one launch together: rank 0 leads, and the others do at every moment what it does.

    rank 0    build ─ check ─ … ─ step ─ step ─ … ─ facts ─ end        the runner, which knows of one session only
                        │           │      │          │      │  orders: one small broadcast, before each call
    ranks 1…  build ─ check ─ … ─ step ─ step ─ … ─ facts ─ end        `follow`

Only rank 0 decides when the window ends, and its steps are the ones that are timed; an order is a part of them (see
docs/design/0011-ranks.md). A session of several ranks finds the default process group initialised: gloo between CPUs, nccl
between GPUs, of which each rank has one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from effbench.errors import LaunchError
from effbench.schema import Series, Spec
from effbench.workload import Session

ORDERS = ("end", "check", "step", "begin", "quality", "facts", "series")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which of how many processes this one is, on all machines and on this one, and where they meet (`init_method` of torch)."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    meeting: str


def join(place: Place, device: str, limit_s: float) -> None:
    """Meet the other ranks. Raises LaunchError where there is no GPU for each, where the port is taken and where they do not come."""
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if device == "cuda":
        if torch.cuda.device_count() < place.local_size:
            text = f"{place.local_size} ranks need a GPU each, and this machine shows {torch.cuda.device_count()}"
            raise LaunchError(f"too_few_gpus: {text}", text)
        torch.cuda.set_device(place.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    if place.meeting.startswith("file:") and place.local_size == place.size:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: its name need not resolve
    try:
        dist.init_process_group(
            backend, init_method=place.meeting, rank=place.rank, world_size=place.size, timeout=timedelta(seconds=limit_s)
        )
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            text = f"the port {os.environ.get('MASTER_PORT', '')} that the ranks meet at is taken"
        raise LaunchError(f"no_meeting: {text}", f"rank {place.rank} could not meet the others: {text}") from error


def leave() -> None:
    """Give up the process group."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def oversubscribed(place: Place, spec: Spec) -> bool:
    """Whether the ranks of this machine must share its cores, so that their times say nothing. GPUs are never shared."""
    return spec.device == "cpu" and len(os.sched_getaffinity(0)) < place.local_size * spec.threads


class Leader(Session):
    """The session of rank 0 as the runner drives it: every call is made by all ranks at once."""

    def __init__(self, session: Session):
        self.session, self.step_work, self.quality_first = session, session.step_work, session.quality_first

    def check(self) -> None:
        _order("check")
        self.session.check()

    def step(self) -> None:
        _order("step")
        self.session.step()

    def begin(self) -> None:
        _order("begin")
        self.session.begin()

    def quality(self) -> None:
        _order("quality")
        self.session.quality()

    def facts(self) -> dict[str, Any]:
        _order("facts")
        return self.session.facts()

    def series(self) -> list[Series]:
        _order("series")
        return self.session.series()

    def end(self) -> None:
        """Let the others go."""
        _order("end")


def follow(session: Session) -> None:
    """Do what rank 0 does until it says that it is over."""
    while (order := _order(None)) != "end":
        getattr(session, order)()


def _order(name: str | None) -> str:
    """Tell (rank 0) or hear (None) what comes next; a broadcast between CPUs."""
    import torch
    import torch.distributed as dist

    number = torch.tensor([0 if name is None else ORDERS.index(name)])
    dist.broadcast(number, 0)
    return ORDERS[int(number)]
