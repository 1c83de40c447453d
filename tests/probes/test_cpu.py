"""The CPU probe on this host, and on made-up /proc and /sys trees."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from effbench.errors import ProbeError
from effbench.probe import ProbeContext, ProbeResult
from effbench.probes.cpu import CpuProbe, RaplSource, rapl_zones
from effbench.probes.sampling import launch_clock
from effbench.schema import Series

pytestmark = pytest.mark.alone

CORES = sorted(os.sched_getaffinity(0))
TICKS = os.sysconf("SC_CLK_TCK")


def context(device: str = "cpu", clock: Callable[[], float] | None = None) -> ProbeContext:
    return ProbeContext(device=device, pid=os.getpid(), threads=2, clock=clock or launch_clock())


def watch(work: Callable[[], object], probe: CpuProbe | None = None) -> ProbeResult:
    """What the probe says of a window in which `work` runs."""
    with probe or CpuProbe(context()) as probe:
        probe.window_begins()
        work()
        probe.window_ended()
    return probe.result()


def series(result: ProbeResult, name: str) -> Series:
    return next(s for s in result.series if s.name == name)


def grown(result: ProbeResult, name: str) -> float:
    """How much a series grew over the window."""
    found = series(result, name)
    assert len(found.values) == 2
    return float(found.values[1] - found.values[0])


def spin(cpu_s: float) -> None:
    end_s = time.process_time() + cpu_s
    while time.process_time() < end_s:
        pass


def write_host(
    root: Path, *, busy_s: float = 0.0, stolen_s: float = 0.0, pressure_s: float = 0.0, quota_s: float = 0.0
) -> None:
    """A made-up host; busy and stolen seconds are those of all cores together."""
    for folder in ("proc/pressure", "sys/fs/cgroup"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    busy, stolen = round(busy_s * TICKS), round(stolen_s * TICKS)
    other = "cpu9999 900000 0 900000 0 0 0 0 900000 0 0"  # a core that is not ours
    rows = [
        f"cpu{core} {busy if core == CORES[0] else 0} 0 0 5 0 0 0 {stolen if core == CORES[0] else 0} 0 0" for core in CORES
    ]
    (root / "proc/stat").write_text("\n".join(["cpu 1 1 1 1 1 1 1 1 1 1", *rows, other, "intr 0"]))
    (root / "proc/pressure/cpu").write_text(
        f"some avg10=0.00 avg60=0.00 avg300=0.00 total={round(pressure_s * 1e6)}\nfull total=9\n"
    )
    (root / "sys/fs/cgroup/cpu.stat").write_text(f"usage_usec 5\nthrottled_usec {round(quota_s * 1e6)}\n")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A quiet made-up host that the probe reads instead of this one."""
    write_host(tmp_path)
    monkeypatch.setattr(CpuProbe, "root", tmp_path)
    return tmp_path


def one_second_of(host: Path, **changes: float) -> ProbeResult:
    """The probe's result for a window of one made-up second in which the host changes so."""
    now_s = 0.0

    def work() -> None:
        nonlocal now_s
        now_s += 1.0
        write_host(host, **changes)

    return watch(work, CpuProbe(context(clock=lambda: now_s)))


def write_rapl(root: Path, zone: str, name: str, energy_uj: int, range_uj: int = 1000_000) -> Path:
    folder = root / "sys/class/powercap" / zone
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in (("name", name), ("energy_uj", energy_uj), ("max_energy_range_uj", range_uj)):
        (folder / file).write_text(f"{text}\n")
    return folder / "energy_uj"


def test_cpu_time_of_the_window_is_the_work_s_and_not_the_probe_s() -> None:
    result = watch(lambda: spin(0.2))
    assert 0.199 <= grown(result, "process_cpu_time") <= 0.23
    found = series(result, "process_cpu_time")
    assert (found.unit, found.scope) == ("s", "process")
    assert found.t_s[0] < found.t_s[1]


def test_a_sleeping_window_costs_no_cpu_time() -> None:
    assert grown(watch(lambda: time.sleep(0.2)), "process_cpu_time") < 0.02


def test_cpu_time_of_reaped_children_counts() -> None:
    code = "import time\nwhile time.process_time() < 0.25: pass"
    result = watch(lambda: subprocess.run([sys.executable, "-S", "-c", code], check=True))
    assert 0.2 < grown(result, "process_cpu_time") < 0.6


def test_facts_say_where_the_launch_ran() -> None:
    facts = watch(lambda: None).facts
    assert facts["threads"] == 2
    assert facts["cores"] == len(CORES)
    assert facts["cpu_model"]
    assert facts["load_average"] >= 0


def test_a_window_that_never_ended_yields_no_series() -> None:
    with CpuProbe(context()) as probe:
        probe.window_begins()
    assert [s for s in probe.result().series if s.unit == "s"] == []


