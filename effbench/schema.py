"""The frozen records that the measuring arm returns, the store keeps and the reading arm reads.

    Spec ──(launched once per block)──▶ Launch + Trace ──(block ratios)──▶ Case (one row of the board)

Times named `*_s` on a trace are seconds on the launch's own monotonic clock; 0 is the birth of the launch.
Missing is `None` with a reason, never 0. Identities: `spec_id` is what runs; `case_id` is what runs and what it
is compared with; `env_id` is where it runs; `run_id` is one row; `launch_id` is one process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import pyarrow

SCHEMA_VERSION = 1

Status = Literal["ok", "failed", "skipped", "invalid"]
STATUSES: tuple[Status, ...] = ("ok", "failed", "skipped", "invalid")
FINISHED: tuple[Status, ...] = ("ok", "skipped")  # a resume repeats everything else


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. Raises ValueError on NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, in hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class TechniqueRef:
    """One technique of a stack, with every parameter filled in."""

    name: str
    axis: str
    params: Mapping[str, Any] = field(default_factory=dict)
    identity: str = ""  # distribution:name@version+source digest
    given: tuple[str, ...] = ()  # the parameters that the suite named; the others are defaults
    filled_in: bool = False  # the default precision, which the suite did not name

    @property
    def label(self) -> str:
        """The name with the parameters that were given: gqa(groups=2)."""
        given = ",".join(f"{key}={self.params[key]}" for key in self.given if key in self.params)
        return f"{self.name}({given})" if given else self.name


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """Which model: a shape of the catalogue or a checkpoint, and where its weights come from."""

    name: str
    weights: Literal["random", "trained", "path", "hub"] = "random"
    location: str | None = None  # folder (path) or repository and revision (hub)
    digest: str = ""  # of the shape (random), of the recipe (trained), of the files (path, hub)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One thing to run, fully resolved: defaults filled in, `auto` resolved, content named by digest."""

    workload: str
    params: Mapping[str, Any]
    model: ModelRef
    techniques: tuple[TechniqueRef, ...]
    text: str  # builtin, a path, or hub:DATASET
    text_digest: str
    seed: int
    device: str  # "cpu" or "cuda"
    threads: int
    protocol: str
    time_limit_s: float
    environment: Mapping[str, str] = field(default_factory=dict)
    workload_identity: str = ""  # distribution:name@version+source digest
    nproc: int = 1  # processes that do the work together

    @property
    def spec_id(self) -> str:
        """Identity of what runs: by content. Where weights and text lie does not count, nor what was given or filled in."""
        plain = self.to_json()
        del plain["text"], plain["model"]["location"]
        for technique in plain["techniques"]:
            del technique["filled_in"], technique["given"]
        if self.nproc == 1:
            del plain["nproc"]  # rows of one process were named before there were several
        return digest(plain)

    @property
    def stack(self) -> tuple[str, ...]:
        """Names of the techniques that the suite asked for, in axis order."""
        return tuple(t.name for t in self.techniques if not t.filled_in)

    @property
    def label(self) -> str:
        """The stack as a person would write it, in axis order; 'as published' where the suite asked for none."""
        return " + ".join(t.label for t in self.techniques if not t.filled_in) or "as published"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Spec:
        techniques = tuple(TechniqueRef(**{**t, "given": tuple(t["given"])}) for t in value["techniques"])
        return cls(**{**value, "model": ModelRef(**value["model"]), "techniques": techniques})


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one row of the board will say: a spec and what it is compared with."""

    spec: Spec
    baseline: Spec | None = None
    baseline_case_id: str | None = None
    skip_reason: str | None = None

    @property
    def case_id(self) -> str:
        """Identity of the row's question: the spec and its baseline."""
        return digest({"spec": self.spec.spec_id, "baseline": self.baseline.spec_id if self.baseline else None})


@dataclass(frozen=True, kw_only=True)
class Series:
    """One sensor over time. `t_s` and `values` have shape (N,); `t_s` ascends."""

    name: str
    unit: str
    scope: str  # process, host, gpu, module, memory
    source: str  # where it was read: "nvml:186", "perf_counter", "/proc/self/statm"
    t_s: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One number with its provenance. An invalid reading says why; a missing one is None and says why."""

    name: str
    value: float | None
    unit: str
    source: str = ""
    scope: str = ""
    valid: bool = True
    reasons: tuple[str, ...] = ()

    @classmethod
    def missing(cls, name: str, unit: str, *reasons: str, source: str = "") -> Reading:
        assert reasons, f"{name}: a missing reading needs a reason"
        return cls(name=name, value=None, unit=unit, source=source, valid=False, reasons=tuple(reasons))


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The raw series of one launch, kept for good. Names are unique."""

    series: tuple[Series, ...] = ()

    def get(self, name: str) -> Series | None:
        return next((s for s in self.series if s.name == name), None)


