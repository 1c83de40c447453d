"""The exported board in tests: written, read as HTML, and the texts that must stay texts."""

from __future__ import annotations

from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

from effbench.schema import CaseRecord
from leaderboard_app.static import write_html

NOW = datetime(2026, 11, 27, 3, 4, tzinfo=UTC)
VOID = {"meta", "input", "rect", "line", "br", "link", "img"}
HOSTILE = (
    "</script><script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x=\'',
    "<!-- <a href='javascript:alert(1)'>x</a>",
    "&lt;b&gt; &amp;amp;",
    "=cmd|' /C calc'!A0",
    "\u202eright to left\u2066",
    "nul\x00 \x1b[31m lone \udc80",
    "x" * 5_000,
)


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text of each cell; fails where tags do not nest."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        wanted = {key.rstrip("_").replace("_", "-"): value for key, value in wanted.items()}
        return [attrs for name, attrs in self.elements if name == tag and wanted.items() <= attrs.items()]

    def text(self) -> str:
        return "".join(text for tag, text in self.texts if tag not in ("style", "script"))


def page_of(records: list[CaseRecord], tmp_path: Path, **options: object) -> Page:
    written = write_html(records, tmp_path / "board.html", now=NOW, **options)
    text = (tmp_path / "board.html").read_text(encoding="utf-8")
    assert written.num_bytes == len(text.encode())
    return Page(text)


def rows_of(page: Page) -> list[dict[str, str]]:
    return [attrs for tag, attrs in page.elements if tag == "tr" and "data-row" in attrs]
