"""THE metric table: every number that can stand in a row, with unit, direction, formula and source.

Columns, tooltips and docs follow from it; `recompute.py` computes each from a launch's facts and trace.
Two families: `paper` are the six of EfficientLLM (arXiv 2505.13840, section 5.1), kept so that results can be
compared with its tables; `beside` are the figures that show what those six hide. T is the window, N its steps.
A plugin's metric needs no line here: it is shown with the unit its reading carries and no direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from effbench.errors import MetricError

Better = Literal["lower", "higher", "none"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One row of the table. `better` is the direction; "none" is never ranked."""

    name: str
    title: str
    unit: str
    better: Better
    formula: str
    source: str
    family: Literal["paper", "beside"] = "beside"
    # "quality"; "scoped": energy and memory, compared within one scope only; "own": of some workloads, absent from other rows
    tags: tuple[str, ...] = ()


def _paper(name: str, title: str, unit: str, better: Better, formula: str, source: str) -> Metric:
    return Metric(name=name, title=title, unit=unit, better=better, formula=formula, source=source, family="paper")


def _beside(name: str, title: str, unit: str, better: Better, formula: str, source: str, *tags: str) -> Metric:
    return Metric(name=name, title=title, unit=unit, better=better, formula=formula, source=source, tags=tags)


def _part(name: str, title: str, what: str) -> Metric:
    """The time of one part of a step: a session keeps it as a series of this name."""
    return _beside(
        name, title, "s", "lower", f"median time of {what}", "host clock, device synchronised before and after", "own"
    )


def _counted(name: str, title: str, unit: str, better: Better, formula: str, source: str = "counted by the workload") -> Metric:
    """A number that a session gives in its fact `figures`."""
    return _beside(name, title, unit, better, formula, source, "own")


WEIGHT_KINDS = {
    "embedding": "embeddings", "head": "output head", "attention": "attention", "feed_forward": "dense feed-forward layers",
    "experts": "experts", "router": "routers", "norm": "norms", "adapter": "adapters", "other": "buffers and the rest",
}  # fmt: skip

