"""Where rows come from, as tables say it: measured here, or brought by a bundle and marked for it.

Who decides the level of a row is `exchange/levels.py`; here it is only a word and a mark beside a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

MEASURED_HERE = "measured here"


@dataclass(frozen=True, kw_only=True)
class Origins:
    """By run id, the bundle that brought a row of another hand and its level; every other row was measured here."""

    bundles: Mapping[str, str] = field(default_factory=dict)
    levels: Mapping[str, str] = field(default_factory=dict)
    marks: Mapping[str, str] = field(default_factory=dict)  # by level: what stands behind a row's name
    meanings: Mapping[str, str] = field(default_factory=dict)  # by level: a sentence without its full stop
    state: str = ""  # changes with the others

    def level(self, run_id: str) -> str:
        return self.levels.get(run_id, MEASURED_HERE)

    def mark(self, run_id: str) -> str:
        return self.marks.get(self.level(run_id), "")

    def notes(self, run_ids: Iterable[str]) -> list[str]:
        """What the mark of each level among these rows means; nothing where all were measured here."""
        levels = dict.fromkeys(self.levels[run_id] for run_id in run_ids if run_id in self.levels)
        return [f"{self.marks.get(level, '')} {level}: {self.meanings.get(level, '')}.".strip() for level in levels]


NO_ORIGINS = Origins()
