"""The comparison of records with what their traces give: what counts as another number, and how it is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from effbench import proof
from effbench.schema import MetricValue, Reading
from tests.factories import spec, steady
from tests.records import make_case, make_value


def value(**changes: object) -> MetricValue:
    return replace(make_value("al_s", 0.1, ratio=0.9), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [{"value": 0.1000001}, {"value": None}, {"lower": 0.05}, {"ratio_upper": 2.0}, {"n": 4}, {"valid": False}],
)
def test_another_number_count_or_validity_is_a_difference(changes: dict[str, object]):
    (found,) = proof.differences([value(**changes)], [value()])
    assert found.name == "al_s"
    assert found.told("row").endswith("from the traces")


@pytest.mark.parametrize("changes", [{}, {"value": 0.1 * (1 + 1e-12)}, {"reasons": ("estimate",)}, {"source": "another"}])
def test_rounding_and_texts_are_none(changes: dict[str, object]):
    assert list(proof.differences([value(**changes)], [value()])) == []


def test_a_metric_on_one_side_only_is_told_as_absent():
    (lost,) = proof.differences([], [value()])
    (added,) = proof.differences([value()], [])
    assert lost.told("row") == "al_s is absent in the row and 0.1 from the traces"
    assert added.told("row") == "al_s is 0.1 in the row and absent from the traces"
    assert lost.unit == added.unit == "s"


def test_readings_of_a_launch_are_compared_too():
    kept, fresh = Reading(name="al_s", value=0.2, unit="s"), Reading(name="al_s", value=0.1, unit="s")
    (found,) = proof.differences([kept], [fresh])
    assert found.told("launch") == "al_s is 0.2 in the launch and 0.1 from the traces"


def test_a_row_without_a_baseline_has_no_ratio():
    launches = [steady(spec(), 0.1, block=block) for block in range(3)]
    row = make_case(baseline=None)
    assert {m.name: m.ratio for m in proof.row_metrics(row, launches, launches)}["al_s"] is None
    assert proof.row_metrics(row, [], []) == ()
