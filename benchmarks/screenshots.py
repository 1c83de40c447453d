"""Pictures of every page of the leaderboard on the committed results, light and dark: docs/images/<page>-<light|dark>.png.

    python -m benchmarks.screenshots [FOLDER]        FOLDER instead of docs/images, as an artefact of continuous integration

The pages are those of the navigation; pages about rows are shown with rows. Needs Chromium and playwright (tests/app/browser.py).
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from effbench.store import Store
from tests.app.browser import FIGURE, ROOT, browser, missing, painted, serve, settled

IMAGES, REFERENCE = ROOT / "docs" / "images", ROOT / "results" / "reference"
SCHEMES, SIZE = ("light", "dark"), {"width": 1280, "height": 1000}
COLOURS = 128  # of a picture: a page has few, and the files stay small
STILL_MS = 1_500  # for figures to draw and grids to measure themselves


def main(arguments: list[str]) -> int:
    """Write the pictures. Returns 1 where there is no browser."""
    if why := missing():
        print(why, file=sys.stderr)
        return 1
    folder = Path(arguments[0]) if arguments else IMAGES
    folder.mkdir(parents=True, exist_ok=True)
    with serve(environment={"EFFBENCH_RESULTS": str(REFERENCE)}) as server, browser() as found:
        for scheme in SCHEMES:
            page = found.new_context(viewport=SIZE, color_scheme=scheme).new_page()
            page.goto(server.url)
            painted(page, FIGURE)
            paths = page.locator("[data-testid=stSidebarNavLink]").evaluate_all(
                "links => links.map(link => new URL(link.href).pathname)"
            )
            for path in paths:
                name = path.strip("/") or "board"
                page.goto(f"{server.url}/{path.strip('/')}{_query(name)}")
                painted(page, "h1")
                _take(page, folder / f"{name}-{scheme}.png")
    return 0


def _query(name: str) -> str:
    """What a page needs in its URL to have something to show: a row and its baseline."""
    rows = {record.case_id: record for record in Store(REFERENCE).cases(["case_id", "workload", "baseline_case_id"])}
    row = next(record for record in rows.values() if record.workload == "generate" and record.baseline_case_id)
    base = rows[row.baseline_case_id or ""]
    known = {"board": "?workload=generate", "run": f"?run={row.run_id}", "compare": f"?rows={base.run_id},{row.run_id}"}
    return known.get(name, "")


def _take(page: Any, path: Path) -> None:
    settled(page)
    page.wait_for_timeout(STILL_MS)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(COLOURS)
    picture.save(path, optimize=True)
    print(f"{path}  {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
