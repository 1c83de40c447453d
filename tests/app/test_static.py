"""The static board: one file, nothing loaded, every text of a record inert."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path

import pyarrow.parquet
import pytest

from effbench.errors import StoreError
from effbench.store import Store
from leaderboard_app import static
from leaderboard_app.figures.style import PALETTE
from leaderboard_app.static import Written, within, write_html
from leaderboard_app.static_tables import MAX_BARS, clean
from tests.app.pages import ROOT
from tests.app.static_page import HOSTILE, NOW, Page, page_of, rows_of
from tests.commands import effbench
from tests.records import CPU, GPU, make_board, make_case, make_value


def test_reference_rows_make_a_small_page_that_loads_nothing(tmp_path: Path) -> None:
    written = write_html(
        Store(ROOT / "results" / "reference").cases(), tmp_path / "b.html", sources=["results/reference"], now=NOW
    )
    assert written == Written(rows=12, left_out=0, replaced=0, num_bytes=(tmp_path / "b.html").stat().st_size)
    assert written.num_bytes < 500_000
    text = (tmp_path / "b.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(rows_of(page)) == 12
    assert not any(key in attrs for _, attrs in page.elements for key in ("src", "srcset", "action", "data", "style"))
    assert all(attrs["href"].startswith("#") for _, attrs in page.elements if "href" in attrs)
    assert not re.search(r"https?://|@import|url\((?!#)|fetch\(|import\(|XMLHttpRequest", text)
    assert "Generated 2026-11-27 03:04 UTC" in page.text()
    assert "Read from results/reference" in page.text()
    assert "d3788e9b" in page.text(), "the commit that measured is said"
    assert "Measured from 2026-11-24" in page.text()


def cells_of(page: Page) -> dict[tuple[str, str], float | None]:
    """By the end of a row's id in the page and metric: what a cell says to the script; None where it has no value."""
    found: dict[tuple[str, str], float | None] = {}
    row = ""
    for tag, attrs in page.elements:
        if tag == "tr":
            row = attrs.get("data-row", "").partition("-")[2]
        elif tag == "td" and "data-metric" in attrs:
            found[row, attrs["data-metric"]] = float(attrs["data-value"]) if "data-value" in attrs else None
    return found


def test_every_number_is_the_one_in_the_parquet(tmp_path: Path) -> None:
    stored = pyarrow.parquet.read_table(ROOT / "results" / "reference" / "runs", columns=["run_id", "metrics"]).to_pylist()
    numbers = {(row["run_id"][:32], m["name"]): m["value"] for row in stored for m in row["metrics"]}
    cells = cells_of(page_of(Store(ROOT / "results" / "reference").cases(), tmp_path))
    assert cells == {cell: numbers.get(cell) for cell in cells}
    assert sum(value is not None for value in cells.values()) > 100
    assert {row for row, metric in cells if metric == "tokens_per_s"} == {row["run_id"][:32] for row in stored}


def test_only_the_page_s_own_script_and_style_may_run(tmp_path: Path) -> None:
    page = page_of([make_case()], tmp_path)
    (policy,) = (attrs["content"] for attrs in page.all("meta", http_equiv="Content-Security-Policy"))
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (text,) = (text for name, text in page.texts if name == tag)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not any(key.startswith("on") for _, attrs in page.elements for key in attrs)


def test_a_row_has_value_interval_unit_ratio_verdict_and_rank(tmp_path: Path) -> None:
    page = page_of([make_case(techniques=("mha",), baseline=None), make_case(techniques=("gqa",), speed=2.0)], tmp_path)
    first, second = page.all("td", data_metric="tokens_per_s")
    assert (first["data-rank"], second["data-rank"]) == ("1", "2")
    assert float(first["data-value"]) == pytest.approx(24380)
    assert "k tokens/s" in page.text()
    assert "24.4 ±0.5×2.00 ▲better" in page.text()
    assert [attrs["data-text"].split()[0] for attrs in rows_of(page)] == ["gqa", "mha"]
    (head,) = page.all("th", data_column="tokens_per_s")
    assert head["scope"] == "col"


def test_ranks_are_shared_where_no_difference_is_shown_and_screening_is_said(tmp_path: Path) -> None:
    page = page_of([make_case(techniques=("gqa",)), make_case(techniques=("mqa",), speed=1.03)], tmp_path)
    assert [attrs["data-rank"] for attrs in page.all("td", data_metric="tokens_per_s")] == ["1=", "1="]
    assert "claim no difference below 10 %" in page.text()
    assert "quick · screening, n = 3" in page.text()
    assert page.all("rect", fill="url(#hatch)")


