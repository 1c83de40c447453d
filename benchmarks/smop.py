"""Llama-SMoP's projector on a CPU: the shared expert kernels against the released loop over experts, and against a model of time.

    point   T tokens, E experts, k = 2 (1 of one):   kernels · loop · kernels again (the A/A)
    model   max(FLOPs / rate of a matrix product, bytes of touched experts / rate of reading memory)

Widths are the released ones before a language model of 2048: D 1024, H 2048, O 2048, in float32. Both arms have the same weights
and inputs, and their outputs are compared before anything is timed. The kernels are slower only where that is shown (time over the
loop's, whole interval above 1 / 0.95); at 8 experts and more they must be shown to be 1.5 times as fast. Both rates of the model
are measured in every block beside the arms: a product of (512, 1024) with (1024, 2048), and the sum of as many bytes as 32 experts
have. The model is met at a point where measured over expected lies within 25 % of 1.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.common import Answer, Arm, Figure, Options, Report, Samples, Target, against, judge, run_blocks, say
from effbench.modules.projector_arms import ProjectorForm
from effbench.stats import Interval, block_interval

EXPERTS, TOKENS = (1, 4, 8, 16, 32), (16, 128, 1024)
FORM = ProjectorForm(kind="jejr", inputs=1024, hidden=2048, outputs=2048)
MANY, THREADS = 8, 2
AT_LEAST_S = 0.08  # of one figure: calls are repeated until then
NOT_SLOWER = Target(text="not shown above 1 / 0.95", upper=1 / 0.95)
FASTER = Target(text="at most 1 / 1.5", upper=1 / 1.5)
AGREES = Target(text="within 25 %", lower=1 / 1.25, upper=1.25)


def run(options: Options) -> Report:
    """Paired blocks over all points."""
    import torch

    torch.set_num_threads(THREADS)
    with torch.inference_mode():
        arms, work = _points(options)
        samples = run_blocks(
            arms, blocks=options.plan(8), seed=options.seed, limit_s=options.limit_s, say=None if options.tiny else say
        )
    rates = [
        Figure(key=f"{key}_count", title=title, interval=samples.interval("rates", key))
        for key, title in (("flops_per_s", "FLOP/s of a matrix product"), ("bytes_per_s", "B/s of reading memory"))
    ]
    return Report(
        name="smop",
        compares="the projector of Llama-SMoP on the expert kernels, against the released loop and a model of its time",
        pairs=len(samples.blocks),
        figures=[
            *(figure for point in work for figure in _against_loop(samples, point)),
            *(_against_model(samples, point, *found) for point, found in work.items()),
            *rates,
        ],
        notes=["A ratio below 1 says that the kernels are faster. Points are judged one by one."],
    )


def _points(options: Options) -> tuple[dict[str, Arm], dict[str, tuple[float, float]]]:
    """The arms of all points, and FLOPs and bytes of touched experts of each point."""
    import torch

    from effbench.modules.projectors import MixtureProjector

    arms, work = {"rates": _rates(1 if options.tiny else max(EXPERTS))}, {}
    for num in EXPERTS[:2] if options.tiny else EXPERTS:
        torch.manual_seed(options.seed)
        kernels = MixtureProjector(replace(FORM, experts=num, top_k=min(2, num))).eval()
        loop = copy.copy(kernels)  # the same weights
        loop.form = replace(kernels.form, kind="loop")
        for tokens in TOKENS[:1] if options.tiny else TOKENS:
            streams = [torch.randn(1, tokens // 2, FORM.inputs) for _ in range(2)]
            torch.testing.assert_close(kernels(streams), loop(streams), rtol=1e-4, atol=1e-4)
            touched = int((kernels.load(streams) > 0).sum())
            point = f"t{tokens}_e{num}"
            work[point] = tokens * kernels.form.flops_per_token(), 4 * touched * kernels.form.expert_weights
            for name, made in (("kernels", kernels), ("loop", loop), ("again", kernels)):
                arms[f"{point}_{name}"] = _arm(made, streams)
    return arms, work


def _arm(made: Any, streams: list[Any]) -> Arm:
    return lambda: {"call_s": _seconds(lambda: made(streams))}


def _rates(experts: int) -> Arm:
    import torch

    x, w, big = torch.randn(512, 1024), torch.randn(2048, 1024), torch.ones(experts * FORM.expert_weights)

    def measured() -> dict[str, float | None]:
        product_s, read_s = _seconds(lambda: x @ w.T), _seconds(big.sum)
        return {"flops_per_s": 2 * 512 * 1024 * 2048 / product_s, "bytes_per_s": 4 * big.numel() / read_s}

    return measured


def _seconds(call: Callable[[], object]) -> float:
    """Time of one call: the median of as many as AT_LEAST_S holds, 3 or more, after one that warms up."""
    call()
    times: list[float] = []
    while len(times) < 3 or math.fsum(times) < AT_LEAST_S:
        start_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - start_s)
    return sorted(times)[len(times) // 2]


def _against_loop(samples: Samples, point: str) -> list[Figure]:
    ratio, title = samples.ratio(f"{point}_kernels", f"{point}_loop", "call_s"), _title(point)
    control = samples.ratio(f"{point}_again", f"{point}_kernels", "call_s")
    target = FASTER if int(point.partition("_e")[2]) >= MANY else NOT_SLOWER
    return [
        Figure(
            key=f"{point}_ratio", title=f"{title}: kernels / loop", interval=ratio, target=target.text,
            verdict=judge(ratio, target) if target is FASTER else not_shown_slower(ratio),
        ),
        Figure(key=f"{point}_control_ratio", title=f"{title}: kernels again / kernels", interval=control),
        Figure(key=f"{point}_s", title=f"{title}: kernels", interval=samples.interval(f"{point}_kernels", "call_s")),
    ]  # fmt: skip


def not_shown_slower(ratio: Interval) -> Answer:
    """Missed only where the whole interval says that the kernels are slower; undecided without an interval."""
    if ratio.lower is None:
        return "undecided here"
    return "missed" if judge(ratio, NOT_SLOWER) == "missed" else "met"


def _against_model(samples: Samples, point: str, flops: float, nbytes: float) -> Figure:
    """Measured over expected, in each block with that block's own rates."""
    call_s = samples.values(f"{point}_kernels", "call_s")
    rates = zip(samples.values("rates", "flops_per_s"), samples.values("rates", "bytes_per_s"), strict=True)
    ratios = [
        found_s / max(flops / by_flops, nbytes / by_bytes) if found_s and by_flops and by_bytes else None
        for found_s, (by_flops, by_bytes) in zip(call_s, rates, strict=True)
    ]
    return against(f"{point}_model_ratio", f"{_title(point)}: measured / model", block_interval(ratios), AGREES)


def _title(point: str) -> str:
    tokens, _, num = point[1:].partition("_e")
    return f"T {tokens}, E {num}"
