"""One question of the static board as HTML: its bars, its table, its notes. Pure: records → text.

Every text of a record passes through `clean`. A cell carries what the script needs to sort and to rank: the value, the rank
by this metric, and why there is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from effbench.analysis.origins import NO_ORIGINS, Origins
from effbench.analysis.rank import (
    Ranked,
    find,
    is_host_bound,
    is_screening,
    question,
    rank_all,
    rankable,
    ratio_verdict,
    spec_fields,
)
from effbench.analysis.table import (
    ARROWS,
    HEADLINE,
    MARKS,
    column_names,
    describe,
    difference_labels,
    explain,
    heading,
    interval,
    notes,
    read_setting,
    scale,
)
from effbench.metrics import METRICS, PAPER_SIX, metric
from effbench.rows import storable
from effbench.schema import CaseRecord, MetricValue
from effbench.stats import Verdict

MAX_BARS = 30
MAX_FOREIGN = 8  # columns of metrics that the table does not know
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_CLASSES: Mapping[Verdict, str] = {"better": "better", "worse": "worse", "no difference shown": "none"}
Ranks = Mapping[str, Sequence[Ranked]]  # by metric
Scales = Mapping[str, tuple[float, str]]  # by metric: factor and unit


@dataclass(frozen=True, kw_only=True)
class Section:
    """One question: what it is about, the metrics that some row of it is ranked by, and its HTML."""

    workload: str
    hardware: str
    model: str
    ranked_by: tuple[str, ...]
    html: str


def plain(text: object, longest: int = 120) -> str:
    """Any text on one line, without control characters and lone surrogates, cut at `longest`. Not yet fit for HTML."""
    found = _CONTROL.sub(" ", str(storable(str(text)))).strip()
    return found if len(found) <= longest else f"{found[: longest - 1]}…"


def clean(text: object, longest: int = 120) -> str:
    """`plain` as HTML, in a text or in a quoted attribute."""
    return escape(plain(text, longest), quote=True)


def element(tag: str, inside: str, **attributes: object) -> str:
    """`<tag attributes>inside</tag>`; attribute values are cleaned, `inside` is HTML already. `aria_label` is aria-label."""
    own = "".join(f' {name.rstrip("_").replace("_", "-")}="{clean(value, 2_000)}"' for name, value in attributes.items())
    return f"<{tag}{own}>{inside}</{tag}>"


def isolated(text: object, longest: int = 120) -> str:
    """A record's text as HTML that changes neither markup nor the direction of what stands around it."""
    return f"<bdi>{clean(text, longest)}</bdi>"


def settings_of(firsts: Iterable[CaseRecord]) -> dict[str, str]:
    """For one row of each question, by question: the settings that tell it from others of its model, work and machine."""
    found: dict[tuple[str, str], dict[str, dict[str, Mapping[str, object]]]] = {}
    for row in firsts:
        if (asked := read_setting(row.spec)) is not None:
            found.setdefault((row.workload, row.hardware), {}).setdefault(row.model, {})[question(row)] = asked
    return {asked: label for settings in found.values() for asked, label in difference_labels(settings).items()}


def section_of(
    name: str,
    rows: Sequence[CaseRecord],
    everything: Sequence[CaseRecord],
    asked: str,
    colours: Mapping[str, str],
    origins: Origins = NO_ORIGINS,
) -> Section:
    """The section of `rows`, those that are shown of `everything` that one question has; `name` is its id in the page.

    `asked` are the settings that tell the question from others (`settings_of`)."""
    first = rows[0]
    names = metric_columns(rows)
    ranks = rank_all(rows, dict.fromkeys([HEADLINE, *(n for n in names if rankable(metric(n)))]))
    ranked_by = tuple(n for n, found in ranks.items() if found[0].rank is not None)
    scales = {n: scale([v.value for row in rows if (v := find(row, n))], _unit(rows, n)) for n in names}
    about = " · ".join(filter(None, (first.model, asked)))
    title = f"{first.workload} on {first.hardware}"
    parts = [
        element("h2", isolated(title), id=name),
        element("h3", isolated(about, 300)),
        element("p", isolated(_parameters(first), 600), class_="soft"),
        *(_bars(name, ranks[n], n, scales[n], colours) for n in ranked_by),
        _table(name, f"{plain(title)}, {plain(about)}", rows, everything, scales, ranks, origins),
    ]
    remarks = "".join(f"<li>{clean(note, 600)}</li>" for note in notes(rows, names))
    if remarks:
        summary = "<summary>What is missing (–) or flagged (*), and why</summary>"
        parts.append(element("details", f"{summary}<ul>{remarks}</ul>", class_="notes"))
    workload, hardware, model = plain(first.workload), plain(first.hardware), plain(first.model)
    where = {"data_workload": workload, "data_hardware": hardware, "data_model": model}
    section = element("section", "".join(parts), class_="question", aria_labelledby=name, **where)
    return Section(workload=workload, hardware=hardware, model=model, ranked_by=ranked_by, html=section)


