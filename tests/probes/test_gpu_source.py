"""Pacing and failing sensors of the GPU source, with sensors made of functions, and the skip rule of the simulated GPU."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from effbench.errors import ProbeError
from effbench.probes.gpu.result import probe_result
from effbench.probes.gpu.source import GpuSource, Meta, Sensor
from effbench.probes.sampling import Recording, SamplingLoop
from tests.fake_nvml import require_gcc


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def sensor(name: str, read: Callable[[], Sequence[float | str]], every_s: float = 0.0) -> Sensor:
    return Sensor(series=(Meta(name, "", "test"),), read=read, every_s=every_s)


def run(
    clock: Clock, sensors: Sequence[Sensor], until_s: float, cpu_time: Callable[[], float] = lambda: 0.0
) -> tuple[GpuSource, Recording]:
    source = GpuSource(sensors, counter="counter", clock=clock, on_close=lambda: ({}, []), cpu_time=cpu_time)
    loop = SamplingLoop(source, period_s=0.1, clock=clock)
    while loop.due_s < until_s:
        clock.now_s = max(clock.now_s, loop.due_s)
        loop.tick()
    return source, loop.finish()


def test_each_sensor_has_its_own_pace_after_a_look_at_the_counter() -> None:
    clock = Clock()
    counter = sensor("counter", lambda: [math.floor(clock() / 0.1)])
    source, found = run(clock, [counter, sensor("slow", lambda: [1.0], 0.5)], 3.0)
    t_s, _ = found.series["counter"]
    assert source.counter_period_s == pytest.approx(0.1, abs=0.002)
    assert np.diff(t_s)[:100] == pytest.approx(0.002)
    assert np.diff(t_s)[-20:-1] == pytest.approx(0.1 / 4.236, rel=0.02)
    assert np.diff(found.series["slow"][0])[2:-1] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("counter_period_s", "slowest_s"), [(0.1, 0.1 / 1.618), (0.025, 0.1)])
def test_reading_that_costs_too_much_becomes_rarer_as_far_as_energy_allows(counter_period_s: float, slowest_s: float) -> None:
    clock, spent = Clock(), [0.0]

    def dear() -> list[float]:
        spent[0] += 0.002
        return [math.floor(clock() / counter_period_s)]

    source, _ = run(clock, [sensor("counter", dear)], 20.0, cpu_time=lambda: spent[0])
    assert source.period_s == pytest.approx(slowest_s, rel=0.05)


def test_a_sensor_the_device_does_not_have_is_not_asked_again() -> None:
    asked = {"never": 0, "now and then": 0}

    def never() -> list[float | str]:
        asked["never"] += 1
        return ["not_supported"]

    def now_and_then() -> list[float | str]:
        asked["now and then"] += 1
        if asked["now and then"] % 2:
            raise ProbeError("nvml_error")
        return [math.nan if asked["now and then"] == 4 else 1.0]

    _, found = run(Clock(), [sensor("never", never), sensor("odd", now_and_then)], 2.0)
    assert asked["never"] == 2  # once, and once more at the end, where everything is read
    assert found.facts["gpu_missing"] == {"never": "not_supported"}
    assert found.facts["gpu_failed_reads"]["odd"] == asked["now and then"] - len(found.series["odd"][0])
    assert np.isfinite(found.series["odd"][1]).all()
    assert found.reasons == ("samples_lost",)


def test_after_the_loss_of_the_device_nothing_is_read_any_more() -> None:
    clock, reads = Clock(), []

    def lost() -> list[float | str]:
        reads.append(clock())
        return [1.0] if clock() < 1.0 else ["device_lost"]

    _, found = run(clock, [sensor("counter", lost), sensor("power", lambda: [2.0])], 5.0)
    assert max(reads) < 1.2
    assert "device_lost" in found.reasons
    assert found.series["power"][0].max() < 1.0


def test_a_source_that_broke_down_gives_reasons_and_no_exception() -> None:
    broken = Recording(series={"gpu_busy": (np.zeros(1), np.zeros(1))}, facts={"detail": "…"}, reasons=("sampler_died",))
    result = probe_result(broken, (0.0, 1.0))
    assert (result.series, result.reasons) == ((), ("sampler_died",))
    assert result.facts["energy_reasons"] == ["sampler_died"]
    assert probe_result(Recording(), None).facts["energy_reasons"] == ["energy_missing"]


def test_without_gcc_a_test_skips_with_the_reason_but_fails_under_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="gcc"):
        require_gcc()
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="gcc"):
        require_gcc()