_TABLE = (
    # The paper's six.
    _paper("amu_gb", "AMU", "GB", "lower", "(1/T) ∫ memory in use dt", "EfficientLLM Eq 1; device memory by NVML, on a CPU private process memory above birth"),
    _paper("pcu", "PCU", "ratio", "higher", "(1/T) ∫ busy share dt", "EfficientLLM Eq 2; NVML busy share, on a CPU process CPU time / (T × threads)"),
    _paper("al_s", "AL", "s", "lower", "Σ step time / N", "EfficientLLM Eq 3"),
    _paper("tt_tokens_per_param_s", "TT", "tokens/param/s", "higher", "Σ tokens / (total parameters × Σ step time)", "EfficientLLM Eq 4, pretraining"),
    _paper("st_samples_per_param_s", "ST", "samples/param/s", "higher", "Σ samples / (total parameters × Σ step time)", "EfficientLLM Eq 5, fine-tuning"),
    _paper("it_tokens_per_s", "IT", "tokens/s", "higher", "Σ generated tokens / Σ step time", "EfficientLLM Eq 6, inference"),
    _paper("aec_w", "AEC", "W", "lower", "gross energy of the window / T", "EfficientLLM Eqs 7-8: a mean power, not an energy"),
    _paper("mcr", "MCR", "×", "higher", "(stored bytes of baseline / stored bytes) × (quality / quality of baseline)", "EfficientLLM Eq 9, with measured bytes"),
    _beside("mcr_nominal", "MCR of nominal sizes", "×", "none", "(nominal bits of baseline / nominal bits) × (quality / quality of baseline)", "EfficientLLM Eq 9 as its tables have it: the format's bits by name, not what is stored"),
    # Memory.
    _beside("device_memory_peak_bytes", "Peak device memory", "B", "lower", "max of device memory in use over the window", "NVML", "scoped"),
    _beside("allocated_peak_bytes", "Peak allocated", "B", "lower", "max of allocated tensor bytes over the window", "torch CUDA allocator", "scoped"),
    _beside("reserved_peak_bytes", "Peak reserved", "B", "lower", "max of bytes the allocator holds over the window", "torch CUDA allocator", "scoped"),
    _beside("tensor_peak_bytes", "Peak of tensors", "B", "lower", "most bytes of tensor storages alive at once over one step after the window; on CUDA peak allocated", "a tracker of every operator's results; on CUDA the allocator", "scoped"),
    _beside("expected_tensor_peak_bytes", "Expected peak of tensors", "B", "none", "weights, optimizer states, and the most that a step has alive beside them", "analytic: models/memory.py, flow.py"),
    _beside("tensor_peak_ratio", "Peak of tensors / expected", "ratio", "none", "peak of tensors / expected peak of tensors", "the two above"),
    _beside("host_memory_peak_bytes", "Peak host memory", "B", "lower", "peak resident size over the window − resident size at birth", "/proc: VmHWM, reset at the window's start", "scoped"),
    _beside("host_private_bytes", "Private host memory", "B", "lower", "private bytes at the window's end − at birth", "/proc: smaps_rollup", "scoped"),
    _beside("kv_cache_bytes", "KV cache", "B", "lower", "bytes of the cache's tensors after the last token", "storages of the cache"),
    _beside("kv_cache_bytes_per_token", "KV cache per token", "B/token", "lower", "KV cache bytes / (batch × cached tokens)", "storages of the cache"),
    _beside("expected_kv_cache_bytes_per_token", "Expected KV cache per token", "B/token", "none", "cached elements of the form of attention × bytes of the dtype / cached tokens", "analytic: costs.py"),
    _beside("weight_bytes", "Stored weights", "B", "lower", "Σ bytes of all distinct parameter and buffer storages", "storages of the model"),
    _beside("bits_per_weight", "Bits per weight", "bit", "lower", "8 × stored bytes / original weights, adapters apart", "storages of the model"),
    *(
        _beside(f"weight_bytes_{kind}", f"Stored: {title}", "B", "lower", f"the part of the stored weights that is {title}", "storages of the model")
        for kind, title in WEIGHT_KINDS.items()
    ),
    # Speed.
    _beside("step_p50_s", "Step p50", "s", "lower", "median of step times", "host clock, device synchronised"),
    _beside("step_p95_s", "Step p95", "s", "lower", "95th percentile of step times", "host clock, device synchronised"),
    _beside("step_p99_s", "Step p99", "s", "lower", "99th percentile of step times", "host clock, device synchronised"),
    _beside("ttft_s", "TTFT", "s", "lower", "median time from request to first token", "host clock or CUDA events"),
    _beside("tpot_s", "TPOT", "s/token", "lower", "median over requests of (last − first token time) / (tokens − 1)", "host clock or CUDA events"),
    _beside("itl_p99_s", "ITL p99", "s", "lower", "99th percentile of the gaps between tokens of one request", "host clock or CUDA events"),
    _beside("tokens_per_s", "Tokens/s", "tokens/s", "higher", "Σ tokens / Σ step time", "counted in the window"),
    _beside("samples_per_s", "Samples/s", "samples/s", "higher", "Σ samples / Σ step time", "counted in the window"),
    _beside("params_total", "Parameters", "count", "none", "number of original weights", "the model, before quantisation"),
    _beside("params_active", "Active parameters", "count", "none", "weights that one token uses", "the model and its techniques"),
    _beside("params_trainable", "Trainable parameters", "count", "none", "weights that receive a gradient", "the model"),
    # Compute.
    _beside("mfu", "MFU", "ratio", "higher", "model FLOPs / (Σ step time × matrix rate measured on this device)", "FLOP model 6N+attention (training) or 2N+attention; doctor --calibrate"),
    _beside("mfu_datasheet", "MFU of datasheet", "ratio", "higher", "model FLOPs / (Σ step time × datasheet rate)", "hardware.py"),
    _beside("decode_flops", "Decode FLOPs", "FLOP", "none", "FLOPs of the matrix products of the last decode step, per sequence", "counted by torch while it runs"),
    _beside("expected_decode_flops", "Expected decode FLOPs", "FLOP", "none", "2 per active weight in a matrix product + scores of the last decode step, per sequence", "analytic: costs.py"),
    _beside("expected_decode_bytes", "Expected decode bytes", "B", "none", "stored weights (of experts those that a token goes to) / batch + cached bytes that the last decode step must read, per sequence", "analytic: costs.py"),
    _beside("bandwidth_share", "Share of bandwidth", "ratio", "higher", "bytes the model must move / (Σ step time × copy bandwidth measured on this device)", "analytic bytes; doctor --calibrate"),
    _beside("sm_activity", "SM activity", "ratio", "higher", "(1/T) ∫ share of SMs with work dt", "NVML GPM metric 2"),
    _beside("tensor_activity", "Tensor activity", "ratio", "higher", "(1/T) ∫ share of tensor pipe cycles dt", "NVML GPM metric 5"),
    _beside("dram_activity", "DRAM activity", "ratio", "higher", "(1/T) ∫ share of DRAM bandwidth dt", "NVML GPM metric 10"),
    _beside("gpu_idle_share", "GPU idle share", "ratio", "lower", "1 − (1/T) ∫ share of the time with a kernel running dt; above 0.2 the row is host-bound", "NVML busy share"),
    # Energy. Gross is what was drawn; net is gross less idle power × T.
    _beside("energy_wh", "Energy of the window", "Wh", "none", "gross energy of the window / 3600", "energy counter, else integral of power", "scoped"),
    _beside("energy_j_per_token", "Energy per token", "J/token", "lower", "gross energy / Σ tokens", "energy counter, else integral of power", "scoped"),
    _beside("energy_net_j_per_token", "Net energy per token", "J/token", "lower", "(gross energy − idle power × T) / Σ tokens; never ranked alone", "energy counter, else integral of power", "scoped"),
    _beside("energy_j_per_step", "Energy per step", "J/step", "lower", "gross energy / N", "energy counter, else integral of power", "scoped"),
    _beside("energy_net_j_per_step", "Net energy per step", "J/step", "lower", "(gross energy − idle power × T) / N; never ranked alone", "energy counter, else integral of power", "scoped"),
    _beside("energy_counter_j", "Energy by counter", "J", "none", "difference of the hardware counter over the window, edges corrected", "NVML total energy, RAPL", "scoped"),
    _beside("energy_integral_j", "Energy by integral", "J", "none", "∫ instant power dt over the window", "NVML field 186", "scoped"),
    _beside("idle_power_w", "Idle power", "W", "none", "mean power before and after the window, nothing of ours running", "as energy", "scoped"),
    # Host.
    _beside("host_cpu_s_per_step", "CPU time per step", "s/step", "lower", "process CPU time in the window / N", "getrusage"),
    _beside("host_stolen_share", "Stolen CPU time", "ratio", "none", "time stolen by the hypervisor / (T × cores)", "/proc/stat"),
    _beside("host_pressure_share", "CPU pressure", "ratio", "none", "share of the window in which some task waited for a core", "/proc/pressure/cpu"),
    # Parts of the MoE applications: smop, usam, fuximt.
    _part("encoder_s", "Encoders", "the encoders, from raw features to their last layer"),
    _part("pooling_s", "Pooling", "the pooling and joining of encoder features"),
    _part("qformer_s", "Q-Former", "the window Q-Former"),
    _part("projector_s", "Projector", "the projector alone, from features of the encoders to embeddings of the language model"),
    _part("prefill_s", "Prefill", "the language model's prefill, up to its first token"),
    _part("train_step_s", "Training step", "a training step: forward, losses and backward, and the optimizer where the work has one"),
    _counted("projector_flops", "Projector FLOPs", "FLOP", "none", "FLOPs of the projector's matrix products, one step"),
    _counted("expected_projector_s", "Expected projector time", "s", "none", "max(projector FLOPs / matrix rate, bytes of touched experts / copy bandwidth)", "analytic work, rates measured on this device"),
    _counted("experts_touched", "Experts touched", "count", "none", "experts with at least one token, mean over the calls of a step"),
    _counted("expert_load_share_max", "Largest expert load", "ratio", "none", "largest share of the pairs of token and expert that one expert has; even is 1 / E"),
    _counted("output_error", "Output error", "ratio", "lower", "RMS of the difference to what the technique's file names / RMS of that, in float64", "the correctness gate"),
    _counted("moe_params", "MoE parameters", "count", "none", "weights of the experts, routers and gates that were added"),
    _counted("optimizer_params", "Parameters with states", "count", "none", "weights for which the optimizer keeps states"),
    _counted("flops_per_token", "FLOPs per token", "FLOP/token", "none", "FLOPs of the matrix products of a forward pass / tokens"),
    # Expert parallelism. A row is the hidden state of one token; C_T of Occult (arXiv 2505.13345) is replicas per token.
    _part("communication_s", "Communication", "the exchanges of a step, slowest rank"),
    _part("compute_s", "Compute", "routing, indices, experts and sums of a step, slowest rank"),
    _counted("replicas_per_token", "C_T", "count", "lower", "mean over tokens of the devices among their experts, as the rows sent have it"),
    _counted("distinct_devices_per_token", "Distinct devices", "count", "none", "the same from the routes and the placement alone"),
    _counted("replicas_max", "Most replicas", "count", "none", "most devices that one token goes to"),
    _counted("replicas_lower_bound", "C_T at least", "count", "none", "⌈k · N_d / N_e⌉", "Occult, the bounds of C_T"),
    _counted("replicas_upper_bound", "C_T at most", "count", "none", "min(k, N_d)", "Occult, the bounds of C_T"),
    _counted("uniform_replicas_per_token", "C_T, uniform routing", "count", "none", "C_T of this placement under uniform random routing"),
    _counted("expected_uniform_replicas_per_token", "Expected C_T, uniform", "count", "none", "Σ over devices of 1 − C(E − experts there, k) / C(E, k)", "closed form"),
    _counted("calibration_replicas_per_token", "C_T, calibration", "count", "lower", "C_T of this placement on the routing that it was made from"),
    _counted("held_out_replicas_per_token", "C_T, held out", "count", "lower", "C_T of this placement on routing that it has not seen"),
    _counted("devices_allowed", "Devices allowed", "count", "none", "devices that pruning leaves a token"),
    _counted("experts_per_token", "Experts per token", "count", "none", "k"),
    _counted("distinct_experts_min", "Fewest distinct experts", "count", "none", "least over tokens of the distinct experts after pruning"),
    _counted("experts_per_device_range", "Experts per device, range", "count", "none", "most − fewest experts on a device"),
    _counted("routes_changed_by_full_pruning", "Routes changed", "count", "none", "pairs of token and expert that pruning to all devices changes"),
    _counted("routes_kept_share", "Routes kept", "ratio", "higher", "share of the pairs of token and expert that pruning leaves as the router chose them"),
    _counted("rows_sent", "Rows sent", "count", "lower", "rows given to the first exchange of a step, all ranks, those for the own device among them"),
    _counted("expected_rows_sent", "Expected rows sent", "count", "none", "Σ over tokens of C_T, or k · tokens for the naive arm"),
    _counted("bytes_sent", "Bytes sent", "B", "lower", "bytes given to the exchanges of a step, both ways, all ranks, those for the own device among them"),
    _counted("bytes_sent_between_devices", "Bytes between devices", "B", "lower", "the same without those for the own device"),
    _counted("expected_communication_s", "Expected communication", "s", "none", "the simulator's time of the exchanges of a step on this topology", "simulator of recorded routing, link rates measured here"),
    # Quality: higher is better where it is ranked.
    _beside("quality", "Quality", "ratio", "higher", "task accuracy, else next-token accuracy, else 2^−bits per byte; the row's source names which", "held-out text", "quality"),
    _beside("quality_change", "Quality change", "ratio", "higher", "quality − quality of baseline, absolute; the ratio of `quality` is the relative change", "held-out text or tasks", "quality"),
    _beside("task_accuracy", "Task accuracy", "ratio", "higher", "mean accuracy of the tasks that the row's spec names", "lm-evaluation-harness", "quality"),
    _beside("validation_loss_before", "Validation loss before", "nat/token", "none", "the same before the first step of fine-tuning", "held-out text", "quality"),
    _beside("base_loss_before", "Base loss before", "nat/token", "none", "mean cross-entropy, before fine-tuning, on held-out text of the kind that the base was trained on", "held-out text", "quality"),
    _beside("base_loss_after", "Base loss after", "nat/token", "lower", "the same after fine-tuning: the difference is what was forgotten", "held-out text", "quality"),
    _beside("train_loss", "Training loss", "nat/token", "lower", "mean loss of the last quality step", "training text", "quality"),
    _beside("validation_loss", "Validation loss", "nat/token", "lower", "mean cross-entropy on held-out text after the quality steps", "held-out text", "quality"),
    _beside("bits_per_byte", "Bits per byte", "bit/byte", "lower", "validation loss / ln 2 × tokens / bytes", "held-out text", "quality"),
    _beside("perplexity", "Perplexity", "ratio", "lower", "exp(validation loss)", "held-out text", "quality"),
    _beside("next_token_accuracy", "Next-token accuracy", "ratio", "higher", "share of held-out tokens that were the first choice", "held-out text", "quality"),
)  # fmt: skip

