"""A results folder of any size with the real schema: what a year of sweeps on six machines would have left.

    python -m benchmarks.board_data /tmp/board 100000

The shape of a row (names, units, sources, reasons, length of the spec) is that of results/reference; what a CPU has no
sensor for is filled in on GPUs. Columns are built whole with Arrow, a sealed file of the store's size at a time, so a million
rows never exist as records. The same seed gives the same rows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.board_cases import (
    HARDWARE,
    MODELS,
    PROTOCOL_NAMES,
    ROWS_A_QUESTION,
    STACKS,
    WORKLOADS,
    identities,
    place,
    sha256,
    stacks,
)
from effbench.files import publish
from effbench.metrics import METRICS
from effbench.protocol import PROTOCOLS
from effbench.schema import MetricValue, arrow_schemas
from effbench.store import MERGED_ROWS, SEALED, Store, _encode
from tests.records import PROVENANCE, VALUES

REFERENCE = Path(__file__).resolve().parents[1] / "results" / "reference"
REPEATED_EVERY = 50  # each fiftieth row is a later run of the case before it
NO_SENSOR = {"no_gpu", "rapl_missing", "no_datasheet", "not_taken"}  # reasons of a CPU that a GPU does not have
FAULTS = (("ok", "", 0.94), ("failed", "out_of_memory", 0.03), ("failed", "timeout", 0.01), ("skipped", "needs_a_gpu", 0.01),
          ("invalid", "throttled", 0.01))  # fmt: skip
GPU_VALUES = {**VALUES, "tokens_per_s": 512 / VALUES["al_s"]}  # a whole number of tokens a step
EXACT = ("count", "B", "B/token")  # units of figures that do not vary between blocks


def write(folder: Path, num_rows: int, seed: int = 1) -> None:
    """Write `num_rows` rows into folder/runs as sealed files. Raises StoreError where the disk is full."""
    drawn = Drawn.of(num_rows, seed)
    for start in range(0, num_rows, MERGED_ROWS):
        rows = np.arange(start, min(start + MERGED_ROWS, num_rows))
        publish(folder / "runs", f"{SEALED}{start // MERGED_ROWS:05d}.parquet", _encode(table(rows, drawn), "runs"))


@dataclass(frozen=True)
class Drawn:
    """What is drawn once for a whole folder: log speed and log memory of each stack in each question."""

    seed: int
    log_speed: np.ndarray  # (questions, stacks)
    log_memory: np.ndarray  # (questions, stacks)

    @classmethod
    def of(cls, num_rows: int, seed: int) -> Drawn:
        random, shape = np.random.default_rng([seed, 0]), (num_rows // ROWS_A_QUESTION + 1, STACKS)
        speed = random.normal(0, 0.3, STACKS) + random.normal(0, 0.1, shape) + random.normal(0, 0.2, shape[0])[:, None]
        memory = random.normal(0, 0.2, STACKS) + random.normal(0, 0.05, shape)
        places = [place(k) for k in range(shape[0])]
        speed += np.log([HARDWARE[p.hardware] / MODELS[p.model] ** 0.7 for p in places])[:, None]
        memory += np.log([MODELS[p.model] for p in places])[:, None]
        return cls(seed, speed, memory)


def table(rows: np.ndarray, drawn: Drawn) -> pa.Table:
    """The rows of these numbers as a table of the schema `runs`."""
    case = rows - rows // REPEATED_EVERY
    k, within = np.divmod(case, ROWS_A_QUESTION)
    protocol, stack = np.divmod(within, STACKS)
    random = np.random.default_rng([drawn.seed, 1 + int(rows[0])])
    places = {int(q): place(int(q)) for q in np.unique(k)}
    fault = random.choice(len(FAULTS), len(rows), p=[share for *_, share in FAULTS])
    hardware = np.array([list(HARDWARE).index(places[q].hardware) for q in k.tolist()])
    blocks = np.array([PROTOCOLS[name].blocks for name in PROTOCOL_NAMES])[protocol]
    named_protocols = np.array(PROTOCOL_NAMES)[protocol].tolist()
    specs, case_ids, baselines = identities(zip(k.tolist(), stack.tolist(), named_protocols, strict=True), places)
    named = [" ".join(t.name for t in s if not t.filled_in) for w in WORKLOADS for s in stacks(w)]
    techniques = pa.array([n.split(" ") if n else [] for n in named], pa.list_(pa.string()))
    workload = np.array([WORKLOADS.index(places[q].workload) for q in k.tolist()])
    columns = {
        "run_id": _ids(random, len(rows)),
        "case_id": pa.array(case_ids),
        "env_id": _pick([sha256(name) for name in HARDWARE], hardware),
        "schema_version": pa.array(np.ones(len(rows), np.int64)),
        "status": _pick([status for status, *_ in FAULTS], fault),
        "reason": _pick([reason for _, reason, _ in FAULTS], fault),
        "suite": _pick([f"sweep-{name}" for name in WORKLOADS], workload),
        "workload": _pick(list(WORKLOADS), workload),
        "model": pa.array([places[q].model for q in k.tolist()]),
        "techniques": techniques.take(pa.array(workload * STACKS + stack)),
        "baseline_case_id": pa.array(baselines, pa.string()),
        "hardware": _pick(list(HARDWARE), hardware),
        "protocol": _pick(list(PROTOCOL_NAMES), protocol),
        "launch_ids": _id_lists(random, blocks),
        "baseline_launch_ids": _id_lists(random, np.where(stack > 0, blocks, 0)),
        "started_at": pa.array(_times(rows)),
        "spec": pa.array(specs),
        "provenance": _provenance().take(pa.array(hardware)),
        "metrics": _metrics(random, drawn, k, stack, blocks, workload, hardware > 0, np.isin(fault, (0, 4))),
    }
    schema = arrow_schemas()["runs"]
    return pa.Table.from_arrays([columns[f.name].cast(f.type) for f in schema], schema=schema)


@dataclass(frozen=True)
class Shape:
    """The metrics of a workload on a kind of device: three variants (plain, host-bound, estimated) of 51 metrics each."""

    texts: pa.StructArray  # name, unit, source, valid, reasons; (workloads × devices × variants × metrics,)
    base: np.ndarray  # the value at speed and memory 1, NaN where there is none; the same length
    rate: np.ndarray  # power of the speed in a value
    size: np.ndarray  # power of the memory in a value
    exact: np.ndarray  # bool: no spread between blocks
    most: np.ndarray  # 0.98 for shares, else infinity
    width: int  # metrics a row


@cache
def shape() -> Shape:
    """Read off the reference rows, so that it follows them."""
    reference = {record.workload: record.metrics for record in Store(REFERENCE).cases() if record.status == "ok"}
    lines = [
        _line(value, on_gpu, variant)
        for workload in WORKLOADS
        for on_gpu in (False, True)
        for variant in ("", "host_bound", "estimate")
        for value in reference[workload]
    ]
    fields = [f for f in arrow_schemas()["runs"].field("metrics").type.value_type if f.name in lines[0]]
    texts = pa.array([{k: line[k] for k in (f.name for f in fields)} for line in lines], pa.struct(fields))
    units = [line["unit"] for line in lines]
    rate = [-1.0 if u.split("/")[0] in ("s", "J") else float(u.endswith("/s")) for u in units]
    size = [float(u in ("B", "GB", "count")) for u in units]
    most = [0.98 if u == "ratio" else np.inf for u in units]
    base = np.array([np.nan if line["base"] is None else line["base"] for line in lines])
    arrays = (np.array(rate), np.array(size), np.isin(units, EXACT), np.array(most))
    return Shape(texts, base, *arrays, len(reference[WORKLOADS[0]]))


def _line(value: MetricValue, on_gpu: bool, variant: str) -> dict[str, Any]:
    base, source, reasons = value.value, value.source, list(value.reasons)
    if on_gpu and (base is not None or NO_SENSOR & set(reasons)):
        base = GPU_VALUES.get(value.name, base)
        source, reasons = source or "NVML", []
    if value.name == "mcr":
        base, reasons = VALUES["mcr"], []
    if on_gpu and variant == "host_bound" and value.name == "gpu_idle_share":
        base, reasons = 0.5, ["host_bound"]
    if on_gpu and variant == "estimate" and "energy" in value.name and base is not None:
        reasons = ["estimate"]
    return {"name": value.name, "unit": value.unit or METRICS[value.name].unit, "source": source, "valid": base is not None,
            "reasons": reasons, "base": base}  # fmt: skip


def _metrics(random: Any, drawn: Drawn, k: Any, stack: Any, blocks: Any, workload: Any, on_gpu: Any, has: Any) -> pa.Array:
    """The list column; rows without `has` have no metrics. Numbers have shape (rows that have, metrics)."""
    form = shape()
    variant = random.choice(3, len(k), p=(0.97, 0.01, 0.02))
    kind = ((workload * 2 + on_gpu) * 3 + variant)[has]
    at = kind[:, None] * form.width + np.arange(form.width)
    k, stack, blocks = k[has], stack[has], blocks[has]
    noise = random.normal(0, 0.01, len(k))
    speed, memory = drawn.log_speed[k, stack] + noise, drawn.log_memory[k, stack]
    rate, size = form.rate[at], form.size[at]
    value = np.minimum(form.base[at] * np.exp(rate * speed[:, None] + size * memory[:, None]), form.most[at])
    ahead = (speed - drawn.log_speed[k, 0])[:, None] * rate + (memory - drawn.log_memory[k, 0])[:, None] * size
    ratio = np.where((stack > 0)[:, None] & ~np.isnan(value), np.exp(ahead), np.nan)
    half = np.exp(random.normal(np.log(np.where(blocks > 3, 0.006, 0.02)), 0.4))[:, None] * random.uniform(0.5, 1.5, at.shape)
    half = np.exp(np.where(form.exact[at], 0.0, half))
    numbers = {"value": value, "lower": value / half, "upper": value * half, "ratio": ratio, "ratio_lower": ratio / half**0.7,
               "ratio_upper": ratio * half**0.7}  # fmt: skip
    flat: dict[str, pa.Array] = {name: pa.array(numbers[name].ravel(), from_pandas=True) for name in numbers}
    flat["n"] = pa.array(np.where(np.isnan(value), 0, blocks[:, None]).ravel())
    texts = form.texts.take(pa.array(at.ravel()))
    flat |= {texts.type[i].name: texts.field(i) for i in range(texts.type.num_fields)}
    type_ = arrow_schemas()["runs"].field("metrics").type
    values = pa.StructArray.from_arrays([flat[f.name] for f in type_.value_type], fields=list(type_.value_type))
    return pa.ListArray.from_arrays(_offsets(has * form.width), values, type=type_)


@cache
def _provenance() -> pa.StructArray:
    """One a machine."""
    type_ = arrow_schemas()["runs"].field("provenance").type
    gpu = ("driver", "cuda", "power_limit_w")
    rows = [{**PROVENANCE, "device_name": name, **({} if "NVIDIA" in name else dict.fromkeys(gpu))} for name in HARDWARE]
    return pa.array(rows, type_)


def _pick(texts: Sequence[str], index: np.ndarray) -> pa.Array:
    return pa.array(texts, pa.string()).take(pa.array(index))


def _ids(random: Any, count: int) -> pa.StringArray:
    """`count` random identities of 32 hex digits."""
    digits = pa.py_buffer(random.bytes(16 * count).hex().encode())
    return pa.StringArray.from_buffers(count, pa.py_buffer(np.arange(count + 1, dtype=np.int32) * 32), digits)


def _id_lists(random: Any, lengths: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(_offsets(lengths), _ids(random, int(lengths.sum())))


def _offsets(lengths: np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def _times(rows: np.ndarray) -> list[str]:
    """A row every 20 s from the start of 2026."""
    at = np.datetime64("2026-01-01T00:00:00") + (rows * 20).astype("timedelta64[s]")
    return [f"{time}+00:00" for time in np.datetime_as_string(at, unit="s").tolist()]


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
