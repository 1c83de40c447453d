"""`make bench NAME=launch_cost`: run one benchmark of effbench itself; without a name, list all and run each.

    python benchmarks/run.py launch_cost              the full form, under 8 minutes
    python benchmarks/run.py launch_cost --tiny       seconds: proves that the script works, its figures mean nothing
    python benchmarks/run.py --list                   what there is

The exit code says whether the script ran, not whether a target was met: these are figures, not tests.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # run as a file, this folder comes first on the path and would hide modules of the same name
    sys.path[0] = str(ROOT)

from benchmarks import common, company  # noqa: E402  (the line above makes this possible)
from effbench.errors import did_you_mean  # noqa: E402

SCRIPTS = (
    "probe_overhead",
    "launch_cost",
    "truth",
    "harness",
    "launchers",
    "attention",
    "listing",
    "quick_suite",
    "board",
    "verify_bundle",
    "energy_truth",
    "experts_forward",
    "experts_training",
    "experts_quantised",
    "experts_gpu",
    "smop",
    "usam",
    "fuximt",
    "occult_placement",
    "expert_parallel",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    asked = _parser().parse_args(arguments)
    if asked.list or not asked.name:
        for name in SCRIPTS:
            print(f"{name:18} {_summary(name)}")
    if asked.list:
        return 0
    if asked.name and asked.name not in SCRIPTS:
        print(
            f"Unknown benchmark {asked.name!r}.{did_you_mean(asked.name, SCRIPTS)} Known: {', '.join(SCRIPTS)}.",
            file=sys.stderr,
        )
        return 2
    if asked.name:
        return _run(asked.name, _options(asked))
    return _run_all(list(sys.argv[1:] if arguments is None else arguments))


def _run(name: str, options: common.Options) -> int:
    began_s, card, others = time.monotonic(), common.machine(), company.Company()
    report = _script(name).run(options)
    others_share = others.share()
    report = replace(report, figures=[company.on_a_busy_machine(figure, others_share) for figure in report.figures])
    if options.tiny:
        figures = [replace(figure, target="", verdict=None) for figure in report.figures]
        report = replace(report, figures=figures, notes=(*report.notes, "A tiny run: nothing here is a measurement."))
    common.emit(report, {**card, "others_share": round(others_share, 3)}, time.monotonic() - began_s)
    return 0


def _run_all(options: list[str]) -> int:
    """Each in a process of its own, so that none inherits threads, memory or environment of another."""
    codes = [subprocess.run([sys.executable, __file__, name, *options], check=False).returncode for name in SCRIPTS]
    return max(codes)


def _script(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}")


def _summary(name: str) -> str:
    return (_script(name).__doc__ or "").strip().splitlines()[0]


def _options(asked: argparse.Namespace) -> common.Options:
    known = {"blocks": asked.blocks, "seed": asked.seed, "tiny": asked.tiny}
    limit = {} if asked.limit_s is None else {"limit_s": asked.limit_s}
    return common.Options(**known, **limit)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description="Benchmarks of effbench itself.")
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(SCRIPTS)}; none: all of them")
    parser.add_argument("--blocks", type=int, help="paired blocks to run, instead of the script's own plan")
    parser.add_argument("--limit-s", type=float, help="begin no block that would end after this many seconds")
    parser.add_argument("--seed", type=int, default=1, help="of the order inside blocks")
    parser.add_argument("--tiny", action="store_true", help="a few seconds: does the script work at all")
    parser.add_argument("--list", action="store_true", help="list the benchmarks and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
