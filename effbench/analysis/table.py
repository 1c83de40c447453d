"""Rows as a table for people and as one JSON document for programs.

    rows ── latest ── rank ──┬── leaderboard, document     what `show --json` prints
                             └── rich_tables               what `show` prints: one table a machine and workload

A cell is the value with the half-width of its interval (or the interval where it is lopsided), and below it the ratio to
the row's baseline with the verdict. A value that is not there is –, and each reason is explained once below the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from effbench.analysis.origins import NO_ORIGINS, Origins
from effbench.analysis.rank import (
    Ranked,
    find,
    is_host_bound,
    is_screening,
    latest,
    question,
    rank,
    rank_all,
    rankable,
    ratio_verdict,
    spec_fields,
)
from effbench.metrics import METRICS, PAPER_SIX, Metric, metric
from effbench.reasons import REASONS
from effbench.schema import SCHEMA_VERSION, CaseRecord, MetricValue
from effbench.stats import SCREENING_FLOOR, Verdict

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

Columns = Literal["default", "paper", "all", "costs"]
HEADLINE = "tokens_per_s"  # what the terminal ranks by
_COMMON = ("device_memory_peak_bytes", "host_memory_peak_bytes", "energy_j_per_token", "quality")
DEFAULT_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "pretrain": (HEADLINE, "step_p50_s", "mfu", *_COMMON, "bits_per_byte"),
    "finetune": (HEADLINE, "step_p50_s", "params_trainable", *_COMMON),
    "generate": (HEADLINE, "ttft_s", "tpot_s", "kv_cache_bytes_per_token", *_COMMON),
    "moe_layer": (HEADLINE, "step_p50_s", "mfu", "bandwidth_share", *_COMMON),
}
ANY_WORKLOAD = (HEADLINE, "step_p50_s", *_COMMON)
COST_COLUMNS = (  # each measured figure and the analytic one it is held against
    "kv_cache_bytes_per_token", "expected_kv_cache_bytes_per_token", "decode_flops", "expected_decode_flops",
    "tpot_s", "expected_decode_bytes",
)  # fmt: skip
CASE_COLUMNS = (  # what a table reads of a row, for `Store.cases(columns=...)`
    "case_id", "env_id", "status", "reason", "suite", "workload", "model", "techniques", "baseline_case_id", "hardware",
    "protocol", "started_at", "spec", "metrics",
)  # fmt: skip
ARROWS = {"lower": "lower is better", "higher": "higher is better", "none": "no direction"}
MARKS: Mapping[Verdict, str] = {"better": "▲", "worse": "▼", "no difference shown": "≈"}
_COLOURS: Mapping[Verdict, str] = {"better": "green", "worse": "red", "no difference shown": "dim"}
_PREFIXES = {-12: "p", -9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T"}
_BASE_UNITS = {"s": 1.0, "B": 1.0, "GB": 1e9, "J": 1.0, "W": 1.0, "Wh": 1.0}  # those that take a prefix
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def column_names(workload: str, columns: Columns = "default") -> tuple[str, ...]:
    """The metrics of a workload's table."""
    if columns == "all":
        return tuple(METRICS)
    chosen = {"paper": PAPER_SIX, "costs": COST_COLUMNS}
    return chosen.get(columns) or DEFAULT_COLUMNS.get(workload, ANY_WORKLOAD)


def metrics_read(columns: Columns = "default") -> frozenset[str] | None:
    """The metrics that any table of these columns needs, for `Store.cases(metrics=...)`; None is all."""
    if columns == "all":
        return None
    return frozenset({HEADLINE, "gpu_idle_share"}).union(*(column_names(w, columns) for w in (*DEFAULT_COLUMNS, "")))


def document(
    cases: Iterable[CaseRecord], metrics: Sequence[str] | None = None, origins: Origins = NO_ORIGINS
) -> dict[str, Any]:
    """One JSON document: `schema_version`, `hidden` (rows that a later one replaced) and `rows` as `leaderboard` gives them,
    each with its `level`."""
    kept, replaced = latest(cases, origins.bundles)
    rows = [row | {"level": origins.level(row["run_id"])} for row in leaderboard(kept, metrics)]
    return {"schema_version": SCHEMA_VERSION, "hidden": len(replaced), "rows": rows}


