"""Does the work of a step fit under the device's roofline, and is the roofline that a record carries the device's?

Ceilings are those of the datasheet row (`hardware.py`), for a CPU generous bounds, and the rates that the record says were measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from effbench.exchange.checking import Seen, number, refused, remark, shown
from effbench.exchange.physics import FASTER
from effbench.exchange.report import Finding
from effbench.hardware import Device, device

PROCESSOR_FLOPS = 5e12  # per core and s, a generous bound
PROCESSOR_BYTES = 3e12  # per s and machine
CACHES_BYTES = 300e6  # weights below this may be read from caches, faster than from memory


def rates(seen: Seen) -> Iterator[Finding]:
    """Work per second lies within the roofline, and the roofline is the device's."""
    row = device(str(seen.launch.hardware)) if seen.gpu else None
    peaks = seen.launch.facts.get("peaks") or {}
    dtype, cores = str(seen.launch.facts.get("compute_dtype") or ""), seen.fact("cores") or 1.0
    measured = peaks.get("matrix_flops_per_s") or {}
    limit_bytes = row.memory_bytes_per_s if row else None if seen.gpu else PROCESSOR_BYTES
    for kind, rate in measured.items():
        limit = _flops_limit(row, str(kind), cores) if row or not seen.gpu else None
        if limit and (number(rate) or 0.0) > FASTER * limit:
            yield refused(
                "peaks", seen.where, f"a measured {shown(kind)} rate of {number(rate):.4g} FLOP/s is above {limit:.4g} FLOP/s"
            )
    copied = number(peaks.get("copy_bytes_per_s"))
    if limit_bytes and copied and copied > FASTER * limit_bytes:
        yield refused("peaks", seen.where, f"a measured copy rate of {copied:.4g} B/s is above {limit_bytes:.4g} B/s")
    if row:
        yield from _datasheet(seen, row, peaks)
    per_s = len(seen.step_s) / float(seen.step_s.sum())
    flops, moved = seen.fact("step_flops"), seen.fact("step_bytes")
    limit = _flops_limit(row, dtype, cores) if row or not seen.gpu else None
    if flops and limit and flops * per_s > FASTER * limit:
        yield refused(
            "roofline", seen.where, f"{flops * per_s:.4g} FLOP/s in {shown(dtype)}; the device does {limit:.4g} FLOP/s at most"
        )
    own = number(measured.get(dtype))
    if flops and own and flops * per_s > 3 * own:
        yield refused(
            "roofline",
            seen.where,
            f"{flops * per_s:.4g} FLOP/s are above 3 times the rate measured on this device, {own:.4g} FLOP/s",
        )
    if moved and limit_bytes and moved * per_s > 1.15 * limit_bytes:
        make = refused if (seen.fact("weight_bytes") or 0.0) > CACHES_BYTES else remark
        yield make("roofline", seen.where, f"{moved * per_s:.4g} B/s must move; memory moves {limit_bytes:.4g} B/s at most")


def _flops_limit(row: Device | None, dtype: str, cores: float) -> float | None:
    if row is None:
        return PROCESSOR_FLOPS * cores
    if dtype == "fp32":
        return max(row.flops_per_s.get(kind, 0.0) for kind in ("fp32", "tf32")) or None
    return row.flops_per_s.get(dtype)


def _datasheet(seen: Seen, row: Device, peaks: Mapping[str, Any]) -> Iterator[Finding]:
    """The datasheet's rates that a record carries are those of the table."""
    given = {**(peaks.get("datasheet_flops_per_s") or {}), "memory": peaks.get("datasheet_bytes_per_s")}
    known = {**row.flops_per_s, "memory": row.memory_bytes_per_s}
    for kind, value in given.items():
        found, right = number(value), known.get(kind)
        if found and right and abs(found / right - 1) > 0.01:
            yield refused(
                "peaks",
                seen.where,
                f"the datasheet's {shown(kind)} rate is given as {found:.4g}/s, {row.name} has {right:.4g}/s",
            )
