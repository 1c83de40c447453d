"""Launches of several processes: in lockstep, and a rank that goes wrong ends them with a reason, in time, and leaves nobody."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from effbench.errors import UsageError
from effbench.executors.local import LocalExecutor
from effbench.executors.torchrun import place_of
from effbench.runner import Request
from effbench.schema import Launch
from tests.commands import ROOT, effbench, environment
from tests.factories import spec
from tests.test_kill import ours

pytestmark = pytest.mark.alone
MARK = "EFFBENCH_TEST_MARK=ranks"


def request(nproc: int = 3, limit_s: float = 60.0, **params: object) -> Request:
    of = spec(workload="faulty_ranks", params=params, protocol="smoke", nproc=nproc, threads=1, time_limit_s=limit_s)
    return Request(
        launch_id="l", spec=of, seed=1, suite="t", env_id="e", block_id="b", block=0, position=0, hardware="h",
        time_limit_s=limit_s,
    )  # fmt: skip


@pytest.fixture(scope="module")
def executor():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "tests" / "faulty_plugin"))
        name, _, value = MARK.partition("=")
        patch.setenv(name, value)
        with LocalExecutor() as executor:
            yield executor


def launched(executor: LocalExecutor, wanted: Request) -> Launch:
    """The launch; afterwards the fork server alone is left."""
    launch, _ = executor.launch(wanted)
    deadline = time.monotonic() + 5
    while (left := set(ours(MARK)) - {os.getpid(), executor._server._process.pid}) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, "a rank outlived its launch"
    return launch


def test_ranks_step_together_and_only_the_first_is_measured(executor):
    launch = launched(executor, request(3))
    assert launch.status == "ok", launch.detail
    assert len(set(launch.facts["pids"])) == 3
    assert launch.facts["mean_of_steps"] == 1 + 2 + 3
    assert launch.facts["tensor_peak_bytes"] > 0


def test_more_ranks_than_cores_count_and_give_no_times(executor):
    cores = len(os.sched_getaffinity(0))
    launch = launched(executor, request(cores + 1))
    found = {reading.name: reading for reading in launch.metrics}
    assert found["al_s"].value > 0, "the launch's row keeps the number"
    assert not found["al_s"].valid
    assert "oversubscribed" in found["al_s"].reasons
    fitting = {reading.name: reading for reading in launched(executor, request(cores)).metrics} if cores > 1 else None
    assert fitting is None or fitting["al_s"].valid


@pytest.mark.parametrize(
    ("how", "at", "reason"),
    [
        ("killed", 3, "rank 2 ended: SIGKILL"),
        ("raise", 3, "rank 2 ended: nan_loss"),
        ("exit", 0, "rank 2 ended: exit code 7"),
        ("killed", -1, "rank 2 ended: SIGKILL"),
        ("unseen", 3, "rank 2 ended: SIGKILL"),
    ],
)
def test_a_rank_that_goes_wrong_ends_the_launch_with_its_reason(executor, how, at, reason):
    started_s = time.monotonic()
    launch = launched(executor, request(4, how=how, rank=2, at=at))
    assert (launch.status, launch.reason) == ("failed", reason)
    assert time.monotonic() - started_s < 30, "it does not wait for the time limit"
    assert executor.launch(request(2))[0].status == "ok", "the next launch is as good as new"


def test_the_first_rank_killed_takes_the_others_along(executor):
    launch = launched(executor, request(3, how="killed", rank=0))
    assert (launch.status, launch.reason) == ("failed", "killed: SIGKILL")


def test_a_rank_that_hangs_ends_with_the_time_limit(executor):
    launch = launched(executor, request(3, limit_s=6, how="hang", rank=1))
    assert launch.status == "failed"
    assert launch.reason.startswith("time_limit")


# Several machines, which are process groups on this one.

SUITE = """
name: ranks
protocol: smoke
cases:
  - workload: faulty_ranks
    params: {params}
    model: tiny-llama
    nproc: 2
    threads: 1
    time_limit_s: 60
"""


def start(folder: Path, rank: int, port: int, params: str = "{}") -> subprocess.Popen[str]:
    """One rank as torchrun starts it on the machine number `rank` of two, in a session of its own."""
    suite = folder / "ranks.yaml"
    suite.write_text(SUITE.replace("{params}", params))
    more = {
        "RANK": rank,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    more = {**more, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": 1}
    return subprocess.Popen(
        [sys.executable, "-m", "effbench.executors.torchrun", str(suite), "--out", str(folder / "out.jsonl")],
        cwd=ROOT, env=environment(**{key: str(value) for key, value in more.items()}), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def records(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_two_groups_of_processes_meet_as_machines_do_and_the_first_writes_the_record(tmp_path):
    port = free_port()
    both = [start(tmp_path, rank, port) for rank in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    (found,) = records(tmp_path)
    assert found["status"] == "ok"
    assert found["facts"]["mean_of_steps"] == 3.0
    assert len(set(found["facts"]["pids"])) == 2


def test_a_machine_that_is_lost_is_said_and_ends_the_other(tmp_path):
    port = free_port()
    both = [start(tmp_path, rank, port, "{how: killed, rank: 1}") for rank in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert both[0].returncode == 1, said
    assert both[1].returncode == -signal.SIGKILL
    (found,) = records(tmp_path)
    assert found["status"] == "failed"
    assert "onnection" in found["reason"]


def test_a_port_that_is_taken_is_said(tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        process = start(tmp_path, 0, port)
        process.communicate(timeout=120)
    assert process.returncode == 1
    (found,) = records(tmp_path)
    assert found["status"] == "failed"
    assert found["reason"] == f"no_meeting: the port {port} that the ranks meet at is taken"


def test_started_without_torchrun_it_says_how():
    with pytest.raises(UsageError, match="start this with torchrun"):
        place_of({"RANK": "0"})


def test_work_of_one_process_refuses_more(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text("name: one\ncases:\n  - {workload: faulty, model: tiny-llama, nproc: 2}\n")
    done = effbench("plan", path)
    assert "the work of one process, and nproc is 2" in done.stdout.replace("\n", " ") + done.stderr
