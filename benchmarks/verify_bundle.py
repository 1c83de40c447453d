"""What it costs to verify a bundle of 100 runs with their raw traces, from the file to the verdict.

    100 simulated honest runs ──submit──▶ one bundle ──┬── verify, once a block: a fresh process with limits,
                                                       │   hashes, tables, every metric from its trace, all checks
                                                       └── CPU time and resident memory of that process

The time is that of a whole `verify` call, start of the interpreter and its imports included; the target is for 2 cores. A
bundle that is not accepted would be cheaper than it should be, so the script stops there. The runs are those of the tests:
many machines, three workloads, three blocks each, windows of 1.5 s.
"""

from __future__ import annotations

import itertools
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import common
from benchmarks.common import Figure, Options, Report, Target, against, single
from effbench.exchange import limits
from effbench.exchange.bundle import Written, make_bundle
from effbench.exchange.verify import verify
from effbench.store import Store

RUNS, TINY_RUNS = 100, 5
AT_MOST = Target(text="≤ 10 s on 2 cores", upper=10.0)
CPU = Target(text=f"≤ {limits.CPU_S} s, the limit", upper=float(limits.CPU_S))


def run(options: Options) -> Report:
    """Write the bundle once, verify it in every block."""
    with _bundle(TINY_RUNS if options.tiny else RUNS) as (path, made, submit_s):

        def once() -> dict[str, float | None]:
            began_s, before_s = time.monotonic(), _children_cpu_s()
            report = verify(path)
            if report.verdict == "rejected":
                raise RuntimeError(f"The bundle of honest runs was rejected: {report.findings[0].message}")
            return {"wall_s": time.monotonic() - began_s, "cpu_s": _children_cpu_s() - before_s}

        samples = common.run_blocks(
            {"verify": once}, blocks=options.plan(15, tiny=1), seed=options.seed, limit_s=options.limit_s, say=common.say
        )
    what = f"{len(made.cases)} runs"
    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    return Report(
        name="verify_bundle",
        compares=f"verifying a bundle of {what}, {made.launches} launches and {made.samples:,} samples",
        pairs=len(samples.blocks),
        figures=[
            against("verify_s", f"verify, {what}", samples.interval("verify", "wall_s"), AT_MOST),
            against("verify_cpu_s", "of that CPU time of its process", samples.interval("verify", "cpu_s"), CPU),
            Figure(key="peak_mb", title="largest resident memory of a child", interval=single(peak_mb)),
            Figure(key="submit_s", title=f"submit, {what}", interval=single(submit_s)),
            Figure(key="bundle_mb", title="the bundle", interval=single(len(made.data) / 1e6)),
        ],
        notes=(f"The process has {limits.ADDRESS_SPACE_BYTES / 1e6:.0f} MB of address space: more ends it.",),
    )


@contextmanager
def _bundle(runs: int) -> Iterator[tuple[Path, Written, float]]:
    """The file, what is in it, and how long it took to write."""
    from tests.exchange import honest

    with tempfile.TemporaryDirectory(prefix="effbench-bench-") as folder:
        store, written = Store(Path(folder) / "results"), 0
        for seed in itertools.count():
            if written >= runs:
                break
            found = honest.bundle(seed)
            for launch_id, launch in found.launches.items():
                store.write_launch(launch, found.traces[launch_id])
            for row in found.cases[: runs - written]:
                store.write_case(row)
                written += 1
        began_s = time.monotonic()
        made = make_bundle(store, contact="someone@example.org", licence="CC0-1.0")
        submit_s = time.monotonic() - began_s
        yield made.write(Path(folder) / "bundle.zip"), made, submit_s


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
