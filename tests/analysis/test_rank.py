"""Ranks: shared when no difference is shown, and only among rows that answer the same question."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effbench.analysis import rank as ranking
from effbench.analysis.rank import latest, rank, ratio_verdict
from effbench.schema import CaseRecord, MetricValue
from effbench.stats import verdict
from tests.records import GPU, make_case, make_value

METRIC = "tpot_s"  # lower is better


def row(run_id: str, metric: MetricValue, **more: Any) -> CaseRecord:
    return make_case(run_id=run_id, metrics=(metric,), **{"techniques": (run_id,), "protocol": "publish"} | more)


def value(middle: float, half: float = 0.02, ratio: float | None = None, ratio_half: float = 0.02, **more: Any) -> MetricValue:
    return replace(make_value(METRIC, middle, half=half, ratio=ratio, ratio_half=ratio_half), **more)


def ranks(*rows: CaseRecord, by: str = METRIC) -> dict[str, int | None]:
    return {found.record.run_id: found.rank for found in rank(rows, by)}


def reasons(*rows: CaseRecord) -> dict[str, str]:
    return {found.record.run_id: found.reason for found in rank(rows, METRIC) if found.rank is None}


def test_rows_are_ranked_in_the_metrics_direction() -> None:
    rows = [row("slow", value(3.0)), row("fast", value(1.0)), row("middle", value(2.0))]
    assert ranks(*rows) == {"fast": 1, "middle": 2, "slow": 3}
    quality = [replace(r, metrics=(replace(r.metrics[0], name="quality"),)) for r in rows]
    assert ranks(*quality, by="quality") == {"slow": 1, "middle": 2, "fast": 3}


def test_overlapping_intervals_share_a_rank_and_the_next_rank_is_left_out() -> None:
    found = rank([row("a", value(1.0, 0.1)), row("b", value(1.05, 0.1)), row("c", value(2.0))], METRIC)
    assert [(f.record.run_id, f.rank, f.shared) for f in found] == [("a", 1, True), ("b", 1, True), ("c", 3, False)]


def test_wide_interval_in_the_middle_shares_a_rank_with_rows_that_differ() -> None:
    assert ranks(row("a", value(1.0)), row("wide", value(1.1, 0.5)), row("c", value(1.2))) == {"a": 1, "wide": 1, "c": 2}


def test_shared_baseline_is_decided_by_the_paired_ratios() -> None:
    noisy = {"half": 0.5}
    assert ranks(row("a", value(1.0, **noisy, ratio=0.5)), row("b", value(1.1, **noisy, ratio=0.6))) == {"a": 1, "b": 2}
    apart = row("b", value(1.1, **noisy, ratio=0.6), baseline=("full",))
    assert ranks(row("a", value(1.0, **noisy, ratio=0.5)), apart) == {"a": 1, "b": 1}


def test_values_that_differ_do_not_outrank_paired_ratios_that_do_not() -> None:
    rows = row("a", value(1.0, ratio=0.5, ratio_half=0.2)), row("b", value(1.2, ratio=0.55, ratio_half=0.2))
    assert ranks(*rows) == {"a": 1, "b": 1}


def test_row_against_its_own_baseline_is_decided_by_its_paired_ratio() -> None:
    baseline = make_case("pretrain", ("mha",), run_id="mha", baseline=None, protocol="publish", metrics=(value(1.0, 0.5),))
    assert ranks(baseline, row("gqa", value(0.95, 0.5, ratio=0.95))) == {"gqa": 1, "mha": 2}
    assert ranks(baseline, row("gqa", value(1.05, 0.5, ratio=1.05))) == {"gqa": 2, "mha": 1}
    assert ranks(baseline, row("gqa", value(0.5, 0.5, ratio=0.95, ratio_half=0.1))) == {"gqa": 1, "mha": 1}
    elsewhere = replace(baseline, env_id="another driver")
    assert ranks(elsewhere, row("gqa", value(0.95, 0.5, ratio=0.95))) == {"gqa": 1, "mha": 1}


def test_screening_rows_claim_nothing_below_ten_percent() -> None:
    quick = {"protocol": "quick"}
    exact = {"half": 0.001}
    assert ranks(row("a", value(1.0, **exact), **quick), row("b", value(1.08, **exact), **quick)) == {"a": 1, "b": 1}
    assert ranks(row("a", value(1.0, **exact), **quick), row("b", value(1.12, **exact), **quick)) == {"a": 1, "b": 2}
    assert ranks(row("a", value(1.0, **exact)), row("b", value(1.08, **exact))) == {"a": 1, "b": 2}


def test_smoke_rows_never_show_a_difference() -> None:
    assert ranks(row("a", value(1.0), protocol="smoke"), row("b", value(9.0), protocol="smoke")) == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    "other", [{"hardware": GPU}, {"workload": "generate"}, {"model": "Qwen2.5-0.5B"}, {"seed": 1}], ids=lambda o: next(iter(o))
)
def test_rows_of_different_questions_are_not_ranked_together(other: dict[str, Any]) -> None:
    assert ranks(row("slow", value(3.0)), row("fast", value(1.0), **other)) == {"slow": 1, "fast": 1}


def test_where_the_same_weights_lie_is_no_part_of_the_question() -> None:
    def at(place: str, found: CaseRecord) -> CaseRecord:
        spec = json.loads(found.spec)
        spec["model"] |= {"weights": "path", "location": place, "digest": "0a"}
        return replace(found, spec=json.dumps(spec))

    assert ranks(at("/data/a", row("slow", value(3.0))), at("/home/b", row("fast", value(1.0)))) == {"slow": 2, "fast": 1}


def test_energy_of_different_sensors_is_not_ranked_together() -> None:
    rows = [
        row(name, make_value("energy_j_per_token", joule, source=source))
        for name, joule, source in (("gpu", 1.0, "nvml:83 · gpu"), ("module", 2.0, "nvml:83 · module"))
    ]
    assert ranks(*rows, by="energy_j_per_token") == {"gpu": 1, "module": 1}


def test_an_invalid_value_is_not_ranked_whatever_its_reason_says() -> None:
    assert ranks(row("good", value(1.0)), row("bad", value(0.5, valid=False, reasons=("",)))) == {"good": 1, "bad": None}


def test_what_cannot_be_ranked_says_why_and_stands_last() -> None:
    unranked = {
        "failed": row("failed", value(0.1), status="failed", reason="out_of_memory"),
        "estimated": row("estimated", value(0.1, reasons=("estimate",))),
        "bad": row("bad", value(0.1, valid=False, reasons=("throttled",))),
        "empty": row("empty", value(0.1, value=None, reasons=("no_gpu",))),
        "single": row("single", value(0.1, lower=None, upper=None)),
        "absent": row("absent", make_value("al_s", 1.0)),
        "python": row("python", value(0.1)),
    }
    idle = make_value("gpu_idle_share", 0.4, reasons=("host_bound",))
    unranked["python"] = replace(unranked["python"], metrics=(*unranked["python"].metrics, idle))
    found = rank([*unranked.values(), row("good", value(5.0))], METRIC)
    assert found[0].record.run_id == "good"
    assert {f.record.run_id: f.reason for f in found[1:]} == {
        "failed": "out_of_memory", "estimated": "estimate", "bad": "throttled", "empty": "no_gpu", "single": "one_block",
        "absent": "not_taken", "python": "host_bound",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["energy_wh", "params_total", "energy_net_j_per_token", "a_plugins_metric"])
def test_metric_without_direction_and_net_energy_are_never_ranked(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        rank([], name)
    assert name not in ranking.rankable_metrics()


bounds = st.tuples(st.floats(0.5, 2.0), st.floats(0.0, 0.3))
protocols = st.sampled_from(["publish", "quick", "smoke"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(bounds, bounds, st.booleans(), protocols), min_size=2, max_size=5))
def test_ranks_agree_with_the_verdict_of_stats_on_every_pair(drawn: list[Any]) -> None:
    rows = []
    for index, ((middle, half), (ratio, ratio_half), has_ratio, protocol) in enumerate(drawn):
        metric = value(middle, half, ratio if has_ratio else None, ratio_half)
        rows.append(replace(row(str(index), metric), protocol=protocol, baseline_case_id="b" if has_ratio else None))

    def better(one: CaseRecord, other: CaseRecord) -> bool:
        a, b = one.metrics[0], other.metrics[0]
        if one.baseline_case_id and other.baseline_case_id:
            low, high = a.ratio_lower / b.ratio_upper, a.ratio_upper / b.ratio_lower
        else:
            low, high = a.lower / b.upper, a.upper / b.lower
        return all(verdict(low, high, "lower", r.protocol) == "better" for r in (one, other))

    wanted = {r.run_id: 1 + sum(better(other, r) for other in rows) for r in rows}
    assert ranks(*rows) == wanted


def test_large_group_is_ranked_like_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(str(i), value(1.0 + 0.01 * i, 0.02)) for i in range(40)]
    whole = ranks(*rows)
    monkeypatch.setattr(ranking, "_PAIRS", 7 * 40)
    assert ranks(*rows) == whole
    assert sorted(whole.values())[-1] == 35  # 34 rows end below its start


def test_later_row_of_the_same_case_replaces_the_earlier_and_a_failed_retry_replaces_nothing() -> None:
    def at(run_id: str, hour: int, **more: Any) -> CaseRecord:
        return row(run_id, value(1.0), techniques=("gqa",), started_at=f"2026-11-20T{hour:02d}:00:00+00:00", **more)

    first, second, elsewhere = at("first", 1), at("second", 2), at("elsewhere", 1, hardware=GPU)
    retry, old_failure = at("retry", 3, status="failed"), at("old failure", 0, status="failed")
    kept, replaced = latest([retry, second, first, elsewhere, old_failure])
    assert {r.run_id for r in kept} == {"second", "elsewhere", "retry"}
    assert {r.run_id for r in replaced} == {"first", "old failure"}


def test_verdict_follows_ratio_direction_and_trust() -> None:
    faster = value(0.5, ratio=0.5)
    assert ratio_verdict(row("a", faster), faster) == "better"
    assert ratio_verdict(row("a", faster), replace(faster, name="tokens_per_s")) == "worse"
    assert ratio_verdict(row("a", faster), replace(faster, reasons=("estimate",))) == "no difference shown"
    assert ratio_verdict(row("a", faster), faster, host_bound=True) == "no difference shown"
    assert ratio_verdict(row("a", faster), replace(faster, ratio=None)) is None
    assert ratio_verdict(row("a", faster), replace(faster, name="params_total")) is None
