"""Does a row that was measured again say the same? Two rows in, one verdict a metric and one for the row. Knows no files.

Both rows carry intervals over their own blocks, and the two runs are independent, so the interval of the quotient (of the
difference, for a share of something) has the square root of the sum of the squared half-widths, on logarithms. Against a band of
tolerance around "equal":

    inside the band      agrees
    outside the band     differs
    across its edge      cannot tell: more blocks, or a quieter machine, would

That is an equivalence test by interval (Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987), strict with the 95 % intervals that a
row has. The bands: 10 % for what is timed or sensed, since two machines of one name differ by some per cent, and 5 points for a
share; 0.1 % for what is counted and 2 % for quality, whose values are compared alone: the seeds of the blocks are the same in both
rows, so what scatters between blocks does not scatter between rows. The paired ratio to the baseline is compared too: a baseline that was slowed down
would flatter a row whose own value is right. A row is reproduced when all that it says of each headline metric agrees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from effbench.metrics import METRICS, Metric, metric, table_order
from effbench.protocol import PROTOCOLS
from effbench.schema import CaseRecord, MetricValue

Agrees = Literal["agrees", "differs", "cannot tell"]
Outcome = Literal["reproduced", "differs", "cannot tell", "other hardware"]
HEADLINE = (
    "tokens_per_s", "step_p50_s", "ttft_s", "tpot_s", "device_memory_peak_bytes", "host_memory_peak_bytes", "energy_j_per_token",
    "kv_cache_bytes_per_token", "weight_bytes", "params_trainable", "quality",
)  # fmt: skip
ALWAYS = "tokens_per_s"  # a row without it is never reproduced
COUNTED_TOLERANCE, QUALITY_TOLERANCE, MEASURED_TOLERANCE = 0.001, 0.02, 0.10  # relative
SHARE_TOLERANCE = 0.05  # absolute
_COUNTED = ("params_", "weight_bytes", "bits_per_weight", "kv_cache_bytes", "decode_flops")
_QUALITY = ("train_loss", "validation_loss", "base_loss_after", "bits_per_byte", "perplexity", "next_token_accuracy")
_BY_SENSOR = ("amu_gb", "aec_w")
_FAR = 700.0  # on logarithms: e^709 is the largest number there is
_PROVENANCE = (
    "effbench_version",
    "source_digest",
    "git_commit",
    "python",
    "driver",
    "cuda",
    "power_limit_w",
    "cpu",
    "packages",
)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """One metric of both rows, or its paired ratio to the baseline. `measure` is here / submitted, or for a share here − submitted,
    with its 95 % interval."""

    name: str
    of: Literal["value", "ratio to baseline"]
    verdict: Agrees
    measure: Literal["ratio", "difference"]
    middle: float | None
    lower: float | None
    upper: float | None
    tolerance: float
    headline: bool
    why: str = ""


def agreements(submitted: CaseRecord, here: CaseRecord) -> tuple[Agreement, ...]:
    """Each metric that the submitted row has a valid value of and that can be compared, and each ratio to its baseline: on other
    hardware only what is counted and quality, on the same everything that has a direction. In the order of the metric table."""
    same = submitted.hardware == here.hardware
    found = {value.name: value for value in here.metrics}
    claims = all(record.protocol in PROTOCOLS and PROTOCOLS[record.protocol].claims for record in (submitted, here))
    lines = []
    for value in sorted(submitted.metrics, key=lambda value: table_order(value.name)):
        if value.valid and value.value is not None and _compares(metric(value.name), same_hardware=same):
            lines.append(_of_values(value, found.get(value.name), claims=claims))
            if value.ratio is not None:
                lines.append(_of_ratios(value, found.get(value.name), claims=claims))
    return tuple(lines)


def outcome(submitted: CaseRecord, here: CaseRecord, lines: tuple[Agreement, ...]) -> Outcome:
    """What the agreements of two rows come to. One headline metric that differs is enough to differ."""
    if submitted.hardware != here.hardware:
        return "other hardware"
    headline = [line for line in lines if line.headline]
    if any(line.verdict == "differs" for line in headline):
        return "differs"
    agreed = any(line.name == ALWAYS for line in headline) and all(line.verdict == "agrees" for line in headline)
    return "reproduced" if agreed else "cannot tell"


def environment_of(record: CaseRecord) -> Mapping[str, str]:
    """What a reader needs to see whether two rows were measured alike."""
    own = {"hardware": record.hardware, "env_id": record.env_id, "case_id": record.case_id, "started_at": record.started_at}
    return own | {name: str(record.provenance[name]) for name in _PROVENANCE if record.provenance.get(name) is not None}


def _compares(row: Metric, *, same_hardware: bool) -> bool:
    if _is_counted(row) or _is_quality(row):
        return True
    return same_hardware and row.name.partition(".")[0] in METRICS and row.better != "none"


def _is_counted(row: Metric) -> bool:
    return row.name.startswith(_COUNTED)


def _is_quality(row: Metric) -> bool:
    return "quality" in row.tags or row.name in _QUALITY


def _tolerance(row: Metric, *, share: bool) -> float:
    if _is_counted(row):
        return COUNTED_TOLERANCE
    if _is_quality(row):
        return QUALITY_TOLERANCE
    return SHARE_TOLERANCE if share else MEASURED_TOLERANCE


def _of_values(claimed: MetricValue, found: MetricValue | None, *, claims: bool) -> Agreement:
    """The value itself."""
    row, why = metric(claimed.name), ""
    if found is None or found.value is None or not found.valid:
        why = f"it was not measured here ({', '.join(found.reasons if found else ()) or 'not taken'})"
    elif (row.tags or row.name in _BY_SENSOR) and claimed.source != found.source:
        why = "the two values come from different sensors, or are different figures"
    sides = [(v.value, v.lower, v.upper) for v in (claimed, found or claimed)]
    share = row.unit == "ratio" and row.name != "perplexity"
    return _judged(row, "value", sides, why, share=share, claims=claims)


def _of_ratios(claimed: MetricValue, found: MetricValue | None, *, claims: bool) -> Agreement:
    """The paired ratio to the baseline: what a row says of its technique, and what a spoilt baseline would improve."""
    row = metric(claimed.name)
    why = "" if found and found.ratio is not None else "it has no ratio to its baseline here"
    sides = [(v.ratio, v.ratio_lower, v.ratio_upper) for v in (claimed, found or claimed)]
    return _judged(row, "ratio to baseline", sides, why, share=False, claims=claims)


_Bounds = tuple[float | None, float | None, float | None]


def _judged(
    row: Metric, of: Literal["value", "ratio to baseline"], sides: Sequence[_Bounds], why: str, *, share: bool, claims: bool
) -> Agreement:
    tolerance, exact = _tolerance(row, share=share), _is_counted(row) or _is_quality(row)
    sides = [(middle, middle, middle) for middle, _, _ in sides] if exact else sides
    middle, lower, upper, problem = (None, None, None, why) if why else _quotient(sides[0], sides[1], share=share)
    why = problem or ("" if claims or exact else "a smoke row claims no difference and no agreement")
    band = (-tolerance, tolerance) if share else (1 / (1 + tolerance), 1 + tolerance)
    verdict: Agrees = "cannot tell"
    if not why and lower is not None and upper is not None:
        if band[0] <= lower and upper <= band[1]:
            verdict = "agrees"
        elif upper < band[0] or lower > band[1]:
            verdict = "differs"
        else:
            why = "the interval crosses the edge of the tolerance"
    return Agreement(
        name=row.name, of=of, verdict=verdict, measure="difference" if share else "ratio", middle=middle, lower=lower, upper=upper,
        tolerance=tolerance, headline=row.name in HEADLINE, why=why,
    )  # fmt: skip


def _quotient(theirs: _Bounds, ours: _Bounds, *, share: bool) -> tuple[float | None, float | None, float | None, str]:
    """ours / theirs, or for a share ours − theirs, with the interval of two independent estimates; and why there is none."""
    if theirs == ours and theirs[0] == theirs[1] == theirs[2] == 0 and not share:
        return 1.0, 1.0, 1.0, ""  # no trainable parameters on either side
    if not share and any(number is not None and number <= 0 for number in (*theirs, *ours)):
        return None, None, None, "one of the two values is not above zero"
    sides = [tuple(None if n is None else n if share else math.log(n) for n in side) for side in (theirs, ours)]
    (centre, low, high), (own, own_low, own_high) = sides
    assert centre is not None and own is not None, "only values that are there are compared"
    back = float if share else math.exp
    if abs(own - centre) > _FAR:
        return None, None, None, "the two values are beyond comparison"
    if low is None or high is None or own_low is None or own_high is None:
        return back(own - centre), None, None, "one of the two rows has no interval: it has one block"
    half = math.hypot((high - low) / 2, (own_high - own_low) / 2)
    return back(own - centre), back(max(own - centre - half, -_FAR)), back(min(own - centre + half, _FAR)), ""
