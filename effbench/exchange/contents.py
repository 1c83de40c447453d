"""What a bundle holds, once its form has been checked: the manifest, rows, launches and traces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from effbench.schema import CaseRecord, Launch, Trace


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Records of another hand: every text may be anything, every number may be invented, what is named may be missing."""

    manifest: Mapping[str, Any]
    cases: tuple[CaseRecord, ...]
    launches: Mapping[str, Launch] = field(default_factory=dict)
    traces: Mapping[str, Trace] = field(default_factory=dict)
