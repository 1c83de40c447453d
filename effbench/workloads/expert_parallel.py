"""One layer of experts on several devices, at a published shape: expert parallelism over `nproc` processes.

Each rank has T tokens of its own and E / N of the experts. A step routes the tokens, sends their rows to the ranks that hold their
experts, runs these and brings the results back, forward or forward and backward. The router's logits are drawn, or recorded from a
model trained here: one draw to place experts by, others to measure on. They are drawn from the suite's seed, the same in every
block, so that counts have no noise; weights and inputs are of the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from effbench import registry
from effbench.costs import FeedForwardCost, num_experts
from effbench.expert_forms import OWN, experts
from effbench.flow import Flow
from effbench.forms import FEED_FORWARD, gated
from effbench.modules.parallel_arms import KEY, Arm
from effbench.schema import Spec
from effbench.tape import Tape, Value
from effbench.technique import Params
from effbench.workload import BuildContext, Session, Workload

NUM_ROUTINGS = 4  # of which the steps take one after the other
RECORDED = (64, 8)  # experts, and experts a token, of the model that routing is recorded from
INDEX = 8


class ExpertParallelParams(Params):
    """Parameters of `expert_parallel`."""

    tokens: int = Field(default=256, ge=1, le=1 << 20, description="T, tokens of each rank in a step")
    mode: Literal["forward", "train"] = Field(default="forward", description="forward, or forward and backward")
    routing: Literal["uniform", "zipf", "topics", "recorded"] = Field(
        default="topics",
        description="even, 1/rank, synthetic topics with experts of their own, or recorded from a model trained here",
    )
    topics: int = Field(default=24, ge=1, le=4096, description="of the synthetic routing")
    strength: float = Field(default=3.0, ge=0, le=100, description="how much a topic prefers its experts, in logits")
    calibration_tokens: int = Field(default=4096, ge=1, le=1 << 20, description="that experts are placed by")


class ExpertParallel(Workload):
    """Route, exchange, run the experts, exchange back."""

    name = "expert_parallel"
    summary = "one layer of experts over several processes: rows and bytes sent, C_T, time in communication and compute"
    trains = False
    throughput = ""
    whole_model = False
    ranks = True
    axes = ("ffn", "parallel", "precision")
    Params = ExpertParallelParams

    def refusal(self, spec: Spec, config: Mapping[str, Any]) -> str | None:
        arm, devices, total = config.get(KEY), spec.nproc, num_experts(config)
        if not total:
            return f"expert_parallel: {spec.model.name} has no experts; choose a mixture of experts, or add moe"
        if not isinstance(arm, Arm):
            return "expert_parallel: nothing says how rows travel; add one of ep_naive, ep_deduplicated, ep_placed, ep_refined, ep_pruned"
        if spec.model.weights != "random":
            return f"expert_parallel: its weights are drawn, so weights {spec.model.weights!r} would change nothing; use random"
        packed = next((ref.name for ref in spec.techniques if registry.technique(ref.name).quantised), None)
        if packed:
            return f"expert_parallel: {packed} packs the layers of whole models; choose fp32, bf16 or fp16"
        if devices < 2:
            return "expert_parallel: one process has nobody to exchange rows with; set nproc to 2 or more"
        if devices > total:
            return f"expert_parallel: {devices} devices are more than the {total} experts of {spec.model.name}; lower nproc"
        if total % devices:
            fits = ", ".join(str(n) for n in range(2, total + 1) if total % n == 0)
            return f"expert_parallel: {total} experts cannot be shared evenly by {devices} devices; choose nproc from {fits}"
        return self._unfit_routing(arm, devices, FeedForwardCost.of(config))

    def _unfit_routing(self, arm: Arm, devices: int, cost: FeedForwardCost) -> str | None:
        if arm.devices is not None and arm.devices > devices:
            return f"ep_pruned: a token cannot use {arm.devices} of {devices} devices; choose devices up to {devices}"
        if arm.devices is not None and cost.top_k > (left := arm.devices * (cost.experts // devices)):
            return (
                f"ep_pruned: {arm.devices} of {devices} devices hold {left} experts, and a token needs {cost.top_k}; allow more"
            )
        if self.params.routing == "recorded" and (cost.experts, cost.top_k) != RECORDED:
            return (
                f"expert_parallel: recorded routing has {RECORDED[1]} of {RECORDED[0]} experts a token, and this layer "
                f"{cost.top_k} of {cost.experts}; choose another shape, or routing uniform, zipf or topics"
            )
        return None

    def stands_on(self, spec: Spec) -> str:
        asked = (spec.seed, spec.nproc, self.params.tokens, self.params.calibration_tokens)
        return f"recorded routing {asked}" if self.params.routing == "recorded" else ""

    def prepare(self, spec: Spec) -> None:
        if self.params.routing == "recorded":
            from effbench.workloads._parallel_routing import record

            record(self.params, spec.nproc, spec.seed)

    def rehearse(self, flow: Flow) -> None:
        """One rank's step under even routing: as many rows come as go, C_T of each token, or k in the naive arm."""
        tape, tokens, cost = flow.tape, self.params.tokens, FeedForwardCost.of(flow.layout.config)
        arm, devices = flow.layout.config[KEY], int(flow.layout.config["nproc"])
        tape.grad = self.params.mode == "train"
        grad, spare = tape.new(tokens * cost.hidden), tape.hold((NUM_ROUTINGS - 1) * tokens * cost.experts * 4)
        x, logits = tape.input(tokens * cost.hidden), tape.input(tokens * cost.experts, 4)
        alike = tape.hold(cost.experts**2 * 8) if arm.devices and arm.policy == "similarity" else None
        scores = tape.op(tokens * cost.experts, 4, (logits,), keeps_result=True)
        weight = tape.op(tokens * cost.top_k, 4, (scores,))
        del scores
        columns = cost.top_k if arm.deduplicate else 1
        rows = tokens * (_copies(cost, devices, arm.devices) if arm.deduplicate else cost.top_k)
        index = tape.hold(rows * INDEX + 4 * tokens * cost.top_k * INDEX + 2 * rows * columns * 4)
        beside = tape.op(rows * columns, 4, (weight,))
        sent = tape.op(rows * cost.hidden, x.item, (x,))
        come = tape.op(sent.elements, sent.item, (sent,))
        del sent, weight
        w_in, w_out = (tape.weight(f"{FEED_FORWARD}.experts.{name}") for name in ("w_in", "w_out"))
        if arm.deduplicate:
            there = tape.op(tokens * cost.top_k, 4, (tape.op(beside.elements, 4, (beside,)),))
            pairs = tape.op(tokens * cost.top_k * cost.hidden, x.item, (come,))
            out = _added_up(tape, experts(tape, pairs, there, w_in, w_out, cost, OWN, None), rows * cost.hidden)
            del there, pairs
        else:
            out = experts(tape, come, tape.new(rows, x.item), w_in, w_out, cost, OWN, None)
        back = tape.op(out.elements, out.item, (out,))
        del come, out
        if not arm.deduplicate:
            back = tape.op(back.elements, max(back.item, 4), (back, beside), (back, beside))
        total = _added_up(tape, back, tokens * cost.hidden)
        del back, beside
        if cost.shared_width:
            total = tape.add(total, gated(tape, x, f"{FEED_FORWARD}.shared"))
        if tape.grad:
            tape.backward(total)
        del grad, spare, alike, index

    def build(self, context: BuildContext) -> Session:
        from effbench.workloads._expert_parallel import ExpertParallelSession

        return ExpertParallelSession(context, self.params)


def _added_up(tape: Tape, rows: Value, elements: float) -> Value:
    """Rows added up in float32, in the width that they have."""
    wide = tape.cast(rows, max(rows.item, 4))
    return tape.cast(tape.op(elements, wide.item, (wide,)), tape.item)


def _copies(cost: FeedForwardCost, devices: int, allowed: int | None) -> float:
    """C_T under uniform routing: N (1 − C(E − E/N, k) / C(E, k)); pruned, no more than the devices allowed."""
    from math import comb

    here = cost.experts // devices
    found = devices * (1 - comb(cost.experts - here, cost.top_k) / comb(cost.experts, cost.top_k))
    return min(found, allowed or devices)
