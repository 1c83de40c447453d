"""The Pareto front against its definition, by values and by intervals."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effbench.analysis.frame import frame_of
from effbench.analysis.pareto import efficiency, floors, front, group_codes, maybe, trade_off, why_left_out
from tests.records import GPU, make_case, make_metrics, make_value

ROWS = st.lists(st.tuples(st.integers(-3, 6), st.integers(-3, 6), st.integers(0, 2)), max_size=14)
# Value, half-width of x and of y; group; floor of the protocol.
BOUNDS = st.lists(
    st.tuples(
        st.integers(1, 12), st.integers(0, 3), st.integers(1, 12), st.integers(0, 3), st.integers(0, 1), st.sampled_from([0.0, 0.1, 1.0])
    ),
    max_size=10,
)  # fmt: skip
DIRECTIONS = list(product(("lower", "higher"), repeat=2))
TIMES = {"lower": 1, "higher": -1}


@pytest.mark.parametrize("better", DIRECTIONS)
@given(rows=ROWS)
@settings(max_examples=100, deadline=None)
def test_front_is_what_no_other_row_beats(better, rows) -> None:
    x, y, group = np.array(rows, float).reshape(-1, 3).T
    found = front(x, y, *better, group.astype(int))
    costs = [(TIMES[better[0]] * a, TIMES[better[1]] * b, g) for a, b, g in rows]
    for mine, on_it in zip(costs, found, strict=True):
        beaten = any(
            other[2] == mine[2] and other[0] <= mine[0] and other[1] <= mine[1] and other[:2] != mine[:2] for other in costs
        )
        assert on_it == (not beaten)


@pytest.mark.parametrize("better", DIRECTIONS)
@given(rows=BOUNDS)
@settings(max_examples=100, deadline=None)
def test_maybe_is_what_no_other_row_is_shown_to_beat(better, rows) -> None:
    found = maybe_of(rows, better)
    for mine, on_it in zip(rows, found, strict=True):
        assert on_it == (not any(shown_to_beat(other, mine, better) for other in rows))


@pytest.mark.parametrize("better", DIRECTIONS)
@given(rows=BOUNDS)
@settings(max_examples=60, deadline=None)
def test_the_front_is_part_of_those_that_may_be_on_it(better, rows) -> None:
    table = np.array(rows, float).reshape(-1, 6)
    on_front = front(table[:, 0], table[:, 2], *better, table[:, 4].astype(int))
    assert not (on_front & ~maybe_of(rows, better)).any()


def bounds_of(row, axis: int) -> tuple[float, float]:
    """Lower and upper bound; widths in quarters, so that bounds of different rows meet, and stay positive."""
    value, half = row[2 * axis], row[2 * axis + 1] / 4
    return value - half, value + half


def maybe_of(rows, better):
    x, y = (np.array([bounds_of(row, axis) for row in rows], float).reshape(-1, 2) for axis in (0, 1))
    return maybe(x, y, *better, np.array([row[4] for row in rows], int), np.array([row[5] for row in rows], float))


def shown_to_beat(other, mine, better) -> bool:
    """The definition in words: no worse in one metric, better by the floor in the other, bound against bound."""
    floor = max(other[5], mine[5])
    if other[4] != mine[4] or floor >= 1:
        return False
    no_worse, far_better = [], []
    for axis in (0, 1):
        (low, high), (my_low, my_high) = bounds_of(other, axis), bounds_of(mine, axis)
        if better[axis] == "lower":
            no_worse.append(high <= my_low)
            far_better.append(high < my_low * (1 - floor))
        else:
            no_worse.append(low >= my_high)
            far_better.append(low > my_high / (1 - floor))
    return (far_better[0] and no_worse[1]) or (no_worse[0] and far_better[1])


def test_rows_without_a_number_are_on_no_front_and_rule_out_nobody() -> None:
    nan, infinite = float("nan"), float("inf")
    x, y = np.array([nan, 1.0, infinite, 2.0]), np.array([0.0, 1.0, 0.0, nan])
    assert front(x, y, "lower", "lower").tolist() == [False, True, False, False]
    unknown = np.array([[0.1, nan], [1.0, 1.2]])
    assert maybe(unknown, np.array([[0.1, 0.2], [1.0, 1.2]]), "lower", "lower").tolist() == [True, True]


def test_nothing_has_no_front_and_no_direction_is_refused() -> None:
    assert front(np.empty(0), np.empty(0), "lower", "higher").tolist() == []
    assert maybe(np.empty((0, 2)), np.empty((0, 2)), "lower", "higher").tolist() == []
    with pytest.raises(ValueError, match="direction"):
        front(np.ones(2), np.ones(2), "none", "lower")


def test_a_hundred_thousand_rows_take_no_hundred_thousand_squared() -> None:
    random = np.random.default_rng(0)
    x, y = random.random((2, 100_000))
    found = front(x, y, "lower", "lower")
    order = np.argsort(x)
    assert np.array_equal(np.sort(np.flatnonzero(found)), np.sort(order[y[order] <= np.minimum.accumulate(y[order])]))
    bounds = [np.stack([values, values + 1e-3], axis=1) for values in (x, y)]
    assert found.sum() < maybe(*bounds, "lower", "lower").sum() < 1_000


def rows_of(**values: tuple[float, float]):
    """Rows named by a technique, with tokens/s and step p50 in s, in one question."""
    return [
        make_case(techniques=(name,), baseline=None, protocol="publish", metrics=tuple(made))
        for name, (rate, step_s) in values.items()
        for made in [(make_value("tokens_per_s", rate), make_value("step_p50_s", step_s))]
    ]


def test_trade_off_marks_the_front_and_says_why_rows_are_left_out() -> None:
    cases = [
        *rows_of(gqa=(100.0, 1.0), mqa=(200.0, 2.0), mha=(90.0, 2.0), lora=(99.5, 1.01)),
        make_case(techniques=("full",), status="failed", reason="out_of_memory"),
        make_case(techniques=("bf16",), metrics=(make_value("tokens_per_s", 1.0),)),
    ]
    rows, left_out = trade_off(frame_of(cases, ["tokens_per_s", "step_p50_s"]), "tokens_per_s", "step_p50_s")
    stands = {row.label: (row.front, row.maybe) for row in rows.itertuples()}
    assert stands == {"gqa": (True, True), "mqa": (True, True), "mha": (False, False), "lora": (False, True)}
    assert sum(left_out.values()) == 2
    assert any("Tokens/s" in why and "out_of_memory" in why for why in left_out)
    assert any("Step p50" in why and "not_taken" in why for why in left_out)


def test_rows_of_different_questions_and_sensors_do_not_beat_each_other() -> None:
    slow, fast = (make_metrics("pretrain", "cuda", speed=speed) for speed in (1.0, 3.0))
    cases = [
        make_case(techniques=("gqa",), hardware=GPU, metrics=slow, protocol="publish"),
        make_case(techniques=("mqa",), hardware=GPU, metrics=fast, protocol="publish"),
        make_case(techniques=("mha",), hardware=GPU, metrics=slow, protocol="publish", seed=1),
        make_case(techniques=("lora",), hardware=GPU, protocol="publish", metrics=tuple(
            make_value(value.name, value.value, source="another sensor") if value.name == "energy_j_per_token" else value for value in slow
        )),
    ]  # fmt: skip
    rows, left_out = trade_off(frame_of(cases, ["energy_j_per_token", "tokens_per_s"]), "energy_j_per_token", "tokens_per_s")
    assert {row.label: row.maybe for row in rows.itertuples()} == {"gqa": False, "mqa": True, "mha": True, "lora": True}
    assert rows["group"].nunique() == 3
    assert left_out == {}


def test_first_reason_counts_and_a_value_that_is_not_finite_is_missing() -> None:
    frame = frame_of(rows_of(gqa=(1.0, 1.0), mqa=(2.0, 1.0)), ["tokens_per_s", "step_p50_s"])
    frame["tokens_per_s"] = [np.nan, 2.0]
    assert [bool(why) for why in why_left_out(frame, ["step_p50_s", "tokens_per_s"])] == [True, False]
    assert why_left_out(frame.iloc[:0], ["tokens_per_s"]).tolist() == []


def test_group_codes_and_floors() -> None:
    frame = frame_of(rows_of(gqa=(1.0, 1.0), mqa=(1.0, 1.0)), [])
    assert len(set(group_codes(frame, ["question"]))) == 1
    assert len(set(group_codes(frame, ["question", "label"]))) == 2
    assert floors(["smoke", "quick", "publish"]).tolist() == [1.0, 0.1, 0.0]


@pytest.mark.parametrize(
    ("x", "y", "kind", "better", "unit"),
    [
        ("aec_w", "al_s", "x*y", "lower", "J"),
        ("aec_w", "tokens_per_s", "y/x", "higher", "tokens/J"),
        ("tokens_per_s", "aec_w", "x/y", "higher", "tokens/J"),
        ("amu_gb", "tokens_per_s", "y/x", "higher", "tokens/s/GB"),
        ("weight_bytes", "tokens_per_s", "y/x", "higher", "tokens/s/B"),
        ("energy_j_per_token", "quality", "y/x", "higher", ""),
        ("quality", "tokens_per_s", "x*y", "higher", ""),
    ],
)
def test_what_two_metrics_are_together(x, y, kind, better, unit) -> None:
    found = efficiency(x, y)
    assert found is not None
    assert (found.kind, found.better, found.unit) == (kind, better, unit)


def test_one_metric_or_none_with_a_direction_is_no_efficiency() -> None:
    assert efficiency("quality", "quality") is None
    assert efficiency("params_total", "quality") is None
