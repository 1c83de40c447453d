"""What is here already: run ids, and fingerprints of traces by which a copy is recognised, also a scaled or noised one.

A fingerprint has two parts. `exact` is a digest of the step times in ns, sorted: the same for a copy that was moved in time or
shuffled. `shape` is how each step's time changed from the one before, in 15 levels of its own spread: nearly the same for a copy that
was stretched or had noise added. Two honest launches share neither: the changes of their steps are noise, but for those far beyond
the usual, which are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt

from effbench.errors import StoreError
from effbench.exchange.checking import Array, step_ticks
from effbench.schema import Trace
from effbench.store import Store

CHANGES = 64  # of a launch's first steps
PERIOD = 8  # workloads take so many prompts, or a divisor of it of routings, in turn: launches share what comes from that
FEWEST_CHANGES = 24  # below this shapes agree by chance
LEVELS = 7  # on either side of 0, three times the usual change
SIGNIFICANT = 8.0  # in standard errors of Fisher's z
LAGS = range(-4, 5)  # steps that a copy may have lost at its beginning

AT_ONCE = 500  # rows of a table of pairs

Shape = npt.NDArray[np.int8]
Table = npt.NDArray[np.float32]
Pair = tuple[int, int, float, int]  # places of both, correlation, changes compared


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Of one trace: see above. `shape` is written with a hex digit a change, 7 standing for none."""

    exact: str
    shape: str


