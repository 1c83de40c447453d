"""Play a recorded launch back as if its sensors were read now: runner, recompute and board are tested without a GPU.

    recorded   t=0 ── … ──┤ window ├── …         shifted so that the two windows begin together
    now                   ┤ window ├── …         (a series is neither stretched nor cut)

A Recording is given in memory, as an .npz file, or as a file named by $EFFBENCH_REPLAY. The runner never opens this
probe by itself. Files hold arrays and JSON only: loading one runs nothing.

    save(Path("h200.npz"), Recording(trace=trace, facts=launch.facts, window=launch.windows["window"]))
    ReplayProbe(context, Path("h200.npz"))
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from effbench.errors import ProbeError
from effbench.probe import Capability, Probe, ProbeContext, ProbeResult
from effbench.schema import Series, Trace, Window

VARIABLE = "EFFBENCH_REPLAY"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What probes saw of one launch. `window` is its measured window on the recorded clock; None leaves times as they are."""

    trace: Trace
    facts: Mapping[str, Any] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    window: Window | None = None


def save(path: Path, recording: Recording) -> None:
    """Write a recording as .npz. Facts must be JSON. Raises OSError, TypeError."""
    heads = [{"name": s.name, "unit": s.unit, "scope": s.scope, "source": s.source} for s in recording.trace.series]
    head = {
        "format": FORMAT,
        "series": heads,
        "facts": dict(recording.facts),
        "reasons": recording.reasons,
        "window": asdict(recording.window) if recording.window else None,
    }
    arrays = {"head": np.array(json.dumps(head))}
    for index, series in enumerate(recording.trace.series):
        arrays[f"t_s_{index}"], arrays[f"values_{index}"] = np.asarray(series.t_s), np.asarray(series.values)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # the stub takes the names for its own option


def load(path: Path) -> Recording:
    """Read what `save` wrote. Raises ProbeError with recording_damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            head = json.loads(str(arrays["head"]))
            if head["format"] != FORMAT:
                raise ProbeError("recording_damaged", f"{path}: format {head['format']}, this effbench reads {FORMAT}")
            series = tuple(
                Series(**about, t_s=arrays[f"t_s_{index}"], values=arrays[f"values_{index}"])
                for index, about in enumerate(head["series"])
            )
            window = Window(**head["window"]) if head["window"] else None
            return Recording(trace=Trace(series=series), facts=head["facts"], reasons=tuple(head["reasons"]), window=window)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ProbeError("recording_damaged", f"{path} is no recording of effbench: {error}") from error


def shifted(trace: Trace, by_s: float) -> Trace:
    """The same trace, `by_s` later."""
    return Trace(series=tuple(replace(series, t_s=series.t_s + by_s) for series in trace.series))


class ReplayProbe(Probe):
    """Yields the recorded series, facts and reasons; step times are the live launch's own and are not played back."""

    name = "replay"
    devices = ()  # no launch opens it by itself

    def __init__(self, context: ProbeContext, recording: Recording | Path | None = None):
        super().__init__(context)
        self._begin_s: float | None = None
        self._recording: Recording | None = None
        self._reason = ""
        named = os.environ.get(VARIABLE)
        source = recording or (Path(named) if named else None)
        try:
            self._recording = load(source) if isinstance(source, Path) else source
        except ProbeError as error:
            self._reason = error.reason
        if self._recording is None:
            self._reason = self._reason or "nothing_to_replay"

    @classmethod
    def capabilities(cls) -> list[Capability]:
        """Always there; says whether the environment names a recording."""
        detail = f"for tests; ${VARIABLE}: {os.environ.get(VARIABLE) or 'not set'}"
        return [Capability(what="replay of a recorded launch", available=True, detail=detail)]

    @property
    def wants_idle(self) -> bool:
        """Whether the recording reaches back before its window, so that idle power can be in it."""
        recorded = self._recording
        if recorded is None or recorded.window is None:
            return False
        start_s = recorded.window.start_s
        return any(len(s.t_s) > 0 and s.t_s[0] < start_s for s in recorded.trace.series)

    def __enter__(self) -> Self:
        return self

    def window_begins(self) -> None:
        self._begin_s = self.context.clock()

    def __exit__(self, *exc: object) -> None:
        return

    def result(self) -> ProbeResult:
        recorded = self._recording
        if recorded is None:
            return ProbeResult(reasons=(self._reason,))
        trace = recorded.trace
        if recorded.window is not None and self._begin_s is not None:
            trace = shifted(trace, self._begin_s - recorded.window.start_s)
        own = ("step", "warm_up_step", "step_device", "token")
        series = tuple(s for s in trace.series if s.name not in own)
        return ProbeResult(series=series, facts=recorded.facts, reasons=recorded.reasons)
