"""How fast the leaderboard paints and answers, in a real browser and from a real server, at 100,000 and 1,000,000 rows.

    generated rows ──▶ a server a size ──┬── first run of the script: everything is read        (cold read, apart)
                                         ├── filters changed one after the other                (time of the script)
                                         ├── a browser, in paired blocks with a bare page       (paint)
                                         ├── 20 viewers at once, a change each per 10 s         (waiting)
                                         └── /proc/<pid>/status before, with them all           (memory)

The bare page has one table and one chart; it is served and painted in the same blocks, and once more as the A/A. Painted is
when table and figure are on the screen. The time of a change is what a WebSocket client waits until the script has ended.
EFFBENCH_BOARD_DATA names a folder that keeps the generated rows for the next run.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import board_data, board_viewers, common
from benchmarks.board_viewers import Load
from benchmarks.common import ROOT, Figure, Options, Report, Samples, Target, against, judge_beside, single
from benchmarks.energy_truth import percentile_interval
from tests.app import browser

BARE = ROOT / "benchmarks" / "bare_page.py"
MAX_POINTS = 5_000
MEMORY_MB, GROWTH_MB = 1_500.0, 10.0  # of the server; of a viewer, whose own copy of a million rows would be hundreds
VIEWERS, THINK_S = 20, 10.0
OTHER_PAGES = ("tradeoffs", "compare", "run", "claims")  # that read the rows; the figures of the first have a point a row


@dataclass(frozen=True, kw_only=True)
class Size:
    """A number of rows and what is asked at it; None where nothing is."""

    rows: int
    paint: float | None = None  # times the bare page
    script_s: float | None = None  # p95 of a change
    changes: int = 80  # a p95 has an upper bound from 73 on
    loaded: bool = False  # whether 20 viewers come


SIZES = (Size(rows=100_000, paint=1.3, script_s=0.25, changes=120), Size(rows=1_000_000, paint=1.6, script_s=0.8, loaded=True))
TINY = (Size(rows=1_000, paint=1.3, script_s=0.25, changes=3, loaded=True),)


def run(options: Options) -> Report:
    """Servers first, all changes before the browser starts, the viewers last."""
    sizes, figures, servers = TINY if options.tiny else SIZES, list[Figure](), dict[int, browser.Server]()
    with _orphans_are_ours(), contextlib.ExitStack() as stack:
        bare = stack.enter_context(browser.serve(BARE))
        for size in sizes:
            folder = stack.enter_context(_rows(size.rows, options.seed))
            server = stack.enter_context(browser.serve(environment={"EFFBENCH_RESULTS": str(folder)}))
            figures += _answers(server, size, options.seed)
            servers[size.rows] = server
        samples, painted = _paint(bare, servers, sizes, options)
        figures = painted + figures
        for size in sizes:
            if size.loaded:
                figures += _viewers(servers[size.rows], size, options)
    return Report(
        name="board",
        compares="the leaderboard on generated rows, and a bare Streamlit page with one table and one chart",
        pairs=len(samples.blocks),
        figures=figures,
        notes=(
            f"A change is one filter, drawn from {', '.join(board_viewers.FILTERS)}; it ends when the script has ended.",
            "Memory: resident set of the server process, pages of files included; growth: anonymous pages alone, which are data.",
        ),
    )


@contextlib.contextmanager
def _orphans_are_ours() -> Iterator[None]:
    """Adopt what the browser's processes leave behind, and wait for it, so that its CPU time does not count as others'."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    try:
        yield
    finally:
        end_s = time.monotonic() + 10.0
        with contextlib.suppress(ChildProcessError):  # none is left
            while time.monotonic() < end_s:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    time.sleep(0.05)


