"""The board as one HTML file: no server, no network, no library; it opens from a disk and can be sent by mail.

    records ── latest ── one section a question, at most MAX_ROWS rows ── tables and bars as HTML ──▶ board.html

The tables and bars are in the page before any script runs; `static_board/board.js` filters and sorts them and keeps what was
chosen in the URL's hash. A record's text reaches the page only through `clean`, never the script, and the page's
Content-Security-Policy lets no other script or style run. `static_tables.py` makes the sections.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from effbench import __version__
from effbench.analysis.origins import NO_ORIGINS, Origins
from effbench.analysis.rank import find, is_host_bound, latest, question, why_unranked
from effbench.analysis.table import ARROWS, HEADLINE
from effbench.errors import StoreError
from effbench.metrics import metric, table_order
from effbench.schema import CaseRecord
from effbench.stats import SCREENING_FLOOR
from leaderboard_app.figures import style
from leaderboard_app.static_tables import Section, clean, element, isolated, section_of, settings_of

MAX_ROWS = 1_000
MAX_MACHINES = 50  # lines of the table of provenance
HATCH = (  # what screening bars are drawn over with; one of it serves the page
    '<svg width="0" height="0" aria-hidden="true" focusable="false"><pattern id="hatch" width="6" height="6" '
    'patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="2" height="6" fill="#fff" fill-opacity="0.55"/>'
    "</pattern></svg>"
)
FILES = Path(__file__).parent / "static_board"


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a page holds: rows shown, rows left out by the limit, rows that a later one replaced, and its size."""

    rows: int
    left_out: int
    replaced: int
    num_bytes: int


def write_html(
    records: Iterable[CaseRecord],
    path: Path,
    *,
    sources: Sequence[str] = (),
    warnings: Sequence[str] = (),
    max_rows: int = MAX_ROWS,
    now: datetime | None = None,
    origins: Origins = NO_ORIGINS,
) -> Written:
    """Write the board of `records` to `path`. `sources` are the folders that they came from, `warnings` sentences
    about what could not be read; rows that `origins` names are marked as of another hand.

    Raises StoreError where the file cannot be written."""
    kept, replaced = latest(records, origins.bundles)
    questions = _questions(kept)
    chosen = within(questions, max_rows)
    shown = sum(len(rows) for rows in chosen.values())
    page = html(questions, chosen, len(replaced), sources, warnings, now or datetime.now(UTC), origins).encode()
    try:
        path.write_bytes(page)
    except OSError as fault:
        raise StoreError(f"{path} cannot be written: {fault.strerror or fault}.") from None
    return Written(rows=shown, left_out=len(kept) - shown, replaced=len(replaced), num_bytes=len(page))


Questions = Mapping[str, Sequence[CaseRecord]]


def _questions(records: Iterable[CaseRecord]) -> Questions:
    """The rows of each question, the best by the headline first, what cannot be ranked last; questions by what they are about."""
    found: dict[str, list[CaseRecord]] = {}
    for record in sorted(records, key=lambda r: (r.workload, r.hardware, r.model)):
        found.setdefault(question(record), []).append(record)
    sign = -1.0 if metric(HEADLINE).better == "higher" else 1.0

    def best_first(record: CaseRecord) -> tuple[bool, float]:
        value = find(record, HEADLINE)
        reason = why_unranked(record, value, host_bound=is_host_bound(record))
        return bool(reason), sign * (value.value if value and value.value is not None else 0.0)

    return {asked: sorted(rows, key=best_first) for asked, rows in found.items()}


def within(questions: Questions, max_rows: int) -> Questions:
    """At most `max_rows` rows of all questions: as many of each as fit evenly, so that a large one does not push out a small."""
    few, many = 1, max((len(rows) for rows in questions.values()), default=1)
    while few < many:
        share = (few + many + 1) // 2
        fits = sum(min(len(rows), share) for rows in questions.values()) <= max_rows
        few, many = (share, many) if fits else (few, share - 1)
    return {asked: rows[:few] for asked, rows in list(questions.items())[:max_rows]}


