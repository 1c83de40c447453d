"""What the pages show, read once for each state of the files and shared by all viewers.

EFFBENCH_RESULTS or results/local, results/reference ──▶ ResultIndex ──(filters, metrics)──▶ frames
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import streamlit as st

from effbench.analysis.index import ResultIndex
from effbench.analysis.origins import Origins
from effbench.exchange.levels import Levels, fingerprint, read_levels
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
    found.refresh(origins())
    return found


def levels() -> Levels:
    """Where the rows of all folders come from, read again where a submission or reproduction has changed."""
    found: Levels = _levels(folders(), fingerprint(folders()))
    return found


def origins() -> Origins:
    """The same as tables show it."""
    return Origins(**levels().described())


class Turn:
    """What a page's script holds while it runs: of many viewers, a few are served at once and the others wait."""

    def __init__(self, at_once: int) -> None:
        self._places = threading.Semaphore(at_once)
        self._mine = threading.local()

    def __enter__(self) -> None:
        self._places.acquire()
        self._mine.held = True

    def __exit__(self, *_: object) -> None:
        self._mine.held = False
        self._places.release()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Let others be served while this script only waits for another process."""
        held = getattr(self._mine, "held", False)
        if held:
            self.__exit__()
        try:
            yield
        finally:
            if held:
                self.__enter__()


@st.cache_resource  # type: ignore[untyped-decorator]
def turn() -> Turn:
    """The turn that all viewers share."""
    return Turn(AT_ONCE)


@st.cache_resource(max_entries=4, show_spinner=False)  # type: ignore[untyped-decorator]
def _levels(of: tuple[Path, ...], state: str) -> Levels:
    return read_levels(of)


@st.cache_resource(max_entries=4, show_spinner="Reading results …")  # type: ignore[untyped-decorator]  # streamlit is not followed
def _index(of: tuple[Path, ...]) -> ResultIndex:
    return ResultIndex(of)


def colours() -> dict[str, str]:
    """The colour of each stack of techniques there is, the same on all pages and under all filters."""
    return style.colours(index().distinct("label"))
