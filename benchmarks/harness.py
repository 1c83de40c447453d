"""What the harness adds to a step: `generate` and `finetune` against bare loops of transformers and peft, in one process.

    one block   for each work a freshly forked process with the workload and a bare loop of the same steps
    one round   a window of the runner with its probes on · a window of bare calls without any · another one (the A/A),
                in an order drawn anew (benchmarks/beside.py)

A window gives its mean step, a round the ratios, a block the median over its rounds, and the interval stands on the blocks. Two
processes of the same code differ by up to 9 % here, so launches against loops in processes of their own decide nothing at 2 %.
All is on one core: what the samplers take is taken from the steps.

`generate` is prefill of 64 tokens and greedy decoding of 32, batch 2. `finetune` is LoRA (rank 16, every linear layer) on 4
sequences of 64 bytes: batch, forward, backward, clipping, AdamW. Both sides have the same checkpoint, batches and threads, and
train to the same losses (a test says so). The verdict needs the whole interval, and the A/A below 2 % as well.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks import common, truth
from benchmarks.bare_loop import BareLoop
from benchmarks.common import Answer, Options, Report, Target
from benchmarks.launches import generate_spec, plan_one, save_checkpoint
from effbench.schema import Spec
from effbench.stats import Interval

TARGET = Target(text="at most 2 % more", upper=1.02)
WORKS = ("generate", "finetune")
ROUNDS = 10
TRAINING = {"batch_size": 4, "seq_len": 64, "quality_steps": 0}


def run(options: Options) -> Report:
    """Up to 40 blocks, as many as fit."""
    common.stay_on_one_core()
    with tempfile.TemporaryDirectory(prefix="effbench-bench-") as folder:
        checkpoint = save_checkpoint(Path(folder) / "tiny")
        specs = (generate_spec(checkpoint, threads=1, protocol="quick"), finetune_spec(checkpoint))
        with BareLoop(checkpoint, *specs, beside=2 if options.tiny else ROUNDS) as loop:
            samples = common.run_blocks(
                {"block": lambda: {key: value for number in range(len(WORKS)) for key, value in loop.medians(number).items()}},
                blocks=options.plan(40, tiny=1),
                seed=options.seed,
                limit_s=options.limit_s,
                say=common.say,
            )
    return Report(
        name="harness",
        compares=f"a step inside effbench and the same step in a bare loop, {ROUNDS} rounds of windows in each process",
        pairs=len(samples.blocks),
        figures=[f for work in WORKS for f in truth.figures(samples, f"{work}_s", work, TARGET.text, _judge)],
    )


def _judge(ratio: Interval, control: Interval) -> Answer:
    return common.judge_beside(ratio, TARGET, control)


def finetune_spec(checkpoint: Path) -> Spec:
    """The resolved spec of `finetune` with LoRA on a local checkpoint, as `effbench plan` gives it."""
    where = {"model": "tiny-llama", "weights": "path", "location": str(checkpoint), "threads": 1}
    return plan_one({"workload": "finetune", "params": TRAINING, "techniques": ["lora"], **where}, "quick")
