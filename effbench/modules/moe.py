"""A mixture of experts in the place of a decoder's feed-forward layers, on the expert kernels.

    x ─┬─ router (float32) ─ route ─ sort ─┐
       ├─────────────────────────────── experts ─▶ y = Σ_k weight · expert(x) + shared(x)
       └─ shared experts, one dense layer ─┘ (add)

The losses that keep a router healthy are terms of the training loss: a forward in training mode leaves their sum in
`auxiliary_loss`, and the training loop adds what `effbench.modules.losses` collects.

Upcycling, with P parts to a copy of the dense layer (its width over an expert's): expert i is part i mod P of copy i div P,
its output matrix times P, and the router has one row per copy, repeated for its parts ("virtual groups", arXiv 2410.07524,
section 3.2). Parts of a copy then tie, so the k best experts are k / P whole copies, and their renormalised weights add up
to the dense layer's function.

Shapes: T tokens, D hidden size, E experts, F width of an expert, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from effbench_kernels import Routing, load_balance_loss, route, sort, z_loss
from effbench_kernels.quantised import QuantisedExperts, quantise, quantised_experts
from torch import nn

from effbench.costs import FeedForwardCost
from effbench.modules.expert_kernels import OWN, run_experts
from effbench.modules.replace import initialise
from effbench.surgery import replace_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MATRICES = ("gate_proj", "up_proj", "down_proj")


class MoEFeedForward(nn.Module):
    """One layer. Router weights stay in float32 whatever the layer's dtype."""

    def __init__(
        self, cost: FeedForwardCost, act: str, *, score: str, renorm: bool, balance: float, z: float, kernels: str = OWN
    ):
        super().__init__()
        self.top_k, self.score, self.renorm, self.balance, self.z = cost.top_k, score, renorm, balance, z
        self.router = nn.Linear(cost.hidden, cost.experts, bias=False, dtype=torch.float32)
        self.experts = Experts(cost.experts, cost.hidden, cost.width, act, kernels=kernels)
        self.shared = GatedFeedForward(cost.hidden, cost.shared_width, act) if cost.shared_width else None
        self.auxiliary_loss: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(…, D) → (…, D)."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.router(x_TD.float())
            routing = route(logits_TE, self.top_k, self.score, self.renorm)
        out_TD = self.experts(x_TD, routing, None if self.shared is None else self.shared(x_TD))
        if self.training:
            self.auxiliary_loss = self._auxiliary(logits_TE, routing.expert)
        return out_TD.view(hidden_states.shape)

    def _auxiliary(self, logits_TE: torch.Tensor, expert_TK: torch.Tensor) -> torch.Tensor | None:
        terms = []
        if self.balance:
            terms.append(self.balance * load_balance_loss(logits_TE, expert_TK, self.score))
        if self.z:
            terms.append(self.z * z_loss(logits_TE))
        return sum(terms[1:], terms[0]) if terms else None


class Experts(nn.Module):
    """The stacked weights of E gated experts: w_in (E, 2F, D), gate before value, and w_out (E, D, F)."""

    def __init__(
        self, num_experts: int, hidden: int, width: int, act: str, *, kernels: str = OWN, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.act, self.kernels = act, kernels
        self.w_in = nn.Parameter(torch.empty(num_experts, 2 * width, hidden, dtype=dtype))
        self.w_out = nn.Parameter(torch.empty(num_experts, hidden, width, dtype=dtype))

    def reset_own_parameters(self, std: float) -> None:
        """New weights the way transformers draws them."""
        nn.init.normal_(self.w_in, std=std)
        nn.init.normal_(self.w_out, std=std)

    def quantise(self, kind: str) -> None:
        """Keep the weights in 8 or 4 bits ("int8", "int4") from now on; they take no gradient any more."""
        w_in, w_out = quantise(self.w_in, kind), quantise(self.w_out, kind)
        del self.w_in, self.w_out
        self.w_in, self.w_out = w_in, w_out

    def forward(self, x_TD: torch.Tensor, routing: Routing, add_TD: torch.Tensor | None) -> torch.Tensor:
        """Σ_k weight · expert(x) + add, (T, D), in the dtype of matrix products here."""
        device = x_TD.device.type
        # The kernels are no operator that autocast knows, so what it would do is done here.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype
        add = None if add_TD is None else add_TD.to(dtype)
        if isinstance(self.w_in, QuantisedExperts):
            plan = sort(routing.expert, self.w_in.shape[0])
            return quantised_experts(x_TD.to(dtype), self.w_in, self.w_out, plan, routing.weight, self.act, add=add)
        w_in, w_out = self.w_in.to(dtype), self.w_out.to(dtype)
        return run_experts(self.kernels, x_TD.to(dtype), w_in, w_out, routing, self.act, add)


class GatedFeedForward(nn.Module):
    """A dense gated layer of the model's own form: the shared experts of a mixture, as one."""

    def __init__(self, hidden: int, width: int, act: str):
        super().__init__()
        self.act = {"swiglu": nn.SiLU(), "geglu": nn.GELU(), "geglu_tanh": nn.GELU(approximate="tanh")}[act]
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """(T, D) → (T, D)."""
        out_TD: torch.Tensor = self.down_proj(self.act(self.gate_proj(x_TD)) * self.up_proj(x_TD))
        return out_TD


def replace_feed_forward(
    model: PreTrainedModel, make: Callable[[], MoEFeedForward], *, every: int = 1, upcycle: bool = False
) -> tuple[str, ...]:
    """Replace every n-th feed-forward layer (the n-th, the 2n-th …) by `make()`; return the names that changed.

    The new modules take device and dtype of what they replace, the router but its device. Weights are drawn from
    N(0, initializer_range), and with `upcycle` the experts are then made of the layer that was there.
    Raises ValueError when the model has no feed-forward layer of the form that transformers' Llama has.
    """
    std, seen = float(getattr(model.config, "initializer_range", 0.02)), 0

    def make_one(name: str, old: nn.Module) -> nn.Module | None:
        nonlocal seen
        if not all(isinstance(getattr(old, part, None), nn.Linear) for part in MATRICES):
            return None
        seen += 1
        if seen % every:
            return None
        weight: Any = old.gate_proj.weight
        with weight.device:
            new = make()
            initialise(new, std)
            new.to(weight.dtype).router.float()
            if upcycle:
                with torch.no_grad():
                    _upcycle(new, old)
        return new.train(old.training)

    changed = replace_modules(model, make_one)
    if not changed:
        raise ValueError(f"{type(model).__name__} has no {every} feed-forward layers with {', '.join(MATRICES)}")
    return changed


def _upcycle(new: MoEFeedForward, old: Any) -> None:
    """Experts from the parts of the dense layer, as the module's docstring says."""
    bank, wide = new.experts, old.gate_proj.weight.shape[0]
    num_experts, width = bank.w_in.shape[0], bank.w_out.shape[2]
    parts = wide // width
    assert parts * width == wide and num_experts % parts == 0 and new.top_k % parts == 0
    for expert in range(num_experts):
        part = slice(expert % parts * width, (expert % parts + 1) * width)
        bank.w_in[expert, :width] = old.gate_proj.weight[part]
        bank.w_in[expert, width:] = old.up_proj.weight[part]
        bank.w_out[expert] = old.down_proj.weight[:, part] * parts
    new.router.weight.copy_(new.router.weight[::parts].repeat_interleave(parts, dim=0))
