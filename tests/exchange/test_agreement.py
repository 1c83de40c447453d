"""Whether a row that was measured again agrees with the one that was submitted: by value, by ratio, by interval."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from effbench import stats
from effbench.exchange.agreement import agreements, environment_of, outcome
from effbench.schema import CaseRecord
from tests.records import GPU, make_case, make_value


def verdicts(submitted: CaseRecord, here: CaseRecord, of: str = "value") -> dict[str, str]:
    return {line.name: line.verdict for line in agreements(submitted, here) if line.of == of}


def judge(submitted: CaseRecord, here: CaseRecord) -> str:
    return outcome(submitted, here, agreements(submitted, here))


def measured(speed: float = 1.0, half: float = 0.02, **changes: Any) -> CaseRecord:
    from tests.records import make_metrics

    hardware = changes.get("hardware", "")
    metrics = make_metrics("pretrain", "cuda" if hardware == GPU else "cpu", speed=speed, half=half)
    exact = ("params_", "weight_bytes", "quality", "train_loss", "validation_loss", "bits_per_byte", "perplexity")
    metrics = tuple(replace(v, lower=v.value, upper=v.value) if v.name.startswith(exact) else v for v in metrics)
    return make_case(**{"metrics": metrics, "protocol": "publish"} | changes)


ROW = measured()


def test_equal_rows_agree_and_a_faster_one_differs() -> None:
    assert judge(measured(), measured(1.02)) == "reproduced"
    assert set(verdicts(measured(), measured(1.02)).values()) == {"agrees"}
    assert judge(measured(), measured(1.3)) == "differs"
    found = verdicts(measured(), measured(1.3))
    assert found["tokens_per_s"] == found["step_p50_s"] == "differs"
    assert found["weight_bytes"] == found["quality"] == "agrees"


def test_a_spoilt_baseline_differs_though_the_values_agree() -> None:
    def against(ratio: float) -> CaseRecord:
        values = [
            replace(v, ratio=ratio, ratio_lower=ratio * 0.99, ratio_upper=ratio * 1.01)
            for v in ROW.metrics
            if v.name == "tokens_per_s"
        ]
        return replace(ROW, metrics=tuple(values))

    assert judge(against(2.0), against(2.05)) == "reproduced"
    assert verdicts(against(2.0), against(1.2)) == {"tokens_per_s": "agrees"}
    assert verdicts(against(2.0), against(1.2), "ratio to baseline") == {"tokens_per_s": "differs"}
    assert judge(against(2.0), against(1.2)) == "differs"
    assert judge(against(2.0), replace(ROW, metrics=(make_value("tokens_per_s", 12190.0),))) == "cannot tell"


def test_quality_is_compared_by_its_value_since_its_scatter_is_that_of_the_seeds() -> None:
    def scattered(value: float) -> CaseRecord:
        found = make_value("quality", value, half=0.3, ratio=1.0, ratio_half=0.3)
        return replace(ROW, metrics=(found,))

    assert set(verdicts(scattered(0.30), scattered(0.31)).values()) == {"agrees"}
    assert set(verdicts(scattered(0.30), scattered(0.33)).values()) == {"differs"}
    assert verdicts(scattered(0.30), scattered(0.30), "ratio to baseline") == {"quality": "agrees"}


def test_wide_intervals_cannot_tell_and_earn_nothing() -> None:
    assert judge(measured(half=0.15), measured(half=0.15)) == "cannot tell"
    found = {line.name: line for line in agreements(measured(half=0.15), measured(half=0.15))}
    assert found["tokens_per_s"].why == "the interval crosses the edge of the tolerance"


def test_other_hardware_is_recorded_but_compares_only_what_is_counted_and_quality() -> None:
    submitted, here = measured(hardware=GPU), measured(3.0)
    assert judge(submitted, here) == "other hardware"
    assert set(verdicts(submitted, here)) == {
        "params_total", "params_active", "params_trainable", "weight_bytes", "quality", "train_loss", "validation_loss",
        "bits_per_byte", "perplexity", "next_token_accuracy",
    }  # fmt: skip


def test_smoke_rows_one_block_and_missing_values_cannot_tell() -> None:
    smoke = measured(protocol="smoke")
    assert judge(smoke, smoke) == "cannot tell"
    one = [replace(v, lower=None, upper=None, n=1) if v.name == "tokens_per_s" else v for v in measured().metrics]
    assert judge(measured(), measured(metrics=tuple(one))) == "cannot tell"
    without = tuple(v for v in measured().metrics if v.name != "step_p50_s")
    lines = {line.name: line for line in agreements(measured(), measured(metrics=without))}
    assert (lines["step_p50_s"].verdict, lines["step_p50_s"].why) == ("cannot tell", "it was not measured here (not taken)")
    assert judge(measured(), measured(metrics=without)) == "cannot tell"
    failed = make_case(status="failed", reason="out_of_memory")
    assert judge(measured(), failed) == "cannot tell"


def test_energy_of_another_sensor_and_another_figure_of_quality_do_not_compare() -> None:
    other = tuple(replace(v, source="another") for v in measured(hardware=GPU).metrics)
    lines = {line.name: line for line in agreements(measured(hardware=GPU), measured(hardware=GPU, metrics=other))}
    for name in ("energy_j_per_token", "quality", "aec_w", "device_memory_peak_bytes"):
        assert lines[name].verdict == "cannot tell" and "different" in lines[name].why
    assert lines["tokens_per_s"].verdict == "agrees"


def test_one_parameter_more_differs_and_no_trainable_parameters_agree() -> None:
    more = tuple(
        replace(v, value=v.value * 1.01, lower=None, upper=None) if v.name == "weight_bytes" else v for v in measured().metrics
    )
    assert judge(measured(), measured(metrics=more)) == "differs"
    none = tuple(make_value("params_trainable", 0.0) if v.name == "params_trainable" else v for v in measured().metrics)
    assert judge(measured(metrics=none), measured(metrics=none)) == "reproduced"


@settings(max_examples=200, deadline=None)
@given(
    a=st.floats(1e-6, 1e12), ratio=st.floats(0.2, 5.0), half=st.floats(0.0, 0.3), name=st.sampled_from(["tokens_per_s", "al_s", "ttft_s"])
)  # fmt: skip
def test_the_verdict_is_that_of_the_band_whichever_row_comes_first(a: float, ratio: float, half: float, name: str) -> None:
    def row(value: float) -> CaseRecord:
        found = make_value(name, value)
        return replace(ROW, metrics=(replace(found, lower=value * math.exp(-half), upper=value * math.exp(half)),))

    line, back = agreements(row(a), row(a * ratio))[0], agreements(row(a * ratio), row(a))[0]
    assert line.verdict == back.verdict
    distance, width, edge = abs(math.log(ratio)), math.hypot(half, half), math.log(1.10)
    if abs(distance + width - edge) > 1e-6 and abs(distance - width - edge) > 1e-6:
        wanted = "agrees" if distance + width < edge else "differs" if distance - width > edge else "cannot tell"
        assert line.verdict == wanted


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(*[st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False))] * 3), min_size=2, max_size=2)
)
def test_no_numbers_make_it_fail(numbers: list[tuple[float | None, float | None, float | None]]) -> None:
    for name in ("tokens_per_s", "pcu", "weight_bytes", "quality", "foreign.metric"):
        sides = [
            replace(ROW, metrics=(replace(make_value(name, 1.0), value=v, lower=low, upper=high, valid=True),))
            for v, low, high in numbers
        ]
        for line in agreements(*sides):
            assert line.verdict in ("agrees", "differs", "cannot tell")
            json.dumps(vars(line), allow_nan=False)


def test_honest_rows_are_rarely_said_to_differ_and_others_rarely_to_agree() -> None:
    """Launches that scatter by 2 %, five blocks a side: what the verdict on throughput says of 2,000 pairs of runs."""
    chance = np.random.default_rng(3)

    def row(truth: float) -> CaseRecord:
        found = stats.block_interval((truth * np.exp(chance.normal(0, 0.02, 5))).tolist())
        value = replace(make_value("tokens_per_s", found.value), lower=found.lower, upper=found.upper, n=5)
        return replace(ROW, metrics=(value,))

    said = {ratio: [verdicts(row(100.0), row(100.0 * ratio))["tokens_per_s"] for _ in range(1_000)] for ratio in (1.0, 1.15)}
    assert said[1.0].count("differs") == 0
    assert said[1.0].count("agrees") > 950
    assert said[1.15].count("agrees") < 5


def test_the_environment_of_a_row_is_text_and_names_what_decides() -> None:
    found = environment_of(measured())
    assert found["hardware"] == measured().hardware
    assert {"env_id", "source_digest", "driver", "packages"} <= found.keys()
    assert all(isinstance(value, str) for value in found.values())


# -- the commands
