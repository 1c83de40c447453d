"""A foreign package whose workload goes wrong in every way a launch can; found through its entry point, as any plugin."""

from __future__ import annotations

import os
import signal
import time
from typing import Literal

from effbench.errors import CorrectnessError, LaunchError
from effbench.technique import YES, Paper, Params, Technique, no
from effbench.workload import BuildContext, Session, Step, Workload


class FaultyParams(Params):
    how: Literal["work", "raise", "hang", "nan", "memory", "killed", "exit", "incorrect", "print"] = "work"
    step_s: float = 0.01
    label: str = ""


class Faulty(Workload):
    name = "faulty"
    summary = "sleeps, or goes wrong"
    trains = False
    throughput = "it"
    Params = FaultyParams

    def build(self, context: BuildContext) -> Session:
        return FaultySession(self.params, context)


class FaultySession(Session):
    step_work = Step(tokens=1, samples=1)

    def __init__(self, params: FaultyParams, context: BuildContext):
        self.params = params

    def check(self) -> None:
        if self.params.how == "incorrect":
            raise CorrectnessError("one is not two")

    def step(self) -> None:
        how = self.params.how
        if how == "raise":
            raise RuntimeError("this step always fails")
        if how == "hang":
            time.sleep(3600)
        if how == "nan":
            raise LaunchError("nan_loss", "the loss is nan")
        if how == "memory":
            raise MemoryError
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit":
            os._exit(7)
        if how == "print":
            print("said by the launch")
            os.abort()
        time.sleep(self.params.step_s)

    def facts(self) -> dict[str, object]:
        return {"params_total": 1, "pid": os.getpid()}


class FaultyRanksParams(Params):
    how: Literal["work", "raise", "killed", "exit", "hang", "unseen"] = "work"  # unseen: killed, no one waits for it
    rank: int = 1  # the one that goes wrong
    at: int = 3  # the step at which it does, -1: while it builds
    step_s: float = 0.0


class FaultyRanks(Workload):
    """Ranks that add up one number a step, until one of them goes wrong."""

    name = "faulty_ranks"
    summary = "adds up over ranks, or goes wrong in one of them"
    trains = False
    throughput = ""
    ranks = True
    Params = FaultyRanksParams

    def build(self, context: BuildContext) -> Session:
        return FaultyRanksSession(self.params)


class FaultyRanksSession(Session):
    step_work = Step(tokens=1, samples=1)

    def __init__(self, params: FaultyRanksParams):
        import torch.distributed as dist

        self.params, self.rank, self.size = params, dist.get_rank(), dist.get_world_size()
        self.num_steps, self.total, self.pids = 0, 0.0, [0] * self.size
        if self.params.at == -1:
            self._go_wrong()
        dist.all_gather_object(self.pids, os.getpid())

    def check(self) -> None:
        pass

    def step(self) -> None:
        import torch
        import torch.distributed as dist

        if self.num_steps == self.params.at:
            self._go_wrong()
        one = torch.tensor([float(self.rank + 1)])
        dist.all_reduce(one)
        self.total += float(one)
        self.num_steps += 1
        time.sleep(self.params.step_s)

    def _go_wrong(self) -> None:
        if self.rank != self.params.rank:
            if self.params.how == "unseen":
                time.sleep(3600)
            return
        if self.params.how == "raise":
            raise LaunchError("nan_loss", "the loss is nan")
        if self.params.how in ("killed", "unseen"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.params.how == "exit":
            os._exit(7)
        if self.params.how == "hang":
            time.sleep(3600)

    def facts(self) -> dict[str, object]:
        return {"params_total": 1, "pids": self.pids, "mean_of_steps": self.total / self.num_steps}


class Picky(Technique):
    name = "picky"
    axis = "kernel"
    summary = "refuses"
    paper = Paper(title="none")

    def supports(self, context):
        return YES if context.device == "abacus" else no("picky needs an abacus; use another technique")
