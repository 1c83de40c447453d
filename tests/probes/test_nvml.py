"""The GPU probe through the real pynvml and a simulated libnvidia-ml: what it records, and that every fault is a reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from effbench.integrate import EnergyResult, is_fault, mean_over, window_energy
from effbench.probe import ProbeResult
from effbench.schema import Series
from tests.fake_nvml import (
    GPU_IS_LOST,
    IDLE_W,
    NOT_SUPPORTED,
    PEAK_W,
    UNINITIALIZED,
    UNKNOWN,
    Gpu,
    Machine,
    Process,
    Rule,
    Slice,
    World,
    stairs,
    steady,
)

pytestmark = pytest.mark.alone

WINDOW = (2.0, 8.0)
LOAD = stairs((1.5, 400.0), (5.0, 300.0), (8.3, IDLE_W))
NO_MASK = {"CUDA_VISIBLE_DEVICES": "0"}


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    started = Machine()
    yield started
    started.close()


def world(*rules: Rule, **settings: Any) -> World:
    return World(gpus=[Gpu(power=LOAD, rules=rules, **settings)], environment=NO_MASK)


def series_of(result: ProbeResult) -> dict[str, Series]:
    return {series.name: series for series in result.series}


def energy_of(result: ProbeResult, window: tuple[float, float] = WINDOW) -> EnergyResult:
    """As `recompute` does it: the functions of `integrate` on the probe's series."""
    found = series_of(result)
    counter, power = found.get("gpu_energy_counter"), found.get("gpu_power_instant")
    return window_energy(
        counter=(counter.t_s, counter.values) if counter else None, power=(power.t_s, power.values) if power else None,
        start_s=window[0], end_s=window[1], idle=[(0.5, 1.4)], min_updates=50, max_gap_s=1.0,
    )  # fmt: skip


def test_a_steady_load_gives_every_series_with_unit_scope_and_source(machine: Machine) -> None:
    seen = machine.observe(world(), window=WINDOW)
    found = series_of(seen.result)
    assert {name: (s.unit, s.scope, s.source) for name, s in found.items()} == {
        "gpu_energy_counter": ("J", "gpu", "nvml:total_energy_consumption"),
        "gpu_power_instant": ("W", "gpu", "nvml:field186:scope0"),
        "gpu_power_average": ("W", "gpu", "nvml:field185:scope0"),
        "gpu_memory_used": ("B", "gpu", "nvml:memory_info_v2"),
        "gpu_memory_process": ("B", "process", "nvml:running_processes"),
        "gpu_busy": ("ratio", "gpu", "nvml:utilization_rates"),
        "gpu_clock_sm": ("MHz", "gpu", "nvml:clock_info"),
        "gpu_clock_memory": ("MHz", "gpu", "nvml:clock_info"),
        "gpu_temperature": ("°C", "gpu", "nvml:temperature"),
        "gpu_throttle": ("bits", "gpu", "nvml:clocks_event_reasons"),
        "gpu_thermal_violation": ("s", "gpu", "nvml:violation_status:thermal"),
        "gpu_sm_activity": ("ratio", "gpu", "nvml:gpm2"),
        "gpu_sm_occupancy": ("ratio", "gpu", "nvml:gpm3"),
        "gpu_tensor_activity": ("ratio", "gpu", "nvml:gpm5"),
        "gpu_dram_activity": ("ratio", "gpu", "nvml:gpm10"),
    }
    assert all((np.diff(s.t_s) >= 0).all() for s in found.values())
    assert seen.result.reasons == ()
    assert (seen.left_open, seen.samples_left) == (0, 0)
    assert energy_of(seen.result).gross_j == pytest.approx(Gpu(power=LOAD).energy_j(*WINDOW), rel=0.01)
    assert found["gpu_memory_process"].values[-1] == 1 << 30
    assert found["gpu_memory_used"].values[-1] == 3 << 30
    assert mean_over(found["gpu_busy"].t_s, found["gpu_busy"].values, *WINDOW) == pytest.approx(1.0)


def test_the_counters_period_is_found_by_looking_and_sets_the_pace(machine: Machine) -> None:
    for period_s in (0.02, 0.1, 0.15):
        facts = machine.observe(world(counter_period=period_s), window=WINDOW).result.facts
        assert facts["counter_period_s"] == pytest.approx(period_s, abs=0.002)
        assert 0.02 <= facts["sample_period_s"] <= 0.1
        assert facts["sample_period_s"] == pytest.approx(max(0.02, period_s / 4.236), rel=0.05)
    slow = machine.observe(world(counter_period=1.0), window=WINDOW).result.facts
    assert slow["counter_period_s"] is None  # three updates do not fit in the look: the usual period is assumed
    assert slow["sample_period_s"] == pytest.approx(0.1 / 4.236)