@contextlib.contextmanager
def _rows(count: int, seed: int) -> Iterator[Path]:
    """A results folder of this many rows."""
    kept = os.environ.get("EFFBENCH_BOARD_DATA")
    with tempfile.TemporaryDirectory(prefix="effbench-bench-") if not kept else contextlib.nullcontext(kept) as name:
        folder = Path(name) / f"{count}-{seed}"
        if not (folder / "whole").exists():
            began_s = time.monotonic()
            board_data.write(folder, count, seed)
            (folder / "whole").touch()
            common.say(f"{count:,} rows written in {time.monotonic() - began_s:.0f} s")
        yield folder


def _answers(server: browser.Server, size: Size, seed: int) -> list[Figure]:
    """The cold read, and the time of a change when everything is read."""
    cold_s, _ = asyncio.run(_visit(server.port))
    common.say(f"{size.rows:,} rows read and shown in {cold_s:.1f} s")
    found = asyncio.run(board_viewers.load(server.port, viewers=1, changes=size.changes, think_s=0.0, seed=seed))
    common.say(f"{len(found.times_s)} changes at {size.rows:,} rows, {len(found.errors)} errors")
    others = {name: asyncio.run(_visit(server.port, name)) for name in OTHER_PAGES}
    faults = (*found.errors, *(fault for _, page in others.values() for fault in page.errors))
    most = max([found.points, *(points for _, page in others.values() for points in page.points)])
    target = _at_most(size.script_s, "s")
    title = f"script after a filter change, {size.rows:,} rows, p95"
    return [
        _p95(f"script_{size.rows}_p95_s", title, found, target),
        Figure(key=f"cold_{size.rows}_s", title=f"cold read and first run, {size.rows:,} rows", interval=single(cold_s)),
        *(
            Figure(key=f"{name}_{size.rows}_s", title=f"first run of {name}, {size.rows:,} rows", interval=single(first_s))
            for name, (first_s, _) in others.items()
        ),
        _errors(f"script_{size.rows}_errors_count", f"errors in these, {size.rows:,} rows", faults),
        _exact(f"points_{size.rows}_count", f"points of the largest figure, {size.rows:,} rows", most, MAX_POINTS),
    ]


async def _visit(port: int, page: str = "") -> tuple[float, board_viewers.Page]:
    """The time of a page's first run in s, and what it sent."""
    async with board_viewers.Viewer(port, page=page, timeout_s=600.0) as viewer:
        return await viewer.rerun(), viewer.page


def _paint(
    bare: browser.Server, servers: Mapping[int, browser.Server], sizes: Sequence[Size], options: Options
) -> tuple[Samples, list[Figure]]:
    """Time from the navigation to table and figure on the screen, each arm once a block in a browser that has its files."""
    if why := browser.missing():
        return Samples(()), [Figure(key="paint_ratio", title="paint", interval=single(None, why))]
    arms = {f"{rows} rows": server.url for rows, server in servers.items()} | {"bare": bare.url, "bare again": bare.url}
    with browser.browser() as found:
        context = found.new_context(viewport={"width": 1280, "height": 1000})
        painted = {name: _painter(context, url) for name, url in arms.items()}
        for arm in () if options.tiny else painted.values():
            arm()  # the browser's cache of scripts and their byte code
        samples = common.run_blocks(
            painted, blocks=options.plan(60), seed=options.seed, limit_s=options.limit_s, say=common.say
        )
    again = samples.ratio("bare again", "bare", "wall_s")
    figures = []
    for size in sizes:
        ratio, key, target = (
            samples.ratio(f"{size.rows} rows", "bare", "wall_s"),
            f"paint_{size.rows}",
            _at_most(size.paint, "×"),
        )
        title = f"paint, {size.rows:,} rows / bare page"
        verdict = judge_beside(ratio, target, again)
        figures += [
            Figure(key=f"{key}_ratio", title=title, interval=ratio, target=target.text, verdict=verdict),
            Figure(
                key=f"{key}_s", title=f"paint, {size.rows:,} rows", interval=samples.interval(f"{size.rows} rows", "wall_s")
            ),
        ]
    return samples, [
        *figures,
        Figure(key="paint_aa_ratio", title="A/A: bare page again / bare page", interval=again),
        Figure(key="paint_bare_s", title="paint, bare page", interval=samples.interval("bare", "wall_s")),
    ]


