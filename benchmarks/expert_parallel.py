"""Expert parallelism over gloo processes of this machine: what each arm sends, its C_T, and where cores suffice its time.

    4 ranks   naive · deduplicated · placed · refined · pruned to 2 devices · deduplicated again (the A/A)
    2 ranks   naive · deduplicated · placed · refined · pruned to 1 device · deduplicated again

Every arm is a launch of the layer of OLMoE with widths divided by 8 (E 64, k 8), forward, 128 tokens a rank, synthetic topics. A block
has one draw of routing for all arms, of its own seed, so bytes and C_T are of the same tokens. Pruned must be shown to send at least
35 % fewer bytes than deduplicated, placed fewer than deduplicated, refined no more than placed; nothing is judged against naive.
Times are there only with a core for each rank, else null with the reason `oversubscribed`. Beside them stands the simulator's
time, an estimate: one link is fitted to the naive and the pruned arm of a block and asked about the deduplicated one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.common import Arm, Figure, Options, Report, Samples, Target, against, run_blocks, say, single
from benchmarks.launches import Launcher, plan_one
from effbench import stats

MODEL, TOKENS = "olmoe-1b-7b-8th", 128
ARMS: Mapping[str, Any] = {name: f"ep_{name}" for name in ("naive", "deduplicated", "placed", "refined")}
COUNTS = {"replicas_per_token": "C_T", "bytes_sent": "bytes"}
TIMES = {"al_s": "a step", "communication_s": "communication", "compute_s": "compute"}
TARGETS = {
    ("pruned", "deduplicated"): Target(text="at least 35 % fewer", upper=0.65),
    ("placed", "deduplicated"): Target(text="fewer", upper=1.0),
    ("refined", "placed"): Target(text="no more", upper=1.0),
}


def run(options: Options) -> Report:
    """Paired blocks of launches."""
    sizes = (2,) if options.tiny else (4, 2)
    with Launcher() as launcher:
        arms = {key: arm for size in sizes for key, arm in _arms(launcher, size, options).items()}
        samples = run_blocks(
            arms, blocks=options.plan(8), seed=options.seed, limit_s=options.limit_s, say=None if options.tiny else say
        )
    return Report(
        name="expert_parallel",
        compares="ways to send tokens to experts on other devices: a copy each, once a device, placed, refined, pruned",
        pairs=len(samples.blocks),
        figures=[figure for size in sizes for figure in (*_sent(samples, size), *_timed(samples, size))],
        notes=["Routing is synthetic and stands for no model; occult_placement has recorded routing."],
    )


def _arms(launcher: Launcher, size: int, options: Options) -> dict[str, Arm]:
    stacks = {**ARMS, "pruned": {"ep_pruned": {"devices": size // 2}}, "again": ARMS["deduplicated"]}
    return {f"{size} {name}": _arm(launcher, size, stack, options) for name, stack in stacks.items()}


def _arm(launcher: Launcher, size: int, stack: Any, options: Options) -> Arm:
    case = {"workload": "expert_parallel", "params": {"tokens": TOKENS}, "model": MODEL, "nproc": size, "techniques": [stack]}
    spec = plan_one({**case, "baseline": [stack]}, "smoke" if options.tiny else "quick")
    block = iter(range(1_000_000))

    def once() -> Mapping[str, float | None]:
        timed = launcher.launch(replace(spec, seed=options.seed + next(block)))
        valid = {reading.name: reading for reading in timed.launch.metrics if reading.valid}
        wanted = (*COUNTS, *TIMES, "bytes_sent_between_devices")
        return {name: valid[name].value if name in valid else None for name in wanted}

    return once


def _sent(samples: Samples, size: int) -> list[Figure]:
    """C_T and bytes of each arm, and ratios with their targets."""
    found = []
    for name in (*ARMS, "pruned"):
        for metric, title in COUNTS.items():
            value = samples.interval(f"{size} {name}", metric)
            found.append(Figure(key=f"{metric}_{size}_{name}_count", title=f"{title}, {size} ranks, {name}", interval=value))
    for (one, other), target in TARGETS.items():
        for metric, title in COUNTS.items():
            ratio = samples.ratio(f"{size} {one}", f"{size} {other}", metric)
            key, text = f"{metric}_{size}_{one}_{other}_ratio", f"{title}, {size} ranks, {one} over {other}"
            judged = metric == "bytes_sent" and (one != "pruned" or size == 4)
            found.append(against(key, text, ratio, target) if judged else Figure(key=key, title=text, interval=ratio))
    return found


def _timed(samples: Samples, size: int) -> list[Figure]:
    """Times over the naive arm's and their A/A, and the simulator's; null where the ranks share cores."""
    found, measured = [], any(value is not None for value in samples.values(f"{size} naive", "al_s"))
    for metric, title in TIMES.items():
        for name, base in (*((name, "naive") for name in (*list(ARMS)[1:], "pruned")), ("again", "deduplicated")):
            ratio = samples.ratio(f"{size} {name}", f"{size} {base}", metric) if measured else single(None, "oversubscribed")
            text = f"{title}, {size} ranks, {name} over {base}"
            found.append(Figure(key=f"{metric}_{size}_{name}_ratio", title=text, interval=ratio))
    ratio = stats.paired_ratio(*_expected(samples, size)) if measured else single(None, "oversubscribed")
    text = f"expected communication over measured, {size} ranks, deduplicated"
    return [*found, Figure(key=f"expected_communication_{size}_ratio", title=text, interval=ratio, note="an estimate")]


def _expected(samples: Samples, size: int) -> tuple[list[float | None], list[float | None]]:
    """Of each block the communication time that a link gives which the naive and the pruned arm fit, and the measured one, in s."""
    from effbench_kernels.simulator import fit_link

    moved, taken = "bytes_sent_between_devices", "communication_s"
    expected: list[float | None] = []
    for block in samples.blocks:
        ends = [block[f"{size} {name}"] for name in ("naive", "pruned")]
        try:
            latency_s, rate = fit_link([end[moved] or 0.0 for end in ends], [end[taken] or math.nan for end in ends])
            expected.append(latency_s + (block[f"{size} deduplicated"][moved] or 0.0) / rate)
        except ValueError:  # the time did not grow with the bytes in this block
            expected.append(None)
    return expected, samples.values(f"{size} deduplicated", taken)
