"""FuxiMT's experts on the shared kernels against a loop over them in plain torch, forward and backward.

    layer     one mixture at the width of bloomz-560m (D 1024, F 4096), 32 and 256 tokens, k = 2, E 4, 8 and 16: kernels · loop · loop again
    step      a training step of tiny-bloom with experts in every second layer, E 8 and 16: the same

Before anything is timed both arms' outputs and gradients are compared in one run of each. Targets: not shown slower at any E, and at
least 1.5 times as fast at E ≥ 8.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

from benchmarks import common
from benchmarks.common import Figure, Options, Report, Target, judge, judge_beside

EXPERTS, STEP_EXPERTS = (4, 8, 16), (8, 16)
HIDDEN, TOKENS, TOP_K = 1024, (32, 256), 2
WINDOW_S = 0.5
NOT_SLOWER = Target(text="not shown < 1", lower=1.0)
FASTER = Target(text="≥ 1.5", lower=1.5)
TOLERANCE = 1e-4  # of outputs and gradients in float32, RMS over RMS


def run(options: Options) -> Report:
    """Loop over kernels: above 1 the kernels are faster."""
    import torch

    torch.set_num_threads(1 if options.tiny else 2)
    blocks = options.plan(8)
    points: dict[str, tuple[int, Mapping[str, Callable[[], Any]]]] = {}
    hidden, many = (64, (4, 16)) if options.tiny else (HIDDEN, TOKENS)
    for tokens, experts in product(many, EXPERTS):
        points[f"layer_t{tokens}_e{experts}"] = experts, _layers(hidden, tokens, experts, options.seed)
    for experts in STEP_EXPERTS:
        points[f"step_e{experts}"] = experts, _steps(experts, options)
    figures = []
    for name, (experts, calls) in points.items():
        arms = {arm: _timed(call, options) for arm, call in (*calls.items(), ("loop again", calls["loop"]))}
        limit_s = options.limit_s / len(points)
        samples = common.run_blocks(arms, blocks=blocks, seed=options.seed, limit_s=limit_s)
        common.say(f"{name}: {len(samples.blocks)} blocks")
        control = samples.ratio("loop again", "loop", "wall_s")
        found = samples.ratio("loop", "kernels", "wall_s")
        what = f"one layer, {name.split('_')[1][1:]} tokens" if name.startswith("layer") else "a training step"
        title = f"{what}, E {experts}: loop ÷ kernels"
        slower = judge_beside(found, NOT_SLOWER, control) == "missed"
        verdict = "missed" if slower else judge(found, FASTER) if experts >= 8 else "met"
        target = FASTER.text if experts >= 8 else NOT_SLOWER.text
        figures.append(Figure(key=f"{name}_ratio", title=title, interval=found, target=target, verdict=verdict))
        figures.append(
            Figure(key=f"{name}_again_ratio", title=f"{title.split(':')[0]}: loop again ÷ loop (A/A)", interval=control)
        )
    return Report(
        name="fuximt",
        compares="FuxiMT's experts, biased and not gated: the shared kernels against a loop in plain torch, forward and backward",
        pairs=blocks,
        figures=figures,
        notes=[
            f"layer: D {hidden}, F {4 * hidden}, {' and '.join(map(str, many))} tokens, k {TOP_K}, float32, even routing; step: tiny-bloom, every 2"
        ],
    )


def _timed(call: Callable[[], Any], options: Options) -> Callable[[], Mapping[str, float]]:
    """The median call of a short window."""

    def arm() -> Mapping[str, float]:
        found, end_s = list[float](), time.perf_counter() + (0.0 if options.tiny else WINDOW_S)
        while len(found) < 2 or time.perf_counter() < end_s:
            start_s = time.perf_counter()
            call()
            found.append(time.perf_counter() - start_s)
        return {"wall_s": statistics.median(found)}

    return arm


def _layers(hidden: int, tokens: int, experts: int, seed: int) -> Mapping[str, Callable[[], Any]]:
    """Forward and backward of one mixture by both arms, on the same weights, inputs and routing."""
    import torch
    from effbench_kernels import route
    from torch import nn

    from effbench.modules.inserted_experts import BiasedExperts, Choices

    torch.manual_seed(seed)
    dense = nn.Module()
    dense.dense_h_to_4h, dense.dense_4h_to_h = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
    choices = Choices(
        form="inserted", experts=experts, top_k=TOP_K, renorm=True, gate="scalar", balance=0.0, noise=0.1, by="kernels"
    )
    bank = BiasedExperts(dense, choices)
    x_TD, grad_TD = torch.randn(tokens, hidden, requires_grad=True), torch.randn(tokens, hidden)
    routing = route(torch.randn(tokens, experts), TOP_K, renorm=True)
    wanted = (x_TD, *bank.parameters())

    def call(by: str) -> tuple[torch.Tensor, ...]:
        bank.by = by
        out_TD = bank(x_TD, routing)
        return (out_TD.detach(), *torch.autograd.grad(out_TD, wanted, grad_TD))

    for one, other in zip(call("kernels"), call("loop"), strict=True):
        error = float((one - other).square().mean().sqrt() / other.square().mean().sqrt())
        if not error < TOLERANCE:
            raise ValueError(f"the arms differ by {error:.2g} of the RMS at E = {experts}; nothing is timed")
    return {"kernels": lambda: call("kernels"), "loop": lambda: call("loop")}


def _steps(experts: int, options: Options) -> Mapping[str, Callable[[], Any]]:
    """A training step of `fuximt` by both arms, after their own correctness gate."""
    return {by: _session(by, experts, options).step for by in ("kernels", "loop")}


def _session(by: str, experts: int, options: Options) -> Any:
    from effbench import registry
    from effbench.models import text, weights
    from effbench.planning import techniques
    from effbench.schema import ModelRef, Spec
    from effbench.workload import BuildContext

    given = {"batch_size": 2, "prompt_tokens": 8, "new_tokens": 8, "pass_steps": 2} if options.tiny else {"batch_size": 4}
    stack = (("fuximt", {"every": 2, "experts": experts, "order": "shuffled", "experts_by": by}),)
    spec = Spec(
        workload="fuximt", params=registry.workload("fuximt").Params(**given).model_dump(mode="json"),
        model=ModelRef(name="tiny-bloom"), techniques=techniques(stack, "cpu"), text=text.BUILTIN,
        text_digest=text.text_digest(text.BUILTIN), seed=options.seed, device="cpu", threads=2, protocol="quick", time_limit_s=60.0,
    )  # fmt: skip
    assert weights.weights_digest(spec)
    session = registry.workload("fuximt")(spec.params).build(
        BuildContext(spec=spec, seed=options.seed, clock=time.perf_counter)
    )
    session.check()
    return session