def html(
    questions: Questions,
    chosen: Questions,
    replaced: int,
    sources: Sequence[str],
    warnings: Sequence[str],
    now: datetime,
    origins: Origins,
) -> str:
    """The page. `chosen` are the rows of `questions` that it shows."""
    colours = style.colours(record.label for rows in questions.values() for record in rows)
    settings = settings_of(rows[0] for rows in chosen.values())
    sections = [
        section_of(f"q{index}", rows, questions[asked], settings.get(asked, ""), colours, origins)
        for index, (asked, rows) in enumerate(chosen.items())
    ]
    css, script = ((FILES / name).read_text(encoding="utf-8") for name in ("board.css", "board.js"))
    assert "</style" not in css and "</script" not in script
    policy = (
        f"default-src 'none'; style-src '{_digest(css)}'; script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
    )
    shown = [record for rows in chosen.values() for record in rows]
    warnings = [*origins.notes(record.run_id for record in shown), *warnings]
    body = "".join(
        (
            '<a class="skip" href="#board">To the results</a>',
            HATCH,
            _header(shown, sections, sum(map(len, questions.values())), replaced, sources, warnings, now),
            _controls(sections),
            '<main id="board" tabindex="-1">',
            '<p id="nothing" hidden>No row passes these filters.</p>'
            if shown
            else "<p>There are no results to show. To make some: effbench run suites/quick.yaml</p>",
            *(section.html for section in sections),
            "</main>",
            _provenance(shown),
        )
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="generator" content="effbench {clean(__version__)}"><meta name="referrer" content="no-referrer">'
        f"<title>effbench leaderboard</title><style>{css}</style></head><body>{body}<script>{script}</script></body></html>\n"
    )


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _header(
    shown: Sequence[CaseRecord],
    sections: Sequence[Section],
    total: int,
    replaced: int,
    sources: Sequence[str],
    warnings: Sequence[str],
    now: datetime,
) -> str:
    floor = f"{100 * SCREENING_FLOOR:.0f} %"
    said = [
        f"Rank is 1 + the number of rows shown to be better; = is shared, where no difference is shown. {len(sections)} tables: "
        "rows are compared only within one machine, work, model and setting.",
        "× is the paired ratio to the row's baseline: ▲ better, ▼ worse, ≈ no difference shown. Intervals are 95 %, over n blocks. "
        f"Hatched rows are screening: they claim no difference below {floor}.",
    ]
    if total > len(shown):
        said.append(
            f"{total - len(shown)} of {total} rows are left out of this page: each table has its best rows by "
            f"{metric(HEADLINE).title}. Ranks are among the rows shown."
        )
    if replaced:
        said.append(f"{replaced} rows are left out since a later run of the same case on the same machine replaced them.")
    said += warnings
    started = sorted(record.started_at for record in shown if record.started_at)
    when = f"Measured from {clean(started[0][:10])} to {clean(started[-1][:10])}. " if started else ""
    where = f"Read from {', '.join(map(clean, sources))}. " if sources else ""
    stamp = now.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    made = f"<p>{len(shown)} rows. {when}{where}Generated {stamp} by effbench {clean(__version__)}.</p>"
    return f"<header><h1>effbench leaderboard</h1>{made}{element('ul', ''.join(f'<li>{clean(text, 1_000)}</li>' for text in said))}</header>"


def _controls(sections: Sequence[Section]) -> str:
    """The filters; hidden until the script that they need runs."""

    def select(label: str, name: str, choices: Iterable[tuple[str, str]]) -> str:
        options = "".join(f'<option value="{clean(value)}">{clean(text)}</option>' for value, text in choices)
        return f'<label>{label}<select name="{name}">{options}</select></label>'

    def every(name: str) -> list[tuple[str, str]]:
        return [("", "all"), *((value, value) for value in sorted({getattr(section, name) for section in sections}))]

    names = {name for section in sections for name in section.ranked_by}
    by = sorted({HEADLINE, *names}, key=lambda name: (name != HEADLINE, table_order(name)))
    parts = [
        '<label>Search<input name="q" type="search" autocomplete="off"></label>',
        *(select(label, label.lower(), every(label.lower())) for label in ("Workload", "Hardware", "Model")),
        select("Ranked by", "by", ((name, f"{metric(name).title} · {ARROWS[metric(name).better]}") for name in by)),
        '<label class="tick"><input name="ranked" type="checkbox"> ranked rows only</label>',
        '<button type="reset">Reset</button>',
        '<output id="count" role="status"></output>',
    ]
    return element("form", "".join(parts), hidden="", aria_label="Filters")


def _provenance(shown: Sequence[CaseRecord]) -> str:
    """One line for each environment that rows were measured in."""
    environments: dict[str, list[CaseRecord]] = {}
    for record in shown:
        environments.setdefault(record.env_id, []).append(record)
    lines = []
    for env_id, rows in list(environments.items())[:MAX_MACHINES]:
        known = {key: str(value) for key, value in rows[0].provenance.items()}
        cells = (
            rows[0].hardware, str(len(rows)), " ".join(known.get(key, "") for key in ("effbench_version", "git_commit")),
            known.get("driver", ""), known.get("python", ""), _packages(known.get("packages", "")), known.get("platform", ""), env_id[:12],
        )  # fmt: skip
        named, *others = (isolated(text.strip() or "–", 300) for text in cells)
        lines.append(f'<tr><th scope="row">{named}</th>{"".join(f"<td>{text}</td>" for text in others)}</tr>')
    heads = ("Hardware", "Rows", "effbench", "Driver", "Python", "Packages", "Platform", "Environment")
    caption = f"What the rows were measured with{_first(len(environments), MAX_MACHINES)}."
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    table = f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    note = "<p>Raw rows and traces: <code>effbench export</code> and the results folder. A row is named by its run id.</p>"
    return f'<footer><h2>Provenance</h2><div class="scroll" tabindex="0" role="region" aria-label="Provenance">{table}</div>{note}</footer>'


def _packages(text: str) -> str:
    try:
        found = json.loads(text)
        return " ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "triton") if name in found)
    except (ValueError, TypeError, RecursionError):
        return text


def _first(count: int, shown: int) -> str:
    return f" (the first {shown} of {count})" if count > shown else ""
