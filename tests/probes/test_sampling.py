"""The sampling process: what it brings home, what it costs, and that whatever happens to it is a reason and no exception."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from effbench.errors import ProbeError
from effbench.probes.sampling import Sample, Sampler, SamplingLoop, Source, launch_clock

pytestmark = pytest.mark.alone


class Counting(Source):
    """Values 0, 1, 2, … and the process that read them."""

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.count = clock, 0

    def read(self) -> Iterable[Sample]:
        self.count += 1
        return [("count", self.clock(), self.count - 1), ("pid", self.clock(), os.getpid())]

    def close(self) -> tuple[dict[str, int], list[str]]:
        return {"counted": self.count}, ["closed_well"]


class FakeClock:
    """A clock that moves when told, and by a little each time it is read, as real ones do."""

    def __init__(self, creep_s: float = 0.0):
        self.now_s, self.creep_s = 0.0, creep_s

    def __call__(self) -> float:
        self.now_s += self.creep_s
        return self.now_s


def sample(source: Callable[[], Source], period_s: float = 0.01) -> Sampler:
    return Sampler(source, period_s=period_s, clock=launch_clock())


def test_samples_come_from_another_process_in_order_and_with_their_facts() -> None:
    clock = launch_clock()
    sampler = Sampler(lambda: Counting(clock), period_s=0.01, clock=clock)
    sampler.start()
    time.sleep(0.3)
    recording = sampler.stop()
    t_s, count = recording.series["count"]
    assert list(count) == list(range(len(count)))
    assert (np.diff(t_s) >= 0).all()
    assert set(recording.series["pid"][1]) != {os.getpid()}
    assert recording.facts["counted"] == recording.facts["reads"] == len(count)
    assert recording.reasons == ("closed_well",)
    assert 5 <= len(count) <= 35  # 30 on a quiet machine


def test_a_mark_is_an_extra_reading_at_once() -> None:
    clock = launch_clock()
    sampler = Sampler(lambda: Counting(clock), period_s=5.0, clock=clock)
    sampler.start()
    time.sleep(0.05)
    marked_s = clock()
    sampler.mark()
    time.sleep(0.4)
    t_s, _ = sampler.stop().series["count"]
    assert len(t_s) == 3  # first, mark, last
    assert 0 <= t_s[1] - marked_s < 1.0


def test_sampling_at_10_hz_takes_less_than_a_hundredth_of_a_core() -> None:
    """The median of five samplers: a machine that others use makes one of them dear."""
    clock, shares = launch_clock(), []
    for _ in range(5):
        sampler = Sampler(lambda: Counting(clock), period_s=0.1, clock=clock)
        sampler.start()
        time.sleep(1.5)
        shares.append(sampler.stop().facts["cpu_share"])
    assert statistics.median(shares) < 0.01, shares


def test_a_killed_child_is_a_reason() -> None:
    sampler = sample(lambda: Counting(launch_clock()))
    sampler.start()
    assert sampler._pid is not None
    os.kill(sampler._pid, signal.SIGKILL)
    sampler.mark()
    recording = sampler.stop()
    assert recording.reasons == ("sampler_died",)
    assert not recording.series


def test_a_child_that_does_not_answer_is_killed() -> None:
    class Hanging(Counting):
        def close(self) -> tuple[dict[str, int], list[str]]:
            time.sleep(60)
            return super().close()

    sampler = sample(lambda: Hanging(launch_clock()))
    sampler.answer_s = 0.2
    sampler.start()
    pid = sampler._pid
    recording = sampler.stop()
    assert recording.reasons == ("sampler_hung",)
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_stopped_child_is_hung_and_not_waited_for() -> None:
    sampler = sample(lambda: Counting(launch_clock()))
    sampler.answer_s = 0.2
    sampler.start()
    assert sampler._pid is not None
    os.kill(sampler._pid, signal.SIGSTOP)
    begin = time.perf_counter()
    assert sampler.stop().reasons == ("sampler_hung",)
    assert time.perf_counter() - begin < 1.5


def test_a_source_that_cannot_open_gives_its_reason() -> None:
    def open_source() -> Source:
        raise ProbeError("nvml_missing", "no such library")

    sampler = sample(open_source)
    begin = time.perf_counter()
    sampler.start()
    assert time.perf_counter() - begin < 2
    recording = sampler.stop()
    assert recording.reasons == ("nvml_missing",)
    assert recording.facts["detail"] == "no such library"


def test_a_failing_reading_is_a_gap_and_a_fault_of_the_source_keeps_what_came_before() -> None:
    class Failing(Counting):
        def read(self) -> Iterable[Sample]:
            samples = super().read()
            if self.count == 3:
                raise ProbeError("not_supported")
            if self.count == 6:
                raise ZeroDivisionError
            return samples

    sampler = sample(lambda: Failing(launch_clock()))
    sampler.start()
    time.sleep(0.6)
    recording = sampler.stop()
    assert list(recording.series["count"][1]) == [0, 1, 3, 4]
    assert recording.reasons == ("not_supported", "sampler_died")
    assert "ZeroDivisionError" in recording.facts["detail"]


def test_interrupting_the_group_does_not_end_the_sampler() -> None:
    sampler = sample(lambda: Counting(launch_clock()))
    sampler.start()
    assert sampler._pid is not None
    os.kill(sampler._pid, signal.SIGINT)
    time.sleep(0.05)
    assert sampler.stop().reasons == ("closed_well",)


def test_a_sampler_that_was_never_started_or_is_stopped_twice_gives_a_reason() -> None:
    assert sample(lambda: Counting(launch_clock())).stop().reasons == ("sampler_died",)
    sampler = sample(lambda: Counting(launch_clock()))
    sampler.prepare()
    assert sampler.stop().reasons == ("sampler_died",)
    assert sampler.stop().reasons == ("sampler_died",)


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    script = """
        import os, sys
        from effbench.probes.sampling import Sampler, Source, launch_clock
        class Quiet(Source):
            def read(self):
                return []
        sampler = Sampler(Quiet, period_s=0.05, clock=launch_clock())
        sampler.start()
        print(sampler._pid, flush=True)
        os.kill(os.getpid(), 9)
    """
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=30, check=False
    )
    pid, deadline = int(child.stdout), time.perf_counter() + 2
    stat = Path(f"/proc/{pid}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.perf_counter() < deadline, "the sampler outlived its parent"
        time.sleep(0.01)


def test_the_schedule_is_absolute_and_a_late_reading_skips_instead_of_bunching() -> None:
    clock = FakeClock()

    class Slow(Counting):
        def read(self) -> Iterable[Sample]:
            samples = list(super().read())
            clock.now_s += 0.35 if self.count == 3 else 0.01
            return samples

    loop = SamplingLoop(Slow(clock), period_s=0.1, clock=clock)
    for _ in range(6):
        clock.now_s = loop.due_s
        loop.tick()
    t_s, _ = loop.gather({}, ()).series["count"]
    np.testing.assert_allclose(t_s, [0.0, 0.1, 0.2, 0.6, 0.7, 0.8])


def test_a_source_may_change_its_own_pace() -> None:
    clock = FakeClock()

    class Settling(Counting):
        @property
        def period_s(self) -> float | None:  # type: ignore[override]
            return 0.002 if self.count < 3 else None

    loop = SamplingLoop(Settling(clock), period_s=0.5, clock=clock)
    for _ in range(5):
        clock.now_s = loop.due_s
        loop.tick()
    np.testing.assert_allclose(loop.gather({}, ()).series["count"][0], [0.0, 0.002, 0.004, 0.504, 1.004])
