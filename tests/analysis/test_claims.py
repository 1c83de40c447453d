"""Each claim with rows that support it, contradict it, leave it open, or do not measure it; and the report of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from effbench import registry
from effbench.analysis.claims import CLAIMS, Claim, Finding, Part, judge
from effbench.analysis.claims.shapes import Best, Straight
from effbench.analysis.claims.standing import NoSingleBest
from effbench.store import Store
from tests.analysis.claim_cases import BY_ID, CASES, Rows, full_over_lora, verdict
from tests.analysis.claim_rows import made_frame, make_row, widened

EXACT_ONLY = {claim.id for claim in CLAIMS if all(part.exact for part in claim.parts if not part.beside)}
each = pytest.mark.parametrize("claim_id", list(BY_ID))


def test_every_claim_of_the_references_is_there_once() -> None:
    wanted = [f"C{i}" for i in range(1, 18)] + [f"O{i}" for i in range(1, 9)] + ["S1", "S2", "S3", "F1", "F2", "F3"]
    assert [claim.id for claim in CLAIMS] == [*wanted, "U1", "U2", "U3", "U4"]
    assert set(CASES) == set(BY_ID)


@each
def test_rows_that_show_it_support_the_claim(claim_id: str) -> None:
    found = verdict(claim_id, CASES[claim_id][0])
    assert found.answer == "supported", found.shown
    assert all(line.answer == "supported" for line in found.shown if not line.beside)


@each
def test_rows_that_show_the_contrary_contradict_the_claim(claim_id: str) -> None:
    found = verdict(claim_id, CASES[claim_id][1])
    assert found.answer == "contradicted", found.shown
    assert any(line.run_ids and line.answer == "contradicted" for line in found.shown)


@each
def test_wide_intervals_leave_the_claim_open(claim_id: str) -> None:
    found = verdict(claim_id, widened(CASES[claim_id][0]))
    assert found.answer == "not shown", found.shown


@each
def test_rows_of_other_techniques_do_not_measure_the_claim(claim_id: str) -> None:
    claim = BY_ID[claim_id]
    other = [make_row(workload, "other", **{m: 1.0 for p in claim.parts for m in p.metrics()}) for workload in claim.workloads]
    found = verdict(claim_id, other)
    assert found.answer == "not measured yet"
    assert not found.by_hardware
    assert claim.needs in found.why


@each
def test_smoke_rows_show_nothing(claim_id: str) -> None:
    if claim_id in EXACT_ONLY:
        pytest.skip("counts and equalities have no noise, so any row may show them")
    for rows in CASES[claim_id]:
        found = verdict(claim_id, [replace(row, protocol="smoke") for row in rows])
        exact = {part.says for part in BY_ID[claim_id].parts if part.exact}
        assert all(line.answer == "not shown" for line in found.shown if line.part not in exact)


def mirrored(part: Part) -> Part:
    """The part that says the contrary."""
    if isinstance(part, Best):
        return replace(part, most=not part.most)
    beyond = 1e-6 if part.exact else 0.0  # at the bound itself an exact part holds
    above = None if part.below is None else part.below + beyond * max(part.below, 1e-3)
    return replace(part, above=above, below=None if part.above is None else part.above * (1 - beyond))


@each
def test_the_rows_tell_each_part_from_its_contrary(claim_id: str) -> None:
    """A part of which no row would notice that its region is mirrored is tested by nothing."""
    claim, rows = BY_ID[claim_id], CASES[claim_id][0]
    specs, frame = {row.run_id: row.spec for row in rows}, made_frame(rows)

    def judged(part: Part) -> Finding:
        parts = tuple(mirrored(other) if other is part else other for other in claim.parts)
        return judge(replace(claim, parts=parts), frame, lambda run_ids: {run_id: specs[run_id] for run_id in run_ids})

    for part in claim.parts:
        has_contrary = (not isinstance(part, NoSingleBest | Straight) and part.above != part.below) or isinstance(part, Best)
        if has_contrary and not part.beside:
            assert judged(part).answer != "supported", part.says


UNMEASURED = {"O7"}  # its workload is there and gives no such figure


def test_a_claim_states_what_was_printed_with_a_grade_and_what_would_measure_it() -> None:
    for claim in CLAIMS:
        assert claim.printed
        assert claim.remark
        assert claim.sentence.endswith(".")
        assert any(not part.beside for part in claim.parts)
        assert len({part.says for part in claim.parts}) == len(claim.parts)
        built = set(claim.workloads) <= set(registry.entries("workload"))
        assert bool(claim.needs) != (built and claim.id not in UNMEASURED)


@pytest.fixture
def on_disk(tmp_path: Path) -> Callable[[Rows], Path]:
    def written(rows: Rows) -> Path:
        store = Store(tmp_path / "results")
        for row in rows:
            store.write_case(row)
        store.compact()
        return store.path

    return written


def test_the_report_says_the_same_for_people_and_programs(on_disk: Callable[[Rows], Path]) -> None:
    import io
    import json

    from rich.console import Console

    from effbench.analysis import claims_report

    rows = [*CASES["C7"][1], *CASES["C13"][0], *full_over_lora(1.0, 3.3)]
    findings, warnings = claims_report.read([on_disk(rows)])
    assert not warnings
    document = json.loads(json.dumps(claims_report.document(findings), allow_nan=False))
    said = {claim["id"]: claim for claim in document["claims"]}
    assert {key: said[key]["verdict"] for key in ("C7", "C13", "C14", "C4")} == {
        "C7": "contradicted",
        "C13": "supported",
        "C14": "supported",
        "C4": "not measured yet",
    }
    assert set(said["C13"]["shown"][0]["run_ids"]) == {row.run_id for row in CASES["C13"][0]}
    assert sum(document["count"].values()) == len(CLAIMS)
    out = io.StringIO()
    console = Console(file=out, width=200)
    for renderable in claims_report.renderables(findings):
        console.print(renderable)
    text = out.getvalue()
    assert all(claim.id in text for claim in CLAIMS)
    assert "contradicted" in text


def test_claims_are_judged_on_an_empty_directory(tmp_path: Path) -> None:
    from effbench.analysis import claims_report

    (tmp_path / "runs").mkdir()
    findings, _ = claims_report.read([tmp_path])
    assert {finding.answer for finding in findings} == {"not measured yet"}


def test_claims_are_frozen_data() -> None:
    claim: Claim = BY_ID["C1"]
    with pytest.raises(AttributeError):
        claim.sentence = "other"  # type: ignore[misc]
