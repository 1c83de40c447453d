"""Tampering with good bundles: named families, and strategies that draw from a seed what they change and by how much.

The forger here has effbench: after a change every metric is computed again, ids are digests again where that is the trick, and steps
are laid end to end. He does not think of the ticks of clocks and of all the numbers that depend on the one that he changes. One who
does makes a coherent forgery, which no look at records can tell (`CAREFUL` has such ones, to know what is not caught).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np

from effbench.exchange.contents import Contents
from effbench.pairing import case_metrics
from effbench.recompute import launch_metrics
from effbench.schema import CaseRecord, Launch, Series, Spec, Trace, canonical_json, digest
from tests.exchange.honest import CPUS, GPUS, environment

Random = np.random.Generator
Forgery = Callable[[Contents, Random], Contents]


# What a forger needs.


def redone(contents: Contents, *, rows_only: bool = False) -> Contents:
    """Every metric of every launch and row computed again."""
    launches = dict(contents.launches)
    if not rows_only:
        for name, launch in launches.items():
            if launch.status == "ok":
                given = {"spec": launch.spec, "windows": launch.windows, "facts": launch.facts, "reasons": launch.reasons}
                launches[name] = replace(launch, metrics=launch_metrics(trace=contents.traces[name], **given))
    rows = []
    for row in contents.cases:
        own, base = ([launches[i] for i in ids] for ids in (row.launch_ids, row.baseline_launch_ids))
        rows.append(replace(row, metrics=case_metrics(own, base if row.baseline_case_id else None)))
    return replace(contents, cases=tuple(rows), launches=launches)


def launches_changed(contents: Contents, change: Callable[[Launch], Launch], only: tuple[str, ...] | None = None) -> Contents:
    chosen = contents.launches if only is None else only
    return replace(contents, launches={n: change(v) if n in chosen else v for n, v in contents.launches.items()})


def traces_changed(contents: Contents, change: Callable[[Trace], Trace], only: tuple[str, ...]) -> Contents:
    return replace(contents, traces={n: change(v) if n in only else v for n, v in contents.traces.items()})


def with_series(trace: Trace, name: str, change: Callable[[Series], Series]) -> Trace:
    return Trace(series=tuple(change(s) if s.name == name else s for s in trace.series))


def with_facts(launch: Launch, **changes: Any) -> Launch:
    return replace(launch, facts={**launch.facts, **changes})


def with_steps(contents: Contents, launch_id: str, lengths_s: np.ndarray, *, careful: bool = False) -> Contents:
    """Other steps, end to end from the window's first one, and the window ended after them."""
    launch, trace = contents.launches[launch_id], contents.traces[launch_id]
    steps = trace.get("step")
    assert steps is not None
    window = launch.windows["window"]
    pause_s = window.end_s - (steps.t_s[-1] + steps.values[-1])
    lengths_s = np.asarray(lengths_s, float)
    stamps = steps.t_s[0] + np.concatenate([[0.0], np.cumsum(lengths_s)])
    if careful:
        stamps = np.rint(stamps * 1e9) * 1e-9
    end_s = float(stamps[-1] + pause_s)
    changed = with_series(trace, "step", lambda s: replace(s, t_s=stamps[:-1], values=np.diff(stamps)))
    windows = {**launch.windows, "window": replace(window, end_s=round(end_s * 1e9) * 1e-9 if careful else end_s)}
    facts = dict(launch.facts)
    if "losses" in facts:
        facts["losses"] = (list(facts["losses"]) * 3)[: len(facts["losses"]) + len(lengths_s) - len(steps.values)]
    launches = {**contents.launches, launch_id: replace(launch, windows=windows, facts=facts)}
    return replace(contents, launches=launches, traces={**contents.traces, launch_id: changed})


def steps_of(contents: Contents, launch_id: str) -> np.ndarray:
    series = contents.traces[launch_id].get("step")
    assert series is not None
    return series.values


def compared(contents: Contents) -> CaseRecord:
    """A row with a baseline: the one whose ratio a forger cares for."""
    return next(row for row in contents.cases if row.baseline_case_id and row.status == "ok")


