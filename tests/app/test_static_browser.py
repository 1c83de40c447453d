"""The exported board in a real browser, from the disk and without a network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from leaderboard_app.static_tables import plain
from tests.app.browser import browser, missing
from tests.app.static_page import HOSTILE, page_of
from tests.records import make_board, make_case, make_value


@pytest.fixture
def browser_page(tmp_path: Path) -> Iterator[Any]:
    """A page of a real browser without a network; the test fails where it says an error or asks for more than the file."""
    if missing():
        pytest.skip(missing())
    said: list[str] = []
    with browser() as found:
        page = found.new_context(offline=True).new_page()
        page.on("pageerror", lambda fault: said.append(str(fault)))
        page.on("console", lambda line: said.append(line.text))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: None if request.url.startswith("file:") else said.append(request.url))
        yield page
    assert said == []


def rows_in(page: Any) -> list[str]:
    """The techniques of each row that can be seen, from the top."""
    found: list[str] = page.locator("tr[data-row]:visible th").all_text_contents()
    return found


def test_a_browser_filters_it_from_the_disk_and_the_address_keeps_what_was_chosen(tmp_path: Path, browser_page: Any) -> None:
    page_of(make_board(60), tmp_path)
    browser_page.goto((tmp_path / "board.html").as_uri())
    assert len(rows_in(browser_page)) == 60
    browser_page.select_option("select[name=workload]", "generate")
    browser_page.fill("input[name=q]", "GQA fp32")
    assert rows_in(browser_page) == []
    assert browser_page.get_by_text("No row passes these filters.").is_visible()
    browser_page.fill("input[name=q]", "GQA")
    chosen = rows_in(browser_page)
    assert 0 < len(chosen) < 20
    assert all("gqa" in techniques for techniques in chosen)
    assert browser_page.locator("#count").inner_text() == f"{len(chosen)} of 60 rows shown"
    assert browser_page.locator("section li[data-row]:visible").count() > 0
    address = browser_page.url
    browser_page.goto("about:blank")
    browser_page.goto(address)
    assert rows_in(browser_page) == chosen
    browser_page.click("button[type=reset]")
    assert len(rows_in(browser_page)) == 60


def test_a_browser_sorts_and_ranks_it_by_another_metric(tmp_path: Path, browser_page: Any) -> None:
    fast = make_case("generate", ("gqa",), speed=4.0)
    small = make_value("tpot_s", 1e-6)
    frugal = make_case("generate", ("mqa",), metrics=(*(m for m in make_case("generate").metrics if m.name != "tpot_s"), small))
    unknown = make_case("generate", ("lora",), speed=0.5)
    unknown = replace(unknown, metrics=tuple(m for m in unknown.metrics if m.name != "tpot_s"))
    page_of([fast, frugal, unknown], tmp_path)
    browser_page.goto((tmp_path / "board.html").as_uri())
    assert rows_in(browser_page) == ["gqa", "mqa", "lora"]
    head = browser_page.locator("thead th[data-column=tpot_s]")
    head.locator("button").click()
    assert rows_in(browser_page) == ["mqa", "gqa", "lora"], "what is missing comes last"
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").press("Enter")
    assert rows_in(browser_page) == ["gqa", "mqa", "lora"]
    assert head.get_attribute("aria-sort") == "descending"
    browser_page.click("button[type=reset]")
    browser_page.select_option("select[name=by]", "tpot_s")
    assert rows_in(browser_page) == ["mqa", "gqa", "lora"]
    assert browser_page.locator("tr[data-row] td.rank").all_inner_texts() == ["1", "2", "–"]
    assert "not_taken" in browser_page.locator("tbody.apart td.why").inner_text()
    assert browser_page.locator("figure:visible").get_attribute("data-by") == "tpot_s"
    assert browser_page.locator(".divider").inner_text() == "Not ranked by TPOT · lower is better"


def test_a_row_that_has_nothing_of_the_chosen_metric_says_why_it_has_no_rank(tmp_path: Path, browser_page: Any) -> None:
    failed = make_case("pretrain", ("mqa",), status="failed", reason="out_of_memory")
    page_of([make_case("generate"), make_case("pretrain"), failed], tmp_path)
    browser_page.goto((tmp_path / "board.html").as_uri())
    browser_page.select_option("select[name=by]", "tpot_s")
    whys = browser_page.locator("section[data-workload=pretrain] td.why").all_text_contents()
    assert whys[0] == "this metric was not taken"
    assert "out_of_memory" in whys[1]


def test_a_browser_shows_hostile_texts_as_texts(tmp_path: Path, browser_page: Any) -> None:
    rows = [replace(make_case(techniques=(nasty,)), model=nasty, run_id=nasty) for nasty in HOSTILE[:4]]
    page_of(rows, tmp_path, sources=HOSTILE[:4], warnings=HOSTILE[:4])
    browser_page.goto((tmp_path / "board.html").as_uri())
    browser_page.select_option("select[name=by]", "step_p50_s")
    assert set(rows_in(browser_page)) == {plain(nasty) for nasty in HOSTILE[:4]}
    assert browser_page.locator("img, body script:not(:last-child), [onmouseover]").count() == 0
