"""What a waiting parent does to the figures of its child, ours beside a peer whose parent does not sleep, on all cores.

    ours    launch by the local executor (`quick`: 1.5 s window)  │ bare loop in a fresh process, twice (the A/A)
    peer    its inline launcher, its process launcher             │ bare loop of its own calls in its environment

Each block runs all of them in random order, and each reported figure is divided by that of the bare loop of the same
block. The calls are those of `truth`: a generate, and the forward up to its first token. The two harnesses use
different library versions and different decoding code, so each is held against its own loop and never against the other.

A parent that polls while its child works takes a core from it, and with all cores in use the child's figures show it;
so the parent's CPU time is reported too: for us all CPU time that the parent and the fork server spend on a launch with a
window of 10 s, fork and transport included, divided by the window alone, which is an upper bound of their share of it;
for the peer its parent's CPU time over the wall time of its launch. How closely ours and bare agree, `truth` decides.
"""

from __future__ import annotations

import os
import resource
import statistics
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.bare_loop import CALLS, BareLoop
from benchmarks.common import Figure, Options, Report, Samples, Target, against
from benchmarks.launches import Launcher, generate_spec, save_checkpoint
from benchmarks.peers.client import Optimum
from benchmarks.peers.setup import PeerUnavailable
from benchmarks.truth import reported
from effbench.protocol import protocol
from effbench.schema import Spec

IDLE = Target(text="< 1 %", upper=0.01)
NOT_TRIPLED = Target(text="< 1.5, not tripled", upper=1.5)
PEER_ARMS = ("peer bare", "peer inline", "peer process")


def run(options: Options) -> Report:
    """Up to 8 blocks; the long launch, which gives the parent's share, is in the first three."""
    threads = len(os.sched_getaffinity(0))
    name = "smoke" if options.tiny else "quick"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="effbench-bench-")))
        checkpoint = save_checkpoint(folder / "tiny")
        spec = generate_spec(checkpoint, threads=threads, protocol=name)
        long = generate_spec(checkpoint, threads=threads, protocol="smoke" if options.tiny else "publish")
        launcher = stack.enter_context(Launcher())
        launcher.launch(spec)  # starts the fork server
        arms: dict[str, common.Arm] = {
            "ours": lambda: reported(launcher, spec),
            "bare": lambda: _bare(checkpoint, spec),
            "bare again": lambda: _bare(checkpoint, spec),
            "ours long": lambda: _parent_share(launcher, long),
        }
        versions: dict[str, str] = {}
        why_not = ""
        try:
            peer = stack.enter_context(Optimum(checkpoint, threads=threads))
            versions = peer.versions
            arms |= {name: _peer_arm(peer, name, spec) for name in PEER_ARMS}
        except PeerUnavailable as reason:
            why_not = str(reason)
        samples = common.run_blocks(
            arms,
            blocks=options.plan(8),
            seed=options.seed,
            limit_s=options.limit_s,
            only_first={"ours long": 3},
            say=common.say,
        )
    return Report(
        name="launchers",
        compares="reported times under each launcher against bare loops of the same calls, all cores",
        pairs=len(samples.blocks),
        figures=[*_our_figures(samples), *_peer_figures(samples)],
        notes=[f"The peer: {why_not}."] if why_not else [],
        versions=versions,
    )


def _our_figures(samples: Samples) -> list[Figure]:
    found = []
    for key, call in CALLS.items():
        control, ratio = samples.ratio("bare again", "bare", key), samples.ratio("ours", "bare", key)
        found += [
            Figure(key=f"aa_{call}_ratio", title=f"A/A, {call}: bare again / bare", interval=control),
            against(f"ours_{call}_ratio", f"{call}: effbench / bare", ratio, NOT_TRIPLED),
        ]
    share = samples.interval("ours long", "parent_share")
    return [*found, against("ours_parent_share", "CPU of parent and fork server / window", share, IDLE)]


def _peer_figures(samples: Samples) -> list[Figure]:
    found = []
    for arm in ("inline", "process"):
        for key, call in CALLS.items():
            ratio = samples.ratio(f"peer {arm}", "peer bare", key)
            found.append(Figure(key=f"peer_{arm}_{call}_ratio", title=f"{call}: peer, {arm} / its bare", interval=ratio))
    share = samples.interval("peer process", "parent_share")
    return [*found, Figure(key="peer_parent_share", title="CPU of the peer's parent / its launch", interval=share)]


def _bare(checkpoint: Path, spec: Spec) -> Mapping[str, float | None]:
    """One window in a process of its own."""
    with BareLoop(checkpoint, spec) as loop:
        return loop.medians()


def _parent_share(launcher: Launcher, spec: Spec) -> Mapping[str, float | None]:
    """The CPU time of those who wait for a launch."""
    before_s = _own_cpu_s() + launcher.server_cpu_s()
    done = launcher.launch(spec)
    spent_s = _own_cpu_s() + launcher.server_cpu_s() - before_s
    return {"parent_share": spent_s / done.launch.windows["window"].length_s}


def _peer_arm(peer: Optimum, arm: str, spec: Spec) -> common.Arm:
    rules, mode = protocol(spec.protocol), arm.removeprefix("peer ")

    def ask() -> Mapping[str, float | None]:
        try:
            answer = peer.ask(mode, warmup_runs=rules.warm_up_steps, iterations=rules.window_steps, duration_s=rules.window_s)
        except PeerUnavailable as reason:
            common.say(f"The peer gave nothing in this block: {reason}")
            return {}
        share = {"parent_share": answer["parent_cpu_s"] / answer["wall_s"]} if mode == "process" else {}
        return {**_medians(answer), **share}

    return ask


def _medians(answer: Mapping[str, Any]) -> dict[str, float | None]:
    return {"generate_s": statistics.median(answer["generate_s"]), "forward_s": statistics.median(answer["prefill_s"])}


def _own_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
