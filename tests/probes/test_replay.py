"""Recordings survive a round trip, and play back in step with the live window."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from effbench.errors import ProbeError
from effbench.probe import ProbeContext
from effbench.probes.replay import VARIABLE, Recording, ReplayProbe, load, save
from effbench.schema import Series, Trace, Window


def recorded(window: Window | None = Window(start_s=100.0, end_s=105.0, ended_by="rule")) -> Recording:  # noqa: B008
    t_s = np.arange(95.0, 110.0, 0.5)
    power = Series(name="gpu_power_instant", unit="W", scope="gpu", source="nvml:186", t_s=t_s, values=np.full(len(t_s), 300.0))
    step = Series(name="step", unit="s", scope="process", source="perf_counter", t_s=t_s, values=np.full(len(t_s), 0.5))
    facts = {"gpu_name": "NVIDIA H200", "reads": 30}
    return Recording(trace=Trace(series=(power, step)), facts=facts, reasons=("power_capped",), window=window)


def play(source: Recording | Path | None, begin_s: float = 7.0) -> ReplayProbe:
    probe = ReplayProbe(ProbeContext(device="cuda", pid=1, threads=1, clock=lambda: begin_s), source)
    with probe:
        probe.window_begins()
        probe.window_ended()
    return probe


def test_a_recording_survives_the_file(tmp_path: Path) -> None:
    before = recorded()
    save(tmp_path / "launch.npz", before)
    after = load(tmp_path / "launch.npz")
    assert (after.facts, after.reasons, after.window) == (before.facts, before.reasons, before.window)
    for ours, theirs in zip(before.trace.series, after.trace.series, strict=True):
        assert (ours.name, ours.unit, ours.scope, ours.source) == (theirs.name, theirs.unit, theirs.scope, theirs.source)
        assert np.array_equal(ours.t_s, theirs.t_s)
        assert np.array_equal(ours.values, theirs.values)


def test_the_recorded_window_begins_with_the_live_one() -> None:
    [power] = play(recorded(), begin_s=7.0).result().series
    assert power.name == "gpu_power_instant"  # the live launch has steps of its own
    assert power.t_s[0] == pytest.approx(2.0)
    assert power.values[0] == 300.0


def test_facts_and_flags_are_played_back(tmp_path: Path) -> None:
    save(tmp_path / "launch.npz", recorded())
    probe = play(tmp_path / "launch.npz")
    assert probe.result().facts["gpu_name"] == "NVIDIA H200"
    assert probe.result().reasons == ("power_capped",)
    assert probe.wants_idle


def test_without_a_window_times_stay_as_they_are() -> None:
    probe = play(recorded(window=None))
    assert probe.result().series[0].t_s[0] == 95.0
    assert not probe.wants_idle


def test_the_environment_can_name_the_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "launch.npz", recorded())
    monkeypatch.setenv(VARIABLE, str(tmp_path / "launch.npz"))
    assert play(None).result().facts["reads"] == 30
    assert "launch.npz" in ReplayProbe.capabilities()[0].detail


def test_nothing_to_replay_is_a_reason_and_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert play(None).result().reasons == ("nothing_to_replay",)


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut off"])
def test_a_damaged_recording_is_a_reason_and_load_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "launch.npz"
    path.write_bytes(content)
    assert play(path).result().reasons == ("recording_damaged",)
    with pytest.raises(ProbeError, match=r"launch\.npz"):
        load(path)


def test_a_recording_of_another_format_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "launch.npz", head=np.array('{"format": 99, "series": []}'))
    with pytest.raises(ProbeError, match="format 99"):
        load(tmp_path / "launch.npz")
