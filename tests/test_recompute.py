"""From trace to metrics: by hand values, and the faults that peers were seen to have."""

from __future__ import annotations

import numpy as np
import pytest

from effbench.metrics import METRICS, PAPER_SIX
from effbench.pairing import case_metrics
from effbench.reasons import REASONS
from effbench.recompute import launch_metrics
from effbench.schema import Window
from tests.factories import launch, series, spec, steady, trace_of_steps


def values(record):
    return {m.name: m for m in record}


def test_tokens_and_samples_per_second_equal_hand_values():
    # Two requests a step, 8 new tokens each, 10 steps of 0.5 s: 160 tokens and 20 samples in 5 s.
    found = values(steady(spec(), 0.5, step_tokens=16, step_samples=2).metrics)
    assert found["it_tokens_per_s"].value == pytest.approx(32.0)
    assert found["tokens_per_s"].value == pytest.approx(32.0)
    assert found["samples_per_s"].value == pytest.approx(4.0)
    assert found["al_s"].value == pytest.approx(0.5)


def test_training_throughput_divides_by_all_parameters():
    found = values(steady(spec(), 0.1, step_tokens=100, throughput="tt", params_total=50).metrics)
    assert found["tt_tokens_per_param_s"].value == pytest.approx(1000 / 50)
    assert found["it_tokens_per_s"].value is None
    assert found["it_tokens_per_s"].reasons == ("not_this_workload",)


def generated(pause_s: float):
    """Three requests of 4 tokens: first after 0.3 s, then every 0.1 s, with a pause between requests."""
    starts = [index * (0.6 + pause_s) for index in range(3)]
    tokens = [start + 0.3 + 0.1 * k for start in starts for k in range(4)]
    token = series("token", tokens, [2] * len(tokens), "tokens")
    trace = trace_of_steps(starts, [0.6] * 3, token)
    facts = {"step_tokens": 8, "step_samples": 2, "throughput": "it"}
    return values(launch(spec(), trace, (0.0, starts[-1] + 0.6), facts).metrics)


def test_time_to_first_token_and_per_output_token_equal_hand_values():
    found = generated(pause_s=0.0)
    assert found["ttft_s"].value == pytest.approx(0.3)
    assert found["tpot_s"].value == pytest.approx(0.1)
    assert found["itl_p99_s"].value == pytest.approx(0.1)


def test_a_long_pause_between_requests_changes_no_token_figure():
    quiet, paused = generated(pause_s=0.0), generated(pause_s=5.0)
    for name in ("ttft_s", "tpot_s", "itl_p99_s", "al_s", "tokens_per_s"):
        assert paused[name].value == pytest.approx(quiet[name].value)


def test_every_metric_of_the_table_is_in_every_launch_with_a_value_or_a_reason():
    found = values(steady(spec(), 0.1).metrics)
    own = {name for name, metric in METRICS.items() if "own" in metric.tags}
    assert set(found) == set(METRICS) - {"mcr", "mcr_nominal", "quality_change"} - own
    for reading in found.values():
        assert (reading.value is None) == (not reading.valid)
        assert reading.value is not None or reading.reasons
        assert reading.unit == METRICS[reading.name].unit


def test_what_a_workload_counts_and_times_apart_is_in_its_rows_alone():
    parts = series("projector_s", [0.5, 10.1, 10.2, 10.3, 99.0], [9.0, 1.0, 2.0, 4.0, 9.0], "s")
    trace = trace_of_steps([10.0, 10.2], [0.2, 0.2], parts)
    facts = {"figures": {"rows_sent": 96, "expected_rows_sent": 96, "communication_s": "oversubscribed", "al_s": 1e-9}}
    windows = {"window": Window(start_s=10.0, end_s=10.4, ended_by="rule")}
    readings = launch_metrics(spec=spec(), windows=windows, facts=facts, trace=trace)
    found = {reading.name: reading for reading in readings}
    assert found["projector_s"].value == 2.0, "the median within the window"
    assert (found["rows_sent"].value, found["rows_sent"].unit, found["rows_sent"].reasons) == (96.0, "count", ())
    assert found["expected_rows_sent"].reasons == ()
    assert (found["communication_s"].value, found["communication_s"].reasons) == (None, ("oversubscribed",))
    assert found["al_s"].value == pytest.approx(0.2), "what every row has is not the workload's to give"
    assert "compute_s" not in found


def test_without_an_energy_sensor_energy_is_missing_and_never_zero():
    found = values(steady(spec(), 0.1).metrics)
    for name in ("aec_w", "energy_j_per_token", "energy_wh"):
        assert found[name].value is None
        assert found[name].reasons == ("no_energy_sensor",)