def test_stolen_time_and_pressure_are_those_of_our_cores(host: Path) -> None:
    result = one_second_of(host, stolen_s=0.02 * len(CORES), pressure_s=0.3)
    assert grown(result, "host_stolen_time") == pytest.approx(0.02 * len(CORES))
    assert grown(result, "host_pressure_some") == pytest.approx(0.3)
    assert "stolen_time" not in result.reasons


def test_more_than_five_percent_stolen_is_flagged(host: Path) -> None:
    assert "stolen_time" in one_second_of(host, stolen_s=0.06 * len(CORES)).reasons


def test_another_process_that_takes_a_tenth_of_the_cores_is_remarked(host: Path) -> None:
    crowded = one_second_of(host, busy_s=0.2 * len(CORES))
    assert "cpu_contended" in crowded.reasons
    assert crowded.facts["other_cpu_share"] == pytest.approx(0.2, abs=0.01)
    assert "cpu_contended" not in one_second_of(host, busy_s=0.2 * len(CORES) + 0.05 * len(CORES)).reasons


def test_a_quota_that_stops_the_launch_is_flagged(host: Path) -> None:
    assert "cpu_quota" in one_second_of(host, quota_s=0.1).reasons


def test_what_the_host_does_not_tell_is_missing_with_its_reason(host: Path) -> None:
    (host / "proc/pressure/cpu").unlink()
    (host / "proc/stat").unlink()
    result = watch(lambda: None)
    assert {s.name for s in result.series} == {"process_cpu_time"}
    assert set(result.reasons) == {"stolen_not_readable", "pressure_missing"}
    assert all(c.remedy for c in CpuProbe.capabilities() if not c.available)


def test_without_rapl_energy_is_missing_and_no_idle_stretch_is_wanted(host: Path) -> None:
    probe = CpuProbe(context())
    assert not probe.wants_idle
    assert watch(lambda: None, probe).facts["energy_reasons"] == ["rapl_missing"]
    assert "energy_reasons" not in watch(lambda: None, CpuProbe(context("cuda"))).facts


def test_rapl_that_only_root_may_read_says_so(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rapl(host, "intel-rapl:0", "package-0", 5)
    plain = Path.read_text

    def guarded(path: Path) -> str:
        if path.name == "energy_uj":
            raise PermissionError
        return plain(path)

    monkeypatch.setattr(Path, "read_text", guarded)
    assert watch(lambda: None).facts["energy_reasons"] == ["rapl_not_permitted"]
    energy = next(c for c in CpuProbe.capabilities() if c.what == "CPU package energy")
    assert "chmod" in energy.remedy


def test_energy_is_the_sum_of_the_packages_and_of_nothing_inside_them(tmp_path: Path) -> None:
    for zone, name in (
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:1", "package-1"),
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:2", "psys"),
    ):
        write_rapl(tmp_path, zone, name, 100)
    write_rapl(tmp_path, "intel-rapl-mmio:0", "package-0", 100)
    assert [zone.energy_uj.parent.name for zone in rapl_zones(tmp_path)] == ["intel-rapl:0", "intel-rapl:1"]


def test_a_counter_that_wraps_around_goes_on(tmp_path: Path) -> None:
    write_rapl(tmp_path, "intel-rapl:0", "package-0", 900_000)
    source = RaplSource(rapl_zones(tmp_path), lambda: 1.0)
    energies = []
    for energy_uj in (950_000, 50_000, 60_000):  # the counter's range is 1 J
        write_rapl(tmp_path, "intel-rapl:0", "package-0", energy_uj)
        [(_, _, energy_j)] = source.read()
        energies.append(energy_j)
    assert energies == pytest.approx([0.05, 0.15, 0.16])


def test_a_counter_that_goes_away_loses_the_reading_and_not_the_launch(tmp_path: Path) -> None:
    counter = write_rapl(tmp_path, "intel-rapl:0", "package-0", 1)
    source = RaplSource(rapl_zones(tmp_path), lambda: 1.0)
    counter.unlink()
    with pytest.raises(ProbeError) as lost:
        source.read()
    assert lost.value.reason == "rapl_lost"


def test_rapl_is_sampled_over_window_and_idle_beside_the_work(host: Path) -> None:
    write_rapl(host, "intel-rapl:0", "package-0", 10)
    probe = CpuProbe(context())
    assert probe.wants_idle
    result = watch(lambda: time.sleep(0.35), probe)
    energy = series(result, "rapl_energy")
    assert len(energy.t_s) >= 4
    assert (energy.unit, energy.scope, energy.source) == ("J", "package", "powercap: package-0")
    assert "energy_reasons" not in result.facts
    beside_a_gpu = watch(lambda: None, CpuProbe(context("cuda")))
    assert "host_rapl_energy" in {s.name for s in beside_a_gpu.series}
