"""Figures are pure functions of a data frame."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from effbench.analysis import frame as frames
from effbench.analysis.board import ranked
from leaderboard_app import ranking_table
from leaderboard_app.figures import ranking, style
from tests.records import GPU, make_board, make_case


def frame_of(cases: list, by: str = "tokens_per_s") -> pd.DataFrame:
    frame = ranking_table.ranking_frame(ranked(frames.frame_of(cases, [by]), by), by, [], {by: 1e-3}, {})
    return frame.sort_values(["hardware", "model", "setting", "rank"], kind="stable")


def bars(frame: pd.DataFrame, by: str = "tokens_per_s", title: str = "k tokens/s"):
    return ranking.ranking_bars(frame, by, title, style.colours(frame["techniques"]))


def test_bars_carry_value_interval_and_identity() -> None:
    frame = frame_of([make_case(techniques=("gqa",)), make_case(techniques=("mqa",), speed=2.0)])
    figure = bars(frame)
    (bar,) = figure.data
    assert list(bar.x) == pytest.approx([24.38, 12.19])
    assert list(bar.error_x.array) == pytest.approx([0.02 * x for x in bar.x])
    assert list(bar.error_x.arrayminus) == pytest.approx([0.02 * x for x in bar.x])
    assert [row[0] for row in bar.customdata] == list(frame.index)
    assert list(figure.layout.yaxis.ticktext) == ["mqa", "gqa"]
    assert figure.layout.xaxis.title.text == "k tokens/s"
    assert figure.layout.xaxis.rangemode == "tozero"


def test_best_row_is_on_top() -> None:
    figure = bars(frame_of([make_case(techniques=("gqa",)), make_case(techniques=("mqa",), speed=2.0)]))
    low, high = figure.layout.yaxis.range
    assert low > high, "the axis runs downwards"
    assert list(figure.data[0].y) == [0.0, 1.0]


def test_machines_and_models_stand_apart_under_their_names() -> None:
    figure = bars(frame_of([make_case(), make_case(hardware=GPU), make_case(model="Qwen2.5-0.5B")]))
    assert [note.text for note in figure.layout.annotations] == [
        "<b>2 × x86-64 core · Qwen2.5-0.5B</b>",
        "<b>2 × x86-64 core · tiny-llama</b>",
        "<b>NVIDIA H200 · tiny-llama</b>",
    ]
    places = {*figure.data[0].y} | {note.y - 0.1 for note in figure.layout.annotations}
    assert len(places) == 6
    assert not bars(frame_of([make_case()])).layout.annotations


def test_screening_rows_are_hatched() -> None:
    frame = frame_of([make_case(techniques=("gqa",)), make_case(techniques=("mqa",), protocol="publish")])
    shapes = dict(zip(frame["protocol"], bars(frame).data[0].marker.pattern.shape, strict=True))
    assert shapes == {"quick · screening": "/", "publish": ""}


def test_colour_follows_the_technique_and_not_the_selection() -> None:
    everything = style.colours(["mha", "gqa", "mqa", "mha"])
    assert len(set(everything.values())) == 3
    one = frame_of([make_case(techniques=("mqa",))])
    assert ranking.ranking_bars(one, "tokens_per_s", "", everything).data[0].marker.color[0] == everything["mqa"]


def test_hostile_text_stays_text() -> None:
    nasty = "<a href='javascript:alert(1)'>x</a>"
    cases = [make_case(techniques=(nasty,)), replace(make_case(model="<b>m"), hardware=nasty)]
    figure = bars(frame_of(cases), title=nasty)
    shown = [*figure.layout.yaxis.ticktext, figure.layout.xaxis.title.text, *(row[1] for row in figure.data[0].customdata)]
    shown += [note.text.removeprefix("<b>").removesuffix("</b>") for note in figure.layout.annotations]
    assert not any("<" in text for text in shown)
    assert "&lt;a href" in figure.layout.xaxis.title.text


def test_long_names_are_cut_and_many_rows_are_not_all_drawn() -> None:
    frame = frame_of([make_case(techniques=("t" * 300,))])
    assert len(bars(frame).layout.yaxis.ticktext[0]) == 40
    board = [case for case in make_board(600) if case.workload == "pretrain"]
    assert len(bars(frame_of(board)).data[0].x) == ranking.MAX_BARS


def test_frame_without_rows_gives_an_empty_figure_frame() -> None:
    assert frame_of([]).empty
    assert ranking_table.apart_frame(frames.frame_of([], ["al_s"]), "al_s", "s").empty
