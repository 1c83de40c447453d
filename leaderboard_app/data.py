"""What the pages show, read once for each state of the files and shared by all viewers.

EFFBENCH_RESULTS or results/local, results/reference ──▶ ResultIndex ──(filters, metrics)──▶ frames
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import streamlit as st

from effbench.analysis.index import ResultIndex
from leaderboard_app.figures import style

DEFAULT_FOLDERS = ("results/local", "results/reference")
AT_ONCE = 2  # more scripts than that share one interpreter lock: none is faster for it, and each holds its columns in memory


def folders() -> tuple[Path, ...]:
    """The results directories: EFFBENCH_RESULTS, separated as in PATH, else the usual two."""
    named = os.environ.get("EFFBENCH_RESULTS", "")
    return tuple(Path(name) for name in (named.split(os.pathsep) if named else DEFAULT_FOLDERS) if name)


def index() -> ResultIndex:
    """The results of all folders, shared by all viewers and read again where a file has changed."""
    found: ResultIndex = _index(folders())
    found.refresh()
    return found


@st.cache_resource  # type: ignore[untyped-decorator]
def turn() -> threading.Semaphore:
    """What a page's script holds while it runs: of many viewers, a few are served at once and the others wait."""
    return threading.Semaphore(AT_ONCE)


@st.cache_resource(max_entries=4, show_spinner="Reading results …")  # type: ignore[untyped-decorator]  # streamlit is not followed
def _index(of: tuple[Path, ...]) -> ResultIndex:
    return ResultIndex(of)


def colours() -> dict[str, str]:
    """The colour of each stack of techniques there is, the same on all pages and under all filters."""
    return style.colours(index().distinct("label"))
