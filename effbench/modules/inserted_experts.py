"""Experts for Bloom's feed-forward layers, before a frozen layer or in its place, on the expert kernels.

    inserted    h' = h + gate · Σ_k weight · expert(LN(h)),   out = h' + FFN(LN(h'))      gate = 0 at the start
    upcycled    out = h + Σ_k weight · expert(LN(h))

LN is the block's own frozen norm before its feed-forward layer, and h what attention has left. An expert is the block's layer
again, two matrices with biases and Bloom's gelu (its tanh form), copied with a little noise. A token's k weights are
probabilities of a softmax over all experts, divided by their sum or not.

Shapes: T tokens, D hidden size, E experts, F width of an expert, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from effbench_kernels import Routing, dense_plan, experts, load_balance_loss, route, sort
from torch import nn
from torch.nn import functional as F

from effbench.modules import expert_kernels  # noqa: F401  (lets torch count the kernels' FLOPs)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a mixture can be told; see the technique `fuximt`."""

    form: Literal["inserted", "upcycled"]
    experts: int
    top_k: int
    renorm: bool
    gate: Literal["scalar", "vector"]
    balance: float
    noise: float
    by: Literal["kernels", "loop"]


class SparseFeedForward(nn.Module):
    """In the place of a BloomMLP: router (fp32), experts, and in the inserted form the frozen layer and a gate (fp32)."""

    def __init__(self, block: Any, choices: Choices, std: float):
        super().__init__()
        old, self.choices = block.mlp, choices
        device, hidden = old.dense_h_to_4h.weight.device, old.dense_h_to_4h.in_features
        self.router = nn.Linear(hidden, choices.experts, bias=False, device=device, dtype=torch.float32)
        nn.init.normal_(self.router.weight, std=std)
        self.experts = BiasedExperts(old, choices)
        self.dense = self.gate = None
        self._norm = (block.post_attention_layernorm,)  # in a tuple, since it is the block's and no part of this module
        if choices.form == "inserted":
            self.dense = old
            self.gate = nn.Parameter(torch.zeros(1 if choices.gate == "scalar" else hidden, device=device))
        self.auxiliary_loss: torch.Tensor | None = None

    def forward(self, normed: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """(B, T, D) twice: LN(h) and h, as the block hands them to its feed-forward layer; the block's result."""
        x_TD, h_TD = (y.reshape(-1, y.shape[-1]) for y in (normed, residual))
        routing = self._route(x_TD)
        if self.gate is None:
            return self.experts(x_TD, routing, h_TD).view(residual.shape)
        if self.choices.gate == "scalar":
            out_TD = self.experts(x_TD, Routing(routing.expert, routing.weight * self.gate), h_TD)
        else:
            out_TD = h_TD + self.gate.to(h_TD.dtype) * self.experts(x_TD, routing)
        out = out_TD.view(residual.shape)
        assert self.dense is not None
        result: torch.Tensor = self.dense(self._norm[0](out), out)
        return result

    def _route(self, x_TD: torch.Tensor) -> Routing:
        choices = self.choices
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.router(x_TD.to(self.router.weight.dtype))
            routing = route(logits_TE, choices.top_k, renorm=choices.renorm)
            if self.training and choices.balance:
                self.auxiliary_loss = choices.balance * load_balance_loss(logits_TE, routing.expert)
        return routing


class BiasedExperts(nn.Module):
    """E copies of a dense layer with noise: w_in (E, F, D), b_in (E, F), w_out (E, D, F), b_out (E, D)."""

    def __init__(self, dense: Any, choices: Choices):
        super().__init__()
        self.by = choices.by
        first, second = dense.dense_h_to_4h, dense.dense_4h_to_h
        for name, value in (("w_in", first.weight), ("b_in", first.bias), ("w_out", second.weight), ("b_out", second.bias)):
            with torch.no_grad():
                stack = value.expand(choices.experts, *value.shape).clone()
                if name.startswith("w") and choices.noise:
                    stack += torch.randn_like(stack) * (choices.noise * value.float().square().mean().sqrt()).to(stack.dtype)
            self.register_parameter(name, nn.Parameter(stack))

    def forward(self, x_TD: torch.Tensor, routing: Routing, add_TD: torch.Tensor | None = None) -> torch.Tensor:
        """Σ_k weight · expert(x) + add, (T, D): the sum in the dtype of matrix products here, or of `add` where that is wider."""
        device = x_TD.device.type
        # The kernels are no operator that autocast knows, so what it would do is done here.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype
        x_TD = x_TD.to(dtype)
        weights = [getattr(self, name).to(dtype) for name in ("w_in", "b_in", "w_out", "b_out")]
        if self.by == "loop":
            with torch.autocast(device, enabled=False):
                out_TD = by_loop(x_TD, weights, routing)
            return out_TD if add_TD is None else add_TD + out_TD
        w_in, b_in, w_out, b_out = weights
        num_tokens, num_experts, weight = x_TD.shape[0], w_in.shape[0], routing.weight
        if weight.shape[1] == num_experts:  # every expert has every token: nothing to sort
            plan = dense_plan(num_tokens, num_experts, x_TD.device)
            weight = torch.zeros_like(weight).scatter(1, routing.expert, weight)
        else:
            plan = sort(routing.expert, num_experts)
        fused = add_TD if add_TD is not None and add_TD.dtype == dtype else None
        out_TD = experts(x_TD, w_in, w_out, plan, weight, "gelu_tanh", b_in=b_in, b_out=b_out, add=fused)
        return out_TD if add_TD is fused else add_TD + out_TD


def by_loop(x_TD: torch.Tensor, stacks: Sequence[torch.Tensor], routing: Routing) -> torch.Tensor:
    """The same in plain torch, one expert after the other, in the dtype of x: (T, D). The reference.

    stacks: w_in, b_in, w_out, b_out. They are taken apart at once, so that the gradient of a stack is put together once.
    """
    out_TD, dtype = torch.zeros_like(x_TD), x_TD.dtype
    for expert, weights in enumerate(zip(*(stack.unbind() for stack in stacks), strict=True)):
        token_N, slot_N = torch.where(routing.expert == expert)
        if not len(token_N):
            continue
        w_in, b_in, w_out, b_out = (weight.to(dtype) for weight in weights)
        hidden_NF = F.gelu(F.linear(x_TD[token_N], w_in, b_in), approximate="tanh")
        rows_ND = F.linear(hidden_NF, w_out, b_out) * routing.weight[token_N, slot_N, None]
        out_TD.index_add_(0, token_N, rows_ND.to(dtype))
    return out_TD


def put_experts(model: PreTrainedModel, choices: Choices, *, every: int) -> None:
    """Give every n-th layer (the n-th, the 2n-th …) of a Bloom model its mixture; noise and routers are drawn in order."""
    std = float(model.config.initializer_range)
    for index, block in enumerate(model.get_decoder().h):
        if (index + 1) % every == 0:
            block.mlp = SparseFeedForward(block, choices, std).train(block.training)


def mixtures(model: nn.Module) -> list[SparseFeedForward]:
    """The mixtures of a model, in order."""
    return [module for module in model.modules() if isinstance(module, SparseFeedForward)]


def train_experts_only(model: nn.Module) -> None:
    """Gradients for experts, routers and gates, and for nothing else."""
    model.requires_grad_(False)
    for mixture in mixtures(model):
        for parameter in own_parameters(mixture):
            parameter.requires_grad_(True)


def own_parameters(mixture: SparseFeedForward) -> list[nn.Parameter]:
    """What a mixture adds: router, experts and gate, but not the frozen layer behind it."""
    gate = [] if mixture.gate is None else [mixture.gate]
    return [*mixture.router.parameters(), *mixture.experts.parameters(), *gate]
