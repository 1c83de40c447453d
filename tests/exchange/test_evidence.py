"""Evidence on records of any hand: every value gives findings and none an exception; copies are known; all of it is quick."""

from __future__ import annotations

import json
import math
import pickle
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effbench.exchange import facts as facts_
from effbench.exchange import known, physics, plausible, timing
from effbench.exchange.checking import Seen
from effbench.exchange.contents import Contents
from effbench.exchange.evidence import findings
from effbench.exchange.known import Known
from effbench.exchange.report import refusals
from effbench.schema import Reading, Trace, Window
from effbench.store import Store
from tests.commands import ROOT
from tests.exchange import forgeries, honest

STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 10**400, -(10**30), float("nan"), float("inf"), "", "\ud800", "<b>" * 1000, [], {}, [[]], {"a": {}}, b"", 1e308,
)  # fmt: skip


@cache
def good() -> Contents:
    return honest.bundle(11, honest.CPUS[0], workload="finetune", protocol_name="smoke")


@cache
def good_gpu() -> Contents:
    return honest.bundle(12, honest.GPUS[0], workload="generate", protocol_name="smoke")


def first_launch(contents: Contents) -> str:
    return next(iter(contents.launches))


def test_a_good_bundle_has_no_refusal():
    assert not refusals(findings(good(), Known()))
    assert not refusals(findings(good_gpu(), Known()))


def test_nothing_at_all_gives_no_exception():
    assert findings(Contents(manifest={}, cases=()), Known()) == []


def every_field(contents: Contents) -> Iterator[tuple[str, str]]:
    launch = contents.launches[first_launch(contents)]
    yield from (("row", name) for name in vars(contents.cases[0]))
    yield from (("launch", name) for name in vars(launch))
    yield from (("fact", name) for name in launch.facts)
    yield from (("quality", name) for name in launch.facts["quality"])
    yield from (("spec", name) for name in vars(launch.spec))
    yield from (("param", name) for name in launch.spec.params)
    yield from (("window", name) for name in ("start_s", "end_s", "ended_by"))
    yield from (("metric", name) for name in vars(contents.cases[0].metrics[0]))
    yield from (("reading", name) for name in vars(launch.metrics[0]))
    yield from (("provenance", name) for name in launch.provenance)


def changed(contents: Contents, kind: str, name: str, value: Any) -> Contents:
    """The first row or launch with another value in one place."""
    key = first_launch(contents)
    launch, row = contents.launches[key], contents.cases[0]
    if kind == "row":
        return replace(contents, cases=(replace(row, **{name: value}), *contents.cases[1:]))
    if kind == "metric":
        metrics = (replace(row.metrics[0], **{name: value}), *row.metrics[1:])
        return replace(contents, cases=(replace(row, metrics=metrics), *contents.cases[1:]))
    new: Any = {
        "launch": lambda: {name: value},
        "fact": lambda: {"facts": {**launch.facts, name: value}},
        "quality": lambda: {"facts": {**launch.facts, "quality": {**launch.facts["quality"], name: value}}},
        "spec": lambda: {"spec": replace(launch.spec, **{name: value})},
        "param": lambda: {"spec": replace(launch.spec, params={**launch.spec.params, name: value})},
        "window": lambda: {"windows": {**launch.windows, "window": replace(launch.windows["window"], **{name: value})}},
        "reading": lambda: {"metrics": (replace(launch.metrics[0], **{name: value}), *launch.metrics[1:])},
        "provenance": lambda: {"provenance": {**launch.provenance, name: value}},
    }[kind]()
    return replace(contents, launches={**contents.launches, key: replace(launch, **new)})


