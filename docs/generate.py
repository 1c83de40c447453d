"""Write the generated parts of docs/methodology.md again, from the tables they describe.

python docs/generate.py            # write
python docs/generate.py --check    # exit 1 where the page is out of date
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from effbench.metrics import METRICS
from effbench.protocol import PROTOCOLS
from effbench.reasons import FAULTS, REASONS, REMARKS

PAGE = Path(__file__).parent / "methodology.md"
ARROWS = {"lower": "↓", "higher": "↑", "none": ""}


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(cells).replace("\n", " ") + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def metrics() -> str:
    header = ["metric", "column", "unit", "better", "formula", "source"]
    rows = ([m.title, f"`{m.name}`", m.unit, ARROWS[m.better], m.formula, m.source] for m in METRICS.values())
    return table(header, rows)


def protocols() -> str:
    names = [field for field in vars(next(iter(PROTOCOLS.values()))) if field not in ("name", "summary")]
    header = ["", *(f"`{p.name}`" for p in PROTOCOLS.values())]
    words = [["what it is", *(p.summary for p in PROTOCOLS.values())]]
    return table(header, words + [[f"`{n}`", *(_plain(getattr(p, n)) for p in PROTOCOLS.values())] for n in names])


def reasons() -> str:
    kinds = {**dict.fromkeys(FAULTS, "fault"), **dict.fromkeys(REMARKS, "remark")}
    rows = ([f"`{code}`", kinds.get(code, ""), meaning] for code, meaning in sorted(REASONS.items()))
    return table(["code", "for energy", "meaning"], rows)


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def generated(text: str) -> str:
    """The page with every generated part made anew."""
    for name, make in (("metrics", metrics), ("protocols", protocols), ("reasons", reasons)):
        mark = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, found = mark.subn(lambda m, make=make: m[1] + make() + "\n" + m[2], text)
        assert found == 1, f"docs/methodology.md has {found} places for the generated part {name!r}"
    return text


if __name__ == "__main__":
    old = PAGE.read_text()
    new = generated(old)
    if "--check" in sys.argv:
        sys.exit("docs/methodology.md is out of date; run `make docs`" if new != old else 0)
    PAGE.write_text(new)
