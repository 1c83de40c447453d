"""Experts in 4 and 8 bits at one token on a CPU: time over the same layer in bfloat16 or float32, and bytes really stored.

Each arm decodes a run of tokens with routings of their own, as generation does, so that weights come from wherever the machine
keeps them and not from one token's cache. Shapes as in `expert_race`, twice as wide, so that groups of 64 divide them. Per block:
plain · plain again (the A/A) · int4 · int8, in random order; a block gives the mean time of a token.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks import common
from benchmarks.common import Figure, Options, Report, Samples, Target, against
from benchmarks.expert_race import SHAPES, THREADS, Layer, Shape
from effbench.stats import Interval

NO_SLOWER = Target(text="≤ 1", upper=1.0)
BYTES = Target(text="≤ 0.30", upper=0.30)
RUN = 64  # tokens


def run(options: Options) -> Report:
    """As many blocks as fit, all shapes and types in each."""
    import torch

    torch.set_num_threads(THREADS)
    shapes = [
        replace(shape, scale=shape.scale // (1 if options.tiny else 2)) for shape in SHAPES[: 1 if options.tiny else None]
    ]
    setups = {(shape.name, dtype): _setup(shape, dtype, options.seed) for shape in shapes for dtype in ("bfloat16", "float32")}
    arms = {f"{name} {dtype}": (lambda arms=made[0]: _block(arms)) for (name, dtype), made in setups.items()}
    samples = common.run_blocks(
        arms, blocks=options.plan(40, tiny=2), seed=options.seed, limit_s=options.limit_s, say=common.say
    )
    figures = [figure for (name, dtype), made in setups.items() for figure in _figures(samples, name, dtype, made[1])]
    return Report(
        name="experts_quantised",
        compares=f"one token through one expert layer, {THREADS} threads: quantised over plain weights of the named type",
        pairs=len(samples.blocks),
        figures=figures,
        notes=[shape.text for shape in shapes],
    )


def _setup(shape: Shape, dtype: str, seed: int) -> tuple[dict[str, Callable[[], None]], float]:
    """The arms of one shape and type, and the int4 bytes over those of bfloat16."""
    import torch
    from effbench_kernels import experts, sort
    from effbench_kernels.quantised import quantise, quantised_experts

    layer = Layer(shape, getattr(torch, dtype), 1, seed, False)
    w_in, w_out = layer.module.gate_up_proj, layer.module.down_proj
    packed = {kind: (quantise(w_in, kind), quantise(w_out, kind)) for kind in ("int4", "int8")}
    g = torch.Generator().manual_seed(seed)
    plans = [sort(torch.randperm(shape.experts, generator=g)[None, : shape.top_k], shape.experts) for _ in range(RUN)]

    def through(call: Callable[..., Any], *weights: Any) -> Callable[[], None]:
        def tokens() -> None:
            with torch.inference_mode():
                for plan in plans:
                    call(layer.x, *weights, plan, layer.weight)

        return tokens

    plain = through(experts, w_in, w_out)
    arms = {"plain": plain, "again": plain, **{kind: through(quantised_experts, *q) for kind, q in packed.items()}}
    stored = sum(q.nbytes for q in packed["int4"]) / (2 * (w_in.numel() + w_out.numel()))
    return arms, stored


def _block(arms: dict[str, Callable[[], None]]) -> dict[str, float | None]:
    taken = {}
    for name in random.sample(list(arms), len(arms)):
        times = []
        for _ in range(3):
            began_s = time.perf_counter()
            arms[name]()
            times.append((time.perf_counter() - began_s) / RUN)
        taken[f"{name}_s"] = statistics.median(times)
    plain_s = (taken["plain_s"] * taken["again_s"]) ** 0.5
    ratios = {f"{kind}_ratio": taken[f"{kind}_s"] / plain_s for kind in ("int4", "int8")}
    return {"plain_s": plain_s, "again_ratio": taken["again_s"] / taken["plain_s"], **ratios}


def _figures(samples: Samples, name: str, dtype: str, stored: float) -> list[Figure]:
    arm, key = f"{name} {dtype}", f"{name}_{dtype}".lower().replace("-", "_")
    int4, control = samples.interval(arm, "int4_ratio"), samples.interval(arm, "again_ratio")
    return [
        Figure(key=f"{key}_s", title=f"{name}, {dtype}", interval=samples.interval(arm, "plain_s")),
        Figure(key=f"{key}_aa_ratio", title=f"A/A, {name}, {dtype}", interval=control),
        against(f"{key}_int4_ratio", f"{name}: int4 / {dtype}", int4, NO_SLOWER),
        Figure(key=f"{key}_int8_ratio", title=f"{name}: int8 / {dtype}", interval=samples.interval(arm, "int8_ratio")),
        against(f"{key}_bytes_ratio", f"{name}: bytes of int4 / bfloat16", Interval(stored, stored, stored, 1), BYTES),
    ]
