"""Whether the harness tells the truth: what it reports, against a bare loop of the same calls in a quiet process.

    ours    launch by the local executor (`quick`: 1.5 s window)  │ bare loop in a fresh process, twice (the A/A)
    peer    its inline launcher, its process launcher             │ bare loop of its own calls in its environment

Each block runs all of them in random order, and each reported figure is divided by that of the bare loop of the same
block. `generate` is one call: prefill of 64 tokens and greedy decoding of 32, batch 2, all cores, medians. `forward` is
the forward pass over the prompt up to the first token (TTFT), which is the one forward that both harnesses time and a
loop can time inside the same call. The two harnesses use different library versions and different decoding code, so
each is held against its own loop and never against the other.

Agreement means: within 3 % beyond the spread of the A/A. A parent that polls while its child works takes a core from it;
so the parent's CPU time is reported too: for us all CPU time that the parent and the fork server spend on a launch with a
window of 10 s, fork and transport included, divided by the window alone, which is an upper bound of their share of it;
for the peer its parent's CPU time over the wall time of its launch.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import ROOT, Figure, Options, Report, Samples, Target, against
from benchmarks.launches import SHAPES, Launcher, generate_spec, save_checkpoint
from benchmarks.peers.client import Optimum
from benchmarks.peers.setup import PeerUnavailable
from effbench.protocol import protocol
from effbench.schema import Spec

TOLERANCE = 0.03
IDLE = Target(text="< 1 %", upper=0.01)
AGREE = "within 3 % beyond the A/A"
CALLS = {"generate_s": "generate", "forward_s": "forward"}
PEER_ARMS = ("peer bare", "peer inline", "peer process")


def run(options: Options) -> Report:
    """Up to 24 blocks; the peer's arms, which take most of the time, are in the first six, the long launch in four."""
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
            "ours": lambda: _ours(launcher, spec),
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
        blocks = options.plan(24)
        samples = common.run_blocks(
            arms,
            blocks=blocks,
            seed=options.seed,
            limit_s=options.limit_s,
            only_first={**dict.fromkeys(PEER_ARMS, 1 if options.tiny else 6), "ours long": 4},
            say=common.say,
        )
    return Report(
        name="truth",
        compares="reported times of a forward and of a generate against bare loops of the same calls",
        pairs=len(samples.blocks),
        figures=[*_our_figures(samples), *_peer_figures(samples)],
        notes=[f"The peer: {why_not}."] if why_not else [],
        versions=versions,
    )


def _our_figures(samples: Samples) -> list[Figure]:
    found = []
    for key, call in CALLS.items():
        control, ratio = samples.ratio("bare again", "bare", key), samples.ratio("ours", "bare", key)
        verdict = common.judge_agreement(ratio, control, TOLERANCE)
        found += [
            Figure(key=f"bare_{key}", title=f"{call}, bare loop", interval=samples.interval("bare", key)),
            Figure(key=f"ours_{key}", title=f"{call}, as effbench reports it", interval=samples.interval("ours", key)),
            Figure(key=f"aa_{call}_ratio", title=f"A/A, {call}: bare again / bare", interval=control),
            Figure(key=f"ours_{call}_ratio", title=f"{call}: effbench / bare", interval=ratio, target=AGREE, verdict=verdict),
        ]
    share = samples.interval("ours long", "parent_share")
    return [*found, against("ours_parent_share", "CPU of parent and fork server / window", share, IDLE)]


def _peer_figures(samples: Samples) -> list[Figure]:
    found = []
    for arm in ("inline", "process"):
        for key, call in CALLS.items():
            ratio = samples.ratio(f"peer {arm}", "peer bare", key)
            found.append(Figure(key=f"peer_{arm}_{call}_ratio", title=f"{call}: peer, {arm} / its bare", interval=ratio))
    found.append(
        Figure(
            key="peer_generate_s", title="generate, the peer's bare loop", interval=samples.interval("peer bare", "generate_s")
        )
    )
    share = samples.interval("peer process", "parent_share")
    return [*found, Figure(key="peer_parent_share", title="CPU of the peer's parent / its launch", interval=share)]


def _ours(launcher: Launcher, spec: Spec) -> Mapping[str, float | None]:
    """What one launch reports."""
    done = launcher.launch(spec)
    return {"generate_s": done.metric("step_p50_s"), "forward_s": done.metric("ttft_s")}


def _parent_share(launcher: Launcher, spec: Spec) -> Mapping[str, float | None]:
    """The CPU time of those who wait for a launch."""
    before_s = _own_cpu_s() + launcher.server_cpu_s()
    done = launcher.launch(spec)
    spent_s = _own_cpu_s() + launcher.server_cpu_s() - before_s
    return {"parent_share": spent_s / done.launch.windows["window"].length_s}


def _bare(checkpoint: Path, spec: Spec) -> Mapping[str, float | None]:
    """The same rule for warm-up and window as the launch has, in a fresh process; this one waits and does nothing."""
    rules = protocol(spec.protocol)
    order = {
        "threads": spec.threads,
        "batch": SHAPES["batch_size"],
        "prompt": SHAPES["prompt_tokens"],
        "new": SHAPES["new_tokens"],
        "warm_up_s": rules.warm_up_s,
        "warm_up_calls": rules.warm_up_steps,
        "window_s": rules.window_s,
        "window_calls": rules.window_steps,
    }
    command = [sys.executable, "-m", "benchmarks.bare_loop", str(checkpoint), json.dumps(order)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"the bare loop failed:\n{done.stderr}")
    times = json.loads(done.stdout.splitlines()[-1])
    return {key: statistics.median(times[key]) for key in CALLS}


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