def test_activity_counters_follow_the_load_and_are_missing_with_a_reason_where_refused(machine: Machine) -> None:
    found = series_of(machine.observe(world(), window=WINDOW).result)
    true_share = (Gpu(power=LOAD).energy_j(*WINDOW) / 6 - IDLE_W) / (PEAK_W - IDLE_W)
    for name, of_it in (("gpu_sm_activity", 1.0), ("gpu_tensor_activity", 0.5), ("gpu_dram_activity", 0.5)):
        assert mean_over(found[name].t_s, found[name].values, *WINDOW) == pytest.approx(of_it * true_share, rel=0.02)
    without = machine.observe(world(activity=0), window=WINDOW).result
    assert without.facts["gpu_missing"] == dict.fromkeys(
        ("gpu_sm_activity", "gpu_sm_occupancy", "gpu_tensor_activity", "gpu_dram_activity"), "not_supported"
    )
    partly = machine.observe(world(Rule(what="fail:activity10", code=NOT_SUPPORTED)), window=WINDOW).result
    assert partly.facts["gpu_missing"] == {"gpu_dram_activity": "not_supported"}
    assert "gpu_sm_activity" in series_of(partly)


# Situation → the reason code, whether energy stands all the same, and by which method.
FAULTS: dict[str, tuple[World, str, bool]] = {
    "counter missing": (world(Rule(what="fail:energy", code=NOT_SUPPORTED)), "counter_missing", True),
    "field 186 unsupported": (
        world(*(Rule(what=f"fail:field186:scope{scope}", code=NOT_SUPPORTED) for scope in (0, 1))), "power_missing", True,
    ),
    "neither": (world(Rule(what="fail:energy", code=NOT_SUPPORTED), Rule(what="fail:fields", code=NOT_SUPPORTED)), "energy_missing", False),
    "counter frozen": (world(Rule(what="freeze", start_s=4.0)), "counter_frozen", False),
    "counter frozen for a while": (world(Rule(what="freeze", start_s=4.0, end_s=6.0)), "counter_frozen", False),
    "driver reload, counter starts again": (world(Rule(what="reset", start_s=5.0)), "counter_reset", False),
    "driver reload, library closed": (world(Rule(what="fail:all", start_s=5.0, code=UNINITIALIZED)), "device_lost", False),
    "GPU lost": (world(Rule(what="fail:all", start_s=5.0, code=GPU_IS_LOST)), "device_lost", False),
    "stale samples": (world(Rule(what="stale", start_s=3.0, end_s=7.0)), "stale_samples", False),
    "thermal slowdown": (world(Rule(what="throttle", start_s=4.0, end_s=4.4, code=0x20)), "throttled", False),
    "power brake": (world(Rule(what="throttle", start_s=4.0, end_s=4.4, code=0x88)), "throttled", False),
    "thermal limit between samples": (world(Rule(what="violation", start_s=4.0, end_s=4.1)), "throttled", False),
    "power cap": (world(Rule(what="throttle", start_s=4.0, end_s=7.0, code=0x4)), "power_capped", True),
    "application clocks": (world(Rule(what="throttle", code=0x2)), "clocks_limited", True),
    "foreign process": (world(processes=[Process(pid="own"), Process(pid=4_000_000, start_s=5.0, end_s=6.0)]), "foreign_process", False),
    "foreign display": (world(processes=[Process(pid="own"), Process(pid=4_000_001, kind="graphics")]), "foreign_process", False),
}  # fmt: skip


@pytest.mark.parametrize("situation", FAULTS)
def test_a_fault_is_a_reason_and_never_an_exception_or_a_zero(machine: Machine, situation: str) -> None:
    imagined, reason, stands = FAULTS[situation]
    result = machine.observe(imagined, window=WINDOW).result
    energy = energy_of(result)
    flags = {*result.reasons, *energy.reasons}
    assert reason in flags
    assert stands == (energy.valid and not any(map(is_fault, flags)))
    assert energy.gross_j != 0
    if stands:
        assert energy.gross_j == pytest.approx(imagined.gpus[0].energy_j(*WINDOW), rel=0.03)


