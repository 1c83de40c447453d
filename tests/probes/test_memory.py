"""The memory probe in processes of their own, where birth is the test's to choose."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace
from typing import Any

import pytest

from effbench.probe import ProbeContext
from effbench.probes import memory
from effbench.probes.memory import MemoryProbe, birth
from effbench.reasons import HOST

pytestmark = pytest.mark.alone

MB = 1e6
PRELUDE = """
    import json, os, time
    import numpy as np
    from effbench.probe import ProbeContext
    from effbench.probes import memory
    from effbench.probes.memory import MemoryProbe, birth
    from effbench.probes.sampling import launch_clock
    def touch(megabytes):
        return np.ones(megabytes * 125_000)
    def show(probe):
        r = probe.result()
        s = {x.name: (x.t_s.tolist(), x.values.tolist(), x.unit, x.scope) for x in r.series}
        print(json.dumps({"facts": dict(r.facts), "reasons": r.reasons, "series": s}))
    context = ProbeContext(device="cpu", pid=os.getpid(), threads=1, clock=launch_clock())
"""


def launch(body: str) -> dict[str, Any]:
    """Run `body` in a fresh interpreter; the probe's result as it prints it."""
    code = textwrap.dedent(PRELUDE) + textwrap.dedent(body)
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout))


@pytest.fixture(scope="module")
def launched() -> dict[str, Any]:
    """80 MB built, 150 MB more for a moment inside the window, 300 MB for a moment before it."""
    return launch("""
        birth()
        probe = MemoryProbe(context)
        built = touch(80)
        with probe:
            warm_up = touch(300)
            del warm_up
            time.sleep(0.2)
            probe.window_begins()
            begin_s = context.clock()
            time.sleep(0.3)
            inside = touch(150)
            time.sleep(0.4)
            del inside
            time.sleep(0.3)
            probe.window_ended()
        probe._facts["window"] = [begin_s, context.clock()]
        show(probe)
    """)


def test_the_peak_is_the_one_of_the_window_above_birth(launched: dict[str, Any]) -> None:
    assert 225 * MB < launched["facts"]["host_memory_peak_bytes"] < 250 * MB
    assert launched["reasons"] == []


def test_private_memory_is_what_the_launch_itself_holds(launched: dict[str, Any]) -> None:
    assert 75 * MB < launched["facts"]["host_private_bytes"] < 100 * MB


def test_memory_over_time_is_sampled_at_10_hz_and_brackets_the_window(launched: dict[str, Any]) -> None:
    t_s, values, unit, scope = launched["series"]["process_memory"]
    begin_s, end_s = launched["facts"]["window"]
    inside = [v for t, v in zip(t_s, values, strict=True) if begin_s <= t <= end_s]
    assert (unit, scope) == ("B", "process")
    assert t_s[0] < begin_s
    due = (end_s - begin_s) / memory.PERIOD_S
    assert (
        due / 3 <= len(inside) <= due + 4
    )  # a busy machine serves the sampler late, never early; start, mark and stop add one each
    assert 225 * MB < max(inside) < 250 * MB
    assert 75 * MB < min(inside) < 100 * MB


def test_sampling_takes_less_than_one_percent_of_a_core() -> None:
    """The median of five launches: one alone, on a machine that others use, has taken seven times its usual."""
    launches = [
        launch("""
            birth()
            probe = MemoryProbe(context)
            built = touch(80)
            with probe:
                probe.window_begins()
                time.sleep(1.5)
                probe.window_ended()
            show(probe)
        """)
        for _ in range(5)
    ]
    shares = [each["facts"]["memory_sampler_cpu_share"] for each in launches]
    assert statistics.median(shares) < 0.01, shares


def test_a_forked_launch_has_a_birth_of_its_own() -> None:
    result = launch("""
        birth()
        inherited = touch(100)
        if pid := os.fork():
            os.waitpid(pid, 0)
            os._exit(0)
        birth()
        context = ProbeContext(device="cpu", pid=os.getpid(), threads=1, clock=launch_clock())
        with MemoryProbe(context) as probe:
            probe.window_begins()
            mine = touch(40)
            probe.window_ended()
        show(probe)
    """)
    assert 36 * MB < result["facts"]["host_memory_peak_bytes"] < 60 * MB
    assert 36 * MB < result["facts"]["host_private_bytes"] < 60 * MB


def test_without_a_birth_nothing_is_claimed() -> None:
    result = launch("""
        with MemoryProbe(context) as probe:
            probe.window_begins()
            probe.window_ended()
        show(probe)
    """)
    assert result == {"facts": {}, "reasons": ["birth_not_taken"], "series": {}}


def test_a_peak_that_cannot_be_reset_is_missing_with_its_reason() -> None:
    result = launch("""
        memory._reset_peak = lambda pid: False
        memory._private_bytes = lambda pid: None
        birth()
        with MemoryProbe(context) as probe:
            probe.window_begins()
            probe.window_ended()
        show(probe)
    """)
    assert "host_memory_peak_bytes" not in result["facts"]
    assert "host_private_bytes" not in result["facts"]
    assert result["reasons"] == ["peak_not_reset", "private_not_readable"]


def test_the_cuda_allocator_is_reset_at_the_window_and_read_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    cuda = SimpleNamespace(
        is_available=lambda: True,
        reset_peak_memory_stats=lambda: calls.append("reset"),
        max_memory_allocated=lambda: 7_000_000,
        max_memory_reserved=lambda: 9_000_000,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    with MemoryProbe(ProbeContext(device="cuda", pid=-1, threads=1, clock=time.perf_counter)) as probe:
        probe.window_begins()
        assert calls == ["reset"]
        probe.window_ended()
    facts = probe.result().facts
    assert (facts["allocated_peak_bytes"], facts["reserved_peak_bytes"]) == (7_000_000, 9_000_000)


def test_an_allocator_that_was_never_loaded_is_named_and_torch_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with MemoryProbe(ProbeContext(device="cuda", pid=-1, threads=1, clock=time.perf_counter)) as probe:
        probe.window_begins()
        probe.window_ended()
    assert probe.result().reasons == ("birth_not_taken", "allocator_not_loaded")
    assert "torch" not in sys.modules


def test_capabilities_name_a_remedy_for_everything_missing() -> None:
    for capability in MemoryProbe.capabilities():
        assert capability.what
        assert capability.available or capability.remedy


def test_every_reason_has_a_sentence() -> None:
    assert {"birth_not_taken", "peak_not_reset", "private_not_readable", "allocator_not_loaded"} <= set(HOST)
    assert birth() is birth()
