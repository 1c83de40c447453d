"""The submit page in a real browser: an upload, its report, a decision, the board. Skipped with its reason where there is no browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from effbench.exchange.bundle import write_bundle
from effbench.store import Store
from tests.app.browser import TABLE, browser, missing, painted, serve, settled
from tests.app.pages import REFERENCE

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "there is a browser")
TOKEN = "the-maintainers-token"


def send(page: Any, path: Path, answer: str) -> None:
    page.locator("input[type=file]").set_input_files(str(path))
    page.get_by_test_id("stFileChip").wait_for(timeout=60_000)
    page.get_by_test_id("stFormSubmitButton").get_by_role("button").click()
    page.get_by_text(answer).first.wait_for(timeout=60_000)
    settled(page)


def write(page: Any, key: str, text: str) -> None:
    page.locator(f".st-key-{key} input").fill(text)
    page.keyboard.press("Enter")
    settled(page)


def test_a_bundle_goes_from_the_upload_to_the_board_and_no_text_of_it_runs(tmp_path: Path) -> None:
    bundle, hostile = tmp_path / "bundle.zip", tmp_path / "<img src=x onerror=document.title='taken'>.zip"
    write_bundle(Store(REFERENCE), bundle, contact="me@example.org", licence="CC-BY-4.0")
    hostile.write_bytes(b"PK this is no bundle")
    places = {"EFFBENCH_RESULTS": str(tmp_path / "results"), "EFFBENCH_QUEUE": str(tmp_path / "queue")}
    with serve(environment=places | {"EFFBENCH_MAINTAINER_TOKEN": TOKEN}) as server, browser() as found:
        page = found.new_context(viewport={"width": 1280, "height": 1600}).new_page()
        faults: list[str] = []
        page.on("pageerror", lambda fault: faults.append(str(fault)))
        page.goto(f"{server.url}/submit")
        page.get_by_text("How to make a bundle").first.wait_for(timeout=60_000)
        send(page, hostile, "Rejected: the reasons")
        send(page, bundle, "Verified, with remarks")
        page.get_by_test_id("stFileChip").wait_for(state="detached", timeout=60_000)
        assert page.get_by_test_id("stFileChip").count() == 0, "the bytes do not stay in the session"
        write(page, "token", TOKEN)
        write(page, "who", "Ada")
        write(page, "why", "it follows")
        assert page.locator(".st-key-token input").get_attribute("type") == "password"
        page.locator(".st-key-accept button").click()
        page.get_by_text("1 accepted, 1 rejected").wait_for(timeout=60_000)
        assert TOKEN not in page.url and "taken" not in page.title() and faults == []
        page.goto(server.url)
        painted(page, TABLE)
        page.get_by_text("† submitted: of another hand").wait_for(timeout=60_000)
    assert len(Store(tmp_path / "results").cases()) == 12