@dataclass(frozen=True, kw_only=True)
class Known:
    """Ids of the runs of one or more results directories, and a fingerprint for each of their launches that has steps."""

    runs: frozenset[str] = frozenset()
    launches: Mapping[str, Fingerprint] = field(default_factory=dict)

    @classmethod
    def of(cls, stores: Iterable[Store]) -> Known:
        """Reads every row and every trace; what cannot be read is not known. Raises StoreError where a folder cannot be read."""
        runs: set[str] = set()
        launches: dict[str, Fingerprint] = {}
        for store in stores:
            runs |= {row.run_id for row in store.cases(["run_id"])}
            table, _ = store.table("launches", ["launch_id", "status"])
            for launch_id, status in zip(table["launch_id"].to_pylist(), table["status"].to_pylist(), strict=True):
                if status != "ok" or launch_id in launches:
                    continue
                try:
                    found = fingerprint(store.trace(launch_id))
                except StoreError:
                    continue
                if found is not None:
                    launches[launch_id] = found
        return cls(runs=frozenset(runs), launches=launches)

    def to_json(self) -> dict[str, Any]:
        return {"runs": sorted(self.runs), "launches": {name: [f.exact, f.shape] for name, f in self.launches.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Known:
        """Raises KeyError, TypeError or ValueError where the fields are others."""
        launches = {
            str(name): Fingerprint(exact=str(exact), shape=str(shape)) for name, (exact, shape) in data["launches"].items()
        }
        for each in launches.values():
            levels(each.shape)
        return cls(runs=frozenset(map(str, data["runs"])), launches=launches)


def fingerprint(trace: Trace) -> Fingerprint | None:
    """The fingerprint of a trace; None where it has no steps, or none that can be counted in ns."""
    series = trace.get("step")
    if series is None or not len(series.values) or not np.isfinite(series.values).all() or np.abs(series.values).max() > 1e9:
        return None
    digest = sha256(np.sort(step_ticks(series.values)).tobytes()).hexdigest()[:32]
    return Fingerprint(exact=digest, shape="".join(f"{level + LEVELS:x}" for level in changes(series.values)))


def changes(lengths_s: Array) -> Shape:
    """How the first steps changed, step by step on logarithms, in levels of three times the usual change; shape (N − 1,).

    What repeats with PERIOD is taken out. Empty where there are too few steps to compare, or where they repeat in another
    rhythm, which launches may share."""
    kept = lengths_s[: CHANGES + 1]
    if len(kept) <= FEWEST_CHANGES or kept.min() <= 0:
        return np.zeros(0, np.int8)
    scaled = np.log(kept)
    for phase in range(PERIOD):
        scaled[phase::PERIOD] -= np.median(scaled[phase::PERIOD])
    change = np.diff(scaled)
    usual = 1.4826 * float(np.median(np.abs(change - np.median(change))))
    if usual <= 0:
        return np.zeros(len(change), np.int8)
    found = np.rint(np.clip(change / (3 * usual), -1, 1) * LEVELS).astype(np.int8)
    return np.zeros(0, np.int8) if _repeats(found) else found


def _repeats(shape: Shape) -> bool:
    """Whether a shape is like itself some steps later, beyond four standard errors; neighbouring changes always are."""
    plain = shape.astype(float)
    total = float(plain @ plain)
    lags = range(2, len(plain) // 2)
    return total > 0 and any(plain[lag:] @ plain[:-lag] > math.tanh(4 / math.sqrt(len(plain) - lag)) * total for lag in lags)


def levels(shape: str) -> Shape:
    """The levels that a shape stands for. Raises ValueError where it is none."""
    found = _DIGITS[np.frombuffer(shape[:CHANGES].encode("ascii", "replace"), np.uint8)]
    if (found > LEVELS).any():
        raise ValueError(f"{shape[:20]!r} is no shape: hex digits from 0 to {2 * LEVELS:x} are")
    return np.asarray(found, np.int8)


def alike(ours: Sequence[Shape], others: Sequence[Shape] | None = None) -> list[Pair]:
    """Pairs of shapes that agree far beyond chance, also when moved by a few steps; without `others` within `ours`.

    Chance: changes of independent steps have a correlation of mean 0, and Fisher's z of it a standard error of about
    1/√(n − PERIOD − 3), 1.2 times that because neighbouring changes share a step.
    """
    right, there = _stacked(ours if others is None else others)
    best: dict[tuple[int, int], Pair] = {}
    for start in range(0, len(ours), AT_ONCE):
        left, here = _stacked(ours[start : start + AT_ONCE])
        for lag in LAGS:
            mine, yours = (slice(lag, None), slice(None, CHANGES - lag)) if lag >= 0 else (slice(None, lag), slice(-lag, None))
            for i, j, r, count in _agreeing(left[:, mine], here[:, mine], right[:, yours], there[:, yours]):
                pair = (start + i, j, r, count)
                if (others is not None or pair[0] < j) and best.get(pair[:2], pair)[2] <= r:
                    best[pair[:2]] = pair
    return [best[key] for key in sorted(best)]


def _agreeing(a: Table, in_a: Table, b: Table, in_b: Table) -> list[Pair]:
    """Pairs of rows of two tables whose correlation over what both have is above chance."""
    count = in_a @ in_b.T
    squared = ((a * a) @ in_b.T) * (in_a @ (b * b).T)
    found = a @ b.T
    rows, columns = np.nonzero(
        (count >= FEWEST_CHANGES) & (found > 0) & (found * found > _LIMITS[count.astype(np.intp)] ** 2 * squared)
    )
    places = zip(rows.tolist(), columns.tolist(), strict=True)
    return [(i, j, float(found[i, j] / np.sqrt(squared[i, j])), int(count[i, j])) for i, j in places]


def chance_limit(count: int) -> float:
    """The correlation of so many changes above which two shapes count as alike."""
    return math.tanh(SIGNIFICANT / math.sqrt(max(count - PERIOD - 3, 1)))


def _stacked(shapes: Sequence[Shape]) -> tuple[Table, Table]:
    """One row a shape, (N, CHANGES), 0 where a launch had fewer steps; and 1 where there is a change to compare, else 0.

    The largest level is none: an allocator that grows makes the same steps of the same program long, in every launch of it.
    """
    table, there = np.zeros((2, len(shapes), CHANGES), np.float32)
    for row, mask, shape in zip(table, there, shapes, strict=True):
        usual = np.abs(shape[:CHANGES]) < LEVELS
        row[: len(shape)], mask[: len(shape)] = np.where(usual, shape[:CHANGES], 0), usual
    return table, there


_LIMITS = np.array([chance_limit(count) for count in range(CHANGES + 1)], np.float32)
_DIGITS = np.full(256, LEVELS + 1, np.int8)
_DIGITS[[ord(f"{level + LEVELS:x}") for level in range(-LEVELS, LEVELS + 1)]] = np.arange(-LEVELS, LEVELS + 1)
