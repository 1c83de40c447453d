"""The workload `expert_parallel`: refusals, what its CPU suite counts, and the claims that its rows can answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from effbench import registry
from effbench.analysis.claims import occult, results_of
from effbench.models.context import refusal
from effbench.models.memory import expected_memory
from effbench.models.shapes import shape
from effbench.planning import Options, plan, techniques
from effbench.schema import ModelRef, Spec
from effbench.store import Store
from effbench.suite import read_suite
from tests.commands import effbench, require_sound
from tests.factories import resolved

TWIN, WHOLE = Path("suites/cpu/occult.yaml"), Path("suites/occult.yaml")
OLMOE, QWEN = "olmoe-1b-7b-8th", "qwen1.5-moe-a2.7b-8th"


def spec_of(*stack: Any, model: str = OLMOE, nproc: int = 4, weights: str = "random", **params: Any) -> Spec:
    named = tuple((one, {}) if isinstance(one, str) else one for one in stack)
    given = registry.workload("expert_parallel").Params(**params).model_dump(mode="json")
    where = ModelRef(name=model, digest=shape(model).digest, weights=weights)
    plain = replace(resolved("tiny-llama", workload="expert_parallel"), model=where, params=given, nproc=nproc)
    return replace(plain, techniques=techniques(named, "cpu"))


REFUSED = [
    (("ep_naive",), {"nproc": 1}, "set nproc to 2 or more"),
    (("ep_naive",), {"nproc": 128}, "128 devices are more than the 64 experts"),
    (("ep_naive",), {"nproc": 3}, "choose nproc from 2, 4, 8, 16, 32, 64"),
    (("ep_naive",), {"nproc": 8, "model": QWEN}, "60 experts cannot be shared evenly by 8 devices"),
    ((), {}, "add one of ep_naive"),
    (("ep_naive",), {"model": "tiny-llama"}, "no experts"),
    ((("ep_pruned", {"devices": 5}),), {}, "cannot use 5 of 4 devices"),
    ((("ep_pruned", {"devices": 1}),), {"nproc": 16}, "1 of 16 devices hold 4 experts, and a token needs 8"),
    (("ep_placed",), {"model": QWEN, "routing": "recorded"}, "4 of 60; choose another shape"),
    (("ep_naive", "sdpa"), {}, "changes nothing in expert_parallel"),
]


@pytest.mark.parametrize(("stack", "given", "says"), REFUSED, ids=[says for *_, says in REFUSED])
def test_what_cannot_be_is_refused_in_a_sentence(stack: Any, given: dict[str, Any], says: str) -> None:
    found = refusal(spec_of(*stack, **given))
    assert found is not None
    assert says in found
    assert "\n" not in found


def test_arms_are_refused_elsewhere() -> None:
    spec = replace(spec_of("ep_naive"), workload="moe_layer", params={}, nproc=1)
    assert "part of the workload expert_parallel" in (refusal(spec) or "")


def test_both_suites_are_planned_whole_and_every_case_has_an_expected_memory() -> None:
    for path in (TWIN, WHOLE):
        cases = plan(read_suite(path), Options())
        assert len(cases) > 10
        assert [case.skip_reason for case in cases] == [None] * len(cases)
        for case in cases:
            expected = expected_memory(case.spec)
            assert expected is not None
            assert expected.peak_bytes > expected.weights > 0


def test_a_rank_s_memory_is_its_share_of_the_experts() -> None:
    two, four = (expected_memory(spec_of("ep_naive", nproc=nproc)) for nproc in (2, 4))
    assert two is not None
    assert four is not None
    assert two.weights == 2 * four.weights


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Store]:
    """The rows of the CPU suite's cases on one shape and one set of parameters for each number of processes, without a record."""
    folder = tmp_path_factory.mktemp("occult")
    text = TWIN.read_text()
    path = folder / "occult.yaml"
    path.write_text(text[: text.index("  - workload", text.index("deepseek"))])
    done = effbench("run", path, "--protocol", "smoke", "--results", folder / "results", timeout_s=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "results", Store(folder / "results")


def figures(store: Store) -> dict[str, dict[str, float]]:
    found = {}
    for launch in store.launches():
        spec = launch.spec
        found[f"{spec.label} {spec.model.name} {spec.nproc}"] = dict(launch.facts["figures"])
    return found


def test_the_rows_of_several_processes_are_sound(rows: tuple[Path, Store]) -> None:
    require_sound(rows[0], rows[0].parent / "bundle.zip")


def test_counts_are_those_of_the_routes_and_of_the_formulas(rows: tuple[Path, Store]) -> None:
    found = figures(rows[1])
    assert len(found) == 11
    for name, one in found.items():
        assert one["rows_sent"] == one["expected_rows_sent"], name
        assert one["output_error"] == 0
        assert one["distinct_devices_per_token"] <= one["replicas_upper_bound"]
        assert one["distinct_devices_per_token"] >= one["replicas_lower_bound"]
        assert one["uniform_replicas_per_token"] == pytest.approx(one["expected_uniform_replicas_per_token"], rel=0.01)
        assert one["experts_per_device_range"] == 0
    naive, once = (found[f"{arm} {OLMOE} 4"] for arm in ("ep_naive", "ep_deduplicated"))
    tokens, hidden, k = 4 * 64, 256, 8
    assert naive["rows_sent"] == tokens * k
    assert naive["bytes_sent"] == naive["rows_sent"] * (2 * hidden * 4 + 4)
    assert once["bytes_sent"] == once["rows_sent"] * (2 * hidden * 4 + k * (4 + 4))
    assert once["rows_sent"] == once["replicas_per_token"] * tokens


def test_placing_lowers_and_refining_lowers_further_and_pruning_limits(rows: tuple[Path, Store]) -> None:
    found = figures(rows[1])
    once, placed, refined, pruned = (
        found[f"{arm} {OLMOE} 4"] for arm in ("ep_deduplicated", "ep_placed", "ep_refined", "ep_pruned")
    )
    assert placed["replicas_per_token"] < 0.9 * once["replicas_per_token"]
    assert refined["calibration_replicas_per_token"] <= placed["calibration_replicas_per_token"]
    assert pruned["replicas_max"] <= pruned["devices_allowed"] == 2
    assert pruned["distinct_experts_min"] == pruned["experts_per_token"] == 8
    assert pruned["routes_changed_by_full_pruning"] == 0
    assert pruned["bytes_sent"] < 0.65 * once["bytes_sent"]
    alone = found[f"ep_pruned(devices=1) {OLMOE} 2"]
    assert alone["replicas_max"] == 1
    assert alone["replicas_per_token"] == 1


def test_the_expected_memory_is_what_rank_0_has(rows: tuple[Path, Store]) -> None:
    for launch in rows[1].launches():
        ratio = launch.facts["tensor_peak_bytes"] / launch.facts["expected_tensor_peak_bytes"]
        assert ratio == pytest.approx(1, abs=0.15), launch.spec.label


def test_times_are_there_only_with_a_core_for_each_rank(rows: tuple[Path, Store]) -> None:
    for launch in rows[1].launches():
        found = {reading.name: reading for reading in launch.metrics}
        parts = [found[name] for name in ("communication_s", "compute_s")]
        if launch.facts.get("oversubscribed"):
            assert [part.value for part in parts] == [None, None]
            assert all("oversubscribed" in part.reasons for part in parts)
        else:
            assert all(part.value > 0 for part in parts)


def test_the_exact_claims_hold_over_these_rows(rows: tuple[Path, Store]) -> None:
    findings, _ = results_of([rows[0]], occult.CLAIMS)
    answers = {finding.claim.id: finding.answer for finding in findings}
    assert {answers[name] for name in ("O1", "O2", "O3", "O4")} == {"supported"}, answers
    assert answers["O5"] != "contradicted"
    assert answers["O7"] == "not measured yet"
