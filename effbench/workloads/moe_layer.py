"""One layer of experts by itself, at the shape of a published model or of a dense model with the technique `moe`.

One step routes T tokens, runs their experts and the shared ones, forward or forward and backward. The router's logits are
drawn and not computed, so that the load has the distribution that is asked for; routing them is part of the step.
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
from effbench.layout import ITEM_BYTES
from effbench.schema import Spec
from effbench.technique import Params
from effbench.workload import BuildContext, Session, Workload

MAX_GATHER_BYTES = 2_000_000_000
NUM_ROUTINGS = 4  # of which the steps take one after the other


class MoELayerParams(Params):
    """Parameters of `moe_layer`."""

    tokens: int = Field(default=256, ge=1, le=1 << 22, description="T, tokens of a step")
    mode: Literal["forward", "train"] = Field(default="forward", description="forward, or forward and backward")
    routing: Literal["uniform", "zipf", "one_hot"] = Field(
        default="uniform", description="load of the experts: even, 1/rank, or all tokens to the same k"
    )


class MoELayer(Workload):
    """Route, sort and run one layer's experts."""

    name = "moe_layer"
    summary = "one layer of experts at a published shape, forward or with backward: tokens/s, share of the roofline"
    trains = False
    throughput = ""
    whole_model = False
    axes = ("ffn", "kernel", "precision")
    Params = MoELayerParams

    def refusal(self, spec: Spec, config: Mapping[str, Any]) -> str | None:
        if not num_experts(config):
            from effbench.models.shapes import layer_names, shape, shape_names

            fits = [*layer_names(), *(name for name in shape_names() if num_experts(shape(name).config))]
            return f"moe_layer: {spec.model.name} has no experts; add the technique moe, or choose from {', '.join(fits)}"
        if spec.model.weights != "random":
            return f"moe_layer: its weights are drawn, so weights {spec.model.weights!r} would change nothing; use random"
        packed = next((ref.name for ref in spec.techniques if registry.technique(ref.name).quantised), None)
        if packed:
            return f"moe_layer: {packed} packs the layers of whole models; choose fp32, bf16 or fp16, or the workload generate"
        other = next((ref.name for ref in spec.techniques if ref.axis == "kernel" and "expert_kernels" not in config), None)
        if other:
            return f"moe_layer: {other} is about attention and changes nothing in a layer of experts; leave it out"
        cost, tokens = FeedForwardCost.of(config), self.params.tokens
        copied = tokens * cost.top_k * 3 * cost.hidden * cost.width * ITEM_BYTES[str(config.get("dtype") or "float32")]
        if config.get("expert_kernels") == "batched_mm" and copied > MAX_GATHER_BYTES:
            return (
                f"moe_layer: batched_mm copies the weights of {tokens * cost.top_k} pairs of token and expert, {copied / 1e9:.1f} GB; "
                f"choose fewer tokens than {tokens}, up to {MAX_GATHER_BYTES / 1e9:.0f} GB, or another implementation"
            )
        return None

    def rehearse(self, flow: Flow) -> None:
        """Inputs, the output's gradient and the router's logits are there before; every step routes, runs the experts and sums."""
        tape, tokens, cost = flow.tape, self.params.tokens, FeedForwardCost.of(flow.layout.config)
        tape.grad = self.params.mode == "train"
        grad = tape.new(tokens * cost.hidden)
        spare = tape.hold((NUM_ROUTINGS - 1) * tokens * cost.experts * 4)
        x, logits = tape.input(tokens * cost.hidden), tape.input(tokens * cost.experts, 4)
        scores = tape.op(tokens * cost.experts, 4, (logits,), keeps_result=True)
        weight = tape.op(tokens * cost.top_k, 4, (scores,))
        del scores
        shared = gated(tape, x, f"{FEED_FORWARD}.shared") if cost.shared_width else None
        w_in, w_out = (tape.weight(f"{FEED_FORWARD}.experts.{name}") for name in ("w_in", "w_out"))
        kernels = str(flow.layout.config.get("expert_kernels") or OWN)
        out = experts(tape, x, weight, w_in, w_out, cost, kernels, shared)
        del weight, shared
        if tape.grad:
            tape.backward(out)
        del grad, spare

    def build(self, context: BuildContext) -> Session:
        from effbench.workloads._moe_layer import MoELayerSession

        return MoELayerSession(context, self.params)
