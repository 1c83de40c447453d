"""The claims page as a visitor uses it, on real parquet files."""

from __future__ import annotations

from dataclasses import replace
from urllib.parse import unquote

import pytest

from effbench.analysis.claims import CLAIMS
from effbench.schema import CaseRecord
from tests.analysis.claim_rows import make_row
from tests.app.pages import VIEWS, Open, texts

PAGE = VIEWS / "claims.py"
HOSTILE = "<b>GPU</b> [x](javascript:alert(1)) =1+1"


def dora(al_s: float = 1.5, **more: str) -> list[CaseRecord]:
    return [make_row("finetune", name, al_s=value, **more) for name, value in (("lora", 1.0), ("dora", al_s))]


def tuned(size: float, **losses: float) -> list[CaseRecord]:
    """Fine-tuned rows of one model with a training loss each."""
    return [
        make_row("finetune", name, model=f"model-{size:g}", train_loss=loss, params_total=size, amu_gb=10.0)
        for name, loss in losses.items()
    ]


def test_every_claim_stands_in_the_table_with_its_verdict(open_page: Open) -> None:
    app = open_page(dora())
    table = app.dataframe[0].value.set_index("id")
    assert list(table.index) == [claim.id for claim in CLAIMS]
    assert table.loc["C13", "verdict"] == "supported"
    assert table.loc["C13", "comparisons"] == 1
    assert table.loc["O6", "verdict"] == "not measured yet"
    assert f"{len(CLAIMS)} of {len(CLAIMS)} claims: 1 supported" in texts(app)


def test_an_open_claim_says_what_was_printed_what_is_shown_and_links_to_its_rows(open_page: Open) -> None:
    rows = dora()
    app = open_page(rows, C13="true")
    shown = texts(app)
    assert "up to 8.93 s a step" in shown
    assert "secondary" in shown
    assert "slower than LoRA" in shown
    hardware = app.dataframe[1].value
    assert hardware["verdict"].tolist() == ["supported"]
    assert hardware["number"].tolist() == pytest.approx([1.5])
    lines = app.dataframe[2].value
    linked = {unquote(str(lines[name].iloc[0])).removeprefix("run?run=") for name in ("row 1", "row 2")}
    assert linked == {row.run_id for row in rows}
    assert [button.label for button in app.get("download_button")] == [
        "Table as CSV",
        "Table as parquet",
        "Claims as JSON",
        "Rows as CSV",
        "Rows as parquet",
    ]


def test_a_closed_claim_computes_no_tables(open_page: Open) -> None:
    assert len(open_page(dora()).dataframe) == 1


def test_a_link_restores_the_filters(open_page: Open) -> None:
    app = open_page(dora(0.5), paper="EfficientLLM", verdict="contradicted")
    assert app.multiselect("paper").value == ["EfficientLLM"]
    assert app.multiselect("verdict").value == ["contradicted"]
    assert app.dataframe[0].value["id"].tolist() == ["C13"]


def test_filters_leave_what_was_chosen(open_page: Open) -> None:
    app = open_page(dora())
    app.multiselect("paper").select("Occult").run()
    assert app.dataframe[0].value["id"].tolist() == [f"O{i}" for i in range(1, 9)]
    app.multiselect("verdict").select("supported").run()
    assert "No claim passes" in texts(app)
    assert not app.dataframe


def test_every_claim_can_be_opened_without_results(open_page: Open) -> None:
    app = open_page([], **{claim.id: "true" for claim in CLAIMS})
    assert set(app.dataframe[0].value["verdict"]) == {"not measured yet"}
    assert "the workload expert_parallel measures them" in texts(app)


def test_screening_is_marked(open_page: Open) -> None:
    app = open_page(dora(protocol="quick"), C13="true")
    assert app.dataframe[1].value["verdict"].tolist() == ["supported · screening"]
    assert "below 10 %" in texts(app)


def test_new_rows_change_the_verdict(open_page: Open) -> None:
    assert open_page(dora()[:1]).dataframe[0].value.set_index("id").loc["C13", "verdict"] == "not measured yet"
    assert open_page(dora()[1:]).dataframe[0].value.set_index("id").loc["C13", "verdict"] == "supported"


def test_texts_of_a_record_stay_text(open_page: Open) -> None:
    rows = [replace(row, hardware=HOSTILE, model=HOSTILE) for row in dora()]
    app = open_page(rows, C13="true")
    assert app.dataframe[1].value["hardware"].tolist() == [HOSTILE]
    marked = [str(element.value) for kind in (app.markdown, app.caption, app.info) for element in kind]
    assert not any("javascript" in text for text in marked)
    labels = [str(one.label) for one in app.expander]
    assert not any("javascript" in label for label in labels)


def test_the_papers_way_shows_its_normalisation_and_ranks_as_its_own(open_page: Open) -> None:
    rows = [*tuned(1.2e9, lora=1.0, dora=0.5, freeze=0.7), *tuned(8e9, lora=1.0, dora=2.0)]
    app = open_page(rows, view="The paper's own way", paper_workload="finetune")
    assert "not how this leaderboard judges" in texts(app)
    assert [s.value for s in app.subheader] == ["Size band 1B-3B", "Size band 7B-8B", "Ranks as published"]
    small, middle, published = (frame.value for frame in app.dataframe)
    assert dict(zip(small["label"], small["Performance rank"], strict=True)) == {"dora": 1, "freeze": 2, "lora": 3}
    assert dict(zip(small["label"], small["Performance 0.1–1"], strict=True)) == pytest.approx(
        {"dora": 1.0, "freeze": 0.1 + 0.9 * 0.6, "lora": 0.1}
    )
    assert dict(zip(middle["label"], middle["Performance rank"], strict=True)) == {"lora": 1, "dora": 2}
    assert len(published) == 21
    assert "Not measured here" in texts(app)


def test_the_papers_way_without_results_shows_its_published_ranks(open_page: Open) -> None:
    app = open_page([], view="The paper's own way")
    assert "no rows of these workloads" in texts(app)
    assert app.dataframe[0].value["method"].tolist()[:2] == ["MQA", "GQA"]
