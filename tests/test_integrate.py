"""Power and energy samples → energy: exact where it can be, additive, and None with a reason where it cannot."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effbench import reasons
from effbench.integrate import EnergyResult, counter_period, mean_over, window_energy

Samples = tuple[np.ndarray, np.ndarray]
END_S = 12.0


def counter(
    watts: float = 100.0,
    period_s: float = 0.1,
    phase_s: float = 0.03,
    every_s: float = 0.0236,
    end_s: float = END_S,
    base_j: float = 1e6,
) -> Samples:
    """A counter of constant power, published every `period_s`, sampled every `every_s`."""
    t_s = np.arange(0, end_s, every_s)
    return t_s, base_j + watts * (np.floor((t_s - phase_s) / period_s) * period_s + phase_s)


def power(watts: float = 100.0, every_s: float = 0.05, end_s: float = END_S) -> Samples:
    t_s = np.arange(0, end_s, every_s)
    return t_s, np.full(len(t_s), watts)


def energy(
    counter: Samples | None, power: Samples | None, start_s: float = 2.0, end_s: float = 8.0, **rules: object
) -> EnergyResult:
    known = {"idle": [(0.5, 1.5)], "min_updates": 50, "max_gap_s": 1.0, **rules}
    return window_energy(counter=counter, power=power, start_s=start_s, end_s=end_s, **known)  # type: ignore[arg-type]


@pytest.mark.parametrize("phase_s", np.linspace(0, 0.1, 7))
def test_constant_power_is_exact_at_every_phase_of_the_counter(phase_s: float) -> None:
    found = energy(counter(phase_s=phase_s), power())
    assert found.gross_j == pytest.approx(600.0, rel=1e-4)
    assert found.integral_j == pytest.approx(600.0)
    assert found.net_j == pytest.approx(0.0, abs=0.1)
    assert (found.method, found.valid, found.reasons) == ("counter", True, ("sensor_duty_unknown",))
    assert 59 <= found.num_updates <= 60
    assert found.counter_period_s == pytest.approx(0.1, rel=1e-3)


def test_a_calibrated_sensor_duty_ends_the_remark() -> None:
    assert energy(counter(), power(), sensor_duty=0.25).reasons == ()


def test_without_a_counter_the_integral_stands_and_says_so() -> None:
    found = energy(None, power(250.0))
    assert (found.gross_j, found.method, found.valid) == (pytest.approx(1500.0), "integral", True)
    assert "counter_missing" in found.reasons
    assert found.counter_j is None


def test_without_instant_power_the_counter_stands_and_says_so() -> None:
    found = energy(counter(), None)
    assert found.gross_j == pytest.approx(600.0, rel=1e-4)
    assert "power_missing" in found.reasons
    assert found.integral_j is None


@pytest.mark.parametrize("empty", [None, (np.empty(0), np.empty(0))])
def test_without_any_sensor_energy_is_none_with_a_reason(empty: Samples | None) -> None:
    found = energy(empty, empty)
    assert (found.gross_j, found.net_j, found.valid, found.method) == (None, None, False, "")
    assert "energy_missing" in found.reasons


def test_a_falling_counter_is_a_reset_and_not_a_negative_energy() -> None:
    t_s, energy_j = counter()
    fallen = (t_s, np.where(t_s > 5.0, energy_j - 1e6, energy_j))
    found = energy(fallen, power())
    assert (found.gross_j, found.counter_j, found.valid) == (None, None, False)
    assert "counter_reset" in found.reasons
    assert energy(fallen, power(), 5.5, 11.5).gross_j == pytest.approx(600.0, rel=1e-3)  # a reset elsewhere harms nothing
    just_after = energy(fallen, power(), 5.02, 11.5)  # no update between the reset and the window: E is unknown there
    assert "counter_reset" in just_after.reasons


def test_a_counter_that_stands_still_is_frozen() -> None:
    t_s, energy_j = counter()
    for stopped_s in (0.0, 1.9, 6.0):
        frozen = (t_s, np.minimum(energy_j, 1e6 + 100 * stopped_s))
        found = energy(frozen, power())
        assert (found.gross_j, found.valid) == (None, False)
        assert "counter_frozen" in found.reasons
    recovered = (t_s, np.where((t_s > 4) & (t_s < 6), 1e6 + 400, energy_j))
    assert "counter_frozen" in energy(recovered, power()).reasons


def test_a_window_with_too_few_updates_is_not_resolved() -> None:
    found = energy(counter(), power(), 2.0, 4.0)
    assert (found.gross_j, found.valid) == (None, False)
    assert "window_too_short" in found.reasons
    assert found.counter_j == pytest.approx(200.0, rel=1e-3)  # kept, though nobody should build on it
    assert energy(counter(), power(), 2.0, 4.0, min_updates=10).gross_j == pytest.approx(200.0, rel=1e-3)


def test_a_single_window_between_two_updates_gives_no_energy() -> None:
    t_s, energy_j = counter(period_s=20.0, phase_s=-5.0)
    found = energy((t_s, energy_j), None, 2.0, 2.5, min_updates=0)
    assert found.gross_j is None
    assert not found.valid


@pytest.mark.parametrize(("start_s", "end_s"), [(-1.0, 5.0), (6.0, 12.5)])
def test_samples_must_bracket_the_window(start_s: float, end_s: float) -> None:
    for sensors in ((counter(), power()), (None, power()), (counter(), None)):
        found = energy(*sensors, start_s, end_s)
        assert (found.gross_j, found.valid) == (None, False)
        assert "not_covered" in found.reasons


def test_a_sampling_gap_invalidates_energy() -> None:
    kept = [(t_s < 3.0) | (t_s > 4.5) for t_s in (counter()[0], power()[0])]
    holed = [(series[0][keep], series[1][keep]) for series, keep in zip((counter(), power()), kept, strict=True)]
    for sensors in ((holed[0], power()), (counter(), holed[1]), (None, holed[1]), (holed[0], None)):
        found = energy(*sensors)
        assert (found.gross_j, found.valid) == (None, False)
        assert "sampling_gap" in found.reasons
    assert energy(*holed, max_gap_s=2.0, min_updates=40).valid


def test_a_gap_outside_the_window_harms_nothing() -> None:
    t_s, energy_j = counter()
    keep = (t_s < 9.0) | (t_s > 11.0)
    assert energy((t_s[keep], energy_j[keep]), power()).gross_j == pytest.approx(600.0, rel=1e-3)


def test_methods_that_differ_by_more_than_five_percent_are_remarked_on() -> None:
    assert "methods_disagree" in energy(counter(100.0), power(106.0)).reasons
    found = energy(counter(100.0), power(104.0))
    assert "methods_disagree" not in found.reasons
    assert energy(counter(100.0), power(106.0)).valid


def test_net_energy_is_gross_less_idle_power_by_the_same_method() -> None:
    t_s = np.arange(0, END_S, 0.0236)
    published_s = np.floor((t_s - 0.03) / 0.1) * 0.1 + 0.03
    truth_j = 50 * published_s + 250 * np.clip(published_s - 2.0, 0, 6.0)
    found = energy((t_s, truth_j), power(77.0))
    assert found.idle_power_w == pytest.approx(50.0, rel=1e-3)
    assert found.net_j == pytest.approx(250 * 6, rel=1e-2)  # both edges of the load fall between updates
    by_integral = energy(
        None, (np.array([0.0, 1.99, 2.0, 8.0, 8.01, 12.0]), np.array([50.0, 50, 300, 300, 50, 50])), max_gap_s=9, min_updates=1
    )
    assert by_integral.idle_power_w is None  # three samples are not an idle measurement
    assert "idle_missing" in by_integral.reasons
    assert by_integral.net_j is None


def test_without_idle_there_is_no_net_energy_and_the_gross_stands() -> None:
    found = energy(counter(), power(), idle=[])
    assert found.valid
    assert found.net_j is None
    assert "idle_missing" in found.reasons


@given(st.lists(st.floats(2.0, 8.0), min_size=1, max_size=6), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_the_parts_of_a_split_window_add_up(cuts: list[float], seed: int) -> None:
    random = np.random.default_rng(seed)
    t_s = np.sort(random.uniform(0, END_S, 500))
    t_s[[0, -1]] = 0, END_S
    watts = (t_s, random.uniform(50, 700, len(t_s)))
    published_s = np.floor((t_s - 0.03) / 0.1) * 0.1 + 0.03
    truth = (t_s, np.cumsum(random.uniform(0, 70, 200))[np.clip((published_s * 10).astype(int) + 1, 0, 199)])
    borders = [2.0, *sorted({round(cut, 3) for cut in cuts} - {2.0, 8.0}), 8.0]
    whole = energy(truth, watts, min_updates=0)
    parts = [energy(truth, watts, a, b, min_updates=0) for a, b in itertools.pairwise(borders)]
    assert sum(part.counter_j for part in parts if part.counter_j is not None) == pytest.approx(whole.counter_j)
    assert sum(part.integral_j for part in parts if part.integral_j is not None) == pytest.approx(whole.integral_j)


def test_a_fast_sensor_shapes_the_energy_between_two_updates() -> None:
    t_s = np.arange(0, END_S, 0.02)
    truth_j = 100 * t_s + 500 * np.clip(t_s - 5.0, 0, None)  # a jump in the middle of a period of 1 s
    published_s = np.floor(t_s - 0.5) + 0.5
    counted = (t_s, np.interp(published_s, t_s, truth_j))
    watts = (t_s, np.where(t_s < 5.0, 100.0, 600.0) + np.sin(40 * t_s))
    true_j = 100 * 3 + 500 * 0
    assert energy(counted, watts, 2.0, 5.0, min_updates=1).counter_j == pytest.approx(true_j, rel=0.05)
    assert energy(counted, None, 2.0, 5.0, min_updates=1).counter_j == pytest.approx(true_j + 125, rel=0.05)  # evenly spread


def test_an_uneven_beat_falls_back_to_what_the_samples_saw() -> None:
    random = np.random.default_rng(0)
    updates_s = np.cumsum(random.uniform(0.03, 0.25, 120))
    t_s = np.arange(0, updates_s[-1], 0.0236)
    counted = (t_s, 100 * np.concatenate([[0.0], updates_s])[np.searchsorted(updates_s, t_s, side="right")])
    assert energy(counted, None, 2.0, 8.0, min_updates=10).counter_j == pytest.approx(600.0, rel=0.01)


def test_a_counter_that_updates_faster_than_it_is_sampled_is_taken_as_fresh() -> None:
    t_s = np.arange(0, END_S, 0.1)
    truth_j = np.where(t_s < 5.0, 10 * t_s, 50 + 300 * (t_s - 5.0))
    found = energy((t_s, truth_j), None, 5.0, 10.0, min_updates=40)
    assert found.counter_j == pytest.approx(1500.0, rel=0.001)


def test_the_update_period_is_found_at_any_sampling_rate_that_sees_it() -> None:
    for period_s in (0.02, 0.1, 0.5):
        for every_s in (0.002, period_s / 4.236, period_s / 3):
            assert counter_period(*counter(period_s=period_s, every_s=every_s)) == pytest.approx(period_s, rel=0.01)
    assert counter_period(*counter(end_s=0.2)) is None
    assert counter_period(np.array([1.0]), np.array([5.0])) is None


def test_the_mean_of_a_series_interpolates_at_the_borders() -> None:
    t_s, values = np.array([0.0, 1.0, 2.0, 4.0]), np.array([0.0, 10.0, 10.0, 30.0])
    assert mean_over(t_s, values, 0.5, 3.0) == pytest.approx((3.75 + 10 + 15) / 2.5)
    assert mean_over(t_s, values, 0.0, 4.0) == pytest.approx((5 + 10 + 40) / 4)
    assert mean_over(t_s, values, 0.5, 3.0, max_gap_s=1.5) is None
    assert mean_over(t_s, values, -0.5, 3.0) is None
    assert mean_over(t_s, values, 0.5, 4.1) is None
    assert mean_over(np.empty(0), np.empty(0), 0.0, 1.0) is None


def test_every_reason_is_a_fault_or_a_remark_and_has_a_sentence() -> None:
    assert not reasons.FAULTS.keys() & reasons.REMARKS.keys()
    assert all(text and not text.endswith(".") for text in reasons.REASONS.values())
    assert reasons.is_fault("counter_reset")
    assert not reasons.is_fault("sensor_duty_unknown")
    assert not reasons.is_fault("a_code_of_another_table")