FIELDS = tuple(every_field(good()))


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(places=st.lists(st.tuples(st.sampled_from(FIELDS), st.sampled_from(STRANGE)), min_size=1, max_size=3))
def test_no_value_of_a_field_ends_the_checks(places: list[tuple[tuple[str, str], Any]]):
    contents = good()
    try:
        for (kind, name), value in places:
            contents = changed(contents, kind, name, value)
    except (TypeError, AttributeError):  # a second change cannot reach into what the first one replaced
        return
    for finding in findings(contents, Known()):
        json.dumps(vars(finding))
        assert len(finding.message) < 600 and finding.message.isprintable()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_series_ends_the_checks(data: st.DataObject):
    contents = data.draw(st.sampled_from([good(), good_gpu()]))
    key = first_launch(contents)
    trace = contents.traces[key]
    which = data.draw(st.sampled_from([s.name for s in trace.series]))
    numbers = st.lists(st.floats() | st.sampled_from([0.0, -1.0, 1e300, 5e-324]), max_size=5)
    t_s, values = data.draw(numbers), data.draw(numbers)
    length = min(len(t_s), len(values))
    same_length = data.draw(st.booleans())
    new = {
        "t_s": np.array(t_s[:length] if same_length else t_s),
        "values": np.array(values[:length] if same_length else values),
    }
    forged = Trace(series=tuple(replace(s, **new) if s.name == which else s for s in trace.series))
    for finding in findings(replace(contents, traces={**contents.traces, key: forged}), Known()):
        json.dumps(vars(finding))


def test_a_check_that_raises_refuses_and_names_itself():
    key = first_launch(good())
    forged = changed(good(), "fact", "peaks", "none")
    found = [f for f in refusals(findings(forged, Known())) if "cannot be checked" in f.message]
    assert found
    assert any(key[:12] in f.where for f in found)


def test_a_missing_trace_and_a_missing_launch_are_named():
    key = good().cases[0].launch_ids[0]
    without_trace = replace(good(), traces={n: t for n, t in good().traces.items() if n != key})
    assert any("trace" in f.message and key[:12] in f.where for f in refusals(findings(without_trace, Known())))
    without = replace(good(), launches={n: v for n, v in good().launches.items() if n != key})
    assert any(key[:12] in f.message for f in refusals(findings(without, Known())))


def test_messages_name_the_number_the_limit_and_the_unit():
    key = first_launch(good_gpu())

    def hotter(trace: Trace) -> Trace:
        for name in ("gpu_power_instant", "gpu_energy_counter"):
            trace = forgeries.with_series(trace, name, lambda s: replace(s, values=np.rint(s.values * 2000) / 1000))
        return trace

    found = refusals(findings(forgeries.redone(forgeries.traces_changed(good_gpu(), hotter, (key,))), Known()))
    power = [f for f in found if f.check == "power"]
    assert power and "700 W" in power[0].message and key[:12] in power[0].where


def test_a_clock_above_the_devices_is_told():
    key = first_launch(good_gpu())

    def faster(trace: Trace) -> Trace:
        return forgeries.with_series(trace, "gpu_clock_sm", lambda s: replace(s, values=s.values + 200))

    found = refusals(findings(forgeries.traces_changed(good_gpu(), faster, (key,)), Known()))
    assert [f.check for f in found] == ["clocks"] and "1980 MHz" in found[0].message


# What is here already.


def test_known_goes_through_json_and_back(tmp_path: Path):
    store = write(good(), tmp_path)
    first = Known.of([store])
    assert len(first.runs) == len(good().cases)
    assert len(first.launches) == len(good().launches)
    assert Known.from_json(json.loads(json.dumps(first.to_json()))) == first


@pytest.mark.parametrize("data", [{}, {"runs": [], "launches": {"a": ["x"]}}, {"runs": [], "launches": {"a": ["x", "zz"]}}])
def test_json_that_is_nothing_known_is_refused(data: Any):
    with pytest.raises((KeyError, TypeError, ValueError)):
        Known.from_json(data)


def write(contents: Contents, folder: Path) -> Store:
    store = Store(folder)
    for key, launch in contents.launches.items():
        store.write_launch(launch, contents.traces[key])
    for row in contents.cases:
        store.write_case(row)
    return store


def test_a_run_that_is_here_is_refused_with_its_reason(tmp_path: Path):
    found = refusals(findings(good(), Known.of([write(good(), tmp_path)])))
    assert {f.check for f in found} == {"known"}
    assert all("here already" in f.message for f in found)


