"""The page of text: the method as in docs/."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.app.pages import ROOT, VIEWS, opened, texts

METHOD = VIEWS / "method.py"


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder docs/ of its own, found as the working directory's; the source tree's is out of sight."""
    source = METHOD.read_text().replace("Path(__file__).resolve().parents[2]", "Path('/nowhere')")
    (tmp_path / "method.py").write_text(source)
    (tmp_path / "docs" / "techniques").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "docs"


def test_method_shows_the_whole_methodology() -> None:
    app = opened(METHOD)
    source = (ROOT / "docs" / "methodology.md").read_text()
    assert app.title[0].value == "Methodology"
    assert [header.value for header in app.header] == re.findall(r"^## (.+)$", source, re.MULTILINE)
    text = texts(app)
    assert "The block is the unit of replication" in text
    assert "| `energy_truth`" in text
    assert "<!--" not in text
    for word in re.findall(r"\w+", re.sub(r"<!--.*?-->|\[[^]]*\]\([^)]*\)", "", source)):
        assert word in text, word


def test_contents_lead_to_headings_that_are_there() -> None:
    app = opened(METHOD)
    contents = next(element.value for element in app.markdown if "](#" in element.value)
    anchors = {header.proto.anchor for header in app.header}
    assert set(re.findall(r"\]\(#([^)]+)\)", contents)) == anchors
    assert len(anchors) == len(app.header)


def test_links_lead_to_documents_that_open_here() -> None:
    text = texts(opened(METHOD))
    targets = re.findall(r"\]\(\?doc=([^)]+)\)", text)
    assert "techniques%2Fmoe" in targets
    assert not re.search(r"\]\((?!\?doc=|#|https?://)", text), "no relative link is left"
    assert "`kernels/README.md`" in text or "kernels/README.md" in text
    app = opened(METHOD, doc="techniques/moe")
    assert app.title[0].value == "The feed-forward axis"
    assert "](?doc=techniques%2Fkernels)" in texts(app)


@pytest.mark.parametrize("name", [p.stem for p in sorted((ROOT / "docs" / "techniques").glob("*.md"))])
def test_every_document_opens(name: str) -> None:
    app = opened(METHOD, doc=f"techniques/{name}")
    assert app.title[0].value in (ROOT / "docs" / "techniques" / f"{name}.md").read_text().splitlines()[0]
    assert len(app.header) > 1


def test_a_document_that_is_not_there_or_not_ours_is_not_opened() -> None:
    for name in ("nonsense", "../README", "/etc/passwd"):
        assert opened(METHOD, doc=name).title[0].value == "Methodology"


def test_code_is_no_heading_and_dollars_are_no_formula(docs: Path) -> None:
    (docs / "methodology.md").write_text(
        "# One\n\nIt costs $2 or $3, `$HOME` [here](techniques/two.md#part) and [there](../suites/quick.yaml).\n\n"
        "```\n# no heading\n[no](link.md) $x\n```\n\n    ## nor this\n\n## Same\n\na\n\n## Same\n\nb [w](https://example.org)\n"
    )
    (docs / "techniques" / "two.md").write_text("# Two\n\n[back](../methodology.md)\n")
    app = opened(docs.parent / "method.py")
    text = texts(app)
    assert [header.value for header in app.header] == ["Same", "Same"]
    assert [header.proto.anchor for header in app.header] == ["same", "same-1"]
    assert r"It costs \$2 or \$3, `$HOME`" in text
    assert "[here](?doc=techniques%2Ftwo#part)" in text
    assert "there (`suites/quick.yaml`)" in text
    assert "# no heading\n[no](link.md) $x" in text
    assert "    ## nor this" in text
    assert "[w](https://example.org)" in text
    assert "[back](?doc=methodology)" in texts(opened(docs.parent / "method.py", doc="techniques/two"))


def test_without_docs_the_page_says_where_it_looked_and_shows_the_metrics(docs: Path) -> None:
    app = opened(docs.parent / "method.py")
    text = texts(app)
    assert str(docs) in text
    assert "make board" in text
    metrics = app.dataframe[0].value.set_index("column")
    assert metrics.loc["tokens_per_s", "better"] == "higher is better"


def test_a_document_that_cannot_be_read_is_named(docs: Path) -> None:
    (docs / "methodology.md").write_bytes(b"# \xff\xfe\n")
    assert "methodology.md" in texts(opened(docs.parent / "method.py"))
