"""Do the facts of a launch agree with its spec, with each other and with what other launches of the same spec say?

Facts are numbers that no sensor gives, so a trace cannot prove them. But most are tied to others: the tokens of a step to the spec's
batch, the number of losses to the number of steps, an accuracy to a whole number of tokens, stored bytes to the number of weights.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from effbench.exchange.checking import OWN, Seen, number, refused, remark, shown
from effbench.exchange.report import Finding
from effbench.metrics import QUALITY_FIGURES, quality_figure
from effbench.schema import canonical_json

THROUGHPUT = {"pretrain": "tt", "finetune": "st", "generate": "it", "moe_layer": ""}
PACKED = ("int8", "nf4", "fp4", "int4", "fp8")  # techniques that store weights in other forms than their dtype
BITS = {"fp32": 32, "bf16": 16, "fp16": 16}
BUFFERS_BYTES = 4e6  # of a model: tables of positions, masks
SAME = (
    "step_tokens", "step_samples", "step_flops", "step_bytes", "throughput", "params_total", "params_active", "params_trainable",
    "weight_bytes", "weight_bytes_by_kind", "bits_per_weight", "compute_dtype", "nominal_bits", "kv_cached_tokens",
)  # fmt: skip
FIGURE = 1e-6  # relative, of figures that follow from each other
HEAT_OR_BRAKE = 0x20 | 0x40 | 0x80  # NVML's clock event bits of thermal slowdown and power brake


def of_spec(seen: Seen) -> Iterator[Finding]:
    """What the spec says already: seed, threads, and for built-in workloads the work of a step."""
    launch, spec = seen.launch, seen.launch.spec
    wanted: dict[str, float | str | None] = {
        "seed": spec.seed + launch.block,
        "threads": spec.threads,
        "cores": seen.provenance("cores"),
    }
    if spec.device == "cpu":
        wanted["cpu_model"] = launch.provenance.get("cpu")
    else:
        wanted["gpu_name"] = launch.hardware
    if seen.own_workload:
        wanted |= _work(spec.workload, spec.params)
    for name, right in wanted.items():
        given = launch.facts.get(name)
        if given is not None and right is not None and given != right:
            yield refused("facts", seen.where, f"{name} is {shown(given)}; by the spec and provenance it is {shown(right)}")
    token = seen.series.get("token")
    if seen.own_workload and spec.workload == "generate" and token is not None:
        due = len(seen.step_s) * int(spec.params["new_tokens"])
        if len(token.t_s) != due or not (token.values == spec.params["batch_size"]).all():
            given = f"{len(token.t_s)} times of tokens in {len(seen.step_s)} steps"
            yield refused("facts", seen.where, f"{given}; {due} times of {spec.params['batch_size']} tokens there are")


def _work(workload: str, params: Mapping[str, Any]) -> dict[str, float | str | None]:
    if workload in ("pretrain", "finetune"):
        batch = params["batch_size"]
        return {"step_tokens": batch * params["seq_len"], "step_samples": batch, "throughput": THROUGHPUT[workload]}
    if workload == "generate":
        batch, new = params["batch_size"], params["new_tokens"]
        cached = batch * (params["prompt_tokens"] + new - 1)
        return {
            "step_tokens": batch * new,
            "step_samples": batch,
            "throughput": "it",
            "kv_cached_tokens": cached,
            "requested_new_tokens": new,
        }
    if workload == "moe_layer":
        return {"step_tokens": params["tokens"], "throughput": ""}
    return {}


def training(seen: Seen) -> Iterator[Finding]:
    """Training keeps a loss a step: those of quality, of warm-up and of the window; the last before the window are `train_loss`."""
    losses, spec = seen.launch.facts.get("losses"), seen.launch.spec
    if losses is None or not seen.own_workload or spec.workload not in ("pretrain", "finetune"):
        return
    first = int(spec.params["quality_steps"])
    count = first + len(seen.series["warm_up_step"].t_s) + len(seen.step_s)
    if len(losses) != min(count, 1000):
        yield refused("facts", seen.where, f"{len(losses)} losses for {count} steps of quality, warm-up and window")
    if len(set(losses)) < 0.5 * len(losses):
        yield remark("facts", seen.where, f"{len(losses) - len(set(losses))} of {len(losses)} losses are repeated")
    taken = seen.launch.facts.get("quality") or {}
    given, validation = number(taken.get("train_loss")), number(taken.get("validation_loss"))
    last = losses[max(0, first - 5) : first] if first <= len(losses) else []
    if given is not None and last and not math.isclose(given, sum(last) / len(last), rel_tol=FIGURE):
        yield refused(
            "quality",
            seen.where,
            f"train_loss is {given:.6g} nat/token; the last {len(last)} losses before it give {sum(last) / len(last):.6g}",
        )
    if validation is not None and losses and validation < 0.7 * min(losses):
        make = refused if validation < 0.5 * min(losses) else remark
        yield make(
            "quality",
            seen.where,
            f"validation_loss is {validation:.4g} nat/token; no step of training was below {min(losses):.4g}",
        )


def quality(seen: Seen) -> Iterator[Finding]:
    """Figures of quality follow from each other, and shares of tokens are whole numbers of tokens."""
    taken = seen.launch.facts.get("quality") or {}
    loss, bits, perplexity, accuracy, tokens = (
        number(taken.get(name))
        for name in ("validation_loss", "bits_per_byte", "perplexity", "next_token_accuracy", "validation_tokens")
    )
    if loss is not None and perplexity is not None and not math.isclose(perplexity, math.exp(min(loss, 700.0)), rel_tol=FIGURE):
        yield refused(
            "quality",
            seen.where,
            f"perplexity is {perplexity:.6g}; exp of the validation loss is {math.exp(min(loss, 700.0)):.6g}",
        )
    bytes_are_tokens = seen.launch.spec.model.weights in ("random", "trained")
    if (
        loss is not None
        and bits is not None
        and bytes_are_tokens
        and not math.isclose(bits, loss / math.log(2), rel_tol=FIGURE)
    ):
        yield refused("quality", seen.where, f"bits_per_byte is {bits:.6g}; the validation loss gives {loss / math.log(2):.6g}")
    if accuracy is not None and tokens:
        right = accuracy * tokens
        if not 0 <= accuracy <= 1 or abs(right - round(right)) > 1e-6 * tokens:
            yield refused(
                "quality",
                seen.where,
                f"next_token_accuracy {accuracy:.6g} of {tokens:g} tokens is {right:.3f} tokens, no whole number up to {tokens:g}",
            )
        if loss is not None and loss < (1 - accuracy) * math.log(2) - FIGURE:
            least = f"{(1 - accuracy) * math.log(2):.4g} nat/token at least"
            yield refused(
                "quality",
                seen.where,
                f"validation_loss is {loss:.4g} nat/token; tokens that were no first choice, {1 - accuracy:.4g} of all, give {least}",
            )
    figure, value = str(taken.get("figure") or ""), number(taken.get("quality"))
    best = quality_figure({name: number(taken.get(name)) for name in ("task_accuracy", "next_token_accuracy", "bits_per_byte")})
    if (
        value is not None
        and figure.split(" ")[0] in QUALITY_FIGURES
        and (best is None or figure.split(" ")[0] != best[0] or not math.isclose(value, best[1], rel_tol=FIGURE))
    ):
        right_one = f"{best[0]} of {best[1]:.6g}" if best else "no figure"
        yield refused("quality", seen.where, f"quality is {value:.6g} as {shown(figure)}; the figures taken give {right_one}")


def sizes(seen: Seen) -> Iterator[Finding]:
    """Stored bytes fit the number of weights and their format; parts add up."""
    total, active, stored = (seen.fact(name) for name in ("params_total", "params_active", "weight_bytes"))
    if total is not None and active is not None and active > total:
        yield refused("sizes", seen.where, f"{active:.6g} weights are active of {total:.6g}")
    by_kind = seen.launch.facts.get("weight_bytes_by_kind") or {}
    if by_kind and not by_kind.get("experts") and active is not None and active != total:
        yield refused("sizes", seen.where, f"{active:.6g} weights are active of {total:.6g}, and no expert is stored")
    adapters = number(by_kind.get("adapter")) or 0.0
    parts = sum(number(part) or 0.0 for part in by_kind.values())
    if by_kind and stored is not None and parts != stored:
        yield refused("sizes", seen.where, f"weight_bytes is {stored:.6g} B, its parts add up to {parts:.6g} B")
    bits = seen.fact("bits_per_weight")
    if (
        bits is not None
        and by_kind
        and stored
        and total
        and not math.isclose(bits, 8 * (stored - adapters) / total, rel_tol=FIGURE)
    ):
        yield refused(
            "sizes",
            seen.where,
            f"bits_per_weight is {bits:.6g}; {stored - adapters:.6g} B and {total:.6g} weights give {8 * (stored - adapters) / total:.6g}",
        )
    if not total or stored is None:
        return
    if not all(ref.identity.startswith(OWN) for ref in seen.launch.spec.techniques):
        return  # a plugin may store weights in any form
    packed = any(ref.name in PACKED for ref in seen.launch.spec.techniques)
    width = BITS.get(str(seen.launch.facts.get("compute_dtype")), 16)
    least = total * (2.5 if packed else 0.97 * min(width, 32)) / 8 / seen.launch.spec.nproc  # a rank stores its part
    added = max(adapters, 4 * min(seen.fact("params_trainable") or 0.0, total))  # adapters are weights that total leaves out
    most = total * 4 * 1.05 + BUFFERS_BYTES + (added if any(ref.axis == "peft" for ref in seen.launch.spec.techniques) else 0.0)
    if not least <= stored <= most:
        given = f"weight_bytes is {stored:.6g} B for {total:.6g} weights of {shown(seen.launch.facts.get('compute_dtype'))}"
        yield refused("sizes", seen.where, f"{given}{' packed' if packed else ''}; {least:.6g} to {most:.6g} B can be")


def flags(seen: Seen) -> Iterator[Finding]:
    """What sensors show is flagged: stolen time, a busy neighbour, a GPU slowed down by heat."""
    due: list[tuple[str, str]] = []
    cores, stolen = seen.fact("cores"), seen.grown("host_stolen_time")
    if cores and stolen and stolen[0] > 0.05 * stolen[1] * cores + 0.02:
        due.append(("stolen_time", f"{stolen[0]:.3f} s of {stolen[1]:.3f} s × {cores:g} cores were stolen"))
    others = seen.fact("other_cpu_share")
    if others is not None and others > 0.10:
        due.append(("cpu_contended", f"others took {100 * others:.0f} % of the cores"))
    slowed = int(np.count_nonzero(seen.inside("gpu_throttle").astype(np.int64) & HEAT_OR_BRAKE))
    if slowed:
        due.append(("throttled", f"{slowed} samples of the window show thermal slowdown or a power brake"))
    for flag, why in due:
        if flag not in seen.launch.reasons:
            yield refused("flags", seen.where, f"{why}, and the launch is not flagged {flag}")


def same(launches: Sequence[Seen]) -> Iterator[Finding]:
    """Launches of one spec on one machine did the same work with the same model; one calibration has one set of peaks."""
    by_spec: dict[str, list[Seen]] = defaultdict(list)
    by_peaks: dict[str, list[Seen]] = defaultdict(list)
    for seen in launches:
        by_spec[f"{seen.launch.env_id} {seen.launch.spec.spec_id}"].append(seen)
        peaks = seen.launch.facts.get("peaks") or {}
        by_peaks[f"{seen.launch.env_id} {peaks.get('calibrated_at')}"].append(seen)
    for members in by_spec.values():
        for name in SAME:
            yield from _equal(members, name, partial(_fact, name))
        yield from _equal(members, "the figure of quality", lambda seen: (seen.launch.facts.get("quality") or {}).get("figure"))
    for members in by_peaks.values():
        yield from _equal(members, "peaks", partial(_fact, "peaks"))


def _fact(name: str, seen: Seen) -> Any:
    return seen.launch.facts.get(name)


def _equal(members: Sequence[Seen], what: str, of: Callable[[Seen], Any]) -> Iterator[Finding]:
    first = members[0]
    for other in members[1:]:
        one, two = of(first), of(other)
        if one != two and canonical_json(one) != canonical_json(two):
            yield refused(
                "facts",
                other.where,
                f"{what} is {shown(two)}, in {first.where} of the same spec and machine it is {shown(one)}",
            )
            return