def test_memory_is_a_time_average_over_the_window_only():
    memory = series("process_memory", [0, 1, 2, 3, 4], [9e9, 1e9, 1e9, 1e9, 9e9], "B")
    trace = trace_of_steps([1.0, 2.0], [1.0, 1.0], memory)
    found = values(launch(spec(), trace, (1.0, 3.0), {"step_tokens": 1, "throughput": "it"}).metrics)
    assert found["amu_gb"].value == pytest.approx(1.0)


def test_cpu_utilisation_is_process_time_over_threads():
    spent = series("process_cpu_time", [0.0, 2.0], [10.0, 13.0], "s")
    trace = trace_of_steps([0.0, 1.0], [1.0, 1.0], spent)
    found = values(launch(spec(), trace, (0.0, 2.0), {"step_tokens": 1, "throughput": "it"}).metrics)
    assert found["pcu"].value == pytest.approx(3.0 / (2.0 * 2))
    assert found["host_cpu_s_per_step"].value == pytest.approx(1.5)


def test_mfu_uses_the_measured_peak_of_the_compute_dtype_and_says_when_there_is_none():
    peaks = {"matrix_flops_per_s": {"float32": 1e9}, "datasheet_flops_per_s": {}}
    facts = {"step_flops": 1e8, "compute_dtype": "float32", "peaks": peaks}
    found = values(steady(spec(), 0.5, **facts).metrics)
    assert found["mfu"].value == pytest.approx(1e8 / 0.5 / 1e9)
    assert found["mfu_datasheet"].reasons == ("no_datasheet",)


def test_what_is_expected_stands_beside_what_was_measured_and_is_an_estimate():
    facts = {"kv_cache_bytes": 4096, "kv_cached_tokens": 16, "decode_flops": 1000, "new_weights": "attention"}
    facts["expected_tensor_peak_bytes"] = 1e6
    expected = {"kv_cache_bytes_per_token": 250.0, "decode_flops": 1010.0, "decode_bytes": 9e3, "cache_read_bytes": 4e3}
    found = values(steady(spec(), 0.1, **facts, expected=expected).metrics)
    assert (found["kv_cache_bytes_per_token"].value, found["decode_flops"].value) == (256.0, 1000.0)
    assert found["expected_kv_cache_bytes_per_token"].value == 250.0
    assert found["expected_decode_flops"].value == 1010.0
    assert found["expected_decode_bytes"].value == 9e3
    assert all("estimate" in found[name].reasons for name in found if name.startswith("expected_"))
    assert found["params_total"].reasons == ("new_weights",)
    without = values(steady(spec(), 0.1).metrics)
    assert without["expected_decode_flops"].reasons == ("not_this_workload",)
    assert without["params_total"].reasons == ()


def test_a_value_that_is_not_finite_becomes_missing_with_its_reason():
    found = values(steady(spec(), 0.1, quality={"quality": float("nan"), "figure": "task_accuracy of x"}).metrics)
    assert found["quality"].value is None
    assert "not_a_number" in found["quality"].reasons


def test_every_reason_code_used_here_is_explained():
    for reading in steady(spec(), 0.1).metrics:
        for reason in reading.reasons:
            assert reason in REASONS


def test_a_case_pairs_each_launch_with_the_baseline_of_its_own_block():
    technique, baseline = spec("mqa"), spec("mha")
    drift = [1.0, 2.0, 4.0]  # the machine slows down from block to block; the ratio does not care
    own = [steady(technique, 0.05 * d, block=b) for b, d in enumerate(drift)]
    base = [steady(baseline, 0.10 * d, block=b) for b, d in enumerate(drift)]
    found = values(case_metrics(own, list(reversed(base))))
    assert found["al_s"].ratio == pytest.approx(0.5)
    assert found["al_s"].ratio_lower == pytest.approx(0.5)
    assert found["al_s"].ratio_upper == pytest.approx(0.5)
    assert found["al_s"].n == 3
    assert found["al_s"].upper / found["al_s"].lower > 10  # the absolute is as uncertain as the machine


def test_steps_never_count_as_replicas():
    few, many = (
        [steady(spec(), 0.1 * (1 + 0.1 * b), block=b, num_steps=n) for b in range(3)] for n in (5, 5000)
    )  # fmt: skip
    a, b = (values(case_metrics(launches, None))["al_s"] for launches in (few, many))
    assert (a.n, b.n) == (3, 3)
    assert (a.lower, a.upper) == (pytest.approx(b.lower), pytest.approx(b.upper))