def test_each_metric_has_its_own_figure_and_the_headline_s_is_shown_first(tmp_path: Path) -> None:
    page = page_of([make_case("generate", ("gqa",)), make_case("generate", ("mqa",), speed=2.0)], tmp_path)
    figures = {attrs["data-by"]: "hidden" in attrs for attrs in page.all("figure")}
    assert not figures.pop("tokens_per_s")
    assert {"tpot_s", "ttft_s", "al_s", "quality"} <= figures.keys()
    assert all(figures.values())
    bars = [attrs for attrs in page.all("li") if "data-row" in attrs]
    assert {attrs["data-row"] for attrs in bars} == {attrs["data-row"] for attrs in rows_of(page)}
    assert {attrs["fill"] for attrs in page.all("rect", height="100%")} - {"url(#hatch)"} <= set(PALETTE)
    assert all(attrs.get("aria-hidden") == "true" for attrs in page.all("svg"))


def test_bars_are_in_proportion_and_the_interval_lies_around_the_end(tmp_path: Path) -> None:
    page = page_of(
        [make_case(techniques=("gqa",), protocol="publish"), make_case(techniques=("mqa",), speed=2.0, protocol="publish")],
        tmp_path,
    )
    widths = [float(attrs["width"].rstrip("%")) for attrs in page.all("rect", height="100%")][:2]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.02)
    line = page.all("line")[0]
    assert float(line["x1"].rstrip("%")) < widths[0] < float(line["x2"].rstrip("%")) <= 98.0


def test_what_cannot_be_ranked_stands_apart_with_its_reason(tmp_path: Path) -> None:
    estimate = make_value("tokens_per_s", 9e9, reasons=("estimate",))
    guessed = make_case(techniques=("lora",), metrics=(estimate,))
    failed = make_case(techniques=("mqa",), status="failed", reason="out_of_memory")
    page = page_of([make_case(), guessed, failed], tmp_path)
    ranked = [attrs for attrs in page.all("td", data_metric="tokens_per_s") if "data-rank" in attrs]
    assert len(ranked) == 1
    assert len([attrs for attrs in page.all("td", data_metric="tokens_per_s") if "estimate" in attrs.get("data-why", "")]) == 1
    assert "Not ranked by Tokens/s" in page.text()
    assert "failed: mqa on tiny-llama" in page.text()
    order = [attrs["data-text"].split()[0] for attrs in rows_of(page)]
    assert order[0] == "gqa"


def test_missing_values_are_dashes_with_a_reason_never_zero(tmp_path: Path) -> None:
    known = make_case(techniques=("gqa",))
    lost = make_value("mfu", None, reasons=("not_calibrated",))
    bare = make_case(techniques=("mqa",))
    bare = replace(bare, metrics=(*(m for m in bare.metrics if m.name != "mfu"), lost))
    page = page_of([known, bare], tmp_path)
    cells = [attrs for attrs in page.all("td", data_metric="mfu") if "data-value" not in attrs]
    assert len(cells) == 1
    assert "not_calibrated" in cells[0]["title"]
    assert "not_calibrated" in page.text(), "and once more as a note"


def test_machines_and_models_are_never_compared(tmp_path: Path) -> None:
    page = page_of([make_case(), make_case(hardware=GPU), make_case(model="Qwen2.5-0.5B"), make_case("generate")], tmp_path)
    sections = page.all("section")
    assert len(sections) == 4
    assert {attrs["data-hardware"] for attrs in sections} == {CPU, GPU}
    assert all(attrs["data-rank"] == "1" for attrs in page.all("td", data_metric="tokens_per_s"))


def test_settings_tell_questions_apart(tmp_path: Path) -> None:
    page = page_of([make_case(), make_case(seed=7)], tmp_path)
    assert "tiny-llama · seed=0" in page.text()
    assert "tiny-llama · seed=7" in page.text()
    assert "sequence length 64" in page.text()


def test_a_spec_that_cannot_be_read_takes_no_setting_from_the_others(tmp_path: Path) -> None:
    deep = "[" * 100_000
    specs = ("{", "[]", '{"model": "x"}', deep)
    broken = [replace(make_case(), run_id=f"broken{i}", case_id=f"c{i}", spec=spec) for i, spec in enumerate(specs)]
    odd = make_case(seed=8)
    odd = replace(odd, provenance={**odd.provenance, "packages": deep})
    page = page_of([make_case(), make_case(seed=7), odd, *broken], tmp_path)
    assert "tiny-llama · seed=7" in page.text()
    assert page.text().count("The specification of these rows cannot be read.") == 4


