"""What to use: limits, ranks and what each choice gives up, by the rules of the ranking."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from effbench.analysis.advice import BEST, BETTER, NO_VALUE, NOT_SHOWN, WORSE, advise, against, in_words
from effbench.analysis.board import Bound
from effbench.analysis.frame import frame_of
from effbench.analysis.rank import rank
from effbench.schema import CaseRecord
from effbench.stats import verdict
from tests.records import make_case, make_value

RATE, TIME, MEMORY, QUALITY = "tokens_per_s", "tpot_s", "host_memory_peak_bytes", "quality"
NAMES = (RATE, TIME, MEMORY, QUALITY)


def row(
    name: str, rate: float = 100.0, time_s: float = 0.01, memory: float = 1e9, quality: float = 0.5, **changes
) -> CaseRecord:
    """A row of one question, without a baseline unless `changes` names one."""
    numbers = {RATE: rate, TIME: time_s, MEMORY: memory, QUALITY: quality}
    metrics = tuple(make_value(metric, value, half=0.01) for metric, value in numbers.items())
    return make_case("generate", (name,), **{"baseline": None, "protocol": "publish", "metrics": metrics} | changes)


def with_value(record: CaseRecord, value) -> CaseRecord:
    return replace(record, metrics=tuple(value if found.name == value.name else found for found in record.metrics))


def advice_of(cases, by=RATE, limits=(), others=(), **more):
    return advise(frame_of(cases, NAMES), by, limits, others, **more)


def at_most(value: float, *metrics: str) -> Bound:
    return Bound(metrics=metrics, value=value, at_most=True)


def labels(found) -> list[str]:
    return list(found.choices["label"])


def test_choices_come_best_first_with_shared_places() -> None:
    found = advice_of([row("gqa", 100.0), row("mqa", 200.0), row("mha", 101.0)])
    assert labels(found) == ["mqa", "mha", "gqa"]
    assert list(found.choices["rank"]) == [1, 2, 2]
    assert list(found.choices["shared"]) == [False, True, True]
    assert found.num_met == 3


def test_limits_keep_rows_out_and_say_why() -> None:
    rows = [
        row("gqa", 100.0, memory=2e9),
        row("mqa", 90.0, memory=1e9),
        with_value(row("mha", 300.0), make_value(MEMORY, None, reasons=("not_sampled",))),
        row("lora", 80.0, memory=1e9, quality=0.1),
        row("full", status="failed", reason="out_of_memory", metrics=()),
    ]
    found = advice_of(rows, limits=(at_most(1.5e9, MEMORY), Bound(metrics=(QUALITY,), value=0.4, at_most=False)))
    assert labels(found) == ["mqa"]
    assert sorted(found.left_out.values()) == [1, 1, 1, 1]
    said = " / ".join(found.left_out)
    for part in ("Peak host memory: beyond", "Peak host memory: no usable", "Quality: beyond", "out_of_memory"):
        assert part in said
    assert labels(advice_of(rows[:2], limits=(at_most(2e9, MEMORY),))) == ["gqa", "mqa"], "a value at its limit meets it"


def test_an_interval_that_reaches_beyond_a_limit_is_said() -> None:
    rows = [row("gqa", memory=1e9), row("mqa", memory=0.9e9)]
    frame = frame_of(rows, (*NAMES, "device_memory_peak_bytes"))
    found = advise(frame, RATE, (at_most(1.005e9, "device_memory_peak_bytes", MEMORY),))
    assert dict(zip(found.choices["label"], found.choices["unsure"], strict=True)) == {
        "gqa": "Peak device memory or Peak host memory",
        "mqa": "",
    }
    both = row("gqa", memory=2e9)
    both = replace(both, metrics=(*both.metrics, make_value("device_memory_peak_bytes", 1e8, half=0.01)))
    frame = frame_of([both], (*NAMES, "device_memory_peak_bytes"))
    found = advise(frame, RATE, (at_most(1e9, "device_memory_peak_bytes", MEMORY),))
    assert list(found.choices["unsure"]) == [""], "the first that a row has counts"
    least = Bound(metrics=(QUALITY,), value=0.499, at_most=False)
    assert list(advice_of(rows[:1], limits=(least,)).choices["unsure"]) == ["Quality"]


def test_what_a_choice_gives_up_is_its_ratio_to_the_best_that_meets_the_limits() -> None:
    rows = [row("gqa", 100.0, memory=1e9), row("mqa", 200.0, memory=2e9), row("mha", 300.0, memory=9e9)]
    found = advice_of(rows, limits=(at_most(3e9, MEMORY),), others=(MEMORY,)).choices
    fast, small = found.loc[found["label"] == "mqa"].iloc[0], found.loc[found["label"] == "gqa"].iloc[0]
    assert (fast[f"{RATE}__verdict"], small[f"{MEMORY}__verdict"]) == (BEST, BEST)
    assert small[f"{RATE}__best"] == fast.name
    assert small[f"{RATE}__against"] == pytest.approx(0.5)
    assert small[f"{RATE}__against_lower"] == pytest.approx(99 / 202)
    assert small[f"{RATE}__against_upper"] == pytest.approx(101 / 198)
    assert in_words(small, RATE) == "×0.500 (0.490–0.510) worse"
    assert in_words(fast, MEMORY) == "×2.00 (1.96–2.04) worse"
    assert in_words(fast, RATE) == BEST


def test_only_values_of_one_sensor_are_held_against_each_other() -> None:
    other = with_value(row("mqa", 90.0), make_value(MEMORY, 1e8, source="another sensor"))
    lost = with_value(row("mha", 80.0), make_value(MEMORY, None, reasons=("not_sampled",)))
    found = advice_of([row("gqa", 100.0, memory=1e9), row("lora", 70.0, memory=2e9), other, lost], others=(MEMORY,)).choices
    said = {line["label"]: in_words(line, MEMORY).split(" ")[-1] for _, line in found.iterrows()}
    assert said == {"gqa": BEST, "lora": WORSE, "mqa": BEST, "mha": "value"}
    assert set(found.loc[found["label"] == "mha", f"{MEMORY}__verdict"]) == {NO_VALUE}
    assert np.isnan(found.loc[found["label"] == "mha", f"{MEMORY}__against"]).all()


@pytest.mark.parametrize("protocol", ["quick", "publish", "smoke"])
def test_the_verdict_on_a_baseline_is_that_of_the_paired_ratio(protocol: str) -> None:
    """The values are far too coarse; the pairs are not. Also the other way round, with the reciprocal interval."""
    for ratio in (0.5, 0.93, 0.995, 1.03, 1.5):
        base = with_value(row("mha", protocol=protocol), make_value(RATE, 100.0, half=0.5))
        case = with_value(
            row("gqa", protocol=protocol, baseline=("mha",)),
            make_value(RATE, 100.0 * ratio, half=0.5, ratio=ratio, ratio_half=0.01),
        )
        frame = frame_of([base, case], [RATE])
        first, second = frame[frame["label"] == "mha"], frame[frame["label"] == "gqa"]
        numbers, said = against(second, first, RATE)
        assert said[0] == verdict(ratio * 0.99, ratio * 1.01, "higher", protocol)
        assert numbers[:, 0] == pytest.approx([ratio, ratio * 0.99, ratio * 1.01])
        numbers, said = against(first, second, RATE)
        assert said[0] == verdict(1 / (ratio * 1.01), 1 / (ratio * 0.99), "higher", protocol)
        assert numbers[:, 0] == pytest.approx([1 / ratio, 1 / (ratio * 1.01), 1 / (ratio * 0.99)])


def test_rows_of_one_baseline_compare_by_their_paired_ratios() -> None:
    def case(name: str, ratio: float, env: str = "here") -> CaseRecord:
        value = make_value(RATE, 100.0, half=0.5, ratio=ratio, ratio_half=0.01)
        return replace(with_value(row(name, baseline=("mha",)), value), env_id=env)

    frame = frame_of([case("gqa", 1.2), case("mqa", 1.8), case("lora", 1.8, env="elsewhere")], [RATE]).set_index(
        "label", drop=False
    )
    numbers, said = against(frame, frame.loc[["mqa"]], RATE)
    assert list(said) == [WORSE, NOT_SHOWN, NOT_SHOWN]
    assert numbers[0] == pytest.approx([1.2 / 1.8, 1.0, 1.0])
    assert numbers[1][2] == pytest.approx(50 / 150), "another environment: the values count, not the ratios"


def test_values_that_are_not_positive_have_a_verdict_and_no_ratio() -> None:
    cases = [
        with_value(row(name), replace(make_value(QUALITY, value), lower=value - 0.01, upper=value + 0.01))
        for name, value in (("gqa", -0.2), ("mqa", 0.1), ("mha", -0.1))
    ]
    frame = frame_of(cases, [QUALITY])
    numbers, said = against(frame, frame[frame["label"] == "mqa"], QUALITY)
    assert dict(zip(frame["label"], said, strict=True)) == {"gqa": WORSE, "mqa": NOT_SHOWN, "mha": WORSE}
    assert np.isnan(numbers[:, frame["label"] != "mqa"]).all()


@pytest.mark.parametrize("by", [RATE, TIME])
def test_verdicts_agree_with_the_ranking_of_any_two_rows(by: str) -> None:
    """Two rows at a time: shown to be worse exactly where the ranking puts the row second."""
    random = np.random.default_rng(3)
    for _ in range(80):
        pair = []
        for name in ("gqa", "mqa" if random.random() < 0.6 else "mha"):
            value = make_value(
                by, float(random.uniform(0.8, 1.4)), half=float(random.uniform(0.005, 0.2)),
                ratio=float(random.uniform(0.8, 1.4)), ratio_half=float(random.uniform(0.005, 0.2)),
            )  # fmt: skip
            protocol = str(random.choice(["quick", "publish", "smoke"]))
            pair.append(
                make_case(
                    "generate", (name,), baseline=None if name == "mha" else ("mha",), protocol=protocol, metrics=(value,)
                )
            )
        frame = frame_of(pair, [by])
        places = {ranked.record.run_id: ranked.rank for ranked in rank(pair, by)}
        for mine, other in ((0, 1), (1, 0)):
            said = against(frame.iloc[[mine]], frame.iloc[[other]], by)[1][0]
            assert (said == WORSE) == (places[frame.index[mine]] == 2)
            assert (said == BETTER) == (places[frame.index[other]] == 2)


def test_many_choices_are_cut_and_none_are_no_fault() -> None:
    rows = [row("gqa", 100.0 + 10 * i, run_id=f"{i:032x}", started_at=f"2026-11-20T10:00:{i:02d}+00:00") for i in range(12)]
    rows = [replace(case, case_id=f"case{i}") for i, case in enumerate(rows)]
    found = advice_of(rows, most=5)
    assert (len(found.choices), found.num_met) == (5, 12)
    none = advice_of(rows, limits=(at_most(1.0, MEMORY),), others=(MEMORY,))
    assert (len(none.choices), none.num_met, sum(none.left_out.values())) == (0, 0, 12)
    assert isinstance(none.choices, pd.DataFrame)
    assert f"{MEMORY}__verdict" in none.choices


def test_mixed_questions_and_metrics_without_direction_are_refused() -> None:
    with pytest.raises(ValueError, match="one question"):
        advice_of([row("gqa"), row("gqa", seed=1)])
    for name in ("params_total", "energy_net_j_per_token"):
        with pytest.raises(ValueError, match=name):
            advise(frame_of([row("gqa")], [RATE, name]), RATE, others=(name,))
