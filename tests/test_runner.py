"""One launch in this process: phases, facts, flags of probes, and what spoils it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from effbench import registry, runner
from effbench.probe import Probe, ProbeResult
from effbench.registry import Entry
from tests.factories import spec

FAULTY = Path(__file__).parent / "faulty_plugin"


class Flagging(Probe):
    """A probe that has seen what it is told to see."""

    name = "flagging"
    saw: tuple[str, ...] = ()
    calls: list[str] = []  # noqa: RUF012  (a test's log)

    @classmethod
    def at_birth(cls):
        cls.calls.append("at_birth")

    @classmethod
    def capabilities(cls):
        return []

    def __enter__(self):
        self.calls.append("enter")
        return self

    def __exit__(self, *exc):
        self.calls.append("exit")

    def window_begins(self):
        self.calls.append("begins")

    def window_ended(self):
        self.calls.append("ended")

    @property
    def wants_idle(self):
        return True

    def result(self):
        return ProbeResult(reasons=self.saw, facts={"seen": 1})


@pytest.fixture
def run(monkeypatch):
    """Run the faulty workload here, with only the flagging probe."""
    monkeypatch.setattr(sys, "path", [str(FAULTY), *sys.path])
    monkeypatch.setattr(Flagging, "calls", [])
    here = Entry(kind="probe", name="flagging", target=f"{__name__}:Flagging", distribution="tests", version="1")
    import faulty_plugin

    monkeypatch.setattr(registry, "entries", lambda kind: {"flagging": here})
    monkeypatch.setattr(registry, "probe", lambda name: Flagging)
    monkeypatch.setattr(registry, "workload", lambda name: faulty_plugin.Faulty)

    def run_it(how="work", saw=(), **changes):
        monkeypatch.setattr(Flagging, "saw", saw)
        of = spec(workload="faulty", params={"how": how}, protocol="smoke", **changes)
        request = runner.Request(
            launch_id="l", spec=of, seed=3, suite="t", env_id="e", block_id="b", block=0, position=0, hardware="h"
        )
        return runner.run(request)

    return run_it


def test_phases_follow_each_other_and_the_window_says_what_ended_it(run):
    launch, trace = run()
    assert launch.status == "ok", launch.detail
    order = ["build", "check", "open_probes", "idle_before", "warm_up", "window", "idle_after", "close_probes"]
    starts = [launch.windows[name].start_s for name in order]
    assert starts == sorted(starts)
    assert launch.windows["window"].ended_by == "rule"
    assert launch.windows["window"].length_s >= 0.2
    assert len(trace.get("step").values) >= 2


def test_probes_are_born_first_and_closed_whatever_happens(run):
    run()
    assert Flagging.calls == ["at_birth", "enter", "begins", "ended", "exit"]
    Flagging.calls.clear()
    launch, _ = run(how="raise")
    assert launch.status == "failed"
    assert Flagging.calls == ["at_birth", "enter", "exit"]


def test_a_window_that_reaches_its_limit_says_so(run, monkeypatch):
    from dataclasses import replace

    from effbench.protocol import protocol

    slow = replace(protocol("smoke"), window_steps=10**6, window_limit_s=0.3)
    monkeypatch.setattr(runner, "protocol", lambda name: slow)
    launch, _ = run()
    assert launch.windows["window"].ended_by == "limit"


@pytest.mark.parametrize("flag", ["foreign_process", "throttled", "device_lost"])
def test_what_spoils_the_times_makes_the_launch_invalid_and_keeps_its_numbers(run, flag):
    launch, _ = run(saw=("sensor_duty_unknown", flag))
    assert (launch.status, launch.reason) == ("invalid", flag)
    assert launch.metrics


def test_a_remark_spoils_nothing(run):
    launch, _ = run(saw=("sensor_duty_unknown", "cpu_contended"))
    assert launch.status == "ok"
    al = next(m for m in launch.metrics if m.name == "al_s")
    assert "cpu_contended" in al.reasons


def test_setting_the_wall_clock_back_changes_no_time(run, monkeypatch):
    import time

    wall = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: float(next(wall)))
    launch, trace = run()
    assert launch.status == "ok"
    assert (trace.get("step").values > 0).all()
    assert 0.2 <= launch.windows["window"].length_s < 5


def test_running_out_of_memory_is_a_failed_launch_with_its_traceback(run):
    launch, trace = run(how="memory")
    assert (launch.status, launch.reason) == ("failed", "out_of_memory")
    assert "MemoryError" in launch.detail
    assert trace.series == ()
