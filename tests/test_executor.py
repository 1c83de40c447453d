"""The local executor: fresh processes, nothing that spins, nothing that outlives it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from effbench.executors.local import LocalExecutor
from effbench.runner import Request
from tests.commands import ROOT
from tests.factories import spec

pytestmark = pytest.mark.alone


def request(how="work", step_s=0.01, protocol="smoke", **changes) -> Request:
    of = spec(workload="faulty", params={"how": how, "step_s": step_s}, protocol=protocol, **changes)
    return Request(launch_id="l", spec=of, seed=1, suite="t", env_id="e", block_id="b", block=0, position=0, hardware="h")


@pytest.fixture(scope="module")
def executor():
    with pytest.MonkeyPatch.context() as patch, LocalExecutor() as executor:
        patch.setenv("PYTHONPATH", str(ROOT / "tests" / "faulty_plugin"))
        yield executor


def children_cpu_s(pid: int) -> float:
    """CPU time of a live process itself."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_every_launch_is_a_process_of_its_own(executor):
    pids = {executor.launch(request())[0].facts["pid"] for _ in range(3)}
    assert len(pids) == 3
    assert os.getpid() not in pids


def idle_cost_s(executor) -> tuple[float, float]:
    """CPU time of parent and server while a launch sleeps six seconds: two steps and a warm-up."""
    server = executor._server._process.pid
    before = time.process_time(), children_cpu_s(server), time.perf_counter()
    launch, _ = executor.launch(request(step_s=2.0))
    after = time.process_time(), children_cpu_s(server), time.perf_counter()
    assert launch.status == "ok"
    assert after[2] - before[2] > 6
    return after[0] - before[0], after[1] - before[1]


ALONE = """
from effbench.executors.local import LocalExecutor
from tests.test_executor import idle_cost_s, request

with LocalExecutor() as executor:
    executor.launch(request())
    print(*idle_cost_s(executor))
"""


def test_nothing_of_ours_spins_while_a_launch_works(monkeypatch):
    """In a process of its own: that of all tests has their threads and their garbage to collect."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "faulty_plugin"))
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    parent_s, server_s = (float(word) for word in done.stdout.split())
    assert parent_s < 0.01 * 6
    assert server_s < 0.01 * 6 + 0.05  # forking a process with torch in it, and reaping it, has its price


def test_a_launch_costs_well_under_a_second_once_the_server_is_there(executor):
    executor.launch(request())
    costs = []
    for _ in range(5):
        started_s = time.perf_counter()
        launch, _ = executor.launch(request())
        wall_s = time.perf_counter() - started_s
        costs.append(wall_s - sum(launch.windows[name].length_s for name in ("warm_up", "window")))
    assert min(costs) < 1.0


def test_a_large_result_comes_through_whole(executor):
    launch, trace = executor.launch(request(step_s=0.00001))
    assert launch.status == "ok", launch.detail
    steps = trace.get("step")
    assert len(steps.values) > 1000
    assert len(steps.values) == len(steps.t_s)


def test_a_dead_server_is_replaced(executor):
    executor._server._process.kill()
    executor._server._process.wait()
    launch, _ = executor.launch(request())
    assert launch.status == "failed"
    assert "fork server ended" in launch.reason
    assert executor.launch(request())[0].status == "ok"


def test_leaving_the_executor_ends_every_process(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "faulty_plugin"))
    with LocalExecutor() as executor:
        executor.launch(request())
        server = executor._server._process.pid
    assert not Path(f"/proc/{server}").exists()
