"""Intervals over blocks: error rates on simulated launches, exactness of the t quantile, and invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effbench.stats import (
    SCREENING_FLOOR,
    Interval,
    block_interval,
    holm,
    paired_p_value,
    paired_ratio,
    per_launch,
    percentile,
    t_quantile,
    tail_is_resolved,
    verdict,
)

LAUNCH_NOISE = 0.03  # standard deviation of a launch's level, on the log scale
STEP_NOISE, CORRELATION, NUM_STEPS = 0.03, 0.8, 200  # steps of one launch: an AR(1) around that level
COMPARISONS = 200
positive = st.floats(1e-6, 1e6)
blocks = st.lists(positive, min_size=2, max_size=8)


def launches(random: np.random.Generator, level: float, drift: np.ndarray) -> np.ndarray:
    """Step times of one launch per block, shape (blocks, NUM_STEPS), in s; `drift` is what a block's launches share."""
    log_level = math.log(level) + drift + random.normal(0, LAUNCH_NOISE, len(drift))
    step = np.empty((len(drift), NUM_STEPS))
    step[:, 0] = random.normal(0, STEP_NOISE, len(drift))
    fresh = random.normal(0, STEP_NOISE * math.sqrt(1 - CORRELATION**2), step.shape)
    for i in range(1, NUM_STEPS):
        step[:, i] = CORRELATION * step[:, i - 1] + fresh[:, i]
    return np.exp(log_level[:, None] + step)