def with_spec(contents: Contents, change: Callable[[Spec], Spec]) -> Contents:
    """Every spec changed, and the ids that follow from it."""
    launches = {n: replace(v, spec=change(v.spec)) for n, v in contents.launches.items()}
    cases: dict[str, str] = {}
    rows = []
    for row in contents.cases:
        spec = change(Spec.from_json(json.loads(row.spec)))
        base = next((launches[i].spec.spec_id for i in row.baseline_launch_ids), None)
        cases[row.case_id] = digest({"spec": spec.spec_id, "baseline": base})
        rows.append(replace(row, spec=canonical_json(spec.to_json()), protocol=spec.protocol, case_id=cases[row.case_id]))
    rows = [replace(row, baseline_case_id=cases.get(row.baseline_case_id or "", row.baseline_case_id)) for row in rows]
    return replace(contents, cases=tuple(rows), launches=launches)


# Named families.


def metric_changed(c: Contents, r: Random) -> Contents:
    row = compared(c)
    faster = tuple(replace(m, value=m.value * 0.93) if m.name == "al_s" and m.value else m for m in row.metrics)
    return replace(c, cases=tuple(replace(x, metrics=faster) if x is row else x for x in c.cases))


def launch_metric_changed(c: Contents, r: Random) -> Contents:
    def faster(launch: Launch) -> Launch:
        return replace(
            launch,
            metrics=tuple(replace(m, value=m.value * 0.9) if m.name == "al_s" and m.value else m for m in launch.metrics),
        )

    return redone(launches_changed(c, faster, compared(c).launch_ids), rows_only=True)


def trace_scaled(c: Contents, r: Random) -> Contents:
    for name in compared(c).launch_ids:
        c = with_steps(c, name, steps_of(c, name) * 0.85)
    return redone(c)


def samples_dropped(c: Contents, r: Random) -> Contents:
    """The slowest tenth of the steps, left out where they were."""
    for name in compared(c).launch_ids:
        keep = steps_of(c, name) <= np.percentile(steps_of(c, name), 90)
        c = traces_changed(
            c, lambda t, k=keep: with_series(t, "step", lambda s: replace(s, t_s=s.t_s[k], values=s.values[k])), (name,)
        )
    return redone(c)


def samples_dropped_and_closed(c: Contents, r: Random) -> Contents:
    """The slowest tenth left out and the gaps closed."""
    for name in compared(c).launch_ids:
        steps = steps_of(c, name)
        c = with_steps(c, name, steps[steps <= np.percentile(steps, 90)], careful=True)
    return redone(c)


def window_shifted(c: Contents, r: Random) -> Contents:
    def later(launch: Launch) -> Launch:
        window = launch.windows["window"]
        moved = replace(window, start_s=window.start_s + 0.4, end_s=window.end_s + 0.4)
        return replace(launch, windows={**launch.windows, "window": moved})

    return redone(launches_changed(c, later, compared(c).launch_ids))


def device_renamed(c: Contents, r: Random) -> Contents:
    """A slower device under the name of a faster one, env_id and all."""
    gpu = next(iter(c.launches.values())).spec.device == "cuda"
    other = environment(
        (GPUS[0] if c.cases[0].hardware != GPUS[0].name else GPUS[1]) if gpu else replace(CPUS[1], name="AMD EPYC 9755")
    )

    def renamed(record: Any) -> Any:
        kept = {k: v for k, v in record.provenance.items() if k in ("baseline", "details")}
        return replace(record, hardware=other.hardware, env_id=other.env_id, provenance={**other.provenance, **kept})

    return redone(replace(launches_changed(c, renamed), cases=tuple(map(renamed, c.cases))))


def copied_with_noise(c: Contents, r: Random) -> Contents:
    """One measured block, the others made from it with 0.3 of its own noise."""
    for ids in {(row.launch_ids) for row in c.cases}:
        first = steps_of(c, ids[0])
        for name in ids[1:]:
            c = with_steps(c, name, first * np.exp(r.normal(0, 0.3 * np.std(np.log(first)), len(first))), careful=True)
    return redone(c)


