"""A launch on a real GPU: engines agree, the real NVML gives energy, and one full trace is kept for the replay tests."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from effbench.store import Store
from tests.commands import effbench

pytestmark = pytest.mark.gpu

SUITE = """\
name: gpu
protocol: {protocol}
cases:
  - workload: generate
    params: {{batch_size: 4, prompt_tokens: 128, new_tokens: 32}}
    model: {model}
    techniques: [mha, mqa]
  - workload: generate
    params: {{batch_size: 4, prompt_tokens: 128, new_tokens: 32, decode_engine: eager}}
    model: {model}
    techniques: [mha]
  - workload: pretrain
    params: {{batch_size: 4, seq_len: 256, quality_steps: 4}}
    model: {model}
    techniques: [mha]
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    path = folder / "gpu.yaml"
    path.write_text(SUITE.format(protocol="quick", model="qwen2.5-0.5b"))
    done = effbench("run", path, "--results", folder / "results", "--device", "cuda", timeout_s=500)
    return done, Store(folder / "results")


def test_every_case_is_measured(ran):
    done, store = ran
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row.status for row in store.cases()} == {"ok"}, [row.reason for row in store.cases()]


def test_the_real_nvml_gives_energy_power_and_memory(ran):
    for row in ran[1].cases():
        found = {m.name: m for m in row.metrics}
        for name in ("amu_gb", "pcu", "aec_w", "energy_counter_j", "energy_integral_j", "idle_power_w"):
            assert found[name].value is not None, (name, found[name].reasons)
        assert 20 < found["aec_w"].value < 1500


def test_decoding_uses_a_cuda_graph_unless_told_otherwise(ran):
    engines = {launch.facts["decode_engine"] for launch in ran[1].launches() if launch.spec.workload == "generate"}
    assert engines == {"cuda_graph", "eager"}


def test_one_full_trace_is_kept(ran):
    """With EFFBENCH_KEEP_TRACE=DIR the launches and traces are copied there, to become files of the replay tests."""
    store = ran[1]
    launch = next(launch for launch in store.launches() if launch.status == "ok")
    trace = store.trace(launch.launch_id)
    assert {"step", "gpu_energy_counter", "gpu_power_instant", "gpu_memory_used"} <= {s.name for s in trace.series}
    keep = os.environ.get("EFFBENCH_KEEP_TRACE")
    if keep:
        shutil.copytree(store.path, Path(keep) / "results", dirs_exist_ok=True)
