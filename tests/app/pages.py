"""Opening a page of the board in tests, as Streamlit runs it, and reading what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from streamlit.testing.v1 import AppTest

from effbench.schema import CaseRecord
from effbench.store import Store

ROOT = Path(__file__).parents[2]
APP = ROOT / "leaderboard_app" / "app.py"
VIEWS = ROOT / "leaderboard_app" / "views"
REFERENCE = ROOT / "results" / "reference"
Open = Callable[..., AppTest]


def opened(page: Path, **query: str | list[str]) -> AppTest:
    """The page after its first run, with these choices in the URL."""
    app = AppTest.from_file(str(page), default_timeout=60)
    for key, value in query.items():
        app.query_params[key] = value
    return sound(app.run())


def stored(folder: Path, records: Sequence[CaseRecord]) -> Path:
    """A results folder with these records, merged into one file; no records leave it empty."""
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    store = Store(folder)
    for record in records:
        store.write_case(record)
    if records:
        store.compact()
    return folder


def sound(app: AppTest) -> AppTest:
    assert not app.exception, app.exception
    return app


def texts(app: AppTest) -> str:
    """All that the page says outside tables and widgets."""
    kinds = (
        app.title,
        app.header,
        app.subheader,
        app.markdown,
        app.text,
        app.info,
        app.warning,
        app.error,
        app.code,
        app.caption,
    )
    return "\n".join(str(element.value) for kind in kinds for element in kind)