def test_people_who_cannot_see_or_point_are_served(tmp_path: Path) -> None:
    page = page_of(make_board(40), tmp_path)
    assert page.elements[0] == ("html", {"lang": "en"})
    assert page.all("meta", name="viewport")
    assert page.all("a", href="#board", class_="skip")
    assert page.all("main", id="board", tabindex="-1")
    tables = [tag for tag, _ in page.elements if tag == "table"]
    assert len([tag for tag, _ in page.elements if tag == "caption"]) == len(tables)
    assert all("scope" in attrs for attrs in page.all("th"))
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in page.all("div", class_="scroll"))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["aria-labelledby"] for attrs in page.all("section")} <= set(ids)
    css = (static.FILES / "board.css").read_text()
    assert "prefers-color-scheme: dark" in css
    assert "max-width: 40rem" in css
    assert "hidden" in page.all("form")[0], "filters wait for the script that they need"
    assert page.all("output", role="status")


def test_every_choice_is_offered_and_the_headline_is_first(tmp_path: Path) -> None:
    page = page_of(make_board(100), tmp_path)
    values = [attrs["value"] for attrs in page.all("option")]
    assert {CPU, GPU, "tiny-llama", "Llama-3.2-1B", "pretrain", "generate"} <= set(values)
    by = values[values.index("tokens_per_s") :]
    assert by[0] == "tokens_per_s"
    assert "energy_j_per_token" in by
    assert "params_total" not in by


@pytest.mark.parametrize("nasty", HOSTILE)
def test_hostile_texts_are_texts_wherever_they_stand(tmp_path: Path, nasty: str) -> None:
    nasty = nasty.replace("\udc80", "")  # no file of results can hold half a character
    value = make_value("tokens_per_s", 10.0, source=nasty)
    foreign = replace(make_value("tokens_per_s", 10.0, ratio=1.1), name=nasty, unit=nasty, reasons=(nasty,))
    record = make_case(techniques=(nasty,), model=nasty, hardware=nasty, protocol=nasty, metrics=(value, foreign))
    record = replace(record, workload=nasty, suite=nasty, run_id=nasty, reason=nasty, started_at=nasty, env_id=nasty)
    record = replace(record, provenance={"packages": nasty, "driver": nasty, "git_commit": nasty})
    broken = replace(record, spec=nasty, run_id="other" + nasty, status="failed", metrics=())
    page = page_of([record, broken], tmp_path, sources=[nasty], warnings=[nasty])
    assert clean(nasty[:10], 20) in (tmp_path / "board.html").read_text()
    honest = page_of([make_case()], tmp_path)
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in honest.elements} | {"details", "summary"}
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert not any(key.startswith("on") for _, attrs in page.elements for key in attrs)
    assert not any("\x00" in text or "\x1b" in text for _, text in page.texts)


@pytest.mark.parametrize("nasty", HOSTILE)
def test_clean_text_survives_a_browser_s_reading(nasty: str) -> None:
    shown = unescape(clean(nasty, 10_000))
    assert shown == "".join(c if c.isprintable() or c in "\u202e\u2066" else " " for c in nasty).replace(
        "\udc80", "\\udc80"
    ).strip() or ("\x00" in nasty)
    assert not set(clean(nasty)) & set("<>\"'")


def test_a_limit_keeps_every_question_and_says_what_is_left_out(tmp_path: Path) -> None:
    board = make_board(300)
    written = write_html(board, tmp_path / "b.html", max_rows=60, now=NOW)
    assert written.rows + written.left_out == 300
    assert 30 < written.rows <= 60
    page = Page((tmp_path / "b.html").read_text())
    assert len(rows_of(page)) == written.rows
    assert f"{written.left_out} of 300 rows are left out" in page.text()
    assert "Ranks are among the rows shown" in page.text()
    everything = Page((write_html(board, tmp_path / "c.html", now=NOW), (tmp_path / "c.html").read_text())[1])
    assert len(page.all("section")) == len(everything.all("section"))


