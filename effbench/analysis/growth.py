"""How decode cost grows with the context, measured beside what the formulas say.

Rows of one stack that differ in nothing but the length of the prompt, shortest against longest: the ratio of their TPOT, and
the ratios of the FLOPs and of the bytes that a decode step should need. The measured ratio is of two cases, not of pairs
within blocks, so its interval adds both; the whole model decodes, so weights that are read for every token damp it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from effbench.analysis.rank import find, latest, spec_fields
from effbench.schema import CaseRecord, MetricValue

if TYPE_CHECKING:
    from rich.console import RenderableType

EXPECTED = ("expected_decode_bytes", "expected_decode_flops")


@dataclass(frozen=True, kw_only=True)
class Growth:
    """One stack from its shortest to its longest prompt; ratios long / short. None: a side has no value."""

    hardware: str
    model: str
    label: str
    short_tokens: int
    long_tokens: int
    tpot_ratio: float | None
    tpot_ratio_lower: float | None
    tpot_ratio_upper: float | None
    bytes_ratio: float | None
    flops_ratio: float | None


def growths(cases: Iterable[CaseRecord]) -> list[Growth]:
    """Every stack that was measured at two prompt lengths or more."""
    groups: dict[str, dict[int, CaseRecord]] = {}
    for case in latest(cases)[0]:
        spec = spec_fields(case.spec) or {}
        params = spec.get("params")
        length = params.pop("prompt_tokens", None) if isinstance(params, dict) else None
        if case.status == "ok" and length:
            same = json.dumps([case.hardware, case.protocol, spec], sort_keys=True)
            groups.setdefault(same, {})[length] = case
    found = [_growth(min(rows), max(rows), rows) for rows in groups.values() if len(rows) > 1]
    return sorted(found, key=lambda g: (g.hardware, g.model, g.tpot_ratio or math.inf))


def tables(cases: Iterable[CaseRecord]) -> list[RenderableType]:
    """The growths as a table for a terminal; nothing where there are none."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    found = growths(cases)
    if not found:
        return []
    table = Table(
        "model", "techniques", "prompt", "TPOT measured", "bytes expected", "FLOPs expected",
        title=Text("Growth of a decode step from the shortest to the longest prompt", "bold"),
        title_justify="left", box=box.HORIZONTALS, pad_edge=False,
    )  # fmt: skip
    for row in found:
        between = "" if row.tpot_ratio_lower is None else f" ({row.tpot_ratio_lower:.2f}–{row.tpot_ratio_upper:.2f})"
        shown = ["–" if v is None else f"×{v:.2f}" for v in (row.tpot_ratio, row.bytes_ratio, row.flops_ratio)]
        lengths = f"{row.short_tokens} → {row.long_tokens}"
        table.add_row(row.model, Text(row.label), lengths, shown[0] + between, *shown[1:])
    return [
        table,
        Text("Bytes are what must be read if each weight and cached element is read once; on a CPU the calls count too."),
    ]


def _growth(short: int, long: int, rows: dict[int, CaseRecord]) -> Growth:
    one, two = rows[short], rows[long]
    tpot = _ratio(find(one, "tpot_s"), find(two, "tpot_s"))
    moved, flops = (_ratio(find(one, name), find(two, name))[0] for name in EXPECTED)
    return Growth(
        hardware=one.hardware, model=one.model, label=one.label, short_tokens=short, long_tokens=long,
        tpot_ratio=tpot[0], tpot_ratio_lower=tpot[1], tpot_ratio_upper=tpot[2], bytes_ratio=moved, flops_ratio=flops,
    )  # fmt: skip


def _ratio(one: MetricValue | None, two: MetricValue | None) -> tuple[float | None, float | None, float | None]:
    """two / one with the interval of independent values, on the log scale."""
    if one is None or two is None or not one.value or not two.value:
        return None, None, None
    ratio = two.value / one.value
    bounds = (one.lower, one.upper, two.lower, two.upper)
    if any(b is None or b <= 0 for b in bounds):
        return ratio, None, None
    widths = [math.log(v.upper / v.lower) / 2 for v in (one, two)]  # type: ignore[operator]  # None is excluded above
    reach = math.exp(math.hypot(*widths))
    return ratio, ratio / reach, ratio * reach
