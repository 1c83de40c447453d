"""The session behind `moe_layer`.

Shapes: T tokens, D hidden size, E experts, F width of an expert, K experts of a token; n tokens of the check.
"""

from __future__ import annotations

from typing import Any

import torch
from effbench_kernels import Groups, Routing, experts, route, sort
from effbench_kernels.backends import ran_on
from torch import nn

from effbench.costs import FeedForwardCost
from effbench.errors import CorrectnessError, LaunchError
from effbench.models import checkpoints
from effbench.models.accounting import dtype_name
from effbench.models.context import configured
from effbench.models.storage import weight_bytes
from effbench.modules.expert_kernels import OWN
from effbench.modules.moe import Experts, GatedFeedForward
from effbench.surgery import GATED_ACTIVATIONS, SIGMOID_FAMILIES
from effbench.workload import BuildContext, Session, Step
from effbench.workloads.moe_layer import NUM_ROUTINGS

CHECK_PAIRS = 16  # pairs of token and expert that the reference computes, in float64 loops
CHECK_WEIGHTS = 50_000_000  # largest layer whose weights' gradients are checked too
# Largest error of the output and of gradients against float64, RMS over RMS.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}


class MoELayerSession(Session):
    """Weights ~ N(0, 1 / fan-in) and inputs ~ N(0, 1), so that nothing saturates."""

    def __init__(self, context: BuildContext, params: Any):
        values = configured(context.spec)
        self.params, self.cost = params, FeedForwardCost.of(values)
        self.device, self.dtype = torch.device(context.spec.device), getattr(torch, str(values.get("dtype") or "float32"))
        self.act = GATED_ACTIVATIONS[values.get("hidden_act", "silu")]
        self.kernels = values.get("expert_kernels", OWN)
        self.router = _router(values, checkpoints.config_values(context.spec.model)[0])
        torch.manual_seed(context.seed)
        with self.device:
            self.layer = self._layer()
            self.x_TD = torch.randn(params.tokens, self.cost.hidden).to(self.dtype)
            self.grad_TD = torch.randn(params.tokens, self.cost.hidden).to(self.dtype)
            self.logits = [logits_of(params.routing, params.tokens, self.cost.experts) for _ in range(NUM_ROUTINGS)]
        self.trains = params.mode == "train"
        self.layer.requires_grad_(self.trains)
        for leaf in (self.x_TD, *self.logits):
            leaf.requires_grad_(self.trains)
        self.num_steps, self.errors = 0, dict[str, float]()
        load = torch.stack(
            [torch.bincount(self._route(i).expert.flatten(), minlength=self.cost.experts) for i in range(NUM_ROUTINGS)]
        )
        self.touched = float((load > 0).sum(1).float().mean())
        self.largest_load = float(load.amax(1).float().mean()) / params.tokens
        self.step_work = self._work()

    def check(self) -> None:
        """Some tokens of the whole step, and in training the gradients of a step of those alone, against float64 loops."""
        num_tokens = min(self.params.tokens, max(1, CHECK_PAIRS // self.cost.top_k))
        chosen = torch.linspace(0, self.params.tokens - 1, num_tokens, device=self.device).long()
        with torch.no_grad():
            whole = self._forward(0)
            routing, x_nD = self._route(0), self.x_TD.detach()[chosen]
            part = Routing(routing.expert[chosen], routing.weight[chosen])
            self._compare("output", whole[chosen], self._reference(x_nD, part))
        if not self.trains:
            return
        heavy = self.cost.weights() > CHECK_WEIGHTS
        bank = self.layer["experts"]
        wanted = [x_nD.requires_grad_(), part.weight.detach().requires_grad_(), *([] if heavy else bank.parameters())]
        part, grad_nD = Routing(part.expert, wanted[1]), self.grad_TD[chosen]
        found, true = (
            torch.autograd.grad(out, wanted, grad_nD)
            for out in (bank(x_nD, part, self._shared(x_nD)), self._reference(x_nD, part))
        )
        for name, one, other in zip(("x", "weight", "w_in", "w_out"), found, true, strict=False):
            self._compare(f"gradient of {name}", one, other)

    def step(self) -> None:
        if self.trains:
            out_TD = self._forward(self.num_steps)
            out_TD.backward(self.grad_TD)
            self.layer.zero_grad(set_to_none=True)
            self.x_TD.grad = self.logits[self.num_steps % NUM_ROUTINGS].grad = None
        else:
            with torch.inference_mode():
                out_TD = self._forward(self.num_steps)
        total = float(out_TD.detach().sum(dtype=torch.float32))  # waits for the device
        if total != total or abs(total) == float("inf"):
            raise LaunchError("not_finite", f"the output of step {self.num_steps} is not finite")
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.num_steps += 1

    def facts(self) -> dict[str, Any]:
        return {
            "params_total": self.cost.weights(),
            "params_active": self.cost.active_weights(),
            "params_trainable": sum(p.numel() for p in self.layer.parameters()) if self.trains else 0,
            "weight_bytes": weight_bytes(self.layer),
            "compute_dtype": dtype_name(self.dtype),
            "expert_kernels": self.kernels,
            "expert_backend": ran_on(self.x_TD) if self.kernels == OWN else self.kernels,
            "experts_touched": self.touched,
            "largest_expert_load_share": self.largest_load,
            "check_errors": self.errors,
        }

    def _layer(self) -> nn.ModuleDict:
        cost = self.cost
        bank = Experts(cost.experts, cost.hidden, cost.width, self.act, kernels=self.kernels, dtype=self.dtype)
        parts: dict[str, nn.Module] = {"experts": bank}
        if cost.shared_width:
            parts["shared"] = GatedFeedForward(cost.hidden, cost.shared_width, self.act).to(self.dtype)
        for parameter in nn.ModuleDict(parts).parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        return nn.ModuleDict(parts)

    def _route(self, number: int) -> Routing:
        return route(self.logits[number % NUM_ROUTINGS], self.cost.top_k, **self.router)

    def _shared(self, x_TD: torch.Tensor) -> torch.Tensor | None:
        return self.layer["shared"](x_TD) if "shared" in self.layer else None

    def _forward(self, number: int) -> torch.Tensor:
        out_TD: torch.Tensor = self.layer["experts"](self.x_TD, self._route(number), self._shared(self.x_TD))
        return out_TD

    def _reference(self, x_nD: torch.Tensor, routing: Routing) -> torch.Tensor:
        bank, plan = self.layer["experts"], sort(routing.expert, self.cost.experts)
        add_nD = self._shared(x_nD)
        return experts(x_nD, bank.w_in, bank.w_out, plan, routing.weight, act=self.act, add=add_nD, backend="reference")

    def _compare(self, what: str, found: torch.Tensor, true: torch.Tensor) -> None:
        true = true.double()
        error = float((found.double() - true).square().mean().sqrt() / true.square().mean().sqrt().clamp_min(1e-30))
        self.errors[what] = error
        if not error <= TOLERANCE[self.dtype]:
            raise CorrectnessError(
                f"{self.kernels}: the {what} is off by {error:.3g} of its RMS; {TOLERANCE[self.dtype]:g} is allowed for {self.dtype}"
            )

    def _work(self) -> Step:
        """FLOPs of the products of the pairs, and bytes that must move if every tensor moves once.

        Forward: inputs, the weights of experts that have tokens, output. Backward besides: the output's gradient, inputs and
        those weights again, and the gradients of inputs and of all weights; pre-activations are written and read.
        """
        cost, tokens, item = self.cost, self.params.tokens, self.dtype.itemsize
        router = cost.hidden * cost.experts
        flops = 2 * tokens * (cost.active_weights() - router)
        one_expert, shared = 3 * cost.hidden * cost.width, 3 * cost.hidden * cost.shared_width
        read, plane = self.touched * one_expert + shared, tokens * cost.hidden
        moved = 2 * plane + read
        if self.trains:
            pre = 2 * tokens * (cost.top_k * cost.width + cost.shared_width)
            moved += 3 * plane + read + cost.experts * one_expert + shared + 2 * pre
        return Step(tokens=tokens, samples=1, model_flops=flops * (3 if self.trains else 1), model_bytes=item * moved)


def logits_of(kind: str, tokens: int, num_experts: int) -> torch.Tensor:
    """(T, E) router logits whose k best experts are drawn without replacement from a distribution over the experts.

    log p + Gumbel noise: the k largest are such a draw (Kool et al., arXiv 1903.06059, section 3). "one_hot" has no noise, and
    its order is that of the experts.
    """
    rank_E = torch.arange(1, num_experts + 1, dtype=torch.float32)
    if kind == "one_hot":
        return (-rank_E / num_experts).expand(tokens, -1).contiguous()
    noise_TE = -torch.empty(tokens, num_experts).exponential_().log()
    return noise_TE - rank_E.log() if kind == "zipf" else noise_TE


def _router(values: dict[str, Any], model_type: str) -> dict[str, Any]:
    """How the shape's router scores, as `route` takes it; families that do not say renormalise (mixtral, gpt_oss)."""
    groups = values.get("n_group") or 1
    score = values.get("scoring_func") or ("sigmoid" if model_type in SIGMOID_FAMILIES else "softmax")
    by = "top2" if score == "sigmoid" else "max"
    return {
        "score": score,
        "renorm": bool(values.get("norm_topk_prob", True)),
        "groups": Groups(groups, values["topk_group"], by) if groups > 1 else None,
        "scale": float(values.get("routed_scaling_factor") or 1.0),
    }