def test_the_limit_is_shared_evenly() -> None:
    rows = make_board(12)
    questions = {"a": rows[:10], "b": rows[10:11], "c": rows[11:]}
    assert {asked: len(kept) for asked, kept in within(questions, 7).items()} == {"a": 5, "b": 1, "c": 1}
    assert {asked: len(kept) for asked, kept in within(questions, 100).items()} == {"a": 10, "b": 1, "c": 1}
    assert {asked: len(kept) for asked, kept in within(questions, 2).items()} == {"a": 1, "b": 1}
    assert within({}, 5) == {}


def test_the_best_rows_of_a_question_are_kept(tmp_path: Path) -> None:
    cases = [make_case(techniques=(f"t{i}",), speed=1.0 + i) for i in range(5)]
    page = page_of([*cases, make_case(techniques=("bad",), status="failed", reason="x")], tmp_path, max_rows=2)
    assert [attrs["data-text"].split()[0] for attrs in rows_of(page)] == ["t4", "t3"]
    assert "4 of 6 rows are left out of this page: each table has its best rows by Tokens/s." in page.text()


def test_a_baseline_that_is_left_out_still_has_its_name(tmp_path: Path) -> None:
    slow = make_case(techniques=("mha",), baseline=None, speed=0.1)
    page = page_of([slow, make_case(techniques=("gqa",))], tmp_path, max_rows=1)
    assert len(rows_of(page)) == 1
    assert "mha" in [text for tag, text in page.texts if tag == "bdi"]


def test_a_large_board_is_a_file_that_can_be_sent(tmp_path: Path) -> None:
    written = write_html(make_board(1_000), tmp_path / "b.html", now=NOW)
    assert written.rows == 1_000
    assert written.num_bytes < 10_000 * written.rows


def test_bars_are_cut_and_say_so(tmp_path: Path) -> None:
    page = page_of([make_case(techniques=(f"t{i}",), speed=1.0 + i) for i in range(MAX_BARS + 5)], tmp_path)
    assert f"The first {MAX_BARS} of {MAX_BARS + 5} rows." in page.text()


def test_replaced_rows_and_unread_files_are_said(tmp_path: Path) -> None:
    old, new = make_case(started_at="2026-11-20T10:00:00+00:00"), make_case(started_at="2026-11-21T10:00:00+00:00")
    page = page_of([old, new], tmp_path, warnings=["Skipped: runs/x.parquet is damaged"])
    assert len(rows_of(page)) == 1
    assert "1 rows are left out since a later run" in page.text()
    assert "Skipped: runs/x.parquet is damaged" in page.text()


def test_no_results_make_a_page_that_says_so(tmp_path: Path) -> None:
    assert "There are no results to show." in page_of([], tmp_path).text()


def test_a_page_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be written"):
        write_html([make_case()], tmp_path / "missing" / "b.html")


def test_neither_streamlit_nor_plotly_nor_pandas_is_loaded() -> None:
    script = (
        "import sys\nfrom leaderboard_app.static import write_html\nfrom tests.records import make_board\nfrom pathlib import Path\n"
        "write_html(make_board(20), Path(sys.argv[1]))\n"
        "print(sorted({'streamlit', 'plotly', 'pandas', 'duckdb', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, "/dev/null"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not here")
def test_the_script_is_valid() -> None:
    subprocess.run(["node", "--check", str(static.FILES / "board.js")], check=True)


def test_the_command_writes_the_board_and_says_how_much_of_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "results")
    for case in make_board(30):
        store.write_case(case)
    page = tmp_path / "board.html"
    assert "A board of 30 rows written to" in effbench("export", "--html", page, "--results", store.path).stdout
    assert len(rows_of(Page(page.read_text()))) == 30
    nowhere = effbench("export", "--html", tmp_path / "none" / "board.html", "--results", store.path)
    assert (nowhere.returncode, "Traceback" in nowhere.stderr) == (2, False)
    assert "cannot be written" in nowhere.stderr
    assert "Nothing to write was named" in effbench("export", "--results", store.path).stderr


def test_a_row_in_two_folders_counts_once_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    for name in ("one", "two"):
        Store(tmp_path / name).write_case(make_case())
    damaged = tmp_path / "two" / "runs" / "damaged.parquet"
    damaged.write_text("no parquet")
    folders = ("--results", tmp_path / "one", "--results", tmp_path / "two")
    done = effbench("export", tmp_path / "rows.csv", "--html", tmp_path / "board.html", *folders)
    assert done.returncode == 0
    assert "1 rows written" in done.stdout
    assert "A board of 1 rows" in done.stdout
    assert str(damaged) in done.stderr
    assert str(damaged) in Page((tmp_path / "board.html").read_text()).text()
