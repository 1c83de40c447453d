"""Whether the harness tells the truth: what it reports, against a bare loop of the same calls in a quiet process.

    one round   a launch by the local executor · a bare loop · a bare loop again (the A/A), in an order drawn anew,
                one at a time, each a freshly forked process with the rule for warm-up and window of `smoke`
    one block   six rounds

All of them stay on one core, with whatever they start. A round gives the ratios of its medians, a block the median over
its rounds (a neighbour's burst falls into one window of three), and the interval stands on the blocks. Every window has a
process of its own on both sides, since the same code differs from process to process; windows are short so that the three
of a round lie within two seconds or so: on a shared machine nothing further apart can be compared to a few percent.

`generate` is one call: prefill of 64 tokens and greedy decoding of 32, batch 2, one thread. `forward` is the forward pass
over the prompt up to the first token (TTFT), which is the one forward that a loop can time inside the same call.
Agreement means: within 3 % beyond the spread of the A/A. What all cores do, and what a parent that does not sleep
does to them, is the script `launchers`.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from benchmarks import common
from benchmarks.bare_loop import CALLS, BareLoop
from benchmarks.common import Answer, Figure, Options, Report, Samples
from benchmarks.launches import Launcher, generate_spec, save_checkpoint
from effbench.schema import Spec
from effbench.stats import Interval

TOLERANCE = 0.03
AGREE = "within 3 % beyond the A/A"
Window = Callable[[], Mapping[str, float | None]]


def run(options: Options) -> Report:
    """Up to 60 blocks, as many as fit."""
    common.stay_on_one_core()
    rounds = 2 if options.tiny else 6
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="effbench-bench-")))
        checkpoint = save_checkpoint(folder / "tiny")
        spec = generate_spec(checkpoint, threads=1, protocol="smoke")
        launcher = stack.enter_context(Launcher())
        launcher.launch(spec)  # starts the fork server
        bare, order = stack.enter_context(BareLoop(checkpoint, spec)), random.Random(options.seed)
        windows: dict[str, Window] = {"ours": lambda: reported(launcher, spec), "bare": bare.medians, "again": bare.medians}
        samples = common.run_blocks(
            {"block": lambda: block(windows, rounds, order, CALLS)},
            blocks=options.plan(60, tiny=1),
            seed=options.seed,
            limit_s=options.limit_s,
            say=common.say,
        )
    return Report(
        name="truth",
        compares=f"reported times of a forward and of a generate against bare loops of the same calls, {rounds} rounds a block",
        pairs=len(samples.blocks),
        figures=[f for key, call in CALLS.items() for f in figures(samples, key, call, AGREE, _agreement)],
    )


def figures(samples: Samples, key: str, call: str, target: str, judge: Callable[[Interval, Interval], Answer]) -> list[Figure]:
    """What a block's ratios of one call say: the bare loop's time, the A/A, and ours with the verdict of (ratio, A/A)."""
    control, ratio = samples.interval("block", f"again_{call}_ratio"), samples.interval("block", f"ours_{call}_ratio")
    return [
        Figure(key=f"bare_{key}", title=f"{call}, bare loop", interval=samples.interval("block", key)),
        Figure(key=f"aa_{call}_ratio", title=f"A/A, {call}: bare again / bare", interval=control),
        Figure(
            key=f"ours_{call}_ratio", title=f"{call}: effbench / bare", interval=ratio, target=target,
            verdict=judge(ratio, control),
        ),
    ]  # fmt: skip


def _agreement(ratio: Interval, control: Interval) -> Answer:
    return common.judge_agreement(ratio, control, TOLERANCE)


def block(windows: Mapping[str, Window], num_rounds: int, order: random.Random, calls: Mapping[str, str]) -> dict[str, float]:
    """The rounds of a block as medians and ratios of each call; ours is held against the mean of both bare loops."""
    rounds = [{name: windows[name]() for name in order.sample(list(windows), len(windows))} for _ in range(num_rounds)]
    found: dict[str, float] = {}
    for key, call in calls.items():
        ours, one, two = ([r[name][key] or float("nan") for r in rounds] for name in ("ours", "bare", "again"))
        found[key] = statistics.median(one)
        found[f"again_{call}_ratio"] = statistics.median(b / a for a, b in zip(one, two, strict=True))
        found[f"ours_{call}_ratio"] = statistics.median(o / (a * b) ** 0.5 for o, a, b in zip(ours, one, two, strict=True))
    return found


def reported(launcher: Launcher, spec: Spec) -> Mapping[str, float | None]:
    """What one launch reports of its calls, in s."""
    done = launcher.launch(spec)
    return {"generate_s": done.metric("step_p50_s"), "forward_s": done.metric("ttft_s")}
