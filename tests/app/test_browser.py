"""The leaderboard as a visitor meets it: a real server, a real Chromium. Skipped with its reason where there is no browser."""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest

from effbench.store import Store
from tests.app.browser import FIGURE, ROOT, TABLE, Server, browser, missing, painted, serve, settled
from tests.records import make_case

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "there is a browser")
REFERENCE = ROOT / "results" / "reference"
NARROW_PX = 390
SCREENS: dict[str, dict[str, Any]] = {
    "wide": {},
    "narrow": {"viewport": {"width": NARROW_PX, "height": 844}, "has_touch": True},
    "dark": {"color_scheme": "dark"},
}
ROW_PX = 35  # of a table, its header too
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>**bold** $x$ =1+1"


@pytest.fixture(scope="module")
def screens() -> Iterator[Callable[[str], Any]]:
    """A browser context a screen, kept for all tests: its cache of scripts halves the time of a page."""
    with browser() as found:
        yield cache(lambda name: found.new_context(**{"viewport": {"width": 1280, "height": 1000}} | SCREENS[name]))


@pytest.fixture(scope="module")
def reference() -> Iterator[Server]:
    with serve(environment={"EFFBENCH_RESULTS": str(REFERENCE)}) as server:
        yield server


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on one good row, one row of hostile texts and one broken file."""
    store = Store(tmp_path_factory.mktemp("troubled"))
    store.write_case(make_case("generate", ("gqa",)))
    store.write_case(make_case("generate", ("mha",), model=HOSTILE, hardware=HOSTILE, baseline=None, run_id="hostile"))
    (store.path / "runs" / "broken-by-hand.parquet").write_bytes(b"PAR1 this is no parquet file PAR1")
    with serve(environment={"EFFBENCH_RESULTS": str(store.path)}) as server:
        yield server


class Tab:
    """A page, with what its console said of faults."""

    def __init__(self, context: Any) -> None:
        self.page = context.new_page()
        self.faults: list[str] = []
        self.page.on("console", lambda said: self._heard(said.type, said.text))
        self.page.on("pageerror", lambda fault: self.faults.append(str(fault)))

    def _heard(self, kind: str, text: str) -> None:
        if kind == "error" and "ERR_NAME_NOT_RESOLVED" not in text:  # Streamlit's own requests to other hosts
            self.faults.append(text)

    def open(self, server: Server, path: str = "", *selectors: str) -> Any:
        self.page.goto(f"{server.url}/{path}", wait_until="commit")
        painted(self.page, *(selectors or (TABLE, FIGURE)))
        settled(self.page)
        return self.page


def query(page: Any) -> dict[str, list[str]]:
    return parse_qs(urlparse(page.url).query)


@pytest.fixture
def tab(screens: Callable[[str], Any], request: pytest.FixtureRequest) -> Iterator[Tab]:
    context = screens(getattr(request, "param", "wide"))
    yield Tab(context)
    for page in context.pages:
        page.close()


def pick(page: Any, key: str, text: str) -> None:
    """Choose an option of a selectbox or multiselect by its text; a long list shows only its first ones until one types."""
    page.locator(f".st-key-{key}").get_by_role("combobox").click()
    page.keyboard.type(text)
    page.get_by_role("option", name=re.compile(f"^{re.escape(text)}")).first.click()
    settled(page)


def chosen(page: Any, key: str) -> str:
    """What a selectbox shows."""
    return str(page.locator(f".st-key-{key}").get_by_role("combobox").input_value())


def test_a_choice_goes_into_the_url_and_the_link_restores_it(tab: Tab, reference: Server) -> None:
    page = tab.open(reference)
    pick(page, "workload", "finetune")
    pick(page, "by", "Step p50")
    assert query(page)["workload"] == ["finetune"]
    assert query(page)["by"][0].startswith("Step p50")
    shown = Tab(page.context).open(reference, page.url.removeprefix(reference.url).lstrip("/"))
    assert chosen(shown, "workload") == "finetune"
    assert chosen(shown, "by").startswith("Step p50")
    assert shown.locator(".st-key-ranking").get_by_text(re.compile("Step p50|ms")).first.is_visible()


def test_the_cheapest_configuration_under_a_latency_limit_is_three_clicks_away(tab: Tab, reference: Server) -> None:
    page = tab.open(reference)
    rows = page.locator("[data-testid=stDataFrame]").first
    tall = rows.bounding_box()["height"]
    page.locator(".st-key-matters").get_by_text("Host memory").click()
    settled(page)
    slider = page.locator(".st-key-tpot input[type=range]")
    assert slider.get_attribute("aria-valuetext") == "no limit"
    track = page.locator(".st-key-tpot [role=group] > div").first.bounding_box()
    page.mouse.click(track["x"] + track["width"] * 0.4, track["y"] + track["height"] / 2)
    settled(page)
    painted(page, TABLE, FIGURE)
    assert query(page)["by"][0].startswith("Peak host memory")
    assert "ms" in query(page)["tpot"][0]
    assert "by the limits" in page.locator("[data-testid=stMain]").inner_text()
    assert rows.bounding_box()["height"] < tall
    assert tab.faults == []


def test_the_trade_offs_keep_what_was_chosen_in_the_address(tab: Tab, reference: Server) -> None:
    drawn = ".js-plotly-plot .main-svg"
    page = tab.open(reference, "tradeoffs?workload=generate", drawn)
    page.locator(".st-key-log").get_by_text("Logarithmic axes").click()
    settled(page)
    painted(page, drawn)
    assert query(page)["log"] == ["true"]
    assert query(page)["workload"] == ["generate"]
    shown = Tab(page.context).open(reference, page.url.removeprefix(reference.url).lstrip("/"), drawn)
    assert shown.locator(".st-key-log input").is_checked()
    assert shown.evaluate(_AXIS_TYPES) == ["log", "log"]
    assert page.locator("[data-testid=stException]").count() == 0


_AXIS_TYPES = """() => { const found = document.querySelector('.js-plotly-plot').layout;
  return [found.xaxis.type, found.yaxis.type]; }"""


def test_the_keyboard_reaches_the_main_controls_and_can_use_them(tab: Tab, reference: Server) -> None:
    page = tab.open(reference)
    reached: list[str] = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached += page.evaluate(_FOCUSED)
        if reached and reached[-1] == "workload":
            page.keyboard.type("pretrain")
            page.keyboard.press("Enter")
            settled(page)
        if {"workload", "by", "hardware", "model"} <= set(reached):
            break
    assert {"workload", "by", "hardware", "model"} <= set(reached), reached
    assert query(page).get("workload") == ["pretrain"]
    assert page.evaluate(_NAMELESS) == []


_NAMELESS = """() => [...document.querySelectorAll('[data-testid=stMain] :is(input, textarea, button, [role=slider])')].filter(
  element => element.checkVisibility() && ![element.ariaLabel, element.innerText, element.title,
    ...[...element.labels ?? []].map(label => label.innerText),
    ...(element.ariaLabelledByElements ?? []).map(label => label.innerText)].some(text => text?.trim())
).map(element => element.outerHTML.slice(0, 200))"""
_FOCUSED = """() => {
  const widget = document.activeElement.closest('[class*=st-key-]');
  return widget ? [widget.className.match(/st-key-([\\w-]+)/)[1]] : [];
}"""


@pytest.mark.parametrize("tab", ["narrow"], indirect=True)
@pytest.mark.parametrize("path", ["", "compare", "claims"])
def test_a_narrow_screen_scrolls_down_only(tab: Tab, reference: Server, path: str) -> None:
    page = tab.open(reference, path, TABLE if not path else "h1")
    wide = page.evaluate("""() => [document.scrollingElement, document.querySelector('[data-testid=stMain]')].map(
      element => [element.scrollWidth, element.clientWidth])""")
    assert all(content <= room for content, room in wide), wide
    outside = page.evaluate(f"""() => [...document.querySelectorAll('[data-testid=stMain] label, [data-testid=stMain] p')].filter(
      element => element.getBoundingClientRect().right > {NARROW_PX + 1}
                 && !element.closest('[data-testid=stDataFrame], [data-testid=stTable], pre, table')).map(element => element.textContent)""")
    assert outside == []


@pytest.mark.parametrize("tab", ["dark"], indirect=True)
def test_a_dark_screen_is_dark_with_light_text_also_in_the_figure(tab: Tab, reference: Server) -> None:
    page = tab.open(reference)
    colours = page.evaluate("""() => ({
      ground: getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor,
      title: getComputedStyle(document.querySelector('h1')).color,
      ticks: getComputedStyle(document.querySelector('.st-key-ranking .xtick text, .st-key-ranking .ytick text')).fill,
      paper: getComputedStyle(document.querySelector('.st-key-ranking .main-svg')).backgroundColor,
    })""")
    ground = _luminance(colours["ground"])
    assert ground < 0.05
    for name in ("title", "ticks"):
        assert (_luminance(colours[name]) + 0.05) / (ground + 0.05) >= 4.5, f"{name}: {colours[name]} on {colours['ground']}"
    assert "rgba(0, 0, 0, 0)" in colours["paper"] or _luminance(colours["paper"]) < 0.05


def _luminance(colour: str) -> float:
    """Relative luminance of an rgb() text (WCAG 2)."""
    channels = [int(float(part)) / 255 for part in re.findall(r"[\d.]+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_an_empty_folder_shows_what_to_run(tab: Tab, tmp_path: Path) -> None:
    with serve(environment={"EFFBENCH_RESULTS": str(tmp_path)}) as server:
        page = tab.open(server, "", "h1")
        assert page.get_by_text("There are no results to show yet.").is_visible()
        assert page.locator("code", has_text="make run").is_visible()
        assert page.get_by_text(str(tmp_path)).is_visible()


def test_a_broken_file_is_named_and_hostile_texts_of_a_record_are_shown_as_text(tab: Tab, troubled: Server) -> None:
    page = tab.open(troubled)
    assert page.get_by_text("broken-by-hand.parquet").first.is_visible()
    assert page.locator(".st-key-ranking .bars path").count() >= 1
    page.locator(".st-key-model").get_by_role("combobox").click()
    assert page.get_by_role("option", name=HOSTILE).is_visible()
    for path in ("", "run?run=hostile", "compare?rows=hostile"):
        page = tab.open(troubled, path, "h1") if path else page
        assert page.locator("[data-testid=stMain] img[src=x]").count() == 0, path
        assert page.title() != "taken", path


def test_every_page_opens_from_the_navigation_with_a_quiet_console(tab: Tab, reference: Server) -> None:
    page = tab.open(reference)
    assert page.get_by_role("heading", name="Leaderboard").is_visible()
    assert page.locator(".st-key-ranking .bars path").count() >= 3
    links = page.locator("[data-testid=stSidebarNavLink]")
    titles = links.all_inner_texts()
    assert len(titles) >= 4
    for number in range(len(titles)):
        links.nth(number).click()
        painted(page, "h1")
        settled(page)
        assert page.locator("[data-testid=stException]").count() == 0, titles[number]
    assert tab.faults == []


def follow(page: Any, row: int = 0) -> Any:
    """Click the link in a row of the first table, wherever its column is. Returns the page that it opens."""
    table = page.locator("[data-testid=stDataFrame]").first
    table.scroll_into_view_if_needed()
    box = table.bounding_box()
    y, left, right = box["y"] + ROW_PX * (row + 1.5), int(box["x"]), int(box["x"] + box["width"])
    for scroll_px in (0, 10_000):
        page.mouse.move((left + right) / 2, y)
        page.mouse.wheel(scroll_px, 0)
        page.wait_for_timeout(200)
        for x in range(right - 6, left, -12):
            page.mouse.move(x, y)
            if page.evaluate("([x, y]) => getComputedStyle(document.elementFromPoint(x, y)).cursor", [x, y]) == "pointer":
                with page.context.expect_page() as opened:
                    page.mouse.click(x, y)
                return opened.value
    raise AssertionError("no cell of this row is a link")


def test_from_the_board_to_a_row_to_its_baseline_and_files_that_hold_what_is_stored(
    tab: Tab, reference: Server, tmp_path: Path
) -> None:
    rows = {record.run_id: record for record in Store(REFERENCE).cases()}
    of_baselines = {name for record in rows.values() if not record.baseline_case_id for name in record.techniques}
    like = next(record for record in rows.values() if set(record.techniques) - of_baselines)
    technique = min(set(like.techniques) - of_baselines)
    page = follow(tab.open(reference, f"?workload={like.workload}&technique={technique}"))
    painted(page, TABLE)
    settled(page)
    record = rows[query(page)["run"][0]]
    assert technique in record.techniques
    assert page.get_by_role("textbox", name="Run id").input_value() == record.run_id
    page.get_by_role("button", name="Compare with its baseline").click()
    page.wait_for_url("**/compare?**")
    painted(page, TABLE)
    settled(page)
    compared = query(page)["rows"][0].split(",")
    assert compared[1] == record.run_id
    assert rows[compared[0]].case_id == record.baseline_case_id
    lines = list(csv.DictReader(io.StringIO(_download(page, "Rows as CSV").read_text("utf-8-sig"))))
    (tmp_path / "runs").mkdir()
    shutil.copy(_download(page, "Rows as parquet"), tmp_path / "runs" / "taken-home.parquet")
    taken = {row.run_id: row for row in Store(tmp_path).cases()}
    assert taken == {run_id: rows[run_id] for run_id in compared}
    assert [line["run_id"] for line in lines] == compared
    for line in lines:
        for name in ("case_id", "workload", "model", "hardware", "protocol", "started_at", "spec"):
            assert line[name] == getattr(taken[line["run_id"]], name)
        for value in taken[line["run_id"]].metrics:
            number = float(line[value.name]) if line[value.name] else None
            assert number == (None if value.value is None else pytest.approx(value.value, rel=1e-12)), value.name
    back = follow(page)
    assert query(back)["run"] == [compared[0]]


def _download(page: Any, button: str) -> Path:
    with page.expect_download() as waiting:
        page.get_by_role("button", name=button).first.click()
    return Path(waiting.value.path())