def energy_scaled(c: Contents, r: Random) -> Contents:
    """Less energy by the counter alone; where there is none, less memory."""

    def less(series: Series) -> Series:
        return replace(series, values=series.values[0] + 0.7 * (series.values - series.values[0]))

    for name in ("gpu_energy_counter", "rapl_energy", "process_memory"):
        if any(t.get(name) for t in c.traces.values()):
            return redone(traces_changed(c, lambda t, n=name: with_series(t, n, less), compared(c).launch_ids))
    raise AssertionError("no series to scale")


def counter_scaled_in_steps(c: Contents, r: Random) -> Contents:
    """Less energy by the counter, in whole mJ; where there is no counter, fewer s of CPU time."""

    def less(series: Series) -> Series:
        return replace(series, values=np.rint((series.values[0] + 0.6 * (series.values - series.values[0])) * 1000) / 1000)

    named = "gpu_energy_counter" if any(t.get("gpu_energy_counter") for t in c.traces.values()) else "step"
    return redone(traces_changed(c, lambda t: with_series(t, named, less), compared(c).launch_ids))


def steps_smoothed(c: Contents, r: Random) -> Contents:
    for name in compared(c).launch_ids:
        steps = steps_of(c, name)
        smooth = np.convolve(np.pad(steps, 2, mode="edge"), np.full(5, 0.2), mode="valid")
        c = with_steps(c, name, smooth)
    return redone(c)


def block_duplicated(c: Contents, r: Random) -> Contents:
    """The best block once more in the place of the worst, with new ids and times."""
    blocks = sorted({v.block for v in c.launches.values()})
    best, worst = blocks[0], blocks[-1]
    launches, traces = dict(c.launches), dict(c.traces)
    for name, launch in c.launches.items():
        if launch.block != worst:
            continue
        source = next(n for n, v in c.launches.items() if v.block == best and v.spec.spec_id == launch.spec.spec_id)
        launches[name] = replace(
            launch, windows=c.launches[source].windows, facts={**c.launches[source].facts, "seed": launch.facts["seed"]}
        )
        traces[name] = c.traces[source]
    return redone(replace(c, launches=launches, traces=traces))


def baseline_swapped(c: Contents, r: Random) -> Contents:
    """The slowest spec of the bundle as the baseline of another."""
    row = compared(c)
    others = [x for x in c.cases if x is not row and x.launch_ids != row.baseline_launch_ids]
    if not others:  # a bundle of two specs: the blocks of the baseline in another order
        ids = row.baseline_launch_ids
        moved = {
            name: replace(c.launches[name], block_id=c.launches[ids[k - 1]].block_id, block=c.launches[ids[k - 1]].block)
            for k, name in enumerate(ids)
        }
        return redone(replace(c, launches={**c.launches, **moved}))
    return redone(
        replace(c, cases=tuple(replace(x, baseline_launch_ids=others[0].launch_ids) if x is row else x for x in c.cases))
    )


def params_changed(c: Contents, r: Random) -> Contents:
    return redone(
        launches_changed(c, lambda v: with_facts(v, params_total=int(v.facts["params_total"] * 0.7)), compared(c).launch_ids)
    )


def peaks_changed(c: Contents, r: Random) -> Contents:
    def lower(launch: Launch) -> Launch:
        peaks = launch.facts["peaks"]
        return with_facts(
            launch, peaks={**peaks, "matrix_flops_per_s": {k: 0.6 * v for k, v in peaks["matrix_flops_per_s"].items()}}
        )

    return redone(launches_changed(c, lower, compared(c).launch_ids))


def protocol_upgraded(c: Contents, r: Random) -> Contents:
    return redone(with_spec(c, lambda spec: replace(spec, protocol="publish")))


def warm_up_in_window(c: Contents, r: Random) -> Contents:
    """The warm-up's steps count as the window's; or the window's first ones, the slow ones, as the warm-up's."""
    for name in compared(c).launch_ids:
        launch, trace = c.launches[name], c.traces[name]
        warm, steps = trace.get("warm_up_step"), trace.get("step")
        assert warm is not None and steps is not None
        joined = replace(steps, t_s=np.concatenate([warm.t_s, steps.t_s]), values=np.concatenate([warm.values, steps.values]))
        window = replace(launch.windows["window"], start_s=launch.windows["warm_up"].start_s)
        windows = {**launch.windows, "window": window, "warm_up": replace(launch.windows["warm_up"], end_s=window.start_s)}
        c = replace(c, launches={**c.launches, name: replace(launch, windows=windows)},
                    traces={**c.traces, name: with_series(trace, "step", lambda s, j=joined: j)})  # fmt: skip
    return redone(c)


