"""Where rows stand below the roofline of their device: FLOP/s reached against FLOPs for each byte moved.

    roof        min(matrix rate, intensity × bandwidth), by the rates measured on the device or by its datasheet
    whole step  FLOP/s = MFU × matrix rate; bytes/s = share of bandwidth × copy bandwidth; intensity = the first / the second
    decode      intensity = FLOPs / bytes of the last decode step; FLOP/s = FLOPs × sequences in the batch / TPOT

The work is the model's (counted or analytic), never what a kernel moved: rows may lie above the bandwidth roof where caches
help, and a row far below it did other things than the model's work. Source: Williams, Waterman, Patterson, CACM 52 (2009).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from effbench.analysis.pareto import Floats, counted, why_left_out
from effbench.errors import StoreError
from effbench.metrics import metric
from effbench.store import Store, read_file

Work = Literal["step", "decode"]
READS: Mapping[Work, tuple[str, ...]] = {
    "step": ("mfu", "bandwidth_share"),
    "decode": ("decode_flops", "expected_decode_bytes", "tpot_s", "mfu"),
}
NOT_CALIBRATED = "no rates of this number format were measured on the device (effbench doctor --calibrate)"


@dataclass(frozen=True, kw_only=True)
class Roof:
    """One roof: `flops_per_s` of a number format and `bytes_per_s`."""

    dtype: str
    flops_per_s: float
    bytes_per_s: float
    measured: bool  # else by the datasheet

    @property
    def ridge(self) -> float:
        """The intensity above which arithmetic is the limit, in FLOP/B."""
        return self.flops_per_s / self.bytes_per_s

    def at(self, intensity: Floats) -> Floats:
        """Attainable FLOP/s at an intensity in FLOP/B."""
        return np.minimum(self.flops_per_s, intensity * self.bytes_per_s)


def roofs(peaks: object) -> list[Roof]:
    """The roofs that `peaks` of a launch's facts give (see `hardware.peaks`), measured ones first; none where a rate is
    missing or not a positive number."""
    found: list[Roof] = []
    for kind, bandwidth, measured in (("matrix", "copy", True), ("datasheet", "datasheet", False)):
        bytes_per_s = _rate(peaks, f"{bandwidth}_bytes_per_s")
        by_dtype = peaks.get(f"{kind}_flops_per_s") if isinstance(peaks, Mapping) else None
        for dtype in by_dtype if isinstance(by_dtype, Mapping) else ():
            if bytes_per_s and (rate := _rate(by_dtype, dtype)):
                found.append(Roof(dtype=str(dtype), flops_per_s=rate, bytes_per_s=bytes_per_s, measured=measured))
    return found


def roofs_of(store: Store, launch_ids: Collection[str]) -> tuple[dict[str, list[Roof]], list[str]]:
    """The roofs that each of these launches recorded, and a sentence for each file that could not be read.

    Ids are read first, then the facts of the files that hold one of them."""
    found: dict[str, list[Roof]] = {}
    warnings = []
    try:
        paths = [path for path, _ in store.files("launches")]
    except StoreError as fault:
        return {}, [str(fault)]
    wanted = pa.array(sorted(launch_ids), pa.string())
    for path in paths:
        if len(found) == len(wanted):
            break
        try:
            mask = pc.is_in(read_file(path, "launches", ["launch_id"])["launch_id"], wanted)
            if pc.any(mask).as_py():
                rows = read_file(path, "launches", ["launch_id", "facts"]).filter(mask)
                found |= {row["launch_id"]: roofs(_peaks(row["facts"])) for row in rows.to_pylist()}
        except FileNotFoundError:
            warnings.append(f"{path} was merged meanwhile: reload the page.")
        except StoreError as fault:
            warnings.append(f"Skipped: {fault}")
    return found, warnings


def points(frame: pd.DataFrame, known: Sequence[Sequence[Roof]], work: Work) -> tuple[pd.DataFrame, dict[str, int]]:
    """The rows with both numbers: `frame` with columns `intensity` (FLOP/B), `flops_per_s`, `dtype`, `roof` (its measured Roof)
    and `attained` (share of the roof at this intensity) more; and for each reason how many rows were left out.

    `known` has each row's roofs. The frame has the metrics of READS; for "decode" also `spec`."""
    dtype = frame["mfu__source"].astype("str").str.extract(r"peak of (\w+)$", expand=False)
    roof = [
        next((one for one in found if one.measured and one.dtype == kind), None)
        for found, kind in zip(known, dtype, strict=True)
    ]
    rate = np.array([np.nan if one is None else one.flops_per_s for one in roof], np.float64)
    bandwidth = np.array([np.nan if one is None else one.bytes_per_s for one in roof], np.float64)
    numbers = {name: frame[name].to_numpy(float) for name in READS[work]}
    with np.errstate(divide="ignore", invalid="ignore"):
        if work == "step":
            why = why_left_out(frame, READS["step"])
            flops_per_s = numbers["mfu"] * rate
            intensity = flops_per_s / (numbers["bandwidth_share"] * bandwidth)
        else:
            why = why_left_out(frame, ("decode_flops", "tpot_s"))
            no_bytes = ~np.isfinite(numbers["expected_decode_bytes"])  # analytic by its nature, so never fit to be ranked
            why = np.where((why == "") & no_bytes, f"{metric('expected_decode_bytes').title}: missing", why)
            intensity = numbers["decode_flops"] / numbers["expected_decode_bytes"]
            flops_per_s = numbers["decode_flops"] * [_batch(text) for text in frame["spec"]] / numbers["tpot_s"]
        why = np.where((why == "") & ~np.isfinite(rate), NOT_CALIBRATED, why)
        drawn = np.isfinite(intensity) & (intensity > 0) & np.isfinite(flops_per_s) & (flops_per_s > 0)
        why = np.where((why == "") & ~drawn, "its numbers are missing or not positive", why)
        attained = flops_per_s / np.minimum(rate, intensity * bandwidth)
    more = {"intensity": intensity, "flops_per_s": flops_per_s, "attained": attained, "dtype": dtype, "roof": roof}
    return frame.assign(**more)[why == ""], counted(why)


def _peaks(facts: str) -> object:
    try:
        return json.loads(facts)["peaks"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _batch(spec: str) -> float:
    """Sequences that a decode step works on; NaN where the spec does not say."""
    try:
        return float(json.loads(spec)["params"]["batch_size"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("nan")


def _rate(rates: object, name: str) -> float | None:
    """A positive number of a mapping, None where it is anything else."""
    value = rates.get(name) if isinstance(rates, Mapping) else None
    usable = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
    return value if usable else None


def used(rows: pd.DataFrame, known: Sequence[Sequence[Roof]]) -> list[Roof]:
    """The distinct roofs of the number formats that the rows of `points` use, measured ones first."""
    dtypes: set[Any] = set(rows["dtype"])
    distinct = dict.fromkeys(roof for found in known for roof in found if roof.dtype in dtypes)
    return sorted(distinct, key=lambda roof: (not roof.measured, roof.dtype, -roof.flops_per_s))