def metric_columns(rows: Sequence[CaseRecord]) -> list[str]:
    """The metrics of a question's table: the workload's own, the paper's six and a few of plugins, where any row has a value."""
    present = {value.name for row in rows for value in row.metrics if value.value is not None}
    foreign = sorted(name for name in present if name.partition(".")[0] not in METRICS)[:MAX_FOREIGN]
    return [name for name in dict.fromkeys([*column_names(rows[0].workload), *PAPER_SIX, *foreign]) if name in present]


def _unit(rows: Sequence[CaseRecord], name: str) -> str:
    return next(value.unit for row in rows if (value := find(row, name)))


def _parameters(row: CaseRecord) -> str:
    """What was asked: the workload's parameters and what else belongs to the question."""
    spec = spec_fields(row.spec) or {}
    try:
        asked = {**spec["params"], **{key: spec.get(key) for key in ("text", "seed", "threads")}}
        asked["weights"] = spec["model"].get("weights")
    except (KeyError, TypeError, AttributeError):
        return "The specification of these rows cannot be read."
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in asked.items() if value is not None)


def _bars(section: str, ranked: Sequence[Ranked], name: str, scaled: tuple[float, str], colours: Mapping[str, str]) -> str:
    """The ranking as bars, best first. The list reads as text; its drawing is for the eye alone."""
    rows = [row for row in ranked if row.rank is not None]
    most = max(abs(row.value.upper or row.value.value or 0.0) for row in rows if row.value) or 1.0
    lines = []
    for row in rows[:MAX_BARS]:
        assert row.value is not None, "a ranked row has a value"
        value = row.value
        number = f"{interval(value, scaled[0])} {scaled[1]}"
        said = f'{isolated(row.record.label, 60)}<span class="unseen">, rank {_place(row)},</span>'
        drawn = _drawing(value, most, colours.get(row.record.label, "#8C8C8C"), screening=is_screening(row.record))
        text = element("span", clean(f"{number} · {_place(row)}"), class_="number")
        lines.append(element("li", f"<span>{said}</span>{drawn}{text}", data_row=_row_id(section, row.record)))
    cut = f" The first {MAX_BARS} of {len(rows)} rows." if len(rows) > MAX_BARS else ""
    by = metric(name)
    caption = f"{heading(name, scaled[1])}, {ARROWS[by.better]}. Line: 95 % interval over blocks.{cut}"
    inside = f"<figcaption>{clean(caption, 300)}</figcaption><ol class='bars'>{''.join(lines)}</ol>"
    shown = {} if name == HEADLINE else {"hidden": ""}
    return element("figure", inside, data_by=name, **shown)


def _drawing(value: MetricValue, most: float, colour: str, *, screening: bool) -> str:
    def share(number: float | None) -> str:
        return f"{min(max((number or 0.0) / most, 0.0), 1.0) * 98:.2f}%"

    width, low, high = share(value.value), share(value.lower), share(value.upper)
    hatch = f'<rect width="{width}" height="100%" fill="url(#hatch)"/>' if screening else ""
    line = f'<line class="whisker" x1="{low}" x2="{high}" y1="50%" y2="50%"/>'
    bar = f'<rect width="{width}" height="100%" fill="{clean(colour)}"/>'
    return f'<svg aria-hidden="true" focusable="false">{bar}{hatch}{line}</svg>'


