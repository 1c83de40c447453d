"""The expert layer on a GPU at published shapes in bfloat16: against transformers, torch and liger-kernel, and against the roof.

    large T   4096 tokens: forward, and forward with backward, beside transformers' grouped_mm, two bare grouped_mm of torch (no
              sorting, no sum), liger-kernel's fused MoE where it is installed, and dense products of the same FLOPs
    small T   1 and 8 tokens: replayed from a CUDA graph over copies of the weights of four times the L2 cache, so that weights come
              from memory; beside it the same without a graph

Routing and sorting count for every arm that has them. The roof is what the device's own copy bandwidth and matrix rate, measured
in the same call, allow: the larger of FLOPs / rate and compulsory bytes / bandwidth. Blocks, A/A and interval are those of
`expert_race`; correctness comes first.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.common import Figure, Options, Report, Target, against
from benchmarks.expert_race import SHAPES, Layer, Shape
from effbench import stats
from effbench.stats import Interval

LARGE, SMALL = (4096,), (1, 8)
OTHERS = (Shape("Qwen1.5-MoE", 2048, 1408, 60, 4, 1), Shape("EfficientLLM 1.5B×8", 1536, 8960, 8, 2, 1))
BLOCKS = 7
CACHES = 4  # how often the weights of a small point fill the L2 cache
TARGETS = {
    ("liger", False): Target(text="≥ 1.25", lower=1.25),
    ("liger", True): Target(text="≥ 1.4", lower=1.4),
    ("grouped_mm", False): Target(text="≥ 2", lower=2.0),
    ("grouped_mm", True): Target(text="≥ 2", lower=2.0),
}
ROOF = Target(text="≥ 0.7", lower=0.7)
Call = Callable[[], Any]


@dataclass(frozen=True)
class Roof:
    """What the device can do, measured."""

    bytes_per_s: float
    flops_per_s: float

    def least_s(self, shape: Shape, tokens: int, train: bool) -> float:
        """Time of the compulsory work: expected touched experts once, inputs and outputs once; backward twice the FLOPs."""
        hidden, width = shape.hidden // shape.scale, shape.width // shape.scale
        touched = shape.experts * (1 - (1 - shape.top_k / shape.experts) ** tokens)
        moved = 2 * (2 * tokens * hidden + 3 * touched * hidden * width) * (3 if train else 1)
        flops = 6 * tokens * shape.top_k * hidden * width * (3 if train else 1)
        return max(moved / self.bytes_per_s, flops / self.flops_per_s)


def run(options: Options) -> Report:
    """Every point once; on a machine without CUDA only a tiny run, which proves that the script works."""
    import effbench_kernels.transformers  # noqa: F401  (registers "effbench")
    import torch

    if not torch.cuda.is_available() and not options.tiny:
        why = "needs a CUDA device: torch is a CPU build" if torch.version.cuda is None else "no CUDA device is visible"
        return Report(name="experts_gpu", compares="nothing", pairs=0, figures=[], notes=[why])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    roof, shapes = _roof(device, options.tiny), _shapes(options.tiny)
    order, figures = random.Random(options.seed), list[Figure]()
    for tokens in (8,) if options.tiny else LARGE:
        for train in (False, True):
            found = {shape.name: _large(shape, tokens, train, device, roof, order) for shape in shapes}
            figures += [figure for name, taken in found.items() for figure in _large_figures(name, tokens, train, taken)]
            figures += _means(found, tokens, train)
    for tokens in (1,) if options.tiny else SMALL:
        for shape in shapes:
            figures += _small(shape, tokens, device, roof, order)
    return Report(
        name="experts_gpu",
        compares="one expert layer in bfloat16, published shapes; ratios are the other's time over ours",
        pairs=BLOCKS,
        figures=figures,
        notes=[f"roof: {roof.bytes_per_s / 1e9:.0f} GB/s, {roof.flops_per_s / 1e12:.1f} TFLOP/s, on {_device_name(device)}"],
    )


def _shapes(tiny: bool) -> list[Shape]:
    if tiny:
        return [Shape("tiny", 512, 256, 8, 2, 4)]
    return [*(Shape(s.name, s.hidden, s.width, s.experts, s.top_k, 1) for s in SHAPES), *OTHERS]


def _roof(device: str, tiny: bool) -> Roof:
    from effbench import calibrate

    if tiny:
        return Roof(1e10, 1e11)
    measured = calibrate.measure(device)
    return Roof(measured.copy_bytes_per_s, measured.matrix_flops_per_s["bf16"])


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "a CPU"


def _layer(shape: Shape, tokens: int, train: bool, device: str, seed: int) -> Layer:
    import torch

    layer = Layer(shape, torch.bfloat16, tokens, seed, train, device)
    layer.gate()
    return layer


def _arms(layer: Layer) -> dict[str, Call]:
    """The ways to run a layer with routing; those that cannot run here are left out."""
    import torch

    arms: dict[str, Call] = {"ours": lambda: layer.routed("effbench"), "grouped_mm": lambda: layer.routed("grouped_mm")}
    up, down = layer.module.gate_up_proj, layer.module.down_proj
    pairs = layer.tokens * layer.shape.top_k
    rows = layer.x.detach().repeat(layer.shape.top_k, 1)
    if not layer.train:
        wide, back = (up[0].t().contiguous().t(), down[0].t().contiguous().t())
        arms["dense"] = lambda: (torch.mm(rows, wide.t())[:, : down.size(2)]) @ back.t()
        bounds = torch.linspace(0, pairs, layer.shape.experts + 1, device=rows.device)[1:].to(torch.int32)

        def bare() -> Any:
            gate, value = torch.nn.functional.grouped_mm(rows, up.mT, offs=bounds).chunk(2, -1)
            return torch.nn.functional.grouped_mm(torch.nn.functional.silu(gate) * value, down.mT, offs=bounds)

        arms["bare grouped_mm"] = bare
    try:
        from liger_kernel.ops import LigerFusedMoEFunction
    except ImportError:
        return arms
    return {**arms, "liger": lambda: layer.routed(LigerFusedMoEFunction)}


def _taken(arms: Mapping[str, Call], order: random.Random, timer: Callable[[Call], float]) -> dict[str, list[float]]:
    """Seconds of each arm and of ours again, one a block."""
    taken: dict[str, list[float]] = {name: [] for name in (*arms, "again")}
    for call in arms.values():
        for _ in range(3):
            timer(call)
    for _ in range(BLOCKS):
        for name in order.sample(list(taken), len(taken)):
            taken[name].append(statistics.median(timer(arms["ours" if name == "again" else name]) for _ in range(5)))
    return taken


def _large(shape: Shape, tokens: int, train: bool, device: str, roof: Roof, order: random.Random) -> dict[str, list[float]]:
    taken = _taken(_arms(_layer(shape, tokens, train, device, 1)), order, _timer(device))
    return {**taken, "roof": [roof.least_s(shape, tokens, train)] * BLOCKS}


def _timer(device: str) -> Callable[[Call], float]:
    from effbench import calibrate

    return calibrate.cuda_timer() if device == "cuda" else calibrate.host_timer


def _key(*parts: object) -> str:
    return "".join(c if c.isalnum() else "_" for c in " ".join(map(str, parts)).lower())


def _large_figures(name: str, tokens: int, train: bool, taken: Mapping[str, list[float]]) -> list[Figure]:
    mode, ours = "training" if train else "forward", taken["ours"]
    made = [
        Figure(
            key=_key(name, tokens, mode, other, "ratio"), title=f"{name}, T {tokens}, {mode}: {other} / ours",
            interval=stats.paired_ratio(list(values), list(ours)),
        )
        for other, values in taken.items()
        if other not in ("ours", "roof")
    ]  # fmt: skip
    share = stats.paired_ratio(list(taken["roof"]), list(ours))
    title = f"{name}, T {tokens}, {mode}: share of the roof, ours {statistics.median(ours) * 1e6:.0f} us"
    return [*made, Figure(key=_key(name, tokens, mode, "roof", "share"), title=title, interval=share)]


def _means(found: Mapping[str, Mapping[str, list[float]]], tokens: int, train: bool) -> list[Figure]:
    """Geometric means over the shapes, block by block, with the targets."""
    figures, mode = [], "training" if train else "forward"
    for (other, trains), target in TARGETS.items():
        rows = [taken for taken in found.values() if other in taken]
        if trains != train or not rows:
            continue
        ratios = [
            math.exp(statistics.mean(math.log(taken[other][block] / taken["ours"][block]) for taken in rows))
            for block in range(BLOCKS)
        ]
        interval: Interval = stats.block_interval(list(ratios))
        title = f"geometric mean over the shapes, T {tokens}, {mode}: {other} / ours"
        figures.append(against(_key("mean", tokens, mode, other, "ratio"), title, interval, target))
    return figures


def _small(shape: Shape, tokens: int, device: str, roof: Roof, order: random.Random) -> list[Figure]:
    """Share of the roof of a few tokens, from a graph and without."""
    import torch

    layers = [_layer(shape, tokens, False, device, 1)]
    touched = roof.least_s(shape, tokens, False) * roof.bytes_per_s
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    layers += [
        Layer(shape, torch.bfloat16, tokens, seed, False, device) for seed in range(2, 2 + math.ceil(CACHES * cache / touched))
    ]

    def every() -> None:
        for layer in layers:
            layer.routed("effbench")

    arms: dict[str, Call] = {"eager": every}
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        every()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            every()
        arms["graph"] = graph.replay
    taken = _taken({"ours": arms.get("graph", every), **arms}, order, _timer(device))
    least = [roof.least_s(shape, tokens, False) * len(layers)] * BLOCKS
    title = f"{shape.name}, T {tokens}: share of the roof"
    figures = [
        Figure(
            key=_key(shape.name, tokens, "eager", "share"),
            title=f"{title}, eager",
            interval=stats.paired_ratio(least, taken["eager"]),
        )
    ]
    if "graph" in arms:
        interval = stats.paired_ratio(least, taken["graph"])
        figures.append(against(_key(shape.name, tokens, "graph", "share"), f"{title}, CUDA graph", interval, ROOF))
    return figures
