"""What a claim is, what one part of it says, and what results can show of it.

    Claim ── parts ──▶ Part.judged(frame, specs) ── Judged lines ──▶ Shown (one hardware) ──▶ Finding (the claim)

A part is a question that rows can answer; its shape says how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from effbench.metrics import metric as metric_row

if TYPE_CHECKING:
    import pandas as pd

Answer = Literal["supported", "contradicted", "not shown", "not measured yet"]
ANSWERS: tuple[Answer, ...] = ("supported", "contradicted", "not shown", "not measured yet")
Grade = Literal["P", "S", "D", "F", "?"]
GRADES: Mapping[str, str] = {
    "P": "primary: the paper, its authors' site, data or code",
    "S": "secondary: a third party's summary of the paper, which may be wrong",
    "D": "derived here from printed numbers; not published",
    "F": "read off a printed figure; not published as a number",
    "?": "no number was found",
}
Specs = Callable[[Sequence[str]], Mapping[str, str]]  # run_ids → spec of each row, as canonical JSON

# Columns of the frame that `Part.judged` returns, one line a comparison.
JUDGED = (
    "hardware", "workload", "model", "setting", "what", "ratio", "lower", "upper", "screening", "answer", "run_ids", "started_at",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Printed:
    """Something that was printed, with its numbers and the grade of the evidence that it was."""

    text: str
    grade: Grade


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing that a claim says, in a form that rows can answer. The shapes are in `shapes.py`.

    `somewhere`: it is enough that one comparison shows it ("up to"); else it must hold wherever it is compared.
    `beside`: shown with the claim and not counted. `exact`: a count or an equality, which has no noise.
    `size`: only models with at least and at most so many weights.
    """

    says: str
    workload: str
    metric: str
    above: float | None = None
    below: float | None = None
    somewhere: bool = False
    beside: bool = False
    exact: bool = False
    size: tuple[float, float] | None = None

    def metrics(self) -> tuple[str, ...]:
        """The metrics that the frame must have."""
        return (self.metric, "params_total") if self.size else (self.metric,)

    def may_answer(self, techniques: Set[str]) -> bool:
        """Whether rows with these techniques, and no others, can answer at all; looked at first, since it costs nothing."""
        return True

    def judged(self, frame: pd.DataFrame, specs: Specs) -> pd.DataFrame:
        """One line for each comparison that the rows of this part's workload allow, with the columns of JUDGED."""
        raise NotImplementedError

    def quantity(self) -> str:
        """What the numbers are of, as text."""
        return metric_row(self.metric).title

    def expected(self) -> str:
        """The region that the number must lie in, as text."""
        bounds = [f"above {self.above:.3g}"] if self.above is not None else []
        bounds += [f"below {self.below:.3g}"] if self.below is not None else []
        return " and ".join(bounds)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One published claim, or one property that a paper's method must have.

    `sentence` is in our words. `remark` says what is wrong or ambiguous in what was printed.
    """

    id: str
    paper: str
    sentence: str
    printed: tuple[Printed, ...]
    remark: str
    parts: tuple[Part, ...]
    needs: str = ""  # what it takes to measure this, where no built workload does

    @property
    def workloads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.workload for part in self.parts))

    @property
    def grade(self) -> str:
        """The best grade of what was printed."""
        return min((p.grade for p in self.printed), key=list(GRADES).index, default="?")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One comparison as it is shown; `ratio` may be a value, where a part judges values."""

    model: str
    setting: str
    what: str
    ratio: float
    lower: float
    upper: float
    screening: bool
    answer: Answer
    run_ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What the rows of one hardware show of one part.

    `ratio` is the median of the comparisons; [lower, upper] spans all their 95 % intervals. `lines` are the most telling ones,
    `num` counts all; `run_ids` are those of the lines.
    """

    part: str
    quantity: str
    expected: str
    hardware: str
    answer: Answer
    beside: bool
    ratio: float
    lower: float
    upper: float
    num: int
    held: int
    failed: int
    screening: bool
    lines: tuple[Line, ...]

    @property
    def run_ids(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run_id for line in self.lines for run_id in line.run_ids))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The verdict on one claim, the verdict of each hardware, and what it stands on. `why` is a sentence."""

    claim: Claim
    answer: Answer
    why: str
    by_hardware: Mapping[str, Answer] = field(default_factory=dict)
    shown: tuple[Shown, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON document."""
        from dataclasses import asdict

        claim = self.claim
        return {
            "id": claim.id, "paper": claim.paper, "claim": claim.sentence, "verdict": self.answer, "why": self.why,
            "printed": [vars(p) for p in claim.printed], "grade": claim.grade, "remark": claim.remark,
            "workloads": list(claim.workloads), "needs": claim.needs or None,
            "judged": [{"says": p.says, "workload": p.workload, "metric": p.metric, "quantity": p.quantity(), "expected": p.expected(), "beside": p.beside}
                       for p in claim.parts],
            "by_hardware": dict(self.by_hardware),
            "shown": [{**asdict(s), "run_ids": list(s.run_ids)} for s in self.shown],
        }  # fmt: skip
