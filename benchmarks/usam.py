"""U-SAM's mixture of projectors on a CPU: the shared expert kernels against a plain loop over a list of modules.

    point   T audio tokens, E experts, soft or the 2 best:   kernels · loop · kernels again (the A/A)

Widths are the paper's before a language model of 2048: Linear(768, 2048), in float32; the router's logits are given to both arms,
which have the same weights, and their outputs are compared before anything is timed. The loop runs an `nn.ModuleList`, as the
released code does: for `soft` every expert on every token, stacked and weighted; for `top` each expert on the tokens that are routed
to it. T = 14 is 10 s of sound, 224 the paper's batch of 16. The kernels are slower only where that is shown (time over the loop's,
whole interval above 1 / 0.95); at 8 experts and more they must be shown to be 1.5 times as fast. A soft mixture can hardly be: both
arms read every expert's weights once and multiply as much, so what the kernels save is the stacking. What being sparse saves is shown
beside, without a target: the 2 best on the kernels over the loop over all experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.common import Arm, Figure, Options, Report, Samples, judge, run_blocks, say
from benchmarks.smop import FASTER, NOT_SLOWER, not_shown_slower

EXPERTS, TOKENS, KINDS = (3, 8, 16, 32), (14, 224), ("soft", "top")
WIDTH, OUT, TOP_K = 768, 2048, 2
MANY, THREADS = 8, 2
AT_LEAST_S = 0.08  # of one figure: calls are repeated until then


def run(options: Options) -> Report:
    """Paired blocks over all points."""
    import torch

    torch.set_num_threads(THREADS)
    with torch.inference_mode():
        points, arms = [], dict[str, Arm]()
        for experts in EXPERTS[:2] if options.tiny else EXPERTS:
            for tokens in TOKENS[:1] if options.tiny else TOKENS:
                for kind in KINDS:
                    points.append((kind, tokens, experts))
                    arms |= _arms(kind, tokens, experts, options.seed)
        samples = run_blocks(
            arms, blocks=options.plan(10), seed=options.seed, limit_s=options.limit_s, say=None if options.tiny else say
        )
    return Report(
        name="usam",
        compares="the mixture of projectors of U-SAM on the expert kernels, against a loop over a list of modules",
        pairs=len(samples.blocks),
        figures=[
            *(figure for point in points for figure in _figures(samples, *point)),
            *(_sparse(samples, tokens, experts) for kind, tokens, experts in points if kind == "top"),
        ],
        notes=["A ratio below 1 says that the kernels are faster. Points are judged one by one."],
    )


def _arms(kind: str, tokens: int, experts: int, seed: int) -> dict[str, Arm]:
    import torch
    from torch import nn

    from effbench.modules.tapm import TaskAwareProjector

    torch.manual_seed(seed)
    kernels = TaskAwareProjector(kind, WIDTH, OUT, experts=experts, top_k=TOP_K if kind == "top" else 1).eval()
    modules = nn.ModuleList(nn.Linear(WIDTH, OUT) for _ in range(experts))
    for number, module in enumerate(modules):
        module.weight.copy_(kernels.experts.weight[number])
        module.bias.copy_(kernels.experts.bias[number])
    audio_TD, logits_TE = torch.randn(tokens, WIDTH), torch.randn(tokens, experts)
    ours, loop = partial(kernels.mix, audio_TD, logits_TE), partial(LOOPS[kind], modules, audio_TD, logits_TE)
    torch.testing.assert_close(ours(), loop(), rtol=1e-4, atol=1e-4)
    calls = {"kernels": ours, "loop": loop, "again": ours}
    return {f"{_key(kind, tokens, experts)}_{name}": partial(_call, call) for name, call in calls.items()}


def soft_loop(modules: Any, audio_TD: Any, logits_TE: Any) -> Any:
    """All experts one after the other, stacked and weighted, as the released code would with distinct experts."""
    import torch

    gate_TE = logits_TE.softmax(-1)
    rows_TEO = torch.stack([module(audio_TD) for module in modules], dim=1)
    return (gate_TE[..., None] * rows_TEO).sum(1)


def top_loop(modules: Any, audio_TD: Any, logits_TE: Any) -> Any:
    """Each expert on the tokens that chose it, added in place."""
    import torch

    weight_TK, expert_TK = logits_TE.softmax(-1).topk(TOP_K, dim=-1)
    out_TO = audio_TD.new_zeros(len(audio_TD), OUT)
    for number, module in enumerate(modules):
        token_N, slot_N = torch.where(expert_TK == number)
        if len(token_N):
            out_TO.index_add_(0, token_N, module(audio_TD[token_N]) * weight_TK[token_N, slot_N, None])
    return out_TO


LOOPS: dict[str, Callable[..., Any]] = {"soft": soft_loop, "top": top_loop}


def _call(call: Callable[[], object]) -> dict[str, float | None]:
    """Time of one call: the median of as many as AT_LEAST_S holds, 3 or more, after one that warms up."""
    call()
    times: list[float] = []
    while len(times) < 3 or math.fsum(times) < AT_LEAST_S:
        start_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - start_s)
    return {"call_s": sorted(times)[len(times) // 2]}


def _figures(samples: Samples, kind: str, tokens: int, experts: int) -> list[Figure]:
    point, title = _key(kind, tokens, experts), f"{kind}, T {tokens}, E {experts}"
    ratio = samples.ratio(f"{point}_kernels", f"{point}_loop", "call_s")
    control = samples.ratio(f"{point}_again", f"{point}_kernels", "call_s")
    target = FASTER if experts >= MANY else NOT_SLOWER
    verdict = judge(ratio, target) if target is FASTER else not_shown_slower(ratio)
    return [
        Figure(key=f"{point}_ratio", title=f"{title}: kernels / loop", interval=ratio, target=target.text, verdict=verdict),
        Figure(key=f"{point}_control_ratio", title=f"{title}: kernels again / kernels", interval=control),
        Figure(key=f"{point}_s", title=f"{title}: kernels", interval=samples.interval(f"{point}_kernels", "call_s")),
    ]


def _sparse(samples: Samples, tokens: int, experts: int) -> Figure:
    """Another function than the soft one, at the same weights: what top-k costs of it."""
    ratio = samples.ratio(f"{_key('top', tokens, experts)}_kernels", f"{_key('soft', tokens, experts)}_loop", "call_s")
    title = f"T {tokens}, E {experts}: top-2 on the kernels / soft loop"
    return Figure(key=f"sparse_t{tokens}_e{experts}_ratio", title=title, interval=ratio)


def _key(kind: str, tokens: int, experts: int) -> str:
    return f"{kind}_t{tokens}_e{experts}"