def leaderboard(cases: Iterable[CaseRecord], metrics: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """One JSON object a row, best tokens/s first: the row's own columns, `screening`, `host_bound`, `question` (rows with
    equal text can be compared) and `metrics`: by name an object of value, lower, upper, n, unit, ratio, ratio_lower,
    ratio_upper, source, valid, reasons as the row has them, `verdict` on the ratio, and `rank` among the rows of its question.

    Numbers are in `unit` and what is missing is null; `rank` is null where `unranked` says why. `metrics` chooses some.
    """
    cases = list(cases)
    names = list(metrics or dict.fromkeys(value.name for case in cases for value in case.metrics))
    ranks = rank_all(cases, {HEADLINE, *(name for name in names if rankable(metric(name)))})
    places = {name: {r.record.run_id: r for r in rows} for name, rows in ranks.items()}
    rows = []
    for case in (ranked.record for ranked in ranks[HEADLINE]):
        bound = is_host_bound(case)
        own = {k: v for k, v in vars(case).items() if k not in ("spec", "provenance", "metrics")}
        about = {"screening": is_screening(case), "host_bound": bound, "question": question(case)}
        found = {value.name: value for value in case.metrics}
        values = {
            name: {
                **{k: v for k, v in vars(found[name]).items() if k != "name"},
                "verdict": ratio_verdict(case, found[name], host_bound=bound),
                "rank": places[name][case.run_id].rank if name in places else None,
                "unranked": places[name][case.run_id].reason if name in places else "no_direction",
            }
            for name in names
            if name in found
        }
        rows.append({**own, **about, "metrics": values})
    return rows


def rich_tables(
    cases: Iterable[CaseRecord], columns: Columns = "default", limit: int | None = 100, origins: Origins = NO_ORIGINS
) -> list[RenderableType]:
    """Tables for a terminal, one a machine and workload, each followed by its notes.

    `limit` is about how many rows all tables together show; those left out are counted."""
    kept, replaced = latest(cases, origins.bundles)
    groups: dict[tuple[str, str], list[CaseRecord]] = {}
    for case in sorted(kept, key=lambda c: (c.hardware, c.workload)):
        groups.setdefault((case.hardware, case.workload), []).append(case)
    found: list[RenderableType] = []
    for (hardware, workload), rows in groups.items():
        share = None if limit is None else max(limit // len(groups), 10)
        foreign = [value.name for row in rows for value in row.metrics if columns == "all"]
        wanted = tuple(dict.fromkeys([*column_names(workload, columns), *foreign]))
        if columns == "costs" and workload != "generate":
            continue  # nothing of the sort is measured there
        found += _one_table(f"{workload} on {hardware}", rows, wanted, share, origins)
    if replaced:
        found.append(f"{len(replaced)} rows are hidden: a later row of the same case on the same machine replaced them.")
    return found


def _one_table(
    title: str, rows: list[CaseRecord], wanted: Sequence[str], limit: int | None, origins: Origins
) -> list[RenderableType]:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    names = [n for n in wanted if any((v := find(r, n)) and v.value is not None for r in rows)]
    present = {name: [v for r in rows if (v := find(r, name))] for name in names}
    scales = {name: scale([v.value for v in found], found[0].unit) for name, found in present.items()}
    ranked = sorted(rank(rows, HEADLINE), key=lambda r: (r.record.model, question(r.record)))
    labels, baselines = settings_labels(rows), {row.case_id: row.label for row in rows}
    by = f"{title}, ranked by {metric(HEADLINE).title}"
    table = Table(title=Text(by, "bold"), title_justify="left", box=box.HORIZONTALS, pad_edge=False)
    for text in ("model", "#", "techniques", "status"):
        table.add_column(text, min_width=max(len(r.model) for r in rows) if text == "model" else None)
    in_columns = len(names) <= len(PAPER_SIX)  # more do not fit: they stand below each other
    for text in [heading(name, scales[name][1]) for name in names] if in_columns else ["metrics"]:
        table.add_column(Text(text), justify="right" if in_columns else "left")
    for (model, asked), members in groupby(ranked[:limit], key=lambda r: (r.record.model, question(r.record))):
        table.add_section()
        first = Text("\n".join(filter(None, (model, labels.get(asked, "")))))
        for one in members:
            between = "\n" if in_columns else "  "
            cells = [_cell(one.record, find(one.record, name), scales[name][0], between) for name in names]
            if not in_columns:
                lines = [Text(f"{heading(n, scales[n][1])}: ").append_text(c) for n, c in zip(names, cells, strict=True) if c]
                cells = [Text("\n").join(lines)]
            table.add_row(first, _place(one), _stack(one.record, baselines, origins), _status(one), *cells)
            first = Text()
    remarks = [*_legend(rows), *origins.notes(row.run_id for row in rows), *notes(rows, wanted)]
    if limit is not None and len(ranked) > limit:
        left_out = len(ranked) - limit
        remarks.append(f"{left_out} more rows are hidden. Narrow with --workload, --model or --technique; --json prints all.")
    return [table, *(Text(note) for note in remarks), ""]


def _place(ranked: Ranked) -> Text:
    from rich.text import Text

    return Text("–" if ranked.rank is None else f"{ranked.rank}{'=' if ranked.shared else ''}")


def _stack(case: CaseRecord, baselines: Mapping[str, str], origins: Origins) -> Text:
    from rich.text import Text

    text = Text(f"{case.label} {origins.mark(case.run_id)}".rstrip())
    if case.baseline_case_id:
        text.append(f"\nvs {baselines.get(case.baseline_case_id, case.baseline_case_id[:8])}", "dim")
    return text


def _status(ranked: Ranked) -> Text:
    from rich.text import Text

    case, value = ranked.record, ranked.value
    if case.status != "ok":
        return Text(case.status, "yellow" if case.status == "skipped" else "red")
    text = Text("ok")
    if ranked.reason:
        return text.append(f"\n{ranked.reason}", "yellow")
    return text.append(f"\n{case.protocol} n={value.n if value else 0}", "dim")


def _cell(case: CaseRecord, value: MetricValue | None, factor: float, between: str = "\n") -> Text:
    from rich.text import Text

    if value is None or value.value is None:
        return Text("–" if case.status == "ok" else "", "dim")
    text = Text(interval(value, factor) + ("*" if value.reasons else ""))
    if value.ratio is not None:
        said = ratio_verdict(case, value, host_bound=is_host_bound(case))
        text.append(f"{between}×{value.ratio:.2f} {MARKS[said] if said else ' '}", _COLOURS[said] if said else "dim")
    return text


def _legend(rows: Sequence[CaseRecord]) -> Iterable[str]:
    if any(row.baseline_case_id and row.status == "ok" for row in rows):
        yield f"×: ratio to the baseline; {', '.join(f'{mark} {said}' for said, mark in MARKS.items())}. =: rank is shared."
    if any(is_screening(row) for row in rows):
        yield f"quick and smoke rows are screening: no difference below {100 * SCREENING_FLOOR:.0f} % is claimed."


def notes(rows: Sequence[CaseRecord], names: Sequence[str]) -> Iterable[str]:
    """What a table of these metrics must say below it: why values are missing (–) or flagged (*), and what failed."""
    explained: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for value in row.metrics if row.status == "ok" else ():
            for reason in value.reasons if value.name in names else ():
                if value.value is not None or reason != "not_this_workload":
                    explained.setdefault(("–" if value.value is None else "*", reason), []).append(metric(value.name).title)
    for (mark, reason), titles in explained.items():
        yield f"{mark} {', '.join(dict.fromkeys(titles))}: {explain(reason)}."
    unfinished: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.status != "ok":
            unfinished.setdefault((row.status, row.label, row.reason), []).append(row.model)
    for (status, stack, reason), models in unfinished.items():
        yield f"{status}: {stack} on {', '.join(dict.fromkeys(models))}: {explain(reason or 'no reason given')}"


def explain(reason: str) -> str:
    """A reason code in words, or the code where no table knows it."""
    known = REASONS.get(reason)
    return f"{known} ({reason})" if known else reason


def settings_labels(rows: Iterable[CaseRecord]) -> dict[str, str]:
    """For each question of these rows, the settings by which it differs from the others of its model.

    A question whose specs are of another hand has none."""
    settings: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        asked = question(row)
        known = settings.setdefault(row.model, {})
        if asked not in known and (found := read_setting(row.spec)) is not None:
            known[asked] = found
    return difference_labels(settings)


def read_setting(spec: str) -> dict[str, Any] | None:
    """`setting` of a stored spec; None where it is one of another hand."""
    fields = spec_fields(spec)
    try:
        return None if fields is None else setting(fields)
    except (TypeError, AttributeError):
        return None


def setting(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a spec that a setting is described by."""
    kept = {key: value for key, value in spec.items() if key in ("seed", "threads", "text_digest")}
    return {**spec.get("params", {}), **kept, "weights": spec.get("model", {}).get("weights")}


def difference_labels(settings: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, str]:
    """model → question → setting; for each question what of its setting differs from the other questions of its model."""
    labels = {}
    for questions in settings.values():
        keys = dict.fromkeys(key for found in questions.values() for key in found)
        differing = [key for key in keys if len({str(found.get(key)) for found in questions.values()}) > 1]
        for asked, found in questions.items():
            labels[asked] = " ".join(f"{key}={str(found.get(key))[:12]}" for key in differing)
    return labels


def heading(name: str, unit: str) -> str:
    """The title of a column with the unit it is shown in."""
    title = metric(name).title
    return unit if title.lower() in unit.lower() else f"{title} ({unit})" if unit else title


def describe(row: Metric) -> str:
    """Help of a column: formula, source and direction."""
    return f"{row.formula}. Source: {row.source}. {ARROWS[row.better].capitalize()}."


def scale(values: Iterable[float | None], unit: str) -> tuple[float, str]:
    """Factor and unit that make these values easy to read: 0.0414 s → (1000, "ms"). A ratio stays as it is."""
    sizes = [abs(v) for v in values if v]
    if unit in ("ratio", "×", "") or not sizes:
        return 1.0, "" if unit == "ratio" else unit
    head, slash, tail = unit.partition("/")
    own = _BASE_UNITS.get(head, 1.0)
    exponent = 3 * math.floor(math.log10(median(sizes) * own) / 3 + 1e-9)
    exponent = min(max(exponent, -12), 0 if head == "s" else 12)
    if head in _BASE_UNITS:
        return own * 10.0**-exponent, f"{_PREFIXES[exponent]}{'B' if head == 'GB' else head}{slash}{tail}"
    if exponent == 0:
        return 1.0, "" if unit == "count" else unit
    number = _PREFIXES[exponent] if exponent > 0 else f"10{str(exponent).translate(_SUPERSCRIPT)}"
    return 10.0**-exponent, number if unit == "count" else f"{number} {unit}"


def interval(value: MetricValue, factor: float = 1.0) -> str:
    """A value with its interval as text, as `interval_text` writes it."""
    assert value.value is not None
    return interval_text(value.value * factor, *(None if end is None else end * factor for end in (value.lower, value.upper)))


def interval_text(middle: float, low: float | None = None, high: float | None = None) -> str:
    """'41.4 ±0.8', or '41.4 (30.1–57.0)' where the interval is lopsided: three digits, or four for a narrower interval."""
    decimals = max(2 - math.floor(math.log10(abs(middle)) + 1e-9), 0) if middle else 2
    if low is None or high is None or low == high or math.isnan(low + high):
        return f"{middle:.{decimals}f}"
    half = (high - low) / 2
    if half < 0.5 * 10.0**-decimals:
        decimals += 1
    if abs(high + low - 2 * middle) > 0.2 * half:
        return f"{middle:.{decimals}f} ({low:.{decimals}f}–{high:.{decimals}f})"
    least = 10.0**-decimals
    return f"{middle:.{decimals}f} ±" + (f"<{least:.{decimals}f}" if half < least / 2 else f"{half:.{decimals}f}")