def tokens_inflated(c: Contents, r: Random) -> Contents:
    return redone(launches_changed(c, lambda v: with_facts(v, step_tokens=v.facts["step_tokens"] * 2), compared(c).launch_ids))


def quality_raised(c: Contents, r: Random) -> Contents:
    """A better accuracy; where no quality was taken, a smaller model."""

    def better(launch: Launch) -> Launch:
        taken = launch.facts.get("quality") or {}
        if not taken.get("quality"):
            return with_facts(launch, weight_bytes=int(launch.facts["weight_bytes"] * 0.5))
        return with_facts(
            launch, quality={**taken, "quality": taken["quality"] * 1.13, "next_token_accuracy": taken["quality"] * 1.13}
        )

    return redone(launches_changed(c, better, compared(c).launch_ids))


FAMILIES: tuple[Forgery, ...] = (
    metric_changed, launch_metric_changed, trace_scaled, samples_dropped, samples_dropped_and_closed, window_shifted, device_renamed,
    copied_with_noise, energy_scaled, counter_scaled_in_steps, steps_smoothed, block_duplicated, baseline_swapped, params_changed,
    peaks_changed, protocol_upgraded, warm_up_in_window, tokens_inflated, quality_raised,
)  # fmt: skip


# Strategies: what is changed and by how much is drawn.


def _launch(c: Contents, r: Random) -> str:
    return str(r.choice(list(compared(c).launch_ids)))


def _factor(r: Random) -> float:
    """A change worth cheating for, 8 to 60 %, up or down."""
    return float(math.exp(r.choice([-1, 1]) * r.uniform(0.08, 0.5)))


def _series(c: Contents, name: str, r: Random) -> str:
    return str(r.choice([s.name for s in c.traces[name].series if len(s.t_s) > 1 and np.ptp(s.values) > 0]))


def any_fact(c: Contents, r: Random) -> Contents:
    """A number among the facts on which a metric stands, of every launch of a row or of one."""
    name = _launch(c, r)
    names = (
        "step_tokens",
        "step_samples",
        "step_flops",
        "params_total",
        "params_active",
        "weight_bytes",
        "seed",
        "threads",
        "cores",
        "kv_cached_tokens",
    )
    key = str(r.choice([n for n in names if c.launches[name].facts.get(n)]))
    factor, only = _factor(r), (name,) if r.random() < 0.5 else compared(c).launch_ids

    def changed(launch: Launch) -> Launch:
        value = launch.facts[key] * factor
        return with_facts(
            launch,
            **{key: max(1, int(value)) + (int(value) == launch.facts[key]) if isinstance(launch.facts[key], int) else value},
        )

    return redone(launches_changed(c, changed, only))


def any_series_scaled(c: Contents, r: Random) -> Contents:
    name = _launch(c, r)
    which, factor = _series(c, name, r), _factor(r)
    return redone(traces_changed(c, lambda t: with_series(t, which, lambda s: replace(s, values=s.values * factor)), (name,)))


def any_series_moved(c: Contents, r: Random) -> Contents:
    name = _launch(c, r)
    which, by_s = _series(c, name, r), float(r.uniform(0.05, 0.5))
    return redone(traces_changed(c, lambda t: with_series(t, which, lambda s: replace(s, t_s=s.t_s + by_s)), (name,)))


def any_times_stretched(c: Contents, r: Random) -> Contents:
    """All times of a launch, borders and samples alike: the most coherent of the simple ones."""
    name, factor = _launch(c, r), float(r.uniform(0.5, 0.9))

    def shorter(series: Series) -> Series:
        return replace(series, t_s=series.t_s * factor, values=series.values * factor if series.unit == "s" else series.values)

    windows = {n: replace(w, start_s=w.start_s * factor, end_s=w.end_s * factor) for n, w in c.launches[name].windows.items()}
    c = traces_changed(c, lambda t: Trace(series=tuple(map(shorter, t.series))), (name,))
    return redone(launches_changed(c, lambda v: replace(v, windows=windows), (name,)))


