"""Plausibility: a sound row passes, and each implausible one is caught by the check meant for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from effbench.checks import failed, run_checks
from effbench.schema import CaseRecord
from tests.records import CPU, GPU, make_case, make_value


def change(record: CaseRecord, name: str, **changes: Any) -> CaseRecord:
    return replace(record, metrics=tuple(replace(m, **changes) if m.name == name else m for m in record.metrics))


def at(number: float) -> dict[str, float]:
    low, high = sorted((number * 0.98, number * 1.02))
    return {"value": number, "lower": low, "upper": high}


def sound(hardware: str = GPU) -> CaseRecord:
    """A row whose figures belong together: 512 tokens and 17.3 J a step."""
    record = make_case(hardware=hardware)
    return change(change(record, "tokens_per_s", **at(512 / 0.042)), "energy_j_per_token", **at(17.3 / 512))


@pytest.mark.parametrize("hardware", [CPU, GPU])
def test_sound_row_passes_every_check(hardware: str) -> None:
    assert failed(sound(hardware)) == []
    names = {check.name for check in run_checks(sound(GPU))}
    assert names == {
        "status",
        "blocks",
        "positive",
        "intervals",
        "percentiles",
        "throughput",
        "energy",
        "memory",
        "shares",
    }


@pytest.mark.parametrize(
    ("name", "changes", "check"),
    [
        ("al_s", {"n": 4}, "blocks"),
        ("step_p50_s", at(0.0), "positive"),
        ("weight_bytes", at(-1.0), "positive"),
        ("mfu", {"lower": 0.5, "upper": 0.6}, "intervals"),
        ("al_s", {"ratio": 2.0}, "intervals"),
        ("step_p95_s", at(0.02), "percentiles"),
        ("tokens_per_s", at(12_200.0), "throughput"),
        ("energy_j_per_token", at(0.05), "throughput"),
        ("aec_w", at(1200.0), "energy"),
        ("aec_w", at(41.2), "energy"),
        ("weight_bytes", at(4e9), "memory"),
        ("mfu", at(1.2), "shares"),
    ],
)
def test_implausible_figure_is_caught(name: str, changes: dict[str, Any], check: str) -> None:
    assert check in {found.name for found in failed(change(sound(), name, **changes))}


def test_too_few_blocks_are_a_warning_that_names_the_protocol() -> None:
    found = failed(replace(sound(), protocol="publish"))
    assert [(check.name, check.severity) for check in found] == [("blocks", "warning")]
    assert "publish asks for 5" in found[0].message


def test_failed_case_fails_one_check_with_its_reason() -> None:
    (check,) = failed(make_case(status="failed", reason="out_of_memory"))
    assert check.message == "failed: out_of_memory"


def test_net_energy_below_idle_power_is_plausible() -> None:
    assert failed(change(sound(), "energy_net_j_per_token", **at(-0.001))) == []


def test_a_quality_below_the_baselines_is_plausible() -> None:
    worse = make_value("quality_change", -0.004, half=0.0)
    assert failed(replace(sound(), metrics=(*sound().metrics, worse))) == []


def test_check_that_has_nothing_to_look_at_does_not_apply() -> None:
    assert [check.name for check in run_checks(make_case(metrics=()))] == ["status", "blocks"]
