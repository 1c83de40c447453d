"""The figures of the trade-offs page are pure functions of a data frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from effbench.analysis.frame import frame_of
from effbench.analysis.pareto import Efficiency, efficiency, trade_off
from effbench.analysis.roofline import Roof
from effbench.schema import CaseRecord
from leaderboard_app.figures import profiles, tradeoffs
from leaderboard_app.figures.tradeoffs import MAX_BARS, MAX_POINTS, MAX_ROWS, Axis, levels, thin
from tests.app.test_tradeoffs import MEMORY, RATE, row, some
from tests.records import make_value


def points_of(cases: Sequence[CaseRecord]) -> pd.DataFrame:
    return trade_off(frame_of(cases, [MEMORY, RATE]), MEMORY, RATE)[0]


X = Axis(name=MEMORY, factor=1e-9, title="<b>memory</b> (GB)", better="lower")
Y = Axis(name=RATE, factor=1e-3, title="k tokens/s", better="higher")


def marks(figure) -> dict[str, object]:
    return {trace.name: trace for trace in figure.data if trace.mode == "markers"}


def test_marks_have_their_place_interval_and_standing() -> None:
    figure = tradeoffs.trade_off(points_of(some()), X, Y, {"gqa": "#123456"})
    found = marks(figure)
    assert set(found) == {"gqa", "mqa", "mha", "lora"}
    gqa = found["gqa"]
    assert (list(gqa.x), list(gqa.y)) == ([pytest.approx(1.0)], [pytest.approx(0.1)])
    assert list(gqa.error_x.array) == pytest.approx([0.01])
    assert list(gqa.error_y.arrayminus) == pytest.approx([0.001])
    assert list(gqa.marker.color) == ["#123456"]
    assert [found[name].marker.symbol[0] for name in ("gqa", "lora", "mha")] == ["circle", "circle", "circle-open"]
    assert list(gqa.customdata[0][2:]) == ["on the front", "1 (0.99 – 1.01)", "0.1 (0.099 – 0.101)"]
    assert figure.layout.xaxis.title.text == "&lt;b&gt;memory&lt;/b&gt; (GB) · lower is better"
    assert not any(
        trace.error_x.visible for trace in marks(tradeoffs.trade_off(points_of(some()), X, Y, {}, error_bars=False)).values()
    )


def test_the_stair_goes_through_the_front_on_the_side_that_it_rules_out() -> None:
    (stair,) = [trace for trace in tradeoffs.trade_off(points_of(some()), X, Y, {}).data if trace.name == "front"]
    assert list(stair.x) == pytest.approx([1.0, 2.0])
    assert stair.line.shape == "hv", "between two rows of the front the cheaper one is what can be had"
    turned = replace(X, name=RATE, factor=1.0, better="higher"), replace(Y, name=MEMORY, factor=1.0, better="lower")
    (stair,) = [trace for trace in tradeoffs.trade_off(points_of(some()), *turned, {}).data if trace.name == "front"]
    assert stair.line.shape == "vh"


def test_log_axes_are_for_positive_values_only() -> None:
    points = points_of(some())
    figure = tradeoffs.trade_off(points, replace(X, log=True), replace(Y, log=True), {})
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type) == ("log", "log")
    points.loc[points.index[0], MEMORY] = 0.0
    figure = tradeoffs.trade_off(points, replace(X, log=True), replace(Y, log=True), {}, efficiency(MEMORY, RATE))
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type) == ("linear", "log")


@pytest.mark.parametrize("kind", ["x*y", "y/x", "x/y"])
def test_iso_lines_are_where_the_combination_is_the_same(kind: str) -> None:
    together = Efficiency(kind=kind, better="higher", meaning="", unit="")
    figure = tradeoffs.trade_off(points_of(some()), X, Y, {}, together)
    lines = [trace for trace in figure.data if trace.name == "iso-efficiency"]
    assert lines
    combine = {"x*y": np.multiply, "y/x": lambda x, y: y / x, "x/y": lambda x, y: x / y}[kind]
    found = [combine(np.array(line.x), np.array(line.y)) for line in lines]
    assert all(np.allclose(values, values[0]) for values in found)
    assert len({round(float(values[0]), 9) for values in found}) == len(lines)
    assert lines[0].text[-1] == "best"
    assert found[0][0] == pytest.approx(max(combine(points_of(some())[MEMORY] * 1e-9, points_of(some())[RATE] * 1e-3)))


def test_levels_step_from_the_best_and_carry_the_unit() -> None:
    joules = Efficiency(kind="x*y", better="lower", meaning="", unit="J")
    found = levels(np.array([2000.0, 4000.0, 8000.0]), 1e3, joules)  # in mJ: the axes were multiplied with 1000 in all
    assert [level for level, _ in found] == pytest.approx([2000.0, 3000.0, 4500.0, 6750.0, 10125.0])
    assert [text for _, text in found][:2] == ["2 J", "3 J"]
    rate = Efficiency(kind="y/x", better="higher", meaning="", unit="")
    assert [text for _, text in levels(np.array([1.0, 1.2]), 1.0, rate)] == ["best", "best / 1.25"]
    assert levels(np.array([3.0]), 1.0, rate) == [(3.0, "best")]
    assert len(levels(np.array([1e-9, 1e9]), 1.0, rate)) == 5


def many(count: int) -> pd.DataFrame:
    """A frame of `trade_off` with every row on the front, as if `count` had been measured."""
    frame = points_of(some()[:1]).iloc[[0] * count].copy()
    for name, values in ((MEMORY, np.linspace(1, 2, count)), (RATE, np.linspace(1, 2, count))):
        for end in ("", "__lower", "__upper"):
            frame[f"{name}{end}"] = values
    frame.index = pd.Index([f"{number:032x}" for number in range(count)])
    return frame


def test_a_figure_never_has_more_than_five_thousand_points() -> None:
    points = thin(many(9_000), MEMORY, RATE)
    figure = tradeoffs.trade_off(points, X, Y, {}, efficiency(MEMORY, RATE))
    assert len(points) == MAX_ROWS
    assert sum(len(trace.x) for trace in figure.data) <= MAX_POINTS
    wide = many(9_000)
    wide[f"{MEMORY}__upper"] += 1
    (drawn,) = marks(tradeoffs.trade_off(thin(wide, MEMORY, RATE), X, Y, {})).values()
    assert np.count_nonzero(drawn.error_x.array) == MAX_BARS
    with pytest.raises(AssertionError, match="thin"):
        tradeoffs.trade_off(many(MAX_ROWS + 1), X, Y, {})


def test_thinning_keeps_the_front_the_extremes_and_then_who_may_be_on_it() -> None:
    points = many(1_000)
    points["front"] = np.arange(1_000) == 500
    points["maybe"] = np.arange(1_000) % 100 == 0
    kept = thin(points, MEMORY, RATE, 20)
    assert len(kept) == 20
    places = [int(name, 16) for name in kept.index]
    assert places == sorted(places)
    assert {0, 500, 999, *range(0, 1_000, 100)} <= set(places)
    assert list(thin(points, MEMORY, RATE, 20).index) == list(kept.index)
    assert set(thin(points.iloc[::-1], MEMORY, RATE, 20).index) == set(kept.index), "whatever the order"
    assert thin(points, MEMORY, RATE, 1_000) is points


def test_many_stacks_have_no_legend_of_their_own_and_hostile_names_are_escaped() -> None:
    points = many(11)
    points["label"] = [f"<i>{number}" for number in range(11)]
    assert set(marks(tradeoffs.trade_off(points, X, Y, {}))) == {"rows"}
    figure = tradeoffs.trade_off(points.head(2), X, Y, {})
    assert "<i>" not in "".join(marks(figure))
    assert "<i>" not in str([trace.customdata for trace in marks(figure).values()])
    assert len(tradeoffs.trade_off(points.head(0), X, Y, {}, efficiency(MEMORY, RATE)).data) == 0


def test_roofs_bend_at_their_ridge_and_are_told_apart() -> None:
    measured = Roof(dtype="<i>fp32", flops_per_s=2e11, bytes_per_s=1e10, measured=True)
    other = replace(measured, dtype="bf16", flops_per_s=4e11)
    sheet = replace(other, measured=False, bytes_per_s=2e10)
    rows = points_of(some()).assign(intensity=10.0, flops_per_s=5e10, attained=0.5, dtype="fp32")
    figure = tradeoffs.roofline(rows, [other, measured, sheet], {})
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    assert [line.name for line in lines] == ["bf16, measured", "&lt;i&gt;fp32, measured", "bf16, datasheet"]
    assert [line.line.dash for line in lines] == ["solid", "dash", "dot"]
    assert (lines[1].x[1], lines[1].y[1]) == (20.0, 2e11)
    assert lines[1].y[0] == pytest.approx(lines[1].x[0] * 1e10)
    assert lines[1].y[2] == 2e11
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type) == ("log", "log")
    assert {trace.name for trace in figure.data if trace.mode == "markers"} == {"gqa", "mqa", "mha", "lora"}
    assert (
        len([trace for trace in tradeoffs.roofline(rows, [sheet] * 40, {}).data if trace.mode == "lines"])
        == tradeoffs.MAX_ROOFS
    )


def test_profiles_draw_each_row_over_the_metrics_with_the_raw_ends() -> None:
    rows = frame_of(some(), [RATE, MEMORY, "quality"])
    table_, left_out = profiles.scores(rows, [RATE, MEMORY, "quality"])
    assert left_out == {}
    assert table_[RATE].tolist() == pytest.approx([0.1 + 0.9 * 10 / 110, 1.0, 0.1, 0.1 + 0.9 * 9.5 / 110])
    names, headings = {run_id: f"<i>{run_id}" for run_id in rows.index}, {RATE: "tokens/s", MEMORY: "B", "quality": "<u>"}
    figure = profiles.parallel(table_, names, headings, dict.fromkeys(headings, ("<w>", "best!")))
    assert [list(trace.y) for trace in figure.data] == [list(line) for line in table_.to_numpy()]
    assert [note.text for note in figure.layout.annotations] == ["&lt;w&gt;", "best!"] * 3
    assert not any("<" in trace.name for trace in figure.data)
    assert len({(trace.line.color, trace.line.dash) for trace in figure.data}) == 4
    round_ = profiles.radar(table_, names, headings)
    for trace, line in zip(round_.data, table_.to_numpy(), strict=True):
        assert list(trace.r) == [*line, line[0]]
        assert list(trace.theta) == ["tokens/s", "B", "&lt;u&gt;", "tokens/s"]
    assert len(profiles.radar(pd.concat([table_] * 3), names, headings).data) == profiles.MAX_ROWS


def test_the_radar_leaves_out_a_metric_that_a_row_lacks() -> None:
    rows = frame_of([*some(), row("full", metrics=(make_value(RATE, 1.0),))], [RATE, MEMORY])
    table_, _ = profiles.scores(rows, [RATE, MEMORY])
    assert table_[MEMORY].isna().sum() == 1
    assert set(profiles.radar(table_, {}, {RATE: "a", MEMORY: "b"}).data[0].theta) == {"a"}