def any_steps_left_out(c: Contents, r: Random) -> Contents:
    name = _launch(c, r)
    keep = r.random(len(steps_of(c, name))) > r.uniform(0.1, 0.4)
    keep[:3], keep[3] = True, False
    return redone(
        traces_changed(
            c, lambda t: with_series(t, "step", lambda s: replace(s, t_s=s.t_s[keep], values=s.values[keep])), (name,)
        )
    )


def any_border(c: Contents, r: Random) -> Contents:
    name, which = _launch(c, r), str(r.choice(["window", "warm_up"]))
    window = c.launches[name].windows[which]
    by_s = float(r.choice([-1, 1]) * r.uniform(0.05, 0.5)) * window.length_s
    moved = replace(window, start_s=window.start_s + by_s) if r.random() < 0.5 else replace(window, end_s=window.end_s + by_s)
    if moved.end_s <= moved.start_s:
        moved = replace(window, end_s=window.end_s + abs(by_s))
    return redone(launches_changed(c, lambda v: replace(v, windows={**v.windows, which: moved}), (name,)))


def any_digits_rounded(c: Contents, r: Random) -> Contents:
    name, places = _launch(c, r), int(r.integers(3, 6))
    return redone(with_steps(c, name, np.maximum(np.round(steps_of(c, name), places), 10.0**-places)))


def any_two_traces_swapped(c: Contents, r: Random) -> Contents:
    one, other = r.choice(list(c.launches), 2, replace=False)
    return redone(replace(c, traces={**c.traces, one: c.traces[other], other: c.traces[one]}))


def any_series_of_another(c: Contents, r: Random) -> Contents:
    one, other = r.choice(list(c.launches), 2, replace=False)
    which = str(r.choice(["step", "process_memory", "process_cpu_time"]))
    taken = c.traces[other].get(which)
    assert taken is not None
    return redone(traces_changed(c, lambda t: with_series(t, which, lambda s: taken), (one,)))


def any_outliers_cut(c: Contents, r: Random) -> Contents:
    for name in compared(c).launch_ids:
        steps = steps_of(c, name)
        c = with_steps(c, name, np.minimum(steps, np.percentile(steps, r.uniform(40, 80))))
    return redone(c)


def any_provenance(c: Contents, r: Random) -> Contents:
    key = str(r.choice(["device_name", "cpu", "cores", "python", "packages", "source_digest"]))
    new = {"cores": "96", "packages": '{"torch": "9.9"}'}.get(key, "another")

    def changed(record: Any) -> Any:
        return replace(record, provenance={**record.provenance, key: new})

    return replace(launches_changed(c, changed), cases=tuple(map(changed, c.cases)))


def any_identity(c: Contents, r: Random) -> Contents:
    name, row = _launch(c, r), compared(c)
    what = int(r.integers(5))
    if what == 0:
        return replace(c, cases=tuple(replace(x, case_id=digest(name)) if x is row else x for x in c.cases))
    if what == 1:
        return replace(c, cases=tuple(replace(x, launch_ids=x.launch_ids[:-1]) if x is row else x for x in c.cases))
    change: Mapping[int, Mapping[str, Any]] = {2: {"env_id": digest(name)}, 3: {"block_id": "block"}, 4: {"block": 7}}
    return redone(launches_changed(c, lambda v: replace(v, **change[what]), (name,)))


def any_metric(c: Contents, r: Random) -> Contents:
    row = c.cases[int(r.integers(len(c.cases)))]
    having = [m.name for m in row.metrics if m.value]
    which, factor = str(r.choice(having)), _factor(r)
    changed = tuple(replace(m, value=m.value * factor) if m.name == which and m.value else m for m in row.metrics)
    return replace(c, cases=tuple(replace(x, metrics=changed) if x is row else x for x in c.cases))