@dataclass(frozen=True, kw_only=True)
class Window:
    """A stretch of the launch's clock, in s, and what ended it."""

    start_s: float
    end_s: float
    ended_by: str = ""  # "rule", "limit", "" where it does not apply

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One process that built one spec and measured one window (or failed, which is a result too).

    `windows` maps a phase (build, warm_up, idle_before, window, idle_after, quality …) to its stretch of the clock.
    `facts` are numbers and texts that no sensor gives: tokens per step, parameter counts, stored bytes, quality.
    `metrics` are recomputable from `facts`, `windows` and the trace by `recompute.launch_metrics`.
    """

    launch_id: str
    suite: str = ""
    spec: Spec
    env_id: str
    block_id: str
    block: int
    position: int  # place in the block's order
    status: Status
    reason: str = ""
    detail: str = ""
    started_at: str = ""
    hardware: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    windows: Mapping[str, Window] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()  # what the probes flagged: throttled, foreign_process …
    metrics: tuple[Reading, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MetricValue:
    """One metric of a case over its blocks: n blocks, Student t on logarithms; ratio is paired, to the baseline."""

    name: str
    value: float | None
    lower: float | None
    upper: float | None
    n: int
    ratio: float | None
    ratio_lower: float | None
    ratio_upper: float | None
    unit: str
    source: str
    valid: bool
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CaseRecord:
    """One row. Fields are the columns of the runs table, in order; a failure is a row too."""

    run_id: str
    case_id: str
    env_id: str
    schema_version: int = SCHEMA_VERSION
    status: Status
    reason: str = ""
    suite: str
    workload: str
    model: str
    techniques: tuple[str, ...]
    baseline_case_id: str | None = None
    hardware: str
    protocol: str
    launch_ids: tuple[str, ...] = ()
    baseline_launch_ids: tuple[str, ...] = ()
    started_at: str
    spec: str  # canonical JSON
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[MetricValue, ...] = ()

    @property
    def label(self) -> str:
        """The stack with the parameters that the suite gave: 'lora(r=8) + bf16'."""
        try:
            return Spec.from_json(json.loads(self.spec)).label
        # a row of another hand, or one read without its spec
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return " + ".join(self.techniques) or "as published"


PROVENANCE_FIELDS = (
    "effbench_version",
    "source_digest",
    "git_commit",
    "python",
    "platform",
    "device_name",
    "driver",
    "cuda",
    "power_limit_w",
    "cpu",
    "cores",
    "memory_gb",
    "packages",
    "baseline",
    "details",
)


@cache
def arrow_schemas() -> dict[str, pyarrow.Schema]:
    """Arrow schemas of the tables `runs`, `launches` and `traces`; nested JSON is text, so a plugin never changes them."""
    import pyarrow as pa

    text, number, flag = pa.string(), pa.float64(), pa.bool_()
    texts = pa.list_(text)
    provenance = pa.struct([(name, text) for name in PROVENANCE_FIELDS])
    value = [("value", number), ("lower", number), ("upper", number), ("n", pa.int64())]
    ratio = [("ratio", number), ("ratio_lower", number), ("ratio_upper", number)]
    tail = [("unit", text), ("source", text), ("valid", flag), ("reasons", texts)]
    metric = pa.struct([("name", text), *value, *ratio, *tail])
    reading = pa.struct([("name", text), ("value", number), ("unit", text), ("source", text), ("scope", text),
                         ("valid", flag), ("reasons", texts)])  # fmt: skip
    runs = [
        *[(name, text) for name in ("run_id", "case_id", "env_id")], ("schema_version", pa.int64()),
        *[(name, text) for name in ("status", "reason", "suite", "workload", "model")], ("techniques", texts),
        *[(name, text) for name in ("baseline_case_id", "hardware", "protocol")],
        ("launch_ids", texts), ("baseline_launch_ids", texts), ("started_at", text), ("spec", text),
        ("provenance", provenance), ("metrics", pa.list_(metric)),
    ]  # fmt: skip
    launches = [
        ("launch_id", text), ("schema_version", pa.int64()), ("suite", text), ("spec_id", text),
        ("spec", text), ("env_id", text), ("block_id", text), ("block", pa.int64()), ("position", pa.int64()),
        *[(name, text) for name in ("status", "reason", "detail", "started_at", "hardware")],
        ("provenance", provenance), ("windows", text), ("facts", text), ("reasons", texts),
        ("metrics", pa.list_(reading)),
    ]  # fmt: skip
    traces = [
        ("series", pa.dictionary(pa.int32(), text)), ("unit", pa.dictionary(pa.int32(), text)),
        ("scope", pa.dictionary(pa.int32(), text)), ("source", pa.dictionary(pa.int32(), text)),
        ("t_s", number), ("value", number),
    ]  # fmt: skip
    return {"runs": pa.schema(runs), "launches": pa.schema(launches), "traces": pa.schema(traces)}
