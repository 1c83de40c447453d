"""Seeded load shapes with edges inside the window: what GPUs do between and during the steps of a program."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.fake_nvml import IDLE_W, PEAK_W, stairs

Points = list[tuple[float, float]]
Random = np.random.Generator


def _steps(random: Random, start_s: float, end_s: float) -> Points:
    """A few jumps to any level."""
    times = np.sort(random.uniform(start_s - 1, end_s + 0.5, random.integers(2, 12)))
    return stairs(*[(float(t), float(random.uniform(IDLE_W, PEAK_W))) for t in times])


def _ramps(random: Random, start_s: float, end_s: float) -> Points:
    times = np.sort(random.uniform(start_s - 1, end_s + 0.5, random.integers(2, 9)))
    return [(start_s - 2, IDLE_W), *((float(t), float(random.uniform(IDLE_W, PEAK_W))) for t in times), (end_s + 1, IDLE_W)]


def _square(random: Random, start_s: float, end_s: float) -> Points:
    """A square wave between two levels; its period is near the sensor's or far from it."""
    period_s = float(random.choice([0.05, 0.099, 0.1, 0.101, 0.2, 0.37, 1.0, 2.3]))
    share, low_w, high_w = random.uniform(0.1, 0.9), random.uniform(IDLE_W, 250), random.uniform(300, PEAK_W)
    begins = np.arange(start_s - random.uniform(0, 1), end_s + 0.5, period_s)
    return stairs(*[edge for t in begins for edge in ((float(t), high_w), (float(t + share * period_s), low_w))])


def _bursts(random: Random, start_s: float, end_s: float) -> Points:
    """Bursts of 20 ms to 2 s with pauses of the same order, as short kernels and host-bound loops make them."""
    edges, t = [], start_s - random.uniform(0, 1)
    scale_s = float(10 ** random.uniform(np.log10(0.02), np.log10(2.0)))
    while t < end_s:
        length_s = float(np.clip(scale_s * random.lognormal(0, 0.5), 0.02, 2.0))
        edges += [(t, float(random.uniform(300, PEAK_W))), (t + length_s, IDLE_W)]
        t += length_s + float(np.clip(scale_s * random.lognormal(0, 0.5), 0.02, 2.0))
    return stairs(*edges)


def _load(random: Random, start_s: float, end_s: float) -> Points:
    """Idle, load with a small ripple, idle; both edges inside the window."""
    edges = [(float(start_s + random.uniform(0, 1)), float(random.uniform(300, PEAK_W)))]
    while edges[-1][0] < end_s - 1:
        edges.append((edges[-1][0] + float(random.uniform(0.05, 0.5)), edges[0][1] * float(random.uniform(0.9, 1.05))))
    return stairs(*edges, (float(max(edges[-1][0] + 0.1, end_s - random.uniform(0, 0.8))), IDLE_W))


SHAPES: dict[str, Callable[[Random, float, float], Points]] = {
    "steps": _steps, "ramps": _ramps, "square": _square, "bursts": _bursts, "load": _load,
}  # fmt: skip


def load(seed: int, start_s: float, end_s: float) -> tuple[str, Points]:
    """The shape's name and its true power over and around [start_s, end_s]; the same seed gives the same load."""
    name = list(SHAPES)[seed % len(SHAPES)]
    return name, SHAPES[name](np.random.default_rng(seed), start_s, end_s)
