"""What a plan says of memory: expected bytes, what fits, what is refused and what would fit; and the figures in a row."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from effbench import cli, hardware, provenance, runner
from effbench.cli import measuring
from effbench.errors import UsageError
from effbench.models.memory import expected_memory
from effbench.planning import Options, describe, plan
from effbench.schema import Case
from effbench.suite import read_suite
from effbench.workload import Session
from tests.factories import resolved, spec, steady

SUITE = """
name: memory
summary: a model that is large for a small device
protocol: quick
seed: 1
cases:
"""


def cases_of(folder: Path, body: str, **options: Any) -> list[Case]:
    path = folder / "memory.yaml"
    path.write_text(SUITE + body)
    return plan(read_suite(path), Options(device="cuda", **options))


FINETUNE = """
  - workload: finetune
    params: {batch_size: 4, seq_len: 1024}
    model: qwen2.5-14b
    techniques: [full, lora]
"""
GENERATE = """
  - workload: generate
    params: {batch_size: 64, prompt_tokens: 4096, new_tokens: 128}
    model: llama-3.1-8b
    techniques: [bf16]
"""


def test_what_is_too_large_is_refused_with_what_would_fit(tmp_path: Path) -> None:
    full, lora = cases_of(tmp_path, FINETUNE, memory_bytes=141e9, device_name="the H200")
    assert full.skip_reason is not None and lora.skip_reason is None
    expected = expected_memory(full.spec)
    assert expected is not None and expected.peak_bytes > 141e9
    assert full.skip_reason.startswith(f"needs about {expected.peak_bytes / 1e9:.3g} GB of tensors, the H200 has 141 GB; ")
    assert full.skip_reason.endswith("choose lora")


def test_a_case_whose_baseline_is_too_large_runs_without_one(tmp_path: Path) -> None:
    full, lora = cases_of(tmp_path, FINETUNE, memory_bytes=141e9)
    assert lora.baseline is None and lora.baseline_case_id is None
    roomy = cases_of(tmp_path, FINETUNE, memory_bytes=500e9)
    assert [case.skip_reason for case in roomy] == [None, None]
    assert roomy[1].baseline is not None and roomy[1].baseline.spec_id == full.spec.spec_id


def test_the_largest_batch_that_fits_is_named(tmp_path: Path) -> None:
    plain = next(case.spec for case in cases_of(tmp_path, GENERATE))
    for most in (40, 62):
        peaks = [
            found.peak_bytes
            for n in (most, most + 1)
            if (found := expected_memory(replace(plain, params={**plain.params, "batch_size": n}))) is not None
        ]
        (case, *_) = cases_of(tmp_path, GENERATE, memory_bytes=sum(peaks) / 2)
        assert case.skip_reason is not None and case.skip_reason.endswith(f"choose batch_size up to {most}")


def test_recomputing_activations_is_named_where_one_sequence_fits_only_so(tmp_path: Path) -> None:
    body = FINETUNE.replace("batch_size: 4, seq_len: 1024", "batch_size: 1, seq_len: 16384").replace("[full, lora]", "[lora]")
    plain = cases_of(tmp_path, body)[0].spec
    again = replace(plain, params={**plain.params, "activation_checkpointing": True})
    little, much = expected_memory(again), expected_memory(plain)
    assert little and much and little.peak_bytes < much.peak_bytes
    (case,) = cases_of(tmp_path, body, only="*lora", memory_bytes=(little.peak_bytes + much.peak_bytes) / 2)[:1]
    assert case.skip_reason is not None and case.skip_reason.endswith("choose activation_checkpointing")


def test_where_nothing_would_fit_the_refusal_says_so(tmp_path: Path) -> None:
    (case, *_) = cases_of(tmp_path, GENERATE, memory_bytes=1e9)
    assert case.skip_reason is not None and case.skip_reason.endswith("choose a smaller model, or a device with more memory")


def test_an_unknown_memory_refuses_nothing_and_says_unknown(tmp_path: Path) -> None:
    cases = cases_of(tmp_path, FINETUNE)
    assert [case.skip_reason for case in cases] == [None, None]
    described = list(describe(cases, Options(device="cuda")))
    assert {d["memory"]["fits"] for d in described} == {"unknown"}
    assert all(d["memory"]["device_bytes"] is None for d in described)


def test_a_description_carries_the_parts_and_whether_they_fit(tmp_path: Path) -> None:
    found = expected_memory(cases_of(tmp_path, FINETUNE)[0].spec)
    assert found is not None
    for share, fits in ((0.5, "yes"), (0.9, "tight"), (1.1, "no")):
        options = Options(device="cuda", memory_bytes=found.peak_bytes / share)
        memory = next(describe(plan_again(tmp_path, options), options))["memory"]
        assert memory["fits"] == fits
        parts = ("weights", "optimizer", "gradients", "activations", "cache", "logits")
        assert sum(memory[part] for part in parts) == pytest.approx(memory["peak_bytes"]) == found.peak_bytes


def plan_again(folder: Path, options: Options) -> list[Case]:
    return plan(read_suite(folder / "memory.yaml"), options)


def test_the_command_shows_each_case_and_takes_another_device(capsys: pytest.CaptureFixture[str]) -> None:
    cli.app(["plan", "suites/quick.yaml", "--device", "cpu", "--memory", "20MB", "--json"], standalone_mode=False)
    cases = json.loads(capsys.readouterr().out)["cases"]
    refused = [c for c in cases if c["skip_reason"]]
    assert {c["memory"]["fits"] for c in cases} >= {"no", "yes"}
    assert all(("the device has 0.02 GB" in c["skip_reason"]) == (c["memory"]["fits"] == "no") for c in refused)
    assert [c["name"] for c in cases if c["memory"]["fits"] == "no"] == [c["name"] for c in refused]
    cli.app(["plan", "suites/quick.yaml", "--device", "cpu", "--memory", "1TB"], standalone_mode=False)
    text = capsys.readouterr().out
    assert "memory GB" in text and "1e+03 GB" in text


@pytest.mark.parametrize(("text", "nbytes"), [("141GB", 141e9), ("80GiB", 80 * 2**30), ("500 mb", 5e8), ("1024", 1024.0)])
def test_an_amount_of_memory_is_read(text: str, nbytes: float) -> None:
    assert measuring._bytes(text) == nbytes


@pytest.mark.parametrize("text", ["much", "-1GB", "0", "infGB", "GB", "nan"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="Try: 141GB"):
        measuring._bytes(text)


def machine(folder: Path, groups: dict[str, str], membership: str) -> tuple[Path, Path]:
    """A /proc and a tree of control groups with these limits."""
    (folder / "proc" / "self").mkdir(parents=True)
    (folder / "proc" / "meminfo").write_text("MemTotal:       16384000 kB\nMemFree: 1 kB\n")
    (folder / "proc" / "self" / "cgroup").write_text(membership)
    for name, limit in groups.items():
        (folder / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "groups" / name).write_text(limit)
    return folder / "proc", folder / "groups"


@pytest.mark.parametrize(
    ("groups", "membership", "nbytes"),
    [
        ({}, "0::/\n", 16384000 * 1024),
        ({"memory.max": "max\n"}, "0::/\n", 16384000 * 1024),
        ({"memory.max": "8000000000\n"}, "0::/\n", 8_000_000_000),
        ({"box/memory.max": "9000000000\n", "box/job/memory.max": "max\n"}, "0::/box/job\n", 9_000_000_000),
        ({"memory/box/memory.limit_in_bytes": "7000000000\n"}, "5:cpu:/\n4:memory:/box\n", 7_000_000_000),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, "4:memory:/\n", 16384000 * 1024),
        ({"other/memory.max": "1000\n"}, "0::/box\n", 16384000 * 1024),
    ],
)
def test_host_memory_is_the_machines_or_the_groups_limit(
    tmp_path: Path, groups: dict[str, str], membership: str, nbytes: int
) -> None:
    assert hardware.host_memory_bytes(*machine(tmp_path, groups, membership)) == nbytes


def test_host_memory_that_nobody_tells_is_none(tmp_path: Path) -> None:
    assert hardware.host_memory_bytes(tmp_path, tmp_path) is None
    name, found = provenance.device_memory("cpu")
    assert name == "this machine" and found is not None and found > 1e9


def test_a_gpus_memory_is_what_its_driver_says_else_the_datasheets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_gpu", lambda: {"name": "NVIDIA H200", "memory_total_bytes": 150_000_000_000})
    assert provenance.device_memory("cuda") == ("the NVIDIA H200", 150_000_000_000)
    monkeypatch.setattr(provenance, "_gpu", lambda: {"name": "NVIDIA H200", "memory_total_bytes": None})
    assert provenance.device_memory("cuda") == ("the NVIDIA H200", 141 * 2**30)
    monkeypatch.setattr(provenance, "_gpu", dict)
    assert provenance.device_memory("cuda") == ("the GPU", None)


# In a row.


class Stepping(Session):
    """A session that does what it is told at its next step."""

    def __init__(self, act: Any = None):
        self.act = act

    def check(self) -> None:
        """Nothing is checked."""

    def facts(self) -> dict[str, Any]:
        return {}

    def step(self) -> None:
        self.act()


def test_a_launch_takes_both_figures() -> None:
    import torch

    of = resolved("tiny-llama", workload="generate")
    facts = runner._tensor_bytes(of, Stepping(lambda: torch.zeros(1 << 20) + 1))
    expected = expected_memory(of)
    assert expected is not None
    assert facts["expected_tensor_peak_bytes"] == expected.peak_bytes
    assert facts["tensor_peak_bytes"] >= 8 << 20
    assert "tensor_peak_bytes" not in runner._tensor_bytes(replace(of, device="cuda"), Stepping()), "the allocator has it"


def test_a_step_that_fails_under_the_tracker_costs_the_figure_alone() -> None:
    def fail() -> None:
        raise RuntimeError("this operator takes no mode")

    facts = runner._tensor_bytes(resolved("tiny-llama", workload="generate"), Stepping(fail))
    assert "tensor_peak_bytes" not in facts and "no mode" in facts["tensors_not_tracked"]
    assert facts["expected_tensor_peak_bytes"] > 0


def readings(**facts: Any) -> dict[str, Any]:
    return {m.name: m for m in steady(spec(), 0.1, **facts).metrics}


def test_the_ratio_is_of_what_was_measured_to_what_was_expected() -> None:
    found = readings(tensor_peak_bytes=110, expected_tensor_peak_bytes=100.0)
    assert found["tensor_peak_bytes"].value == 110
    assert found["expected_tensor_peak_bytes"].reasons == ("estimate",)
    assert found["tensor_peak_ratio"].value == pytest.approx(1.1)


def test_what_is_missing_says_why() -> None:
    untracked, unknown = readings(expected_tensor_peak_bytes=100.0), readings(tensor_peak_bytes=110)
    assert untracked["tensor_peak_bytes"].reasons == untracked["tensor_peak_ratio"].reasons == ("tensors_not_tracked",)
    assert unknown["expected_tensor_peak_bytes"].value is None
    assert "no_memory_model" in unknown["expected_tensor_peak_bytes"].reasons
    assert unknown["tensor_peak_ratio"].reasons == ("no_memory_model",)


def test_on_a_gpu_the_allocators_peak_is_the_measured_one() -> None:
    on_gpu = spec(device="cuda")
    facts = {"allocated_peak_bytes": 105, "expected_tensor_peak_bytes": 100.0, "tensor_peak_bytes": 1}
    found = {m.name: m for m in steady(on_gpu, 0.1, **facts).metrics}
    assert found["tensor_peak_bytes"].value == 105
    assert found["tensor_peak_ratio"].value == pytest.approx(1.05)
