"""What a verification says: findings, and the one verdict that follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["refused", "remark"]
Verdict = Literal["accepted", "accepted with remarks", "rejected"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that a check found. `check` is its name, `where` the row, launch or member; the message gives units."""

    check: str
    severity: Severity
    message: str
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome for one bundle. Passing shows that rows follow from traces and that both are plausible; not that they are true."""

    bundle_sha256: str
    rows: int
    launches: int
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()  # what could not be checked or enforced here, and why

    @property
    def verdict(self) -> Verdict:
        if any(finding.severity == "refused" for finding in self.findings):
            return "rejected"
        return "accepted with remarks" if self.findings else "accepted"

    def to_json(self) -> dict[str, Any]:
        return {"verdict": self.verdict, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """Raises KeyError or TypeError where the fields are others."""
        findings = tuple(Finding(**each) for each in data["findings"])
        own = {name: data[name] for name in ("bundle_sha256", "rows", "launches")}
        return cls(**own, findings=findings, notes=tuple(data["notes"]))


def refusals(findings: Sequence[Finding]) -> list[Finding]:
    """Those for which the bundle is rejected."""
    return [finding for finding in findings if finding.severity == "refused"]