def test_a_stalled_machine_leaves_a_gap_that_invalidates_energy(machine: Machine) -> None:
    energy = energy_of(machine.observe(world(), window=WINDOW, stall=(3.0, 6.5)).result)
    assert (energy.gross_j, energy.valid) == (None, False)
    assert "sampling_gap" in energy.reasons


def test_without_energy_the_facts_say_why(machine: Machine) -> None:
    for imagined, why in (
        (FAULTS["neither"][0], ["not_supported"]),
        (world(Rule(what="fail:energy", code=UNKNOWN), Rule(what="fail:fields", code=UNKNOWN)), ["nvml_error"]),
    ):
        result = machine.observe(imagined, window=WINDOW).result
        assert result.facts["energy_reasons"] == why
        assert "gpu_memory_used" in series_of(result)


def test_one_failing_reading_is_a_counted_gap_and_harms_nothing(machine: Machine) -> None:
    """AIPerf suppressed errors per sample, and the whole metric vanished (its pull request 1350)."""
    result = machine.observe(world(Rule(what="fail:fields", start_s=4.0, end_s=4.03, code=UNKNOWN)), window=WINDOW).result
    assert 1 <= result.facts["gpu_failed_reads"]["gpu_power_instant"] <= 2
    assert "samples_lost" in result.reasons
    assert energy_of(result).valid


def test_a_gpu_without_counter_is_never_zero_and_the_fallback_is_marked(machine: Machine) -> None:
    """CodeCarbon gives 0 kWh for a GPU without a counter (its issue 1316)."""
    energy = energy_of(machine.observe(FAULTS["counter missing"][0], window=WINDOW).result)
    assert energy.counter_j is None
    assert (energy.method, energy.gross_j) == ("integral", energy.integral_j)
    assert "counter_missing" in energy.reasons


def test_setting_the_wall_clock_in_the_window_changes_nothing(machine: Machine) -> None:
    """Zeus stamps its windows with wall time. The driver's own stamps are wall time too."""
    plain = machine.observe(world(), window=WINDOW).result
    for jump_s in (-3600, 3600):
        moved = machine.observe(world(Rule(what="wall", start_s=4.0, code=jump_s)), window=WINDOW).result
        assert moved.reasons == plain.reasons
        for one, other in zip(plain.series, moved.series, strict=True):
            np.testing.assert_array_equal(one.values, other.values)


def test_under_mig_energy_is_missing_and_memory_and_activity_are_the_slices(machine: Machine) -> None:
    """Zeus 0.16 swallows a MIG mask, and the total energy is 0 (its issue 109)."""
    split = Gpu(power=LOAD, split=1, slices=[Slice(uuid="MIG-aaaa", instance=3, used_bytes=7 << 30)])
    imagined = World(gpus=[split], environment={"CUDA_VISIBLE_DEVICES": "MIG-aaaa"})
    result = machine.observe(imagined, window=WINDOW).result
    found = series_of(result)
    assert "mig" in result.reasons
    assert not {"gpu_energy_counter", "gpu_power_instant", "gpu_power_average", "gpu_busy"} & found.keys()
    assert {reason for name, reason in result.facts["gpu_missing"].items() if name in ("gpu_busy", "gpu_energy_counter")} == {
        "mig"
    }
    assert result.facts["energy_reasons"] == ["mig"]
    assert energy_of(result).gross_j is None
    assert found["gpu_memory_used"].values[-1] == 7 << 30
    assert "gpu_sm_activity" in found
    assert result.facts["gpu_uuid"] == "MIG-aaaa"


def test_a_grace_hopper_gives_module_joules_and_says_so(machine: Machine) -> None:
    refused = [Rule(what=f"fail:field{field}:scope0", code=NOT_SUPPORTED) for field in (185, 186)]
    result = machine.observe(world(*refused, name="NVIDIA GH200 480GB"), window=WINDOW).result
    found = series_of(result)
    assert "module_scope" in result.reasons
    assert {found[name].scope for name in ("gpu_energy_counter", "gpu_power_instant")} == {"module"}
    assert found["gpu_power_instant"].source == "nvml:field186:scope1"
    assert result.facts["gpu_power_scope"] == "module"
    assert energy_of(result).valid