def test_new_rows_on_launches_that_are_here_are_none(tmp_path: Path):
    """A baseline may be submitted with one row, and again with the next."""
    here = Known.of([write(good(), tmp_path)])
    new = replace(good(), cases=tuple(replace(row, run_id=f"new{row.run_id}") for row in good().cases))
    assert not refusals(findings(new, here))


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_copy_of_what_is_here_is_recognised_scaled_and_noised(noise: float):
    copy, random = honest.bundle(13, honest.CPUS[0], workload="finetune", step_s=0.03), np.random.default_rng(5)
    launches = {name: known.fingerprint(trace) for name, trace in copy.traces.items()}
    here = Known(launches={name: p for name, p in launches.items() if p})
    for key in list(copy.launches):
        steps = forgeries.steps_of(copy, key)
        steps = steps * (1 if not noise else 0.9) * np.exp(random.normal(0, noise * float(np.std(np.log(steps))), len(steps)))
        copy = forgeries.with_steps(copy, key, steps, careful=True)
    renamed = {f"other-{key}": replace(v, launch_id=f"other-{key}") for key, v in copy.launches.items()}
    rows = tuple(
        replace(row, run_id=f"new{row.run_id}", launch_ids=tuple(f"other-{i}" for i in row.launch_ids),
                baseline_launch_ids=tuple(f"other-{i}" for i in row.baseline_launch_ids))
        for row in copy.cases
    )  # fmt: skip
    moved = replace(copy, cases=rows, launches=renamed, traces={f"other-{key}": t for key, t in copy.traces.items()})
    found = [f for f in refusals(findings(moved, here)) if f.check == "known"]
    assert len({f.where for f in found}) >= 0.8 * len(renamed)


def test_independent_launches_are_never_alike():
    random = np.random.default_rng(3)
    shapes = [known.changes(0.05 * np.exp(random.normal(0, 0.05, int(random.integers(26, 200))))) for _ in range(600)]
    assert known.alike(shapes) == []
    assert known.alike(shapes[:300], shapes[300:]) == []


def test_a_common_ramp_and_a_common_period_are_no_likeness():
    random = np.random.default_rng(4)
    ramp, turns = 0.1 * np.exp(-np.arange(100) / 20), np.tile([0.0, 0.1, 0.03, 0.2], 25)
    shapes = [known.changes(0.05 * np.exp(ramp + turns + random.normal(0, 0.01, 100))) for _ in range(100)]
    assert known.alike(shapes) == []


def test_the_same_steps_may_be_long_in_every_launch_and_a_copy_is_still_found():
    """As an allocator that settles makes them: seen in three launches of one program, 0.91 to 0.98 alike with these steps."""
    random = np.random.default_rng(5)
    long = np.zeros(100)
    long[[7, 8, 13, 14, 18, 22, 23, 31, 40, 41, 55]] = [0.4, 0.7, 0.35, 0.6, 0.3, 0.3, 0.5, 0.3, 0.4, 0.6, 0.3]
    steps_s = [0.015 * np.exp(long + random.normal(0, 0.01, 100)) for _ in range(60)]
    assert known.alike([known.changes(one) for one in steps_s]) == []
    copies = [known.changes(one * 1.07 * np.exp(random.normal(0, 0.002, 100))) for one in steps_s]
    assert len(known.alike([known.changes(one) for one in steps_s], copies)) >= 57


def test_probabilities_of_chi_square_equal_tables():
    # Abramowitz and Stegun, table 26.7: P(χ² < x) for 2, 5 and 10 degrees of freedom.
    for value, degrees, right in ((0.02010067, 2, 0.01), (11.0705, 5, 0.95), (3.94030, 10, 0.05)):
        assert math.isclose(plausible.chi_square_below(value, degrees), right, rel_tol=1e-4)


