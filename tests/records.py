"""Realistic records for tests, made without running anything: what a sweep on a laptop or an H200 would have written."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from effbench.metrics import METRICS
from effbench.schema import (
    Case,
    CaseRecord,
    Launch,
    MetricValue,
    ModelRef,
    Reading,
    Series,
    Spec,
    TechniqueRef,
    Trace,
    Window,
    canonical_json,
)

CPU, GPU = "2 × x86-64 core", "NVIDIA H200"
AXES = {"mha": "attention", "gqa": "attention", "mqa": "attention", "lora": "peft", "full": "peft", "bf16": "precision"}

# What a small model does on a CPU; a GPU is a hundred times faster and has the sensors that the CPU lacks.
VALUES = {
    "amu_gb": 0.21, "pcu": 0.93, "al_s": 0.042, "tt_tokens_per_param_s": 2.4e-3, "st_samples_per_param_s": 3.1e-6,
    "it_tokens_per_s": 310.0, "aec_w": 412.0, "mcr": 1.6, "device_memory_peak_bytes": 3.1e9, "allocated_peak_bytes": 2.7e9,
    "reserved_peak_bytes": 2.9e9, "host_memory_peak_bytes": 2.4e8, "host_private_bytes": 1.9e8, "kv_cache_bytes": 1.6e6,
    "kv_cache_bytes_per_token": 2048.0, "weight_bytes": 1.31e7, "step_p50_s": 0.0414, "step_p95_s": 0.0465,
    "step_p99_s": 0.0512, "ttft_s": 0.031, "tpot_s": 0.0032, "itl_p99_s": 0.0061, "tokens_per_s": 12190.0,
    "samples_per_s": 95.2, "params_total": 3.28e6, "params_active": 3.28e6, "params_trainable": 3.28e6, "mfu": 0.31,
    "mfu_datasheet": 0.22, "bandwidth_share": 0.12, "sm_activity": 0.74, "tensor_activity": 0.33, "dram_activity": 0.28,
    "gpu_idle_share": 0.04, "energy_wh": 0.17, "energy_j_per_token": 0.0338, "energy_net_j_per_token": 0.029,
    "energy_j_per_step": 17.3, "energy_net_j_per_step": 14.8, "energy_counter_j": 618.0, "energy_integral_j": 611.0,
    "idle_power_w": 78.0, "host_cpu_s_per_step": 0.078, "host_stolen_share": 0.002, "host_pressure_share": 0.01,
    "quality": 0.31, "train_loss": 3.1, "validation_loss": 3.3, "bits_per_byte": 2.2, "perplexity": 27.1,
    "next_token_accuracy": 0.31,
}  # fmt: skip
NEEDS_GPU = frozenset(
    {"device_memory_peak_bytes", "allocated_peak_bytes", "reserved_peak_bytes", "sm_activity", "tensor_activity",
     "dram_activity", "gpu_idle_share", "aec_w", "energy_wh", "energy_j_per_token", "energy_net_j_per_token",
     "energy_j_per_step", "energy_net_j_per_step", "energy_counter_j", "energy_integral_j", "idle_power_w", "mfu_datasheet"}
)  # fmt: skip
ONLY = {
    "pretrain": frozenset({"tt_tokens_per_param_s", "train_loss", "validation_loss", "bits_per_byte", "perplexity"}),
    "finetune": frozenset({"st_samples_per_param_s", "train_loss", "validation_loss", "bits_per_byte", "perplexity"}),
    "generate": frozenset({"it_tokens_per_s", "ttft_s", "tpot_s", "itl_p99_s", "kv_cache_bytes", "kv_cache_bytes_per_token"}),
}


def make_spec(
    workload: str = "pretrain",
    techniques: Iterable[str] = ("mha",),
    *,
    model: str = "tiny-llama",
    device: str = "cpu",
    protocol: str = "quick",
    seed: int = 0,
    **params: Any,
) -> Spec:
    """A resolved spec; the default precision is filled in as the planner does."""
    stack = [TechniqueRef(name=t, axis=AXES.get(t, "mixer"), identity=f"effbench:{t}@0.1.0+a1b2") for t in techniques]
    if not any(t.axis == "precision" for t in stack):
        stack.append(TechniqueRef(name="fp32", axis="precision", filled_in=True))
    return Spec(
        workload=workload,
        params={"batch": 8, "sequence_length": 64, **params},
        model=ModelRef(name=model, digest="5e" * 32),
        techniques=tuple(stack),
        text="sympy",
        text_digest="7e" * 32,
        seed=seed,
        device=device,
        threads=2,
        protocol=protocol,
        time_limit_s=300.0,
        workload_identity=f"effbench:{workload}@0.1.0+c3d4",
    )


def make_value(
    name: str,
    value: float | None,
    *,
    half: float = 0.02,
    n: int = 3,
    ratio: float | None = None,
    ratio_half: float = 0.02,
    valid: bool = True,
    reasons: tuple[str, ...] = (),
    source: str = "host clock",
) -> MetricValue:
    """A metric whose relative half-widths are `half` and `ratio_half`."""
    bounds = (None, None) if value is None else (value * (1 - half), value * (1 + half))
    ratios = (None, None) if ratio is None else (ratio * (1 - ratio_half), ratio * (1 + ratio_half))
    return MetricValue(
        name=name, value=value, lower=bounds[0], upper=bounds[1], n=n if value is not None else 0, ratio=ratio,
        ratio_lower=ratios[0], ratio_upper=ratios[1], unit=METRICS[name].unit if name in METRICS else "",
        source=source, valid=valid and value is not None, reasons=reasons,
    )  # fmt: skip


def make_metrics(
    workload: str = "pretrain",
    device: str = "cpu",
    *,
    speed: float = 1.0,
    baseline_speed: float | None = None,
    half: float = 0.02,
    n: int = 3,
) -> tuple[MetricValue, ...]:
    """All metrics of one case that runs `speed` times as fast as the table above; a ratio where there is a baseline."""
    others = frozenset().union(*(names for kind, names in ONLY.items() if kind != workload)) - ONLY[workload]
    found = []
    for name, base in VALUES.items():
        if name in others:
            found.append(make_value(name, None, reasons=("not_this_workload",)))
        elif device == "cpu" and name in NEEDS_GPU:
            reason = "no_energy_sensor" if "energy" in name or name in ("aec_w", "idle_power_w") else "no_gpu"
            found.append(make_value(name, None, reasons=(reason,)))
        else:
            rate = {"s": -1, "J": -1}.get(METRICS[name].unit.split("/")[0], 1 if METRICS[name].unit.endswith("/s") else 0)
            factor = speed**rate
            ratio = None if baseline_speed is None or name == "mcr" else (speed / baseline_speed) ** rate
            found.append(make_value(name, base * factor, half=half, n=n, ratio=ratio, ratio_half=half))
    return tuple(found)


PROVENANCE: Mapping[str, str] = {
    "effbench_version": "0.1.0", "source_digest": "ab" * 32, "git_commit": "0123456789", "python": "3.11.9",
    "platform": "Linux-6.8-x86_64", "device_name": GPU, "driver": "570.86", "cuda": "12.8", "power_limit_w": "700.0",
    "cpu": "x86-64", "cores": "16", "memory_gb": "128.0", "packages": '{"numpy":"2.4.6","torch":"2.13.0"}',
    "details": '{"clocks_mhz":[1980,2619]}',
}  # fmt: skip


def make_case(
    workload: str = "pretrain",
    techniques: Iterable[str] = ("gqa",),
    *,
    run_id: str = "",
    hardware: str = CPU,
    model: str = "tiny-llama",
    protocol: str = "quick",
    status: Any = "ok",
    reason: str = "",
    baseline: Iterable[str] | None = ("mha",),
    metrics: tuple[MetricValue, ...] | None = None,
    speed: float = 1.0,
    seed: int = 0,
    started_at: str = "2026-11-20T10:00:00+00:00",
) -> CaseRecord:
    """One row of the board; `metrics` defaults to every metric at `speed`, with ratios to a baseline of speed 1."""
    techniques = tuple(techniques)
    device = "cpu" if hardware == CPU else "cuda"
    common: dict[str, Any] = {"model": model, "device": device, "protocol": protocol, "seed": seed}
    spec = make_spec(workload, techniques, **common)
    base = None if baseline is None else Case(spec=make_spec(workload, baseline, **common))
    case = Case(spec=spec, baseline=base.spec if base else None)
    if metrics is None and status == "ok":
        metrics = make_metrics(workload, device, speed=speed, baseline_speed=None if base is None else 1.0)
    run_id = run_id or hashlib.sha256(f"{case.case_id}{hardware}{started_at}{status}".encode()).hexdigest()[:32]
    return CaseRecord(
        run_id=run_id,
        case_id=case.case_id,
        env_id=hashlib.sha256(hardware.encode()).hexdigest(),
        status=status,
        reason=reason,
        suite="quick",
        workload=workload,
        model=model,
        techniques=techniques,
        baseline_case_id=base.case_id if base else None,
        hardware=hardware,
        protocol=protocol,
        launch_ids=tuple(f"{run_id[:12]}-{i}" for i in range(3)),
        baseline_launch_ids=tuple(f"b{run_id[:12]}-{i}" for i in range(3)) if base else (),
        started_at=started_at,
        spec=canonical_json(spec.to_json()),
        provenance=PROVENANCE,
        metrics=metrics or (),
    )


def make_trace(num_steps: int = 30, seed: int = 0) -> Trace:
    """Step times, memory and power over about 1.5 s, and one sensor that gave nothing."""
    random = np.random.default_rng(seed)
    step_s = 0.05 * np.exp(random.normal(0, 0.05, num_steps))
    t_s = np.cumsum(step_s)
    clock_s = np.arange(0, t_s[-1], 0.1)

    def series(name: str, unit: str, scope: str, source: str, at: np.ndarray, values: np.ndarray) -> Series:
        return Series(name=name, unit=unit, scope=scope, source=source, t_s=at, values=values)

    return Trace(
        series=(
            series("step", "s", "process", "perf_counter", t_s - step_s, step_s),
            series("process_memory", "B", "process", "/proc/self/statm", clock_s, np.full(len(clock_s), 2.1e8)),
            series("gpu_power_instant", "W", "gpu", "nvml:186", clock_s, 400 + 20 * random.standard_normal(len(clock_s))),
            series("gpu_energy_counter", "J", "gpu", "nvml:83", np.empty(0), np.empty(0)),
        )
    )


def make_launch(launch_id: str = "launch-0", *, block: int = 0, status: Any = "ok", **changes: Any) -> Launch:
    """A launch of the pretraining spec."""
    known: dict[str, Any] = {
        "suite": "quick",
        "env_id": "e" * 64,
        "block_id": f"block-{block}",
        "position": 1,
        "started_at": "2026-11-20T10:00:00+00:00",
        "hardware": CPU,
        "provenance": PROVENANCE,
        "windows": {"build": Window(start_s=0.1, end_s=0.7), "window": Window(start_s=1.0, end_s=2.5, ended_by="rule")},
        "facts": {
            "step_tokens": 512,
            "params_total": 3_280_000,
            "quality": {"figure": "next_token_accuracy on 512 bytes", "quality": 0.31},
        },
        "metrics": (
            Reading(name="al_s", value=0.05, unit="s", source="host clock"),
            Reading.missing("aec_w", "W", "no_power_sensor"),
        ),
    }
    return Launch(**{"launch_id": launch_id, "spec": make_spec(), "block": block, "status": status} | known | changes)


def make_board(num_rows: int, seed: int = 0) -> list[CaseRecord]:
    """`num_rows` distinct cases over two machines, three workloads and three models; one in twenty failed."""
    random = np.random.default_rng(seed)
    stacks = (("mha",), ("gqa",), ("mqa",), ("lora",), ("gqa", "bf16"))
    rows = []
    for i in range(num_rows):
        techniques = stacks[i % 5]
        failed = i % 20 == 19
        rows.append(
            make_case(
                ("pretrain", "finetune", "generate")[i // 5 % 3],
                techniques,
                run_id=hashlib.sha256(f"{seed}:{i}".encode()).hexdigest()[:32],
                hardware=(CPU, GPU)[i // 15 % 2],
                model=("tiny-llama", "Qwen2.5-0.5B", "Llama-3.2-1B")[i // 30 % 3],
                baseline=None if techniques == ("mha",) else ("mha",),
                status="failed" if failed else "ok",
                reason="out_of_memory" if failed else "",
                speed=1.0 if techniques == ("mha",) else math.exp(random.normal(0, 0.3)),
                seed=i // 90,
                started_at=f"2026-11-20T10:{i // 60 % 60:02d}:{i % 60:02d}+00:00",
            )
        )
    return rows
