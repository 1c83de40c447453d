"""Records that tests of the measuring arm build by hand."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from effbench.recompute import launch_metrics
from effbench.runner import Request, record
from effbench.schema import Launch, ModelRef, Series, Spec, TechniqueRef, Trace, Window

_numbers = itertools.count()


def spec(*stack: str, workload: str = "generate", protocol: str = "quick", **changes: Any) -> Spec:
    """A spec with these techniques; only names matter to what these tests test."""
    plain = Spec(
        workload=workload,
        params={},
        model=ModelRef(name="tiny-llama", digest="x"),
        techniques=tuple(TechniqueRef(name=name, axis="attention", identity="x") for name in stack),
        text="builtin",
        text_digest="0" * 64,
        seed=1,
        device="cpu",
        threads=2,
        protocol=protocol,
        time_limit_s=60.0,
    )
    return replace(plain, **changes)


def series(name: str, t_s: Sequence[float], values: Sequence[float], unit: str = "", source: str = "test") -> Series:
    return Series(name=name, unit=unit, scope="process", source=source, t_s=np.asarray(t_s), values=np.asarray(values))


def trace_of_steps(starts_s: Sequence[float], lengths_s: Sequence[float], *more: Series) -> Trace:
    return Trace(series=(series("step", starts_s, lengths_s, "s"), *more))


def launch(
    of: Spec, trace: Trace, window: tuple[float, float], facts: Mapping[str, Any], *, block: int = 0, block_id: str = ""
) -> Launch:
    """A successful launch whose metrics are computed from its trace."""
    windows = {"window": Window(start_s=window[0], end_s=window[1], ended_by="rule")}
    request = Request(
        launch_id=f"launch{next(_numbers)}", spec=of, seed=1, suite="test", env_id="here", block_id=block_id or f"block{block}",
        block=block, position=0, hardware="test machine",
    )  # fmt: skip
    metrics = launch_metrics(spec=of, windows=windows, facts=facts, trace=trace)
    return record(request, "ok", windows=windows, facts=facts, metrics=metrics)


def steady(of: Spec, step_s: float, *, block: int = 0, num_steps: int = 10, **facts: Any) -> Launch:
    """A launch of equal steps."""
    starts = np.arange(num_steps) * step_s
    known = {"step_tokens": 8, "step_samples": 2, "throughput": "it", "params_total": 1000, "weight_bytes": 4000, **facts}
    return launch(of, trace_of_steps(starts, np.full(num_steps, step_s)), (0.0, num_steps * step_s), known, block=block)


def resolved(model: str, *stack: str, device: str = "cpu", workload: str = "generate", **model_changes: Any) -> Spec:
    """A spec as planning resolves it, that can really be built; techniques with the parameters that suit a small model."""
    from effbench import registry
    from effbench.models import text, weights
    from effbench.planning import techniques

    params = registry.workload(workload).Params().model_dump(mode="json")
    refs = techniques(tuple((name, dict(registry.technique(name).small_params)) for name in stack), device)
    plain = spec(workload=workload, device=device, params=params, techniques=refs, text_digest=text.text_digest("builtin"))
    plain = replace(plain, model=ModelRef(name=model, **model_changes))
    return replace(plain, model=replace(plain.model, digest=weights.weights_digest(plain)))