def test_blocks_that_agree_beyond_their_noise_are_told():
    """Five blocks with steps of 5 % noise whose means agree to a millionth."""
    contents, random = honest.bundle(21, honest.CPUS[1], workload="pretrain", protocol_name="publish"), np.random.default_rng(1)
    for row in contents.cases:
        for key in row.launch_ids:
            steps = forgeries.steps_of(contents, key)
            drawn = np.exp(random.normal(0, 0.05, len(steps)))
            contents = forgeries.with_steps(contents, key, 0.03 * drawn / np.exp(np.mean(np.log(drawn))), careful=True)
    found = [f for f in findings(forgeries.redone(contents), Known()) if f.check == "spread"]
    assert found and found[0].severity == "refused"


# What the real GPU probe writes down passes.


def test_series_of_the_real_sampling_process_are_sound():
    """NVML's stub, pynvml, the probe and its process are real; the launch around them is written by hand."""
    from tests.fake_nvml import Gpu, Machine, World, stairs

    machine = Machine()
    try:
        gpu = Gpu(power=stairs((1.0, 500.0), (2.3, 120.0)), rules=())
        seen, (start_s, end_s) = machine.observe_really(
            World(gpus=[gpu], environment={"CUDA_VISIBLE_DEVICES": "0"}), idle_s=0.5, window_s=0.6
        )
    finally:
        machine.close()
    launch = good_gpu().launches[first_launch(good_gpu())]
    windows = {
        "build": Window(start_s=0.0, end_s=0.0), "warm_up": Window(start_s=0.0, end_s=0.0),
        "window": Window(start_s=start_s, end_s=end_s, ended_by="rule"), "close_probes": Window(start_s=end_s, end_s=end_s + 2.0),
    }  # fmt: skip
    facts = {**launch.facts, **seen.result.facts}
    one = Seen(replace(launch, windows=windows, facts=facts, reasons=seen.result.reasons), Trace(series=seen.result.series))
    assert {"gpu_energy_counter", "gpu_power_instant", "gpu_memory_used"} <= one.series.keys()
    energy = dict.fromkeys(("aec_w",), Reading(name="aec_w", value=500.0, unit="W"))
    found = [
        *physics.sensors(one),
        *physics.memory(one),
        *physics.energy(one, energy),
        *plausible.samples(one),
        *facts_.flags(one),
    ]
    found += [f for f in timing.ticks(one) if "borders" not in f.message]
    assert not [f for f in found if f.severity == "refused"]


# Speed.

CHILD = """
import pickle, resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (500_000_000, 500_000_000))
began_s = time.process_time()
from effbench.exchange.evidence import findings
from effbench.exchange.known import Known
contents = pickle.load(open(sys.argv[1], "rb"))
loaded_s = time.process_time()
found = findings(contents, Known())
heavy = [name for name in ("pandas", "duckdb", "torch", "scipy") if name in sys.modules]
print(len(contents.cases), len(contents.launches), sum(f.severity == "refused" for f in found), time.process_time() - loaded_s, loaded_s - began_s, *heavy)
"""


@pytest.mark.alone
def test_a_hundred_runs_are_checked_in_seconds_and_500_mb(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    parts = [honest.bundle(seed) for seed in range(100, 142)]
    contents = Contents(
        manifest={}, cases=tuple(row for part in parts for row in part.cases)[:100],
        launches={n: v for part in parts for n, v in part.launches.items()}, traces={n: v for part in parts for n, v in part.traces.items()},
    )  # fmt: skip
    path = tmp_path / "contents.pickle"
    path.write_bytes(pickle.dumps(contents))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows, launches, refused, took_s, loading_s, *heavy = done.stdout.split()
    with capsys.disabled():
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
        print(
            f"\n{rows} rows, {launches} launches: {float(took_s):.2f} s of CPU, {float(loading_s):.2f} s to load, at most {peak:.0f} MB resident"
        )
    assert (rows, refused) == ("100", "0")
    assert not heavy
    assert float(took_s) < 7


def test_windows_are_compared_in_any_type():
    key = first_launch(good())
    launch = good().launches[key]
    strange = {**launch.windows, "window": Window(start_s="x", end_s=None, ended_by=3)}  # type: ignore[arg-type]
    forged = replace(good(), launches={**good().launches, key: replace(launch, windows=strange)})
    assert any(f.check == "windows" for f in refusals(findings(forged, Known())))
