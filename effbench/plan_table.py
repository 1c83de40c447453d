"""What a suite would do, as a table for a terminal: one line a case, with its expected memory and what the cost model says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def plan_table(suite: str, cases: Sequence[Mapping[str, Any]], device_name: str, memory: str) -> Table:
    """The cases as `planning.describe` gives them; `memory` is in words what the device has."""
    kinds = {"KV kB/token": ("kv_cache_bytes_per_token", 1e3), "read kB/decode": ("cache_read_bytes_per_token", 1e3),
             "mixer MFLOP/token": ("mixer_flops_per_token", 1e6)}  # fmt: skip
    fits = {"yes": "", "tight": " (tight)", "no": " (too large)", "unknown": " (of unknown)"}
    if any((e := case["expected"]) and e["ffn_active_weights"] != e["ffn_weights"] for case in cases):
        kinds |= {"FFN MFLOP/token": ("ffn_flops_per_token", 1e6), "FFN M weights": ("ffn_weights", 1e6),
                  "of them active": ("ffn_active_weights", 1e6), "FFN MB/decode": ("ffn_read_bytes_per_step", 1e6)}  # fmt: skip
    about = (
        f"Memory: expected peak of tensors, of {device_name} with {memory}. Cache and FLOPs "
        "are analytic, per sequence; FFN: all layers, bytes of a step of the whole batch, routing even."
    )
    table = Table(
        "case", "compared with", "blocks", "memory GB", *kinds, "note", title=f"{suite}: {len(cases)} cases", caption=about
    )
    for case in cases:
        expected = case["expected"] or {}
        sizes = ((expected.get(key), by) for key, by in kinds.values())
        shown = ["–" if v is None else f"{v / by:.4g}" for v, by in sizes]
        new = f"{case['new_weights']}: starts from new weights" if case["new_weights"] else ""
        needed = case["memory"]
        size = "–" if needed is None else f"{needed['peak_bytes'] / 1e9:.3g}{fits[needed['fits']]}"
        table.add_row(case["name"], case["baseline"] or "–", str(case["blocks"]), size, *shown, case["skip_reason"] or new)
    return table
