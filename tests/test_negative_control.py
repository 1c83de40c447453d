"""A negative control of the harness: LoRA and RSLoRA run the same graph, so no metric of speed, memory or energy may differ.

Real launches by the local executor in paired blocks, every comparison tested at once (Holm). Positive controls show that the
same test can find something: full fine-tuning needs other memory, DoRA more time where a step has few tokens.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from effbench import stats
from effbench.executors.local import LocalExecutor
from effbench.metrics import METRICS
from effbench.planning import techniques
from effbench.runner import Request
from effbench.schema import Launch, Spec
from tests.factories import resolved

pytestmark = pytest.mark.alone

BLOCKS, LEVEL = 16, 0.01  # enough to tell DoRA from LoRA on a machine that others share
STACKS = ("lora", "rslora", "dora", "full")
COMPARED = [m.name for m in METRICS.values() if m.better != "none" and "quality" not in m.tags and m.name != "mcr"]


def spec_of(technique: str) -> Spec:
    spec = resolved("tiny-llama", workload="finetune")
    params = {**spec.params, "batch_size": 1, "seq_len": 16, "quality_steps": 0}  # few tokens: DoRA's cost does not shrink
    return replace(spec, protocol="smoke", threads=1, params=params, techniques=techniques(((technique, {}),), "cpu"))


@pytest.fixture(scope="module")
def launches() -> dict[str, list[Launch]]:
    """One launch of each stack in every block, in an order drawn for the block."""
    specs = {name: spec_of(name) for name in STACKS}
    found: dict[str, list[Launch]] = {name: [] for name in STACKS}
    with LocalExecutor() as executor:
        for block in range(BLOCKS):
            order = random.Random(block).sample(STACKS, len(STACKS))
            for position, name in enumerate(order):
                request = Request(
                    launch_id=f"{name}-{block}", spec=specs[name], seed=block, suite="test", env_id="here",
                    block_id=str(block), block=block, position=position, hardware="here",
                )  # fmt: skip
                launch = executor.launch(request)[0]
                assert launch.status == "ok", launch.detail
                found[name].append(launch)
    return found


def values_of(launches: list[Launch], metric: str) -> list[float | None]:
    tables = ({r.name: r.value for r in launch.metrics if r.valid} for launch in launches)
    return [table.get(metric) for table in tables]


def differences(own: list[Launch], other: list[Launch]) -> dict[str, float]:
    """Holm-adjusted p-value of every metric that both sides have."""
    found = {name: stats.paired_p_value(values_of(own, name), values_of(other, name)) for name in COMPARED}
    present = {name: p for name, p in found.items() if p is not None}
    adjusted = dict(zip(present, stats.holm(list(present.values())), strict=True))
    for name, p in sorted(adjusted.items(), key=lambda item: item[1]):
        ratio = stats.paired_ratio(values_of(own, name), values_of(other, name))
        print(f"{name:26} {ratio.value:.4f} [{ratio.lower:.4f}, {ratio.upper:.4f}] p {found[name]:.4f} adjusted {p:.4f}")
    return adjusted


def test_lora_and_rslora_differ_in_no_metric_of_speed_memory_or_energy(launches: dict[str, list[Launch]]) -> None:
    adjusted = differences(launches["rslora"], launches["lora"])
    assert {"al_s", "step_p50_s", "tokens_per_s", "amu_gb", "host_memory_peak_bytes", "weight_bytes"} <= set(adjusted)
    assert [name for name, p in adjusted.items() if p <= LEVEL] == []


def test_the_same_comparison_finds_full_fine_tuning_different_in_memory(launches: dict[str, list[Launch]]) -> None:
    found = {name for name, p in differences(launches["full"], launches["lora"]).items() if p <= LEVEL}
    assert {"weight_bytes", "host_memory_peak_bytes"} <= found


def test_the_same_comparison_finds_dora_slower(launches: dict[str, list[Launch]]) -> None:
    found = {name for name, p in differences(launches["dora"], launches["lora"]).items() if p <= LEVEL}
    assert {"step_p50_s", "weight_bytes"} <= found
    slower = stats.paired_ratio(values_of(launches["dora"], "step_p50_s"), values_of(launches["lora"], "step_p50_s"))
    assert slower.lower is not None
    assert slower.lower > 1.0
