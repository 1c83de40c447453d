"""Published claims of the founding papers, held against results.

A claim is data: what was printed, with which grade of evidence, and the parts that rows can answer. Its verdict is computed from
a frame of rows, with intervals; see `judging.py`.
"""

from effbench.analysis.claims.efficientllm import CLAIMS as _EFFICIENTLLM
from effbench.analysis.claims.efficientllm_tuning import CLAIMS as _TUNING
from effbench.analysis.claims.judging import findings_of, judge, results_of
from effbench.analysis.claims.moe_applications import CLAIMS as _MOE_APPLICATIONS
from effbench.analysis.claims.occult import CLAIMS as _OCCULT
from effbench.analysis.claims.types import ANSWERS, GRADES, Claim, Finding, Part, Printed, Shown

CLAIMS: tuple[Claim, ...] = (*_EFFICIENTLLM, *_TUNING, *_OCCULT, *_MOE_APPLICATIONS)
PAPERS: tuple[str, ...] = tuple(dict.fromkeys(claim.paper for claim in CLAIMS))

__all__ = [
    "ANSWERS", "CLAIMS", "GRADES", "PAPERS", "Claim", "Finding", "Part", "Printed", "Shown", "findings_of", "judge", "results_of",
]  # fmt: skip