def test_of_two_gpus_the_one_of_the_mask_is_measured(machine: Machine) -> None:
    """Zeus 0.16 raises ValueError for a UUID in the mask."""
    first = Gpu(power=steady(100.0), uuid="GPU-aaaa1111", pci="00000000:18:00.0")
    second = Gpu(power=steady(500.0), uuid="GPU-bbbb2222", pci="00000000:19:00.0")
    for mask in ("1", "GPU-bbbb2222", "GPU-bb", "1,0"):
        imagined = World(gpus=[first, second], environment={"CUDA_VISIBLE_DEVICES": mask})
        result = machine.observe(imagined, window=WINDOW).result
        assert result.facts["gpu_uuid"] == "GPU-bbbb2222"
        assert energy_of(result).gross_j == pytest.approx(3000.0, rel=1e-3)
        assert machine.visible_devices(imagined)[0].uuid == "GPU-bbbb2222"


@pytest.mark.parametrize("mask", ["", "-1", "NoDevFiles", "7", "GPU-unknown", "nonsense"])
def test_a_mask_without_devices_gives_no_device_and_no_exception(machine: Machine, mask: str) -> None:
    imagined = dataclasses.replace(world(), environment={"CUDA_VISIBLE_DEVICES": mask})
    assert machine.visible_devices(imagined) == []
    assert "no GPU is visible" in machine.why_no_device(imagined)
    assert not any(capability.available for capability in machine.capabilities(imagined))


def test_provenance_says_what_a_reproduction_needs(machine: Machine) -> None:
    known = machine.provenance(world())
    assert known["name"] == "NVIDIA H200"
    assert known["driver"] == "580.0.fake"
    assert known["cuda_driver"] == "13.0"
    assert known["power_limit_w"] == PEAK_W
    assert (known["ecc"], known["persistence_mode"], known["mig_mode"]) == (True, True, False)
    assert known["application_clock_sm_mhz"] is None  # refused, hence None and not 0
    assert known["pci_bus_id"] == "00000000:18:00.0"


def test_capabilities_name_each_sensor_with_reason_and_remedy(machine: Machine) -> None:
    whole = machine.capabilities(world(processes=[Process(pid="own")]))
    assert all(c.available for c in whole if "processes" not in c.what)
    refused = {c.what: c for c in machine.capabilities(world(Rule(what="fail:energy", code=NOT_SUPPORTED), activity=0))}
    assert not refused["GPU energy by counter"].available
    assert "not_supported" in refused["tensor core activity (GPM)"].detail
    assert refused["GPU instant power"].available
    locked = machine.capabilities(world(Rule(what="fail:activity", code=4)))
    assert "administrator" in next(c.remedy for c in locked if "SM activity" in c.what)


def test_half_an_hour_of_load_costs_seconds(machine: Machine) -> None:
    half_hour = stairs(*[(1.5 + 60 * k + 30 * h, 400.0 - 200.0 * h) for k in range(30) for h in (0, 1)])
    gpu = Gpu(power=half_hour)
    window = (2.0, 1800.0)
    energy = energy_of(machine.observe(World(gpus=[gpu], environment=NO_MASK), window=window).result, window)
    assert energy.gross_j == pytest.approx(gpu.energy_j(*window), rel=1e-4)


def test_the_real_sampling_process_sees_the_same_as_the_simulated_one(machine: Machine) -> None:
    gpu = Gpu(power=stairs((1.3, 500.0), (2.2, 200.0)))
    seen, window = machine.observe_really(World(gpus=[gpu], environment=NO_MASK), idle_s=0.5, window_s=2.0)
    found = series_of(seen.result)
    counter, power = found["gpu_energy_counter"], found["gpu_power_instant"]
    energy = window_energy(
        counter=(counter.t_s, counter.values), power=(power.t_s, power.values), start_s=window[0], end_s=window[1],
        idle=[], min_updates=15, max_gap_s=1.0,
    )  # fmt: skip
    assert energy.gross_j == pytest.approx(gpu.energy_j(*window), rel=0.03)
    assert (seen.result.facts["counter_period_s"] or 0.1) == pytest.approx(0.1, rel=0.5)  # None on a machine too busy to look
    assert seen.result.facts["gpu_sampler_cpu_share"] < 0.1
    assert seen.left_open == 0  # NVML was open in the sampling process only


def test_a_gpu_that_is_lost_while_the_real_process_samples_ends_the_series_and_not_the_work(machine: Machine) -> None:
    lost = Gpu(power=steady(300.0), rules=[Rule(what="fail:all", start_s=0.8, code=GPU_IS_LOST)])
    seen, window = machine.observe_really(World(gpus=[lost], environment=NO_MASK), idle_s=0.4, window_s=0.8)
    assert "device_lost" in seen.result.reasons
    assert energy_of(seen.result, window).gross_j is None
