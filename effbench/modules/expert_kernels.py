"""What computes the experts of a layer: our kernels, or transformers' implementations on the same weights and routing.

Shapes: T tokens, D hidden size, E experts, F width of an expert, K experts of a token.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from effbench_kernels import Routing, dense_plan, experts, sort
from torch.utils.flop_counter import flop_registry, register_flop_formula

from effbench.surgery import GATED_ACTIVATIONS

OWN = "effbench"


def run_experts(
    implementation: str,
    x_TD: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    routing: Routing,
    act: str,
    add_TD: torch.Tensor | None,
) -> torch.Tensor:
    """Σ_k weight · w_out[e] · act(w_in[e] · x) + add, (T, D); w_in (E, 2F, D), gate before value, w_out (E, D, F).

    `implementation`: "effbench", or transformers' "eager", "grouped_mm" or "batched_mm". All tensors but the routing's weights
    have one dtype.
    """
    if implementation != OWN:
        out_TD = _of_transformers(implementation, x_TD, w_in, w_out, routing, act)
        return out_TD if add_TD is None else out_TD + add_TD
    weight, num_experts = routing.weight, w_in.shape[0]
    if weight.shape[1] == num_experts:  # every expert has every token: nothing to sort
        plan = dense_plan(x_TD.shape[0], num_experts, x_TD.device)
        weight = torch.zeros_like(weight).scatter(1, routing.expert, weight)
    else:
        plan = sort(routing.expert, num_experts)
    return experts(x_TD, w_in, w_out, plan, weight, act=act, add=add_TD)


def _of_transformers(
    implementation: str, x_TD: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, routing: Routing, act: str
) -> torch.Tensor:
    """The library's function on a stand-in for its experts module, whose stacked weights have the layout of ours."""
    from transformers.activations import ACT2FN
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    act_fn = ACT2FN[next(name for name, gated in GATED_ACTIVATIONS.items() if gated == act)]

    def gate(both: torch.Tensor) -> Any:
        gate_NF, value_NF = both.chunk(2, dim=-1)
        return act_fn(gate_NF) * value_NF

    module = SimpleNamespace(
        num_experts=w_in.shape[0], gate_up_proj=w_in, down_proj=w_out, act_fn=act_fn, _apply_gate=gate,
        has_gate=True, has_bias=False, has_post_expert_norm=False, is_transposed=False, is_concatenated=True,
        _is_expert_parallel=False,
    )  # fmt: skip
    forward = MixtralExperts.forward.__wrapped__ if implementation == "eager" else ALL_EXPERTS_FUNCTIONS[implementation]
    out_TD: torch.Tensor = forward(module, x_TD, routing.expert, routing.weight)
    return out_TD


def _flops(x: Any, w_in: Any, w_out: Any, *rest: Any, **_: Any) -> int:
    """FLOPs of one call of the kernels' operator from its shapes, as torch counts matrix products."""
    pairs = rest[5][0]  # b_in, b_out, weight, add, offsets, token
    return int(2 * pairs * (w_in[1] * w_in[2] + w_out[1] * w_out[2]))


if torch.ops.effbench_kernels.experts not in flop_registry:  # torch counts no operator that it does not know
    register_flop_formula(torch.ops.effbench_kernels.experts)(_flops)