def any_interval(c: Contents, r: Random) -> Contents:
    row, share = compared(c), float(r.uniform(0.2, 0.9))

    def narrower(m: Any) -> Any:
        if m.ratio is None or m.ratio_lower is None or m.ratio_lower == m.ratio_upper:
            return m
        return replace(
            m, ratio_lower=m.ratio + share * (m.ratio_lower - m.ratio), ratio_upper=m.ratio + share * (m.ratio_upper - m.ratio)
        )

    return replace(c, cases=tuple(replace(x, metrics=tuple(map(narrower, x.metrics))) if x is row else x for x in c.cases))


def any_start(c: Contents, r: Random) -> Contents:
    """Launches that began when others ran."""
    name = _launch(c, r)
    before = min(datetime.fromisoformat(v.started_at) for v in c.launches.values())
    begun = (before + timedelta(seconds=float(r.uniform(0, 0.3)))).isoformat(timespec="milliseconds")
    others = [n for n, v in c.launches.items() if datetime.fromisoformat(v.started_at) > before]
    return launches_changed(c, lambda v: replace(v, started_at=begun), (name if name in others else others[0],))


def any_steps_repeated(c: Contents, r: Random) -> Contents:
    """The faster half of the steps, twice."""
    for name in compared(c).launch_ids:
        steps = steps_of(c, name)
        fast = r.permutation(np.sort(steps)[: max(2, len(steps) // 2)])
        c = with_steps(c, name, np.concatenate([fast, fast]), careful=True)
    return redone(c)


def any_spec_parameter(c: Contents, r: Random) -> Contents:
    """Another batch size than what ran, ids and all."""
    factor = int(r.integers(2, 5))
    return redone(
        with_spec(c, lambda spec: replace(spec, params={**spec.params, "batch_size": spec.params["batch_size"] * factor}))
    )


STRATEGIES: tuple[Forgery, ...] = (
    any_fact, any_series_scaled, any_series_moved, any_times_stretched, any_steps_left_out, any_border, any_digits_rounded,
    any_two_traces_swapped, any_series_of_another, any_outliers_cut, any_provenance, any_identity, any_metric, any_interval, any_start,
    any_steps_repeated, any_spec_parameter,
)  # fmt: skip


# Coherent forgeries: every number that follows from a changed one is changed too.


def careful_smoothing(c: Contents, r: Random) -> Contents:
    """Outliers cut in whole ns, and as many steps added as the rule asks for."""
    for name in compared(c).launch_ids:
        steps = np.minimum(steps_of(c, name), np.percentile(steps_of(c, name), 80))
        steps = np.concatenate([steps, r.choice(steps, len(steps)) * np.exp(r.normal(0, 0.02, len(steps)))])
        asked_s = {"smoke": 0.2, "quick": 1.5, "publish": 10.0}[c.launches[name].spec.protocol]
        c = with_steps(c, name, steps[: max(5, int(np.searchsorted(np.cumsum(steps), asked_s)) + 1)], careful=True)
    return redone(c)


def careful_speed(c: Contents, r: Random) -> Contents:
    """Times that were never measured: drawn anew at nine tenths of the real ones, in whole ns, until the rule is met."""
    for name in compared(c).launch_ids:
        steps = steps_of(c, name)
        drawn = 0.9 * np.median(steps) * np.exp(r.normal(0, float(np.std(np.log(steps))), 4 * len(steps) + 20))
        asked_s = {"smoke": 0.2, "quick": 1.5, "publish": 10.0}[c.launches[name].spec.protocol]
        c = with_steps(c, name, drawn[: max(5, int(np.searchsorted(np.cumsum(drawn), asked_s)) + 1)], careful=True)
    return redone(c)


def careful_accuracy(c: Contents, r: Random) -> Contents:
    """A tenth more tokens right, in whole tokens."""

    def better(launch: Launch) -> Launch:
        taken = launch.facts.get("quality") or {}
        if not taken.get("next_token_accuracy"):
            return launch
        right = round(taken["next_token_accuracy"] * 1.1 * taken["validation_tokens"]) / taken["validation_tokens"]
        return with_facts(launch, quality={**taken, "quality": right, "next_token_accuracy": right})

    return redone(launches_changed(c, better, compared(c).launch_ids))


CAREFUL: tuple[Forgery, ...] = (careful_smoothing, careful_speed, careful_accuracy)
