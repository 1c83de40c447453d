"""What the races of the expert layers share: shapes, arms, the gate, and how a point is measured and judged.

    point    shape × type × tokens, one set of weights, inputs and routing for all arms
    gate     ours against torch's products in float64 (transformers' in float32 for many tokens): a wrong answer is not timed
    pilot    the implementations of transformers (eager, grouped_mm, and batched_mm while its gather stays under 2 GB), the
             best of up to three calls each; the fastest is the peer of this point
    blocks   ours · the peer · the peer again (the A/A), in random order, each the median call of a short window

A point is slower only if that is shown (ratio below 0.95, one-sided t, Holm over all points), and only if it is shown again in
two more measurements. The mean over the points is geometric; its interval comes from those of the points.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy.stats import t as student

from benchmarks import common
from benchmarks.common import Figure, Options, Report, Target
from effbench.stats import Interval

THREADS = 2
TOKENS = (1, 5, 16, 80, 512, 4096)
PEERS = ("grouped_mm", "eager", "batched_mm")
GATHER_BYTES = 2e9
EXACT_TOKENS = 512
SLOWER = 0.95
WINDOW_S = 0.02
MEAN = Target(text="≥ 1.15, lower bound ≥ 1.05", lower=1.15)
LEAST_BLOCKS, MOST_BLOCKS = 4, 15


@dataclass(frozen=True)
class Shape:
    """A published shape with widths divided by `scale`; experts and top-k as published."""

    name: str
    hidden: int
    width: int
    experts: int
    top_k: int
    scale: int

    @property
    def text(self) -> str:
        return f"{self.name}/{self.scale}: D {self.hidden // self.scale}, F {self.width // self.scale}, E {self.experts}, k {self.top_k}"


SHAPES = (
    Shape("OLMoE", 2048, 1024, 64, 8, 4),
    Shape("Qwen3-MoE", 2048, 768, 128, 8, 4),
    Shape("Mixtral", 4096, 14336, 8, 2, 8),
    Shape("DeepSeek-V2-Lite", 2048, 1408, 64, 6, 4),
)


@dataclass
class Point:
    """One comparison: its arms, and what was measured of them (one entry a block; ratios are peer's time over ours)."""

    name: str
    peer: str
    ours_s: list[float]
    ratios: list[float]
    again: list[float]

    def interval(self, values: Sequence[float]) -> Interval:
        from effbench import stats

        return stats.block_interval(list(values))

    def log_mean(self) -> tuple[float, float]:
        """Mean of the logarithm of the ratio and its variance."""
        logs = np.log(self.ratios)
        return float(logs.mean()), float(logs.var(ddof=1) / len(logs))

    def p_slower(self) -> float:
        """One-sided p of a ratio below `SLOWER`: small where being slower is shown."""
        mean, variance = self.log_mean()
        if variance <= 0:
            return 1.0
        return float(student.cdf((mean - math.log(SLOWER)) / math.sqrt(variance), len(self.ratios) - 1))


class Layer:
    """One expert layer of transformers with its inputs, and the ways to run it."""

    def __init__(self, shape: Shape, dtype: Any, tokens: int, seed: int, train: bool, device: str = "cpu"):
        import torch
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        hidden, width = shape.hidden // shape.scale, shape.width // shape.scale
        config = SimpleNamespace(
            num_local_experts=shape.experts, hidden_size=hidden, intermediate_size=width, hidden_act="silu",
            _experts_implementation="eager",
        )  # fmt: skip
        self.train, self.shape, self.tokens, self.dtype = train, shape, tokens, dtype
        g = torch.Generator(device).manual_seed(seed)
        with torch.device("meta"):
            self.module = MixtralExperts(config)
        self.module = self.module.to(dtype).to_empty(device=device).requires_grad_(train)

        def normal(*sizes: int) -> torch.Tensor:
            return torch.randn(sizes, generator=g, device=device)

        with torch.no_grad():
            for parameter in self.module.parameters():
                for expert in parameter:
                    expert.copy_(normal(*expert.shape) / expert.size(-1) ** 0.5)
        self.x = normal(tokens, hidden).to(dtype).requires_grad_(train)
        self.logits, self.grad = normal(tokens, shape.experts), normal(tokens, hidden).to(dtype)
        weight, self.index = torch.topk(torch.softmax(self.logits, -1), shape.top_k, dim=-1)
        self.weight = (weight / weight.sum(-1, keepdim=True)).to(dtype).requires_grad_(train)

    def forward(self, implementation: str) -> Any:
        """The layer's output."""
        import torch

        self.module.config._experts_implementation = implementation
        with torch.inference_mode():
            return self.module(self.x, self.index, self.weight)

    def least_s(self, implementation: str) -> float:
        """What a training step takes at least: its forward pass, and for the eager loop a whole stack of zeros for each expert that
        has tokens, which is how the gradient of one expert's slice becomes that of the stack.
        """
        import torch

        least_s = _best(lambda: self.forward(implementation))
        if implementation == "eager":
            zeros_s = _best(lambda: [torch.zeros_like(stack) for stack in self.module.parameters()])
            least_s += zeros_s * len(torch.unique(self.index))
        return least_s

    def call(self, implementation: str) -> Any:
        """The layer's output, and with `train` the gradients of all inputs."""
        import torch

        if not self.train:
            return self.forward(implementation)
        self.module.config._experts_implementation = implementation
        leaves = (self.x, self.weight, *self.module.parameters())
        out = self.module(self.x, self.index, self.weight)
        return out, *torch.autograd.grad(out, leaves, self.grad)

    def routed(self, implementation: Any) -> Any:
        """Routing and the layer, by a registered name or by liger-kernel's function; with `train` the gradients."""
        import torch
        from effbench_kernels import route

        if implementation == "effbench":
            index, weight = route(self.logits, self.shape.top_k, renorm=True)
        else:
            best, index = torch.topk(torch.softmax(self.logits, -1), self.shape.top_k, dim=-1)
            weight = best / best.sum(-1, keepdim=True)
        weight = weight.to(self.dtype).requires_grad_(self.train)
        with torch.inference_mode(not self.train):
            if isinstance(implementation, str):
                self.module.config._experts_implementation = implementation
                out = self.module(self.x, index, weight)
            else:
                stacks = (self.module.gate_up_proj, self.module.down_proj)
                out = implementation.apply(self.x, *stacks, index.to(torch.int32), weight)
        return torch.autograd.grad(out, (self.x, weight, *self.module.parameters()), self.grad) if self.train else out

    def gate(self) -> None:
        """Raises AssertionError where ours is further from the truth than rounding explains."""
        import copy

        import torch

        exact = copy.copy(self)
        kind = torch.float64 if self.tokens <= EXACT_TOKENS else torch.float32
        exact.module = copy.deepcopy(self.module).to(kind)
        exact.x, exact.weight = (part.detach().to(kind).requires_grad_(self.train) for part in (self.x, self.weight))
        exact.grad = self.grad.to(kind)
        limit = (3e-6 if kind == torch.float64 else 6e-6) if self.dtype == torch.float32 else 1.5e-2
        pairs = [(self.call("effbench"), exact.call("effbench" if kind == torch.float64 else "grouped_mm"))]
        if self.train:
            pairs = list(zip(*pairs[0], strict=True))
        for got, want in pairs:
            error = ((got.double() - want.double()).square().mean() / want.double().square().mean()).sqrt().item()
            assert error <= limit, f"{self.shape.name}, {self.tokens} tokens: error {error:.1e} of {limit:.0e} allowed"

    def peers(self) -> list[str]:
        """The implementations of transformers that this point can run."""
        size = sum(p[0].numel() * p.element_size() for p in self.module.parameters())
        fits = self.tokens * self.shape.top_k * size < GATHER_BYTES
        return [name for name in PEERS if fits or name != "batched_mm"]


def race(options: Options, *, name: str, train: bool) -> Report:
    """All points in random order until the limit of time; each type, shape and token count once, then what must be looked at again."""
    import effbench_kernels.transformers  # noqa: F401  (registers "effbench")
    import torch

    torch.set_num_threads(THREADS)
    began_s, order = time.monotonic(), random.Random(options.seed)
    grid = list(_grid(options.tiny))
    order.shuffle(grid)
    points, share_s = list[Point](), options.limit_s * 0.5 / len(grid)
    for number, (shape, dtype, tokens) in enumerate(grid):
        if time.monotonic() - began_s > options.limit_s:
            break
        points.append(measure(Layer(shape, dtype, tokens, options.seed, train), order, share_s, options.tiny))
        common.say(f"{number + 1} of {len(grid)}: {points[-1].name}: {math.exp(points[-1].log_mean()[0]):.2f}")
    slow = shown_slower(points)
    for _ in range(0 if options.tiny else 2):  # what is slower must be so three times
        again = [
            (n, measure(Layer(shape, dtype, tokens, options.seed, train), order, share_s, False))
            for n, (shape, dtype, tokens) in enumerate(grid[: len(points)])
            if n in slow
        ]
        for n, point in again:
            points[n] = point
        slow &= shown_slower(points)
    return Report(
        name=name,
        compares=f"time of transformers' best implementation over ours, one expert layer, {THREADS} threads, larger is better",
        pairs=min(len(p.ratios) for p in points),
        figures=_figures(points, slow, len(grid)),
        notes=[shape.text for shape in SHAPES],
        versions={},
    )


def _grid(tiny: bool) -> Iterator[tuple[Shape, Any, int]]:
    import torch

    for shape in SHAPES[:1] if tiny else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in TOKENS[:2] if tiny else TOKENS:
                yield shape, dtype, tokens


def measure(layer: Layer, order: random.Random, share_s: float, tiny: bool) -> Point:
    """Gate, pilot and blocks of one point, in about `share_s`."""
    began_s = time.perf_counter()
    layer.gate()
    pilot = dict[str, float]()
    for name in layer.peers():  # what must take longer than another took has lost, and need not be waited for
        if not pilot or not layer.train or layer.least_s(name) < min(pilot.values()):
            pilot[name] = _best(lambda name=name: layer.call(name))
    peer = min(pilot, key=lambda name: pilot[name])
    calls = max(1, math.ceil(WINDOW_S / pilot[peer]))
    point = Point(f"{layer.shape.name}, {str(layer.dtype)[6:]}, T {layer.tokens}", peer, [], [], [])
    arms = {"ours": "effbench", "peer": peer, "again": peer}
    while len(point.ratios) < (2 if tiny else MOST_BLOCKS):
        if len(point.ratios) >= LEAST_BLOCKS and time.perf_counter() - began_s > share_s:
            break
        taken = {
            arm: statistics.median(_timed(lambda arm=arm: layer.call(arms[arm])) for _ in range(calls))
            for arm in order.sample(list(arms), len(arms))
        }
        point.ours_s.append(taken["ours"])
        point.ratios.append(math.sqrt(taken["peer"] * taken["again"]) / taken["ours"])
        point.again.append(taken["again"] / taken["peer"])
    return point


def _best(call: Callable[[], Any]) -> float:
    """The best of three calls, or of as many as fit into a second."""
    times = [_timed(call)]
    while len(times) < 3 and sum(times) < 1.0:
        times.append(_timed(call))
    return min(times)


def _timed(call: Callable[[], Any]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def shown_slower(points: Sequence[Point]) -> set[int]:
    """The points whose ratio is below `SLOWER` at a family-wise 5 % (Holm)."""
    ranked = sorted(range(len(points)), key=lambda n: points[n].p_slower())
    found = set[int]()
    for place, n in enumerate(ranked):
        if points[n].p_slower() > 0.05 / (len(points) - place):
            break
        found.add(n)
    return found


def geometric_mean(points: Sequence[Point]) -> Interval:
    """Of the points' ratios, with the interval that theirs give; n is the number of points."""
    means, variances = zip(*(point.log_mean() for point in points), strict=True)
    mean, spread = sum(means) / len(points), 1.96 * math.sqrt(sum(variances)) / len(points)
    return Interval(math.exp(mean), math.exp(mean - spread), math.exp(mean + spread), len(points))


def _figures(points: Sequence[Point], slow: set[int], planned: int) -> list[Figure]:
    mean = geometric_mean(points)
    met = mean.value is not None and mean.lower is not None and mean.value >= 1.15 and mean.lower >= 1.05
    missed = mean.upper is not None and mean.upper < 1.15
    control = Interval(*_control(points), len(points))
    count = Interval(float(len(slow)), None, None, len(points))
    figures = [
        Figure(
            key="mean_ratio", title="geometric mean over the points: the best peer / ours", interval=mean, target=MEAN.text,
            verdict="met" if met else "missed" if missed else "undecided here",
        ),
        Figure(key="aa_mean_ratio", title="A/A: the best peer again / the best peer", interval=control),
        Figure(
            key="slower_count", title=f"points shown to be slower than {SLOWER}", interval=count, target="none",
            verdict="missed" if slow else "met" if len(points) == planned else "undecided here",
            note="" if len(points) == planned else f"{planned - len(points)} points were not reached",
        ),
    ]  # fmt: skip
    for point in sorted(points, key=lambda point: point.name):
        ours_ms = statistics.median(point.ours_s) * 1e3
        spread = statistics.median(point.again)
        key = "".join(c if c.isalnum() else "_" for c in point.name.lower()) + "_ratio"
        note = f"{point.peer}; ours {ours_ms:.3g} ms; A/A {spread:.2f}"
        figures.append(Figure(key=key, title=point.name, interval=point.interval(point.ratios), note=note))
    return figures


def _control(points: Sequence[Point]) -> tuple[float, float, float]:
    logs = [np.log(point.again) for point in points]
    mean = float(np.mean([values.mean() for values in logs]))
    spread = 1.96 * math.sqrt(sum(float(values.var(ddof=1)) / len(values) for values in logs)) / len(points)
    return math.exp(mean), math.exp(mean - spread), math.exp(mean + spread)