def compare(random: np.random.Generator, num_blocks: int, effect: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Step times of a technique that takes `effect` times as long, and of its baseline, under a drift they share."""
    drift = random.normal(0, 2 * LAUNCH_NOISE, num_blocks)
    return launches(random, 0.01 * effect, drift), launches(random, 0.01, drift)


def claims(num_blocks: int, effect: float = 1.0, comparisons: int = COMPARISONS) -> tuple[float, float]:
    """Share of comparisons in which a difference is shown, and in which the interval holds the true ratio."""
    random = np.random.default_rng(1)
    shown = covered = 0
    for _ in range(comparisons):
        technique, baseline = compare(random, num_blocks, effect)
        ratio = paired_ratio([per_launch(s) for s in technique], [per_launch(s) for s in baseline])
        assert ratio.lower is not None
        assert ratio.upper is not None
        shown += verdict(ratio.lower, ratio.upper, "lower", "publish") != "no difference shown"
        covered += ratio.lower <= effect <= ratio.upper
    return shown / comparisons, covered / comparisons


def test_two_equal_techniques_are_told_apart_in_2_to_9_percent_of_comparisons() -> None:
    rates = {n: claims(n)[0] for n in (3, 5)}
    print(f"false-positive rate of {COMPARISONS} A/A comparisons: {rates[5]:.1%} with 5 blocks, {rates[3]:.1%} with 3 blocks")
    assert 0.02 <= rates[5] <= 0.09
    assert rates[3] <= 0.09


def test_a_difference_of_three_times_the_launch_noise_is_found_in_90_percent_of_comparisons() -> None:
    # The noise of what a launch reports: its level and, on top, the median of its own correlated steps.
    reported = [per_launch(s) for s in launches(np.random.default_rng(0), 0.01, np.zeros(2000))]
    noise = float(np.std(np.log(np.array(reported, dtype=float))))
    effect = math.exp(3 * noise)
    found, covered = claims(5, effect, comparisons=600)
    slower, _ = claims(5, 1 / effect, comparisons=600)
    print(f"launch noise {noise:.2%}, planted {effect - 1:+.1%}: found in {found:.1%}, its inverse in {slower:.1%} of 600")
    assert min(found, slower) >= 0.90
    assert 0.91 <= covered <= 0.99


def test_the_interval_of_an_absolute_value_covers_it_in_about_95_percent_of_cases() -> None:
    random, covered, trials = np.random.default_rng(7), 0, 1000
    for _ in range(trials):
        interval = block_interval(np.exp(random.normal(math.log(3.0), 0.2, 5)))
        assert interval.lower is not None
        assert interval.upper is not None
        covered += interval.lower <= 3.0 <= interval.upper
    print(f"coverage of {trials} intervals: {covered / trials:.1%}")
    assert 0.93 <= covered / trials <= 0.97


def test_treating_steps_as_replicas_would_call_most_equal_techniques_different() -> None:
    random, shown = np.random.default_rng(1), 0
    for _ in range(COMPARISONS):
        technique, baseline = compare(random, 5)
        wrong = paired_ratio(technique.ravel(), baseline.ravel())  # the mistake: one "block" per step
        assert wrong.lower is not None
        assert wrong.upper is not None
        shown += not wrong.lower <= 1.0 <= wrong.upper
    print(f"false-positive rate with steps as replicas: {shown / COMPARISONS:.1%}")
    assert shown / COMPARISONS > 0.5


def test_an_interval_refuses_the_raw_steps_of_a_launch() -> None:
    steps = [np.array([1.0, 2.0]), np.array([1.0, 2.0])]
    with pytest.raises(ValueError, match="per_launch"):
        block_interval(steps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="per_launch"):
        paired_ratio(np.ones((3, 10)), np.ones((3, 10)))


def test_the_t_quantile_agrees_with_scipy() -> None:
    from scipy.special import stdtrit

    for degrees in [*range(1, 40), 100, 501]:
        for level in (0.5, 0.9, 0.95, 0.99, 0.9999):
            assert t_quantile(level, degrees) == pytest.approx(stdtrit(degrees, (1 + level) / 2), rel=1e-9)
    with pytest.raises(ValueError):
        t_quantile(0.95, 0)


def test_one_block_has_a_value_and_no_interval_and_no_block_has_neither() -> None:
    assert block_interval([2.0]) == Interval(2.0, None, None, 1, ("one_block",))
    assert block_interval([]) == Interval(None, None, None, 0, ("no_blocks",))
    assert block_interval([None, None]) == Interval(None, None, None, 0, ("no_blocks",))
    assert verdict(None, None, "lower", "publish") == "no difference shown"


def test_a_missing_side_drops_the_pair_and_lowers_n() -> None:
    ratio = paired_ratio([2.0, None, 8.0], [1.0, 5.0, 4.0])
    assert (ratio.value, ratio.n) == (pytest.approx(2.0), 2)
    assert paired_ratio([2.0, 2.0], [1.0, None]).reasons == ("one_block",)
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_ratio([1.0], [1.0, 2.0])


def test_values_that_are_not_all_positive_get_an_arithmetic_interval_and_say_so() -> None:
    interval = block_interval([-1.0, 0.0, 4.0])
    half = t_quantile(0.95, 2) * math.sqrt(7.0) / math.sqrt(3.0)
    assert interval.value == pytest.approx(1.0)
    assert interval.upper == pytest.approx(1.0 + half)
    assert interval.reasons == ("not_all_positive",)


def test_a_zero_baseline_leaves_no_ratio() -> None:
    assert paired_ratio([1.0, 2.0], [1.0, 0.0]) == Interval(None, None, None, 0, ("baseline_not_positive",))
    assert paired_ratio([0.0, 1.0], [1.0, 1.0]).reasons == ("not_all_positive",)


def test_nan_is_left_out_and_named() -> None:
    assert block_interval([1.0, math.nan, 1.0]) == Interval(1.0, 1.0, 1.0, 2, ("not_finite",))
    assert paired_ratio([1.0, math.inf, 1.0], [1.0, 1.0, 1.0]).reasons == ("not_finite",)


def test_blocks_that_agree_exactly_keep_their_value_to_the_last_bit() -> None:
    assert block_interval([1235814432.0] * 5) == Interval(1235814432.0, 1235814432.0, 1235814432.0, 5)


@pytest.mark.parametrize(
    ("lower", "upper", "better", "protocol", "expected"),
    [
        (0.80, 0.85, "lower", "quick", "better"),
        (0.80, 0.85, "higher", "quick", "worse"),
        (1.20, 1.30, "higher", "quick", "better"),
        (1.20, 1.30, "lower", "quick", "worse"),
        (0.92, 0.95, "lower", "quick", "no difference shown"),
        (0.92, 0.95, "lower", "publish", "better"),
        (1.05, 1.11, "lower", "quick", "no difference shown"),
        (0.90, 0.90, "lower", "quick", "better"),
        (0.70, 1.01, "lower", "publish", "no difference shown"),
        (0.10, 0.20, "lower", "smoke", "no difference shown"),
    ],
)
def test_a_verdict_needs_an_interval_without_1_and_under_quick_a_tenth(
    lower: float, upper: float, better: str, protocol: str, expected: str
) -> None:
    assert verdict(lower, upper, better, protocol) == expected  # type: ignore[arg-type]


def test_a_metric_without_direction_has_no_verdict() -> None:
    with pytest.raises(ValueError, match="none"):
        verdict(0.5, 0.6, "none", "publish")  # type: ignore[arg-type]


@pytest.mark.parametrize("num_blocks", [2, 3, 5, 8, 31])
def test_the_p_value_is_that_of_scipy_s_t_test_on_logarithms(num_blocks: int) -> None:
    from scipy.stats import ttest_1samp

    random = np.random.default_rng(num_blocks)
    for effect in (0.0, 0.05, -0.3):
        own, base = np.exp(random.normal(effect, 0.1, num_blocks)), np.exp(random.normal(0, 0.1, num_blocks))
        assert paired_p_value(own, base) == pytest.approx(ttest_1samp(np.log(own / base), 0.0).pvalue, rel=1e-6, abs=1e-14)


def test_a_p_value_below_the_level_is_an_interval_without_1() -> None:
    random = np.random.default_rng(3)
    seen = set()
    for _ in range(100):
        own, base = np.exp(random.normal(0.08, 0.1, 4)), np.exp(random.normal(0, 0.1, 4))
        ratio, p = paired_ratio(own, base), paired_p_value(own, base)
        assert ratio.lower is not None and ratio.upper is not None and p is not None
        assert (p < 0.05) == (not ratio.lower <= 1.0 <= ratio.upper)
        seen.add(p < 0.05)
    assert seen == {True, False}


def test_blocks_that_agree_exactly_are_equal_or_different_without_doubt() -> None:
    assert paired_p_value([3.0, 4.0], [3.0, 4.0]) == 1.0
    assert paired_p_value([6.0, 8.0, 2.0], [3.0, 4.0, 1.0]) == 0.0
    assert paired_p_value([1e-200, 1e200], [1.0, 1.0]) == pytest.approx(1.0)
    assert paired_p_value([2.0, None], [1.0, 1.0]) is None
    assert paired_p_value([2.0, 0.0], [1.0, 1.0]) is None
    assert paired_p_value([2.0, 2.0], [1.0, 0.0]) is None


def test_holm_s_procedure_on_its_steps() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(ValueError, match="is no p-value"):
        holm([0.1, math.nan])


def test_holm_keeps_the_family_wise_error_where_single_tests_do_not() -> None:
    random, trials, metrics, level = np.random.default_rng(11), 1000, 20, 0.05
    singly = together = missed = 0
    for _ in range(trials):
        p = [paired_p_value(np.exp(random.normal(0, 0.1, 5)), np.ones(5)) for _ in range(metrics)]
        real = paired_p_value(np.exp(random.normal(1.0, 0.1, 5)), np.ones(5))
        assert real is not None
        adjusted = holm([*(q for q in p if q is not None), real])
        singly += min(q for q in p if q is not None) <= level
        together += min(adjusted[:-1]) <= level
        missed += adjusted[-1] > level
    print(f"any of {metrics} true nulls rejected: {singly / trials:.1%} singly, {together / trials:.1%} by Holm")
    assert singly / trials > 0.5
    assert 0.01 < together / trials < level + 3 * math.sqrt(level * (1 - level) / trials)
    assert missed / trials < 0.05


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.randoms())
def test_adjusted_p_values_keep_their_order_and_do_not_depend_on_it(p_values: list[float], random: object) -> None:
    adjusted = holm(p_values)
    assert all(p <= a <= min(1.0, p * len(p_values)) + 1e-12 for p, a in zip(p_values, adjusted, strict=True))
    order = list(range(len(p_values)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert holm([p_values[i] for i in order]) == [adjusted[i] for i in order]


def test_the_tail_of_few_steps_is_not_resolved() -> None:
    assert not tail_is_resolved(99, 99.0)
    assert tail_is_resolved(100, 99.0)
    assert tail_is_resolved(20, 95.0)
    assert percentile([], 50) is None
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5
    assert per_launch([1.0, 2.0, 6.0], "mean") == 3.0
    assert per_launch(range(101), "p99") == 99.0
    assert per_launch([]) is None


@given(blocks, st.floats(1e-3, 1e3))
def test_scaling_every_block_scales_the_interval(values: list[float], factor: float) -> None:
    plain, scaled = block_interval(values), block_interval([v * factor for v in values])
    for a, b in ((plain.value, scaled.value), (plain.lower, scaled.lower), (plain.upper, scaled.upper)):
        assert b == pytest.approx(a * factor, rel=1e-6)  # type: ignore[operator]


@given(st.lists(st.tuples(positive, positive), min_size=2, max_size=8))
def test_swapping_technique_and_baseline_inverts_the_ratio(pairs: list[tuple[float, float]]) -> None:
    above, below = [a for a, _ in pairs], [b for _, b in pairs]
    forth, back = paired_ratio(above, below), paired_ratio(below, above)
    assert forth.value is not None
    assert forth.value * back.value == pytest.approx(1.0, rel=1e-6)  # type: ignore[operator]
    if back.upper and math.isfinite(back.upper):
        assert forth.lower * back.upper == pytest.approx(1.0, rel=1e-6)  # type: ignore[operator]


@given(blocks, st.randoms())
def test_the_order_of_blocks_is_irrelevant(values: list[float], random: object) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert block_interval(shuffled) == block_interval(values)


@given(positive, positive, st.sampled_from(["quick", "publish"]))
def test_swapping_technique_and_baseline_swaps_the_verdict(one: float, other: float, protocol: str) -> None:
    lower, upper = sorted((one, other))
    swapped = {"better": "worse", "worse": "better"}
    forth, back = verdict(lower, upper, "lower", protocol), verdict(1 / upper, 1 / lower, "lower", protocol)
    middle = math.sqrt(lower * upper)
    if (
        min(
            abs(bound - edge)
            for bound in (lower, upper, middle)
            for edge in (1, 1 - SCREENING_FLOOR, 1 / (1 - SCREENING_FLOOR))
        )
        > 1e-9
    ):
        assert back == swapped.get(forth, forth)


def test_absurdly_wide_intervals_stay_finite() -> None:
    interval = block_interval([1e-200, 1e200])
    assert interval.upper is not None
    assert math.isfinite(interval.upper)
