"""A real server and a real browser, for tests of what a visitor sees, for screenshots and for the board's benchmark.

The browser is the system's own Chromium, driven by Playwright; nothing is downloaded. `missing()` says what is not there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
APP = ROOT / "leaderboard_app" / "app.py"
# No sandbox: continuous integration runs as root. No other hosts: a page must look the same without a network.
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost"]
START_S, PAINT_MS = 60.0, 60_000.0
# Painted: the script has run and nothing is left in a half-drawn state (stale elements are those of the run before).
TABLE = "[data-testid=stDataFrame] canvas"
FIGURE = ".st-key-ranking .js-plotly-plot .main-svg"


def chromium() -> str | None:
    """Where the browser is: EFFBENCH_CHROMIUM, else the system's."""
    named = os.environ.get("EFFBENCH_CHROMIUM")
    return named or next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


def missing() -> str:
    """Why there can be no browser, or an empty string."""
    if not find_spec("playwright"):
        return "playwright is not installed: pip install playwright (no browser download is needed)"
    return "" if chromium() else "there is no Chromium: apt-get install chromium, or name one in EFFBENCH_CHROMIUM"


@dataclass(frozen=True)
class Server:
    """A running `streamlit run`."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"


@contextlib.contextmanager
def serve(script: Path = APP, *, environment: Mapping[str, str] | None = None, theme: str = "") -> Iterator[Server]:
    """Run a Streamlit script on a free port until the block ends. Raises RuntimeError with its log when it does not start."""
    port = free_port()
    options = {"server.port": port, "server.address": "localhost", "server.headless": "true", "server.fileWatcherType": "none",
               "browser.gatherUsageStats": "false"}  # fmt: skip
    options |= {"theme.base": theme} if theme else {}
    command = [sys.executable, "-m", "streamlit", "run", str(script), *(f"--{name}={value}" for name, value in options.items())]
    with tempfile.TemporaryDirectory(prefix="effbench-server-") as name:
        log = Path(name) / "log"
        with log.open("wb") as out:
            known = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
            process = subprocess.Popen(command, cwd=ROOT, env=known, stdout=out, stderr=subprocess.STDOUT)
        try:
            server = Server(process, port, log)
            _wait(server)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])


def _wait(server: Server) -> None:
    began_s = time.monotonic()
    while time.monotonic() - began_s < START_S and server.process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.url}/_stcore/health", timeout=5):
            return
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start:\n{server.log.read_text()[-2000:]}")


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=chromium(), args=FLAGS)
        try:
            yield found
        finally:
            found.close()


def painted(page: Any, *selectors: str) -> None:
    """Wait until each of these is visible and the script has finished."""
    for selector in selectors:
        page.locator(selector).first.wait_for(state="visible", timeout=PAINT_MS)


def settled(page: Any) -> None:
    """Wait until the server has run the script for everything that was clicked."""
    page.wait_for_timeout(150)
    page.wait_for_function("!document.querySelector('[data-testid=stStatusWidget]')", timeout=PAINT_MS)
    page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning]", timeout=PAINT_MS)
