"""What a launch costs beside the measurement itself, and what the same costs with optimum-benchmark 0.6.0.

Ours: wall time of a launch by the local executor less its warm-up, window, idle, quality and track phases, which every launch
records; from the second on, since the first also starts the fork server (its time is a row of its own). What is left is
fork, build, correctness gate, opening and closing the probes, computing the metrics and bringing the record home.

The peer's: wall time of `Benchmark.launch` with its process launcher and PyTorch backend, less the calls that its own
report says it measured. Where that leaves a choice it is made in the peer's favour:

- warmup_runs is 0, which skips its warm-up altogether, so nothing of it has to be estimated; the first, cold calls count
  as measured, not as cost;
- latency only: its memory and energy passes are off, while our launches take memory and CPU in the same window;
- a parent that has imported everything already asks for one launch after another, as ours does, so neither Python's
  start nor its command line is counted (`optimum-benchmark` on a command line pays both each time);
- its child's end, after the report is sent, is waited for outside the time.

Both load the same checkpoint, 4.87 M parameters, saved once with its tokenizer.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from benchmarks import common
from benchmarks.common import Figure, Options, Report, Samples, Target, against, single
from benchmarks.launches import Launcher, Timed, generate_spec, save_checkpoint
from benchmarks.peers.client import Optimum
from benchmarks.peers.setup import PeerUnavailable
from effbench.schema import Spec
from effbench.stats import Interval

FIXED = Target(text="at most 1 s", upper=1.0)
SHARE = Target(text="at most a tenth", upper=0.1)
PHASES = ("build", "check", "open_probes", "close_probes", "collect")


def run(options: Options) -> Report:
    """Twenty blocks: ours, ours again (the A/A) and the peer."""
    threads = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="effbench-bench-")))
        spec = generate_spec(save_checkpoint(folder / "tiny"), threads=threads, protocol="smoke")
        launcher = stack.enter_context(Launcher())
        first = launcher.launch(spec)
        arms: dict[str, common.Arm] = {
            "ours": lambda: _ours(launcher, spec),
            "ours again": lambda: _ours(launcher, spec),
        }
        peer, why_not = _peer(stack, folder / "tiny", threads)
        if peer:
            arms["peer"] = lambda: _theirs(peer)
            arms["peer"]()  # as ours, from the second on
        samples = common.run_blocks(arms, blocks=options.plan(20), seed=options.seed, limit_s=options.limit_s, say=common.say)
        versions = peer.versions if peer else {}
    notes = [f"The peer: {why_not}."] if why_not else []
    return Report(
        name="launch_cost",
        compares="fixed cost of a launch on the same saved model: effbench, and optimum-benchmark 0.6.0 with its process launcher",
        pairs=len(samples.blocks),
        figures=_figures(samples, first, why_not),
        notes=[
            *notes,
            "How the peer's cost is computed, and what is in its favour: the docstring of benchmarks/launch_cost.py.",
        ],
        versions=versions,
    )


def _figures(samples: Samples, first: Timed, why_not: str) -> list[Figure]:
    ratio = Interval(None, None, None, 0, (why_not,)) if why_not else samples.ratio("ours", "peer", "fixed_s")
    peers = Interval(None, None, None, 0, (why_not,)) if why_not else samples.interval("peer", "fixed_s")
    control = samples.ratio("ours again", "ours", "fixed_s")
    return [
        Figure(key="first_launch_s", title="our first launch, fork server included", interval=single(first.fixed_s)),
        against("ours_fixed_s", "our launch, from the second on", samples.interval("ours", "fixed_s"), FIXED),
        *(Figure(key=f"ours_{p}_s", title=f"  of it: {p}", interval=samples.interval("ours", f"{p}_s")) for p in PHASES),
        Figure(key="ours_rest_s", title="  of it: fork and transport", interval=samples.interval("ours", "rest_s")),
        Figure(key="aa_ratio", title="A/A: ours again / ours", interval=control),
        Figure(key="peer_fixed_s", title="the peer's launch, from the second on", interval=peers),
        against("ours_over_peer_ratio", "ours / the peer's", ratio, SHARE),
    ]


def _ours(launcher: Launcher, spec: Spec) -> Mapping[str, float | None]:
    done = launcher.launch(spec)
    phases = {f"{name}_s": done.phase_s(name) for name in PHASES}
    rest_s = done.fixed_s - sum(value or 0.0 for value in phases.values())
    return {"fixed_s": done.fixed_s, **phases, "rest_s": rest_s}


def _theirs(peer: Optimum) -> Mapping[str, float | None]:
    try:
        answer = peer.ask("process", warmup_runs=0, iterations=2, duration_s=0.0)
    except PeerUnavailable as reason:
        common.say(f"The peer gave nothing in this block: {reason}")
        return {"fixed_s": None}
    return {"fixed_s": answer["wall_s"] - sum(answer["generate_s"])}


def _peer(stack: ExitStack, checkpoint: Path, threads: int) -> tuple[Optimum | None, str]:
    """The peer, ready for orders, or why it cannot be had."""
    try:
        return stack.enter_context(Optimum(checkpoint, threads=threads)), ""
    except PeerUnavailable as reason:
        common.say(f"The peer is not available: {reason}")
        return None, str(reason)
