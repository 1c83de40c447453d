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


class Picky(Technique):
    name = "picky"
    axis = "kernel"
    summary = "refuses"
    paper = Paper(title="none")

    def supports(self, context):
        return YES if context.device == "abacus" else no("picky needs an abacus; use another technique")
