"""What the harness adds to a step: launches of `generate` and `finetune` against bare loops of transformers and peft.

    one round   a launch by the local executor · a bare loop · a bare loop again (the A/A), in an order drawn anew
    one block   four rounds of each work

The design of `truth`: all on one core, every window in a freshly forked process of its own under the rule of `smoke`, a round
gives the ratios of its medians, a block the median over its rounds, and the interval stands on the blocks. What differs is the
question: `truth` asks whether the figures agree, this one whether a step inside effbench costs at most 2 % more than the same
step in a loop that a person would write. Its verdict needs the whole interval, and the A/A of the same loop below 2 % as well.

`generate` is prefill of 64 tokens and greedy decoding of 32, batch 2. `finetune` is LoRA (rank 16, every linear layer) on 4
sequences of 64 bytes: batch, forward, backward, clipping, AdamW. Both sides have the same checkpoint, batches and threads, and
train to the same losses (a test says so).
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks import common, truth
from benchmarks.bare_loop import BareLoop
from benchmarks.common import Figure, Options, Report, Samples, Target
from benchmarks.launches import Launcher, generate_spec, plan_one, save_checkpoint
from effbench.schema import Spec

TARGET = Target(text="at most 2 % more", upper=1.02)
STEPS = {"generate": "generate_s", "finetune": "step_s"}  # the work → what a bare loop calls the time of one step
TRAINING = {"batch_size": 4, "seq_len": 64, "quality_steps": 0}


def run(options: Options) -> Report:
    """Up to 60 blocks, as many as fit."""
    common.stay_on_one_core()
    rounds = 1 if options.tiny else 4
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="effbench-bench-")))
        checkpoint = save_checkpoint(folder / "tiny")
        specs = {"generate": generate_spec(checkpoint, threads=1, protocol="smoke"), "finetune": finetune_spec(checkpoint)}
        launcher, order = stack.enter_context(Launcher()), random.Random(options.seed)
        launcher.launch(specs["generate"])  # starts the fork server
        bare = stack.enter_context(BareLoop(checkpoint, *specs.values()))

        def arm(number: int, work: str) -> common.Arm:
            key, loop = STEPS[work], partial(bare.medians, number)
            ours = partial(_reported, launcher, specs[work], key)
            return lambda: truth.block({"ours": ours, "bare": loop, "again": loop}, rounds, order, {key: work})

        samples = common.run_blocks(
            {work: arm(number, work) for number, work in enumerate(STEPS)},
            blocks=options.plan(60, tiny=1),
            seed=options.seed,
            limit_s=options.limit_s,
            say=common.say,
        )
    return Report(
        name="harness",
        compares=f"a step inside effbench against the same step in a bare loop, {rounds} rounds a block",
        pairs=len(samples.blocks),
        figures=[figure for work in STEPS for figure in _figures(samples, work)],
    )


def finetune_spec(checkpoint: Path) -> Spec:
    """The resolved spec of `finetune` with LoRA on a local checkpoint, as `effbench plan` gives it."""
    where = {"model": "tiny-llama", "weights": "path", "location": str(checkpoint), "threads": 1}
    return plan_one({"workload": "finetune", "params": TRAINING, "techniques": ["lora"], **where}, "smoke")


def _reported(launcher: Launcher, spec: Spec, key: str) -> Mapping[str, float | None]:
    return {key: launcher.launch(spec).metric("step_p50_s")}


def _figures(samples: Samples, work: str) -> list[Figure]:
    control, ratio = samples.interval(work, f"again_{work}_ratio"), samples.interval(work, f"ours_{work}_ratio")
    return [
        Figure(key=f"bare_{work}_s", title=f"{work}, a step of the bare loop", interval=samples.interval(work, STEPS[work])),
        Figure(key=f"aa_{work}_ratio", title=f"A/A, {work}: bare again / bare", interval=control),
        Figure(
            key=f"ours_{work}_ratio", title=f"{work}: effbench / bare", interval=ratio, target=TARGET.text,
            verdict=common.judge_beside(ratio, TARGET, control),
        ),
    ]  # fmt: skip