def test_a_reference_has_values_but_no_ratio():
    found = values(case_metrics([steady(spec(), 0.1, block=b) for b in range(3)], None))
    assert found["al_s"].ratio is None
    assert found["mcr"].reasons == ("no_baseline",)
    assert set(PAPER_SIX) <= set(found)


def test_a_failed_baseline_leaves_values_and_takes_ratios_away_with_a_reason():
    found = values(case_metrics([steady(spec("mqa"), 0.1, block=b) for b in range(3)], []))
    assert found["al_s"].value == pytest.approx(0.1)
    assert found["al_s"].ratio is None
    assert "baseline_failed" in found["al_s"].reasons


def test_compression_rate_is_measured_bytes_times_quality_kept():
    good = {"quality": 0.5, "figure": "next_token_accuracy on 10 bytes"}
    base = [steady(spec(), 0.1, block=b, weight_bytes=4000, quality=good) for b in range(3)]
    own = [steady(spec("bf16"), 0.1, block=b, weight_bytes=2000, quality={**good, "quality": 0.4}) for b in range(3)]
    assert values(case_metrics(own, base))["mcr"].value == pytest.approx(2.0 * 0.4 / 0.5)


def test_compression_rate_without_quality_is_missing():
    pair = [[steady(spec(name), 0.1, block=b) for b in range(3)] for name in ("bf16", "fp32")]
    mcr = values(case_metrics(*pair))["mcr"]
    assert mcr.value is None
    assert mcr.reasons == ("no_quality",)


def test_compression_rate_of_unlike_quality_figures_is_refused():
    own = [steady(spec("bf16"), 0.1, quality={"quality": 0.5, "figure": "task_accuracy of a"})]
    base = [steady(spec(), 0.1, quality={"quality": 0.5, "figure": "2^-bits_per_byte"})]
    assert values(case_metrics(own, base))["mcr"].reasons == ("quality_not_comparable",)


def test_energy_of_a_constant_load_is_power_times_time_gross_and_net():
    t = np.arange(0.0, 40.0, 0.02)
    power_w = np.where((t >= 10) & (t < 30), 300.0, 100.0)
    energy_j = np.concatenate([[0.0], np.cumsum(power_w[:-1] * np.diff(t))])
    ticks = np.floor(t / 0.1) * 0.1
    counter_j = np.interp(ticks, t, energy_j)
    trace = trace_of_steps(
        np.arange(10.0, 30.0, 1.0), np.ones(20),
        series("gpu_energy_counter", t, counter_j, "J", "nvml"), series("gpu_power_instant", t, power_w, "W", "nvml"),
    )  # fmt: skip
    windows = {
        "idle_before": Window(start_s=2.0, end_s=8.0),
        "window": Window(start_s=10.0, end_s=30.0),
        "idle_after": Window(start_s=32.0, end_s=38.0),
    }
    facts = {"step_tokens": 10, "step_samples": 1, "throughput": "it"}
    found = values(launch_metrics(spec=spec(device="cuda"), windows=windows, facts=facts, trace=trace))
    assert found["aec_w"].value == pytest.approx(300.0, rel=0.01)
    assert found["energy_j_per_token"].value == pytest.approx(30.0, rel=0.01)
    assert found["energy_net_j_per_token"].value == pytest.approx(20.0, rel=0.02)
    assert found["idle_power_w"].value == pytest.approx(100.0, rel=0.01)
    assert "sensor_duty_unknown" in found["aec_w"].reasons


def test_a_gpu_that_warms_up_beyond_the_band_makes_energy_invalid_under_publish_only():
    t = np.arange(0.0, 12.0, 0.1)
    sensors = [
        series("gpu_energy_counter", t, 300.0 * t, "J", "nvml"),
        series("gpu_power_instant", t, np.full(len(t), 300.0), "W", "nvml"),
        series("gpu_temperature", t, 40.0 + 3.0 * t, "°C", "nvml"),
    ]
    trace = trace_of_steps([1.0, 6.0], [5.0, 5.0], *sensors)
    window = {"window": Window(start_s=1.0, end_s=11.0)}
    for protocol, drifted in (("publish", True), ("quick", False)):
        found = values(
            launch_metrics(spec=spec(device="cuda", protocol=protocol), windows=window, facts={"throughput": "it"}, trace=trace)
        )
        assert ("temperature_drift" in found["aec_w"].reasons) == drifted
        assert found["aec_w"].valid != drifted