def _table(
    section: str,
    title: str,
    rows: Sequence[CaseRecord],
    everything: Sequence[CaseRecord],
    scales: Scales,
    ranks: Ranks,
    origins: Origins,
) -> str:
    """Ranked rows, and below them those that have no rank by the headline; the script moves rows when another metric ranks."""
    num_left = len(everything) - len(rows)
    left = f" {num_left} more rows are left out of this page." if num_left else ""
    by = element("span", clean(metric(HEADLINE).title), class_="by")
    caption = f"{clean(title, 400)}. Ranked by {by}. {left}"
    heads = [_head("techniques", "Techniques"), _head("rank", "Rank"), _head("baseline", "Baseline")]
    heads += [_head(name, heading(name, unit), describe(metric(name))) for name, (_, unit) in scales.items()]
    heads += [
        _head("protocol", "Protocol"),
        '<th scope="col">Why no rank</th>',
        _head("started", "Started"),
        _head("run", "Run"),
    ]
    places = {name: {row.record.run_id: row for row in found} for name, found in ranks.items()}
    baselines = {row.case_id: row.label for row in everything}
    bodies: dict[bool, list[str]] = {True: [], False: []}
    for one in ranks[HEADLINE]:
        cells = {name: places.get(name, {}).get(one.record.run_id) for name in scales}
        bodies[one.rank is not None].append(_row(section, one, baselines, scales, cells, origins))
    divider = f'<tr class="divider"><th scope="rowgroup" colspan="{len(heads)}">Not ranked by {by}</th></tr>'
    apart = element("tbody", divider + "".join(bodies[False]), class_="apart", **({} if bodies[False] else {"hidden": ""}))
    head = f"<caption>{caption}</caption><thead><tr>{''.join(heads)}</tr></thead>"
    table = element("table", f"{head}<tbody>{''.join(bodies[True])}</tbody>{apart}")
    return element("div", table, class_="scroll", tabindex="0", role="region", aria_label=f"Table: {title}")


def _head(column: str, text: str, help_text: str = "") -> str:
    button = element("button", clean(text), type="button", **({"title": help_text} if help_text else {}))
    return element("th", button, scope="col", data_column=column)


def _row(
    section: str,
    one: Ranked,
    baselines: Mapping[str, str],
    scales: Scales,
    cells: Mapping[str, Ranked | None],
    origins: Origins,
) -> str:
    row = one.record
    base = baselines.get(row.baseline_case_id or "", (row.baseline_case_id or "–")[:8])
    blocks = max((value.n for value in row.metrics), default=0)
    protocol = f"{row.protocol}{' · screening' if is_screening(row) else ''}, n = {blocks}"
    why = explain(one.reason) if one.reason else ""
    status = explain(row.reason or row.status) if row.status != "ok" else "this metric was not taken"
    searched = " ".join((row.label, row.model, row.hardware, row.workload, row.protocol, row.status, row.suite, row.run_id))
    parts = [
        element("th", isolated(row.label) + _level(row, origins), scope="row", data_column="techniques", **_title(row.label)),
        element("td", _place(one), class_="rank"),
        element("td", isolated(base, 60), data_column="baseline"),
        *(_cell(row, find(row, name), factor, cells[name], name) for name, (factor, _) in scales.items()),
        element("td", clean(protocol), data_column="protocol"),
        element("td", isolated(why, 400), class_="why"),
        element("td", clean(row.started_at[:10]), data_column="started"),
        element("td", isolated(row.run_id[:12]), data_column="run", title=row.run_id),
    ]
    about = {"data_row": _row_id(section, row), "data_text": plain(searched, 1_000).lower(), "data_status": plain(status, 400)}
    return element("tr", "".join(parts), **about)


def _cell(row: CaseRecord, value: MetricValue | None, factor: float, ranked: Ranked | None, name: str) -> str:
    """The value with its interval, and below it the ratio to the baseline with the verdict; – where it is missing."""
    known: dict[str, str] = {"class_": "number", "data_metric": name}
    if ranked is not None and ranked.rank is not None:
        known["data_rank"] = _place(ranked)
    elif ranked is not None:
        known["data_why"] = explain(ranked.reason)
    if value is None or value.value is None:
        reasons = " ".join(explain(reason) for reason in value.reasons) if value else "not taken"
        return element("td", '<span aria-hidden="true">–</span><span class="unseen">missing</span>', title=reasons, **known)
    text = clean(interval(value, factor) + ("*" if value.reasons else ""))
    if value.ratio is not None:
        said = ratio_verdict(row, value, host_bound=is_host_bound(row))
        verdict = f' <span aria-hidden="true">{MARKS[said]}</span><span class="unseen">{said}</span>' if said else ""
        text += f"<br>{element('span', f'×{value.ratio:.2f}{verdict}', class_=_CLASSES[said] if said else 'none')}"
    return element("td", text, data_value=repr(value.value), **known)


def _level(row: CaseRecord, origins: Origins) -> str:
    """The mark of a row of another hand."""
    mark = origins.mark(row.run_id)
    return f" {element('abbr', clean(mark), title=origins.level(row.run_id))}" if mark else ""


def _place(ranked: Ranked) -> str:
    return "–" if ranked.rank is None else f"{ranked.rank}{'=' if ranked.shared else ''}"


def _row_id(section: str, row: CaseRecord) -> str:
    return f"{section}-{row.run_id[:32]}"


def _title(text: str) -> dict[str, str]:
    """The whole of a text that is cut in its cell."""
    return {"title": text} if len(text) > 120 else {}
