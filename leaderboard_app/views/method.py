"""How it was measured: the pages of docs/, as they are in the source tree, with a table of contents and working links.

    docs/methodology.md, docs/techniques/*.md ── sections at headings ── st.header with its own anchor, st.markdown

A wheel carries no docs. They are looked for beside the installed package (a checkout or an editable install) and in the
working directory; where they are in neither, the page says so and shows the metric table, which is code.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pandas as pd
import streamlit as st

from effbench.analysis.table import ARROWS
from effbench.metrics import METRICS

FIRST = "methodology"
_HEADING = re.compile(r"(#{1,6})\s+(.+?)\s*#*$")
_LINK = re.compile(r"\[([^\]]+)\]\(([^()\s]+)\)", re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)
_FENCED = re.compile(r"(```.*?```)", re.DOTALL)
_CODE = re.compile(r"(`[^`]*`)")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A heading and the text up to the next one. The text before the first heading has level 0."""

    level: int
    title: str
    anchor: str
    text: str


def page() -> None:
    folders = places()
    root = next((folder for folder in folders if (folder / f"{FIRST}.md").is_file()), None)
    if root is None:
        without_docs(folders)
        return
    pages = documents(root)
    chosen = st.selectbox(
        "Document", list(pages), key="doc", bind="query-params", help="The method, and the details of each axis."
    )
    try:
        text = pages[chosen].read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        st.error("This document cannot be read.")
        st.text(f"{pages[chosen]}: {fault}")
        return
    show(parts(text, chosen, pages))


def places() -> list[Path]:
    """Where docs are looked for, in this order."""
    return list(dict.fromkeys([Path(__file__).resolve().parents[2] / "docs", Path.cwd() / "docs"]))


def documents(root: Path) -> dict[str, Path]:
    """The documents by name as the URL has it: 'methodology', 'techniques/moe'."""
    return {FIRST: root / f"{FIRST}.md"} | {
        f"techniques/{path.stem}": path for path in sorted((root / "techniques").glob("*.md"))
    }


def parts(text: str, name: str, pages: Mapping[str, Path]) -> list[Part]:
    """A document cut at its headings, with links that work here. `name` is the document's, `pages` those there are."""
    found: list[Part] = []
    level, title, lines, taken = 0, "", list[str](), set[str]()
    for line in [*_lines(_COMMENT.sub("", text)), (True, "")]:
        fenced, content = line
        heading = None if fenced else _HEADING.match(content)
        if heading is None:
            lines.append(content)
            continue
        if title or "".join(lines).strip():
            found.append(_part(level, title, lines, name, pages, taken))
        level, title, lines = len(heading[1]), heading[2], []
    if title or "".join(lines).strip():
        found.append(_part(level, title, lines, name, pages, taken))
    return found


def _lines(text: str) -> Iterator[tuple[bool, str]]:
    """Each line, and whether it is code, where a # is no heading."""
    fenced = False
    for line in text.splitlines():
        fence = line.lstrip().startswith("```")
        yield fenced or fence or line.startswith("    "), line
        fenced ^= fence


def _part(level: int, title: str, lines: list[str], name: str, pages: Mapping[str, Path], taken: set[str]) -> Part:
    slug = base = re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).strip().replace(" ", "-") or "part"
    count = 1
    while slug in taken:
        slug = f"{base}-{count}"
        count += 1
    taken.add(slug)
    return Part(level=level, title=title, anchor=slug, text=linked("\n".join(lines), name, pages).strip())


def linked(text: str, name: str, pages: Mapping[str, Path]) -> str:
    """Markdown whose relative links lead to documents of this page; one that leads elsewhere becomes text with the file's path.

    Outside of code $ is escaped, which would start a formula."""

    def replaced(match: re.Match[str]) -> str:
        words, target = match[1], match[2]
        if re.match(r"https?://|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        whole = posixpath.normpath(posixpath.join("docs", posixpath.dirname(name), path))
        document = whole.removeprefix("docs/").removesuffix(".md")
        if document in pages:
            return f"[{words}](?doc={quote(document, safe='')}{f'#{anchor}' if anchor else ''})"
        return words if words == whole else f"{words} (`{whole}`)"

    return _outside(
        _FENCED, text, lambda prose: _outside(_CODE, _LINK.sub(replaced, prose), lambda words: words.replace("$", r"\$"))
    )


def _outside(code: re.Pattern[str], text: str, change: Callable[[str], str]) -> str:
    """`text` with what is not `code` changed. The pattern's one group is the code."""
    return "".join(piece if index % 2 else change(piece) for index, piece in enumerate(code.split(text)))


def show(found: list[Part]) -> None:
    """Title, contents, sections."""
    first = found[0] if found and found[0].level == 1 else None
    st.title(first.title if first else "Method", anchor=first.anchor if first else None)
    if first:
        st.markdown(first.text)
    sections = [part for part in found if part is not first]
    contents = [f"{'  ' * max(part.level - 2, 0)}- [{part.title}](#{part.anchor})" for part in sections if part.title]
    if contents:
        with st.expander("Contents", expanded=True):
            st.markdown("\n".join(contents))
    for part in sections:
        if part.title:
            (st.header if part.level <= 2 else st.subheader)(part.title, anchor=part.anchor)
        if part.text:
            st.markdown(part.text)


def without_docs(folders: list[Path]) -> None:
    """An installed package: say what is missing, and show what the code itself knows."""
    st.title("Method")
    st.info("The method is a document of the source tree, which this installation does not have.", icon=":material/menu_book:")
    st.markdown("Start the leaderboard from a checkout of the source (`make board`), or read `docs/methodology.md` there.")
    st.text("Looked in: " + ", ".join(str(folder) for folder in folders))
    st.header("Metrics")
    lines = [(m.title, m.name, m.unit, ARROWS[m.better], m.formula, m.source) for m in METRICS.values()]
    frame = pd.DataFrame(lines, columns=["metric", "column", "unit", "better", "formula", "source"])
    st.dataframe(frame, hide_index=True, key="metrics", alt="Every metric with unit, direction, formula and source.")


page()
