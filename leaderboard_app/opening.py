"""How every page about rows begins: what could not be read is named, and without results it says how to get some."""

from __future__ import annotations

import streamlit as st

from effbench.analysis.index import ResultIndex
from leaderboard_app import data


def results() -> ResultIndex | None:
    """The index of all rows; None where there are none, which the page then says."""
    index = data.index()
    unread(index)
    if index.count():
        return index
    st.info("There are no results to show yet.", icon=":material/inbox:")
    st.markdown("Measure the quick suite on this machine; it takes about four minutes:")
    st.code("make run", language="bash")
    st.markdown("Or show results that are elsewhere:")
    st.code("effbench board --results path/to/results", language="bash")
    st.text("Looked in: " + ", ".join(str(folder) for folder in data.folders()))
    return None


def unread(index: ResultIndex) -> None:
    """Name the files and folders that could not be read."""
    for warning in (*index.warnings, *data.levels().warnings):
        st.warning(_plain(warning), icon=":material/broken_image:")


def _plain(text: str) -> str:
    """Text with everything that Markdown would read as markup escaped."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>()#+!|~$:" else letter for letter in text)
