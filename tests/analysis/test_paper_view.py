"""EfficientLLM's normalisation and ranks, against numbers worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest

from effbench.analysis.frame import frame_of
from effbench.analysis.paper_view import OTHER, bands, metrics_needed, normalised, paper_table, published_ranks
from effbench.schema import CaseRecord
from tests.analysis.claim_rows import make_row


def rows(size: float, **al_s: float) -> list[CaseRecord]:
    return [make_row("generate", name, model=f"model-{size:g}", al_s=value, params_total=size) for name, value in al_s.items()]


def framed(records: list[CaseRecord]) -> pd.DataFrame:
    return frame_of(records, metrics=metrics_needed("generate"))


def test_worst_is_a_tenth_and_best_is_one() -> None:
    assert normalised(pd.Series([2.0, 4.0, 3.0]), lower=True).tolist() == pytest.approx([1.0, 0.1, 0.55])
    assert normalised(pd.Series([2.0, 4.0, 3.0]), lower=False).tolist() == pytest.approx([0.1, 1.0, 0.55])
    equal = normalised(pd.Series([2.0, math.nan, 2.0]), lower=True)
    assert equal.tolist()[::2] == [1.0, 1.0]
    assert math.isnan(equal[1])


def test_a_rank_is_of_the_plain_mean_over_models() -> None:
    table = paper_table(framed([*rows(7e9, bf16=1.0, int4=2.0), *rows(8e9, bf16=4.0, int4=2.0)]))
    assert table.means["AL"].to_dict() == pytest.approx({"bf16": 2.5, "int4": 2.0})
    assert table.ranks["AL"].to_dict() == {"bf16": 2.0, "int4": 1.0}
    assert table.models == ("model-7e+09", "model-8e+09")
    assert list(table.means) == ["AL"]


def test_a_model_counts_once_however_many_rows_it_has() -> None:
    more = [make_row("generate", "bf16", model="model-7e+09", al_s=4.0, params_total=7e9, params={"batch": 1})]
    table = paper_table(framed([*rows(7e9, bf16=2.0), *more, *rows(8e9, bf16=9.0)]))
    assert table.means["AL"].to_dict() == pytest.approx({"bf16": 6.0})


def test_bands_are_the_papers_and_the_rest_is_named() -> None:
    found = bands(framed([*rows(1.5e9, bf16=1.0), *rows(5e9, bf16=1.0), *rows(14e9, bf16=1.0), *rows(3e6, bf16=1.0)]))
    assert sorted(found) == ["1.5B-3.8B", "14B-34B", OTHER, OTHER]


def test_invalid_values_are_left_out() -> None:
    good, bad = rows(7e9, bf16=1.0, int4=9.0)
    bad = replace(bad, metrics=tuple(replace(m, valid=False, reasons=("throttled",)) for m in bad.metrics))
    assert paper_table(framed([good, bad])).ranks["AL"].to_dict() == {"bf16": 1.0}


def test_several_workloads_at_once_are_refused() -> None:
    both = [make_row("generate", "bf16", al_s=1.0), make_row("finetune", "lora", al_s=1.0)]
    names = {*metrics_needed("generate"), *metrics_needed("finetune")}
    with pytest.raises(ValueError, match="finetune, generate"):
        paper_table(frame_of(both, metrics=tuple(names)))


def test_published_ranks_keep_the_papers_ties_and_gaps() -> None:
    small = published_ranks("quantization", "1.5B-3.8B")
    assert small["Performance"].tolist() == [1, 1, 3]
    assert "TT" not in small
    assert len(published_ranks("training")) == 21
    with pytest.raises(KeyError, match="no published ranks"):
        published_ranks("training", "70B")
