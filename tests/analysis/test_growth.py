"""Growth of a decode step with the context: which rows belong together, and what their ratio is worth."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from effbench.analysis.growth import growths, tables
from effbench.schema import CaseRecord, canonical_json
from tests.records import make_case, make_spec, make_value


def row(tokens: int, tpot_s: float | None, technique: str = "mha", **changes: Any) -> CaseRecord:
    metrics = [
        make_value("tpot_s", tpot_s, half=0.1),
        make_value("expected_decode_bytes", 1e6 * (1 + tokens / 100)),
        make_value("expected_decode_flops", 1e6 * (1 + tokens / 1000)),
    ]
    spec = make_spec("generate", [technique], prompt_tokens=tokens)
    case = make_case("generate", [technique], metrics=tuple(metrics), **changes)
    return replace(case, case_id=f"{technique}-{tokens}", spec=canonical_json(spec.to_json()))


def test_the_longest_prompt_is_held_against_the_shortest() -> None:
    rows = [row(100, 0.01), row(400, 0.02), row(900, 0.03), row(100, 0.01, "gqa"), row(900, 0.011, "gqa")]
    found = growths(rows)
    assert [(g.label, g.short_tokens, g.long_tokens) for g in found] == [("gqa", 100, 900), ("mha", 100, 900)]
    slow = found[1]
    assert slow.tpot_ratio == pytest.approx(3.0)
    assert slow.bytes_ratio == pytest.approx(5.0)
    assert slow.flops_ratio == pytest.approx(1.9 / 1.1)


def test_the_interval_adds_both_sides() -> None:
    found = growths([row(100, 0.01), row(900, 0.03)])[0]
    reach = math.exp(math.hypot(*[math.log(1.1 / 0.9) / 2] * 2))
    assert found.tpot_ratio_lower == pytest.approx(3.0 / reach)
    assert found.tpot_ratio_upper == pytest.approx(3.0 * reach)


def test_one_length_failed_rows_and_other_machines_make_no_growth() -> None:
    assert growths([row(100, 0.01)]) == []
    assert growths([row(100, 0.01), row(900, 0.03, status="failed")]) == []
    assert growths([row(100, 0.01), row(900, 0.03, hardware="another")]) == []
    assert growths([row(100, None), row(900, 0.03)])[0].tpot_ratio is None


@pytest.mark.parametrize("spec", ["no JSON", "[1]", '{"params": 7}', "[" * 100_000])
def test_a_spec_of_another_hand_takes_no_part(spec: str) -> None:
    assert growths([replace(make_case(), spec=spec)]) == []


def test_it_is_printed_beside_what_was_expected() -> None:
    out = io.StringIO()
    for renderable in tables([row(100, 0.01), row(900, 0.03)]):
        Console(file=out, width=120).print(renderable)
    text = out.getvalue()
    assert "100 → 900" in text
    assert "×3.00 (2.60–3.46)" in text
    assert "×5.00" in text
    assert tables([row(100, 0.01)]) == []
