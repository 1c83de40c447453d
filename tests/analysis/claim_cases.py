"""For each claim rows that support it and rows that contradict it; printed numbers where the paper has some."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from effbench.analysis.claims import CLAIMS, Finding, judge
from effbench.schema import CaseRecord
from tests.analysis.claim_rows import made_frame, make_row

BY_ID = {claim.id: claim for claim in CLAIMS}
Rows = list[CaseRecord]
Stacks = dict[str, dict[str, float]]


def rows_of(workload: str, stacks: Stacks, **more: Any) -> Rows:
    return [make_row(workload, stack, **more, **metrics) for stack, metrics in stacks.items()]


def sized(workload: str, size: float, stacks: Stacks, **more: Any) -> Rows:
    """The same for a model of so many weights."""
    return rows_of(workload, {k: {**v, "params_total": size} for k, v in stacks.items()}, model=f"model-{size:g}", **more)


def verdict(claim_id: str, rows: Iterable[CaseRecord]) -> Finding:
    rows = list(rows)
    specs = {row.run_id: row.spec for row in rows}
    return judge(BY_ID[claim_id], made_frame(rows), lambda run_ids: {run_id: specs[run_id] for run_id in run_ids})


def along(workload: str, technique: str, values: dict[str, dict[str, float]]) -> Rows:
    """Rows of one technique that differ in its parameters."""
    return [make_row(workload, f"{technique}({given})", half=0.0, **metrics) for given, metrics in values.items()]


def attention(metric: str, **values: float) -> Rows:
    return rows_of("pretrain", {name: {metric: value} for name, value in values.items()})


def best_in(workload: str, names: str, metric: str, first: str, factor: float = 0.8, size: float = 1.2e9) -> Rows:
    """Rows of `names`, all alike but `first`, which has `factor` times the metric."""
    return sized(workload, size, {name: {metric: 1.0 * (factor if name == first else 1)} for name in names.split()})


PEFT = "lora lora_plus rslora dora pissa freeze full"
PALE = {"al_s": 1.0, "amu_gb": 10.0, "energy_j_per_token": 1.0}


def no_best(winner: bool) -> Rows:
    """Two techniques in each workload; one is ahead in everything, or each in something."""
    found = []
    for workload, more in (
        ("pretrain", "perplexity"),
        ("finetune", "validation_loss"),
        ("generate", "kv_cache_bytes_per_token"),
    ):
        second = {"al_s": 2.0, "amu_gb": 20.0, "energy_j_per_token": 2.0, more: 2.0 if winner else 0.5}
        found += rows_of(workload, {"mha": {**PALE, more: 1.0}, "gqa": second})
    return found


def rslora(at_14b: float, below: float, loss: float = 0.8) -> Rows:
    found = []
    for size, speed in ((14e9, at_14b), (7e9, below)):
        found += sized("finetune", size, {"lora": {"al_s": 1.0, "validation_loss": 1.0},
                                          "rslora": {"al_s": speed, "validation_loss": loss}})  # fmt: skip
    return found


def positions(rope: float, relative_s: float) -> Rows:
    stacks = {name: {"perplexity": 9.0, "al_s": 1.0, "amu_gb": 40.0} for name in ("learned_positions", "sinusoidal", "nope")}
    stacks["rope"] = {"perplexity": rope, "al_s": 1.0, "amu_gb": 40.0}
    stacks["relative_bias"] = {"perplexity": 8.5, "al_s": relative_s, "amu_gb": 30.0}
    return rows_of("pretrain", stacks)


def full_over_lora(small: float, large: float) -> Rows:
    return [
        row
        for size, loss in ((1e9, small), (24e9, large))
        for row in sized("finetune", size, {"lora": {"validation_loss": 1.0}, "full": {"validation_loss": loss}})
    ]


def frozen(al_s: float) -> Rows:
    return rows_of("finetune", {name: {"al_s": al_s if name == "freeze" else 1.0} for name in PEFT.split()})


def replicas(c_t: float, distinct: float) -> Rows:
    return rows_of("expert_parallel", {"ep_deduplicated": {
        "replicas_per_token": c_t, "distinct_devices_per_token": distinct, "replicas_upper_bound": 4, "replicas_lower_bound": 1,
        "uniform_replicas_per_token": 3.66, "expected_uniform_replicas_per_token": 3.659,
    }}, half=0.0)  # fmt: skip


def times_at(*seconds: float) -> Rows:
    """Step times at C_T 1, 2, 3 and 4, each an arm of its own."""
    arms = ("ep_pruned(devices=1)", "ep_pruned(devices=2)", "ep_placed", "ep_deduplicated")
    return rows_of("expert_parallel", {arm: {"replicas_per_token": c_t, "al_s": s}
                                       for arm, c_t, s in zip(arms, (1, 2, 3, 4), seconds, strict=True)})  # fmt: skip


def experts(workload: str, technique: str, few: dict[str, float], many: dict[str, float], **more: Any) -> Rows:
    return [make_row(workload, f"{technique}(experts={n})", **more, **m) for n, m in ((2, few), (16, many))]


# Rows that support a claim, and rows that contradict it.
CASES: dict[str, tuple[Rows, Rows]] = {
    "C1": (
        rows_of("pretrain", {"dense": {"perplexity": 8.09, "amu_gb": 44.82}, "moe(granularity=1)": {"perplexity": 7.10, "amu_gb": 62.7}}),
        rows_of("pretrain", {"dense": {"perplexity": 8.09, "amu_gb": 44.82}, "moe(granularity=1)": {"perplexity": 7.10, "amu_gb": 76.53}}),
    ),
    "C2": (
        rows_of("generate", {"bf16": {"amu_gb": 60, "energy_j_per_token": 8.0}, "int4": {"amu_gb": 15.4, "energy_j_per_token": 2.05}}),
        rows_of("generate", {"bf16": {"amu_gb": 51.83, "energy_j_per_token": 8.57}, "int4": {"amu_gb": 34.21, "energy_j_per_token": 7.23}}),
    ),
    "C3": (
        rows_of("generate", {"bf16": {"quality": 0.50}, "int4": {"quality": 0.495}}),
        rows_of("generate", {"bf16": {"quality": 0.1700}, "int4": {"quality": 0.0529}}),
    ),
    "C4": (
        rows_of("generate", {"fp16": {"al_s": 1.06, "energy_j_per_token": 1.1}, "bf16": {"al_s": 1.0, "energy_j_per_token": 1.0}}),
        rows_of("generate", {"fp16": {"al_s": 1.0, "energy_j_per_token": 1.0}, "bf16": {"al_s": 1.0, "energy_j_per_token": 1.0}}),
    ),
    "C5": (
        rows_of("pretrain", {"mqa": {"amu_gb": 40, "al_s": 0.12}, **{n: {"amu_gb": 45, "al_s": 0.13} for n in ("gqa", "mla", "nsa")}}),
        rows_of("pretrain", {"mqa": {"amu_gb": 40, "al_s": 0.14}, **{n: {"amu_gb": 45, "al_s": 0.13} for n in ("gqa", "mla", "nsa")}}),
    ),
    "C6": (attention("perplexity", mla=7.79, gqa=8.09, mqa=8.23, nsa=8.0), attention("perplexity", mla=8.5, gqa=8.09, mqa=8.9)),
    "C7": (
        attention("energy_j_per_token", nsa=0.8, gqa=1.0, mqa=1.0, mla=1.8),
        attention("energy_j_per_token", nsa=356.5, gqa=83.7, mqa=84, mla=155),
    ),
    "C8": (positions(8.0, 0.9), positions(8.0, 1.3)),
    "C9": (
        rows_of("pretrain", {"dense": {"amu_gb": 44.82, "aec_w": 653}, "mamba": {"amu_gb": 30.25, "aec_w": 510.64}}),
        rows_of("pretrain", {"dense": {"amu_gb": 44.82, "aec_w": 653}, "mamba": {"amu_gb": 60, "aec_w": 510.64}}),
    ),
    "C10": (best_in("finetune", PEFT, "validation_loss", "lora_plus"), best_in("finetune", PEFT, "validation_loss", "pissa")),
    "C11": (rslora(at_14b=0.8, below=1.0), rslora(at_14b=1.0, below=1.0)),
    "C12": (frozen(0.3), frozen(0.7)),
    "C13": (
        rows_of("finetune", {"lora(r=8)": {"al_s": 1.0}, "dora(r=8)": {"al_s": 1.6}}),
        rows_of("finetune", {"lora(r=8)": {"al_s": 1.0}, "dora(r=8)": {"al_s": 0.8}}),
    ),
    "C14": (full_over_lora(1.0, 3.3), full_over_lora(3.3, 1.0)),
    "C15": (
        rows_of("diffuse", {"mha + dense": {"quality": 0.4}, "gqa + dense": {"quality": 0.6}, "mha + moe": {"quality": 0.6}}),
        rows_of("diffuse", {"mha + dense": {"quality": 0.4}, "gqa + dense": {"quality": 0.3}, "mha + moe": {"quality": 0.6}}),
    ),
    "C16": (
        best_in("vlm", "lora lora_plus rslora dora pissa", "validation_loss", "pissa", size=7e9),
        best_in("vlm", "lora lora_plus rslora dora pissa", "validation_loss", "lora_plus", size=7e9),
    ),
    "C17": (no_best(winner=False), no_best(winner=True)),
    "O1": (replicas(3.02, 3.02), replicas(8.0, 3.68)),
    "O2": (
        rows_of("expert_parallel", {"ep_placed": {"output_error": 0.0, "experts_per_device_range": 1.0}}, half=0.0),
        rows_of("expert_parallel", {"ep_placed": {"output_error": 1e-9, "experts_per_device_range": 1.0}}, half=0.0),
    ),
    "O3": (
        rows_of("expert_parallel", {
            "ep_deduplicated": {"replicas_per_token": 3.68}, "ep_refined": {"calibration_replicas_per_token": 2.9},
            "ep_placed": {"replicas_per_token": 3.02, "calibration_replicas_per_token": 3.0},
        }),
        rows_of("expert_parallel", {
            "ep_deduplicated": {"replicas_per_token": 3.68}, "ep_refined": {"calibration_replicas_per_token": 3.2},
            "ep_placed": {"replicas_per_token": 3.02, "calibration_replicas_per_token": 3.0},
        }),
    ),
    "O4": (
        rows_of("expert_parallel", {"ep_pruned(devices=2)": {
            "replicas_max": 2, "devices_allowed": 2, "distinct_experts_min": 8, "experts_per_token": 8, "routes_changed_by_full_pruning": 0,
        }}, half=0.0),
        rows_of("expert_parallel", {"ep_pruned(devices=2)": {
            "replicas_max": 3, "devices_allowed": 2, "distinct_experts_min": 8, "experts_per_token": 8, "routes_changed_by_full_pruning": 0,
        }}, half=0.0),
    ),
    "O5": (
        rows_of("expert_parallel", {
            "ep_naive": {"bytes_sent": 8e6},
            "ep_deduplicated": {"bytes_sent": 3.7e6, "rows_sent": 3700, "expected_rows_sent": 3700, "output_error": 0.0},
        }, half=0.0),
        rows_of("expert_parallel", {
            "ep_naive": {"bytes_sent": 8e6},
            "ep_deduplicated": {"bytes_sent": 3.7e6, "rows_sent": 3701, "expected_rows_sent": 3700, "output_error": 0.0},
        }, half=0.0),
    ),
    "O6": (times_at(5.82, 9.22, 12.9, 16.6), times_at(5.82, 5.9, 6.0, 16.6)),
    "O7": (
        rows_of("finetune_pruned", {"ep_placed": {"quality": 0.5}, "ep_pruned(devices=2,policy=similarity)": {"quality": 0.52}}),
        rows_of("finetune_pruned", {"ep_placed": {"quality": 0.5}, "ep_pruned(devices=2,policy=similarity)": {"quality": 0.4}}),
    ),
    "O8": (
        rows_of("expert_parallel", {"ep_deduplicated": {"held_out_replicas_per_token": 3.65}, "ep_placed": {"held_out_replicas_per_token": 3.19}}),
        rows_of("expert_parallel", {"ep_deduplicated": {"held_out_replicas_per_token": 3.19}, "ep_placed": {"held_out_replicas_per_token": 3.65}}),
    ),
    "S1": (
        experts("smop", "smop_jejr", {"projector_flops": 25.2e6, "projector_s": 1.0}, {"projector_flops": 25.2e6, "projector_s": 1.05}),
        experts("smop", "smop_jejr", {"projector_flops": 25.2e6, "projector_s": 1.0}, {"projector_flops": 25.2e6, "projector_s": 4.0}),
    ),
    "S2": (
        rows_of("smop", {"smop_dense": {"projector_s": 1.0, "ttft_s": 9.0}, "smop_jejr": {"projector_s": 1.0, "ttft_s": 9.0}}),
        rows_of("smop", {"smop_dense": {"projector_s": 1.0, "ttft_s": 9.0}, "smop_jejr": {"projector_s": 2.0, "ttft_s": 9.1}}),
    ),
    "S3": (
        rows_of("smop", {"smop_jejr": {"params_active": 12.6e6}, "smop_dedr": {"params_active": 12.6e6}}, half=0.0),
        rows_of("smop", {"smop_jejr": {"params_active": 12.6e6}, "smop_dedr": {"params_active": 25.2e6}}, half=0.0),
    ),
    "F1": (
        rows_of("fuximt", {"fuximt": {"params_trainable": 3.2e9, "optimizer_params": 3.2e9, "moe_params": 3.2e9}}, half=0.0),
        rows_of("fuximt", {"fuximt": {"params_trainable": 3.2e9, "optimizer_params": 10e9, "moe_params": 3.2e9}}, half=0.0),
    ),
    "F2": (
        [*along("fuximt", "fuximt", {"experts=8,top_k=1": {"flops_per_token": 14.9e9}, "experts=32,top_k=1": {"flops_per_token": 14.9e9},
                                     "experts=8,top_k=2": {"flops_per_token": 15.7e9}})],
        [*along("fuximt", "fuximt", {"experts=8,top_k=1": {"flops_per_token": 14.9e9}, "experts=32,top_k=1": {"flops_per_token": 40e9},
                                     "experts=8,top_k=2": {"flops_per_token": 15.7e9}})],
    ),
    "F3": (
        rows_of("fuximt", {"fuximt(order=shuffled)": {"tokens_per_s": 1e4}, "fuximt(order=curriculum)": {"tokens_per_s": 1.01e4}}),
        rows_of("fuximt", {"fuximt(order=shuffled)": {"tokens_per_s": 1e4}, "fuximt(order=curriculum)": {"tokens_per_s": 0.8e4}}),
    ),
    "U1": (
        experts("usam", "usam_soft", {"projector_flops": 1e6, "projector_s": 1.0}, {"projector_flops": 8e6, "projector_s": 5.0}),
        experts("usam", "usam_soft", {"projector_flops": 1e6, "projector_s": 1.0}, {"projector_flops": 1e6, "projector_s": 1.0}),
    ),
    "U2": (
        rows_of("usam", {"usam_soft": {"encoder_s": 0.2, "prefill_s": 0.02}}),
        rows_of("usam", {"usam_soft": {"encoder_s": 0.02, "prefill_s": 0.2}}),
    ),
    "U3": (
        rows_of("usam", {"usam_soft": {"train_step_s": 1.0, "ttft_s": 0.1}, "usam_soft(contrastive=True)": {"train_step_s": 1.2, "ttft_s": 0.1}}),
        rows_of("usam", {"usam_soft": {"train_step_s": 1.0, "ttft_s": 0.1}, "usam_soft(contrastive=True)": {"train_step_s": 1.2, "ttft_s": 0.2}}),
    ),
    "U4": (
        rows_of("usam", {"usam_aliased": {"output_error": 0.0}, "usam_soft": {"output_error": 1e-7}}, half=0.0),
        rows_of("usam", {"usam_aliased": {"output_error": 0.0}, "usam_soft": {"output_error": 0.3}}, half=0.0),
    ),
}  # fmt: skip