# What quality may be, best first: each is higher-is-better, and a compression rate multiplies by it.
QUALITY_FIGURES = ("task_accuracy", "next_token_accuracy", "2^-bits_per_byte")


def quality_figure(found: Mapping[str, float | None]) -> tuple[str, float] | None:
    """(name, value) of the best quality figure among what a workload found; None where it found none of them."""
    bits = found.get("bits_per_byte")
    values = (found.get("task_accuracy"), found.get("next_token_accuracy"), None if bits is None else 2.0**-bits)
    return next(((name, v) for name, v in zip(QUALITY_FIGURES, values, strict=True) if v is not None), None)


def check_quality_figure(figure: str) -> None:
    """Refuse a text such as "perplexity on 8192 bytes" that names no figure for which higher is better. Raises MetricError."""
    name = figure.split(" ")[0]
    if name not in QUALITY_FIGURES:
        known = METRICS.get(name)
        why = f"lower {known.title.lower()} is better" if known and known.better == "lower" else "it is not known"
        raise MetricError(
            f"{name!r} cannot be a quality figure ({why}), since a compression rate would rise as the model gets worse; "
            f"use one of {', '.join(QUALITY_FIGURES)}"
        )


METRICS: dict[str, Metric] = {m.name: m for m in _TABLE}
PAPER_SIX = ("amu_gb", "pcu", "al_s", "tt_tokens_per_param_s", "st_samples_per_param_s", "it_tokens_per_s", "aec_w", "mcr")


def metric(name: str, unit: str = "") -> Metric:
    """The table's row for `name`; that of the part before a dot for a part of it (`task_accuracy.arc_easy`), with the part in its
    title; or for a plugin's metric a row with its own unit and no direction."""
    whole, _, part = name.partition(".")
    known = METRICS.get(name)
    if part and whole in METRICS:
        known = replace(METRICS[whole], name=name, title=f"{METRICS[whole].title}, {part}")
    return known or Metric(name=name, title=name, unit=unit, better="none", formula="see the plugin", source="plugin")


def table_order(name: str) -> tuple[int, str]:
    """Sorts names as the table has them, a plugin's after all of these."""
    return (_ORDER.get(name.partition(".")[0], len(_ORDER)), name)


_ORDER = {name: index for index, name in enumerate(METRICS)}