def _painter(context: Any, url: str) -> Callable[[], Mapping[str, float | None]]:
    def paint() -> Mapping[str, float | None]:
        page = context.new_page()
        try:
            began_s = time.perf_counter()
            page.goto(url, wait_until="commit")
            browser.painted(page, browser.TABLE, browser.FIGURE)
            return {"wall_s": time.perf_counter() - began_s}
        finally:
            page.close()

    return paint


def _viewers(server: browser.Server, size: Size, options: Options) -> list[Figure]:
    """Twenty viewers at once, and what they leave in the server's memory."""
    count, changes, think_s = (3, 2, 0.2) if options.tiny else (VIEWERS, 12, THINK_S)
    before, during, rows = memory_mb(server.process.pid), dict[str, float](), f"{size.rows:,} rows"
    found = asyncio.run(
        board_viewers.load(
            server.port, viewers=count, changes=changes, think_s=think_s, seed=options.seed,
            at_end=lambda: during.update(memory_mb(server.process.pid)),
        )
    )  # fmt: skip
    common.say(f"{len(found.times_s)} changes of {count} viewers, {len(found.errors)} errors")
    growth_mb = (during["anonymous"] - before["anonymous"]) / count
    return [
        _p95(
            f"viewers_{size.rows}_p95_s",
            f"{count} viewers, a change each per {think_s:g} s, {rows}, p95",
            found,
            _at_most(2.0, "s"),
        ),
        _errors(f"viewers_{size.rows}_errors_count", f"errors in {count * changes} changes of theirs", found.errors),
        _exact(f"memory_{size.rows}_mb", f"server memory before them, {rows}", before["rss"], MEMORY_MB),
        _exact(f"memory_viewers_{size.rows}_mb", f"server memory with {count} viewers", during["rss"], MEMORY_MB),
        _exact(f"peak_{size.rows}_mb", "its peak before them, cold read included", before["peak"], MEMORY_MB),
        _exact(f"peak_viewers_{size.rows}_mb", f"its peak with {count} viewers", during["peak"], MEMORY_MB),
        _exact(f"growth_{size.rows}_mb", "growth a viewer", growth_mb, GROWTH_MB),
    ]


def memory_mb(pid: int) -> dict[str, float]:
    """Memory of a process in 1e6 bytes (proc(5): status): `rss` now, `anonymous` of it (no pages of files), `peak` so far."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    found = {words[0].rstrip(":"): float(words[1]) * 1024 / 1e6 for words in lines if words[-1] == "kB"}
    return {"rss": found["VmRSS"], "anonymous": found["RssAnon"] + found["RssShmem"], "peak": found["VmHWM"]}


def _p95(key: str, title: str, found: Load, target: Target) -> Figure:
    if not found.times_s:
        return Figure(key=key, title=title, interval=single(None, "no change came through"))
    times_s = np.array(found.times_s)
    note = f"median {np.median(times_s):.3g} s, longest {times_s.max():.3g} s"
    return against(key, title, percentile_interval(times_s, 0.95), target, note)


def _errors(key: str, title: str, errors: Sequence[str]) -> Figure:
    return _exact(key, title, len(errors), 0, errors[0][:120] if errors else "")


def _exact(key: str, title: str, value: float, most: float, note: str = "") -> Figure:
    """A figure that is counted, not sampled: it has no interval, and its verdict is plain."""
    verdict: common.Answer = "met" if value <= most else "missed"
    return Figure(key=key, title=title, interval=single(float(value)), target=f"≤ {most:,.0f}", verdict=verdict, note=note)


def _at_most(upper: float | None, unit: str) -> Target:
    return Target(text=f"≤ {upper:g} {unit}", upper=upper)
