"""What the tests of all pages use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from effbench.schema import CaseRecord
from tests.app.pages import REFERENCE, Open, opened, stored


@pytest.fixture
def open_page(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Open the page that the test's module names PAGE on some records, on a results folder, or on the reference results."""

    def on(results: Sequence[CaseRecord] | Path = REFERENCE, **query: str | list[str]) -> AppTest:
        folder = results if isinstance(results, Path) else stored(tmp_path / "results", results)
        monkeypatch.setenv("EFFBENCH_RESULTS", str(folder))
        return opened(request.module.PAGE, **query)

    return on
