"""The session behind `expert_parallel`, one in each rank; rank 0 reports for all.

Shapes: T tokens of a rank, D hidden size, E experts, F width of an expert, K experts of a token; n tokens of a check.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from effbench_kernels import Routing, experts, sort
from effbench_kernels.backends import ran_on
from effbench_kernels.exchange import Meter, expert_parallel, shards
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from effbench.costs import FeedForwardCost
from effbench.errors import CorrectnessError, LaunchError, ModelError
from effbench.models import checkpoints
from effbench.models.accounting import dtype_name
from effbench.models.context import configured
from effbench.modules.moe import GatedFeedForward
from effbench.modules.parallel_arms import KEY
from effbench.schema import Series
from effbench.surgery import GATED_ACTIVATIONS
from effbench.workload import BuildContext, Session, Step
from effbench.workloads._moe_layer import CHECK_PAIRS, TOLERANCE, _router
from effbench.workloads._parallel_routing import Router, draw
from effbench.workloads.expert_parallel import NUM_ROUTINGS

PARTS = ("communication_s", "compute_s")
EXACT_WIDTHS = (8, 4)  # D and F of the layer of whole numbers


class ExpertParallelSession(Session):
    """Weights ~ N(0, 1 / fan-in) and inputs ~ N(0, 1); an expert's weights are drawn from its number, wherever it lives."""

    def __init__(self, context: BuildContext, params: Any):
        if not dist.is_initialized():
            raise ModelError("expert_parallel is the work of several processes, and this one is alone; run it with nproc")
        values = configured(context.spec)
        self.params, self.cost, self.arm = params, FeedForwardCost.of(values), values[KEY]
        self.rank, self.size, self.clock = dist.get_rank(), dist.get_world_size(), context.clock
        self.device = torch.device(context.spec.device)
        self.group = init_device_mesh(context.spec.device, (self.size,), mesh_dim_names=("experts",)).get_group()
        self.dtype = getattr(torch, str(values.get("dtype") or "float32"))
        self.act = GATED_ACTIVATIONS[values.get("hidden_act", "silu")]
        self.seed, self.routing_seed = context.seed, context.spec.seed
        drawn = draw(params, self.cost, self.routing_seed)
        options = _router(values, checkpoints.config_values(context.spec.model)[0])
        self.router = Router(self.arm, self.cost, options, drawn).to(self.device)
        self.where = shards(self.router.place, self.size)
        self.held = self.where.held_by(self.rank).tolist()
        self.logits = [one.to(self.device) for one in drawn.measured]
        self.trains = params.mode == "train"
        self.w_in, self.w_out = (
            torch.stack(stack).to(self.device) for stack in zip(*map(self._expert, self.held), strict=True)
        )
        torch.manual_seed(self.seed)
        self.shared = self._shared()
        torch.manual_seed(self.seed + 1_000_003 * (self.rank + 1))
        self.x_TD, self.grad_TD = (torch.randn(params.tokens, self.cost.hidden).to(self.device, self.dtype) for _ in range(2))
        for leaf in self._leaves():
            leaf.requires_grad_(self.trains)
        self.meter = Meter(self.rank)
        self.num_steps, self.errors, self.exact_error = 0, dict[str, float](), 0.0
        self.parts, self.sent = list[tuple[float, ...]](), dict[int, tuple[int, ...]]()
        self.step_work = self._work()

    # The gate.

    def check(self) -> None:
        """Some tokens of each rank against float64 on rank 0; and all of them in a layer of whole numbers, which must be exact."""
        num_tokens = min(self.params.tokens, max(1, CHECK_PAIRS // self.cost.top_k))
        chosen = torch.linspace(0, self.params.tokens - 1, num_tokens, device=self.device).long()
        x_TD = self.x_TD.detach().requires_grad_(self.trains)
        routing = _cut(self.router(self.logits[0]), self.trains)
        out_TD = self._forward(x_TD, routing)
        found = [out_TD.detach()]
        if self.trains:
            found += torch.autograd.grad(out_TD, (x_TD, routing.weight), self.grad_TD)
        part = (x_TD, *routing, self.grad_TD, *found)
        for known in self._gathered([tensor.detach()[chosen].cpu() for tensor in part]):
            self._compare(*known)
        self._check_exactly()

    def _compare(
        self, x_nD: torch.Tensor, expert_nK: torch.Tensor, weight_nK: torch.Tensor, grad_nD: torch.Tensor, *found: Any
    ) -> None:
        """What one rank found for some tokens, against one process in float64."""
        used, local = expert_nK.unique(return_inverse=True)
        w_in, w_out = (torch.stack(stack).double() for stack in zip(*map(self._expert, used.tolist()), strict=True))
        x, weight = (one.double().requires_grad_(self.trains) for one in (x_nD, weight_nK))
        plan = sort(local.view_as(expert_nK), len(used))
        true = [experts(x, w_in, w_out, plan, weight, act=self.act, backend="reference")]
        if self.trains:
            true += torch.autograd.grad(true[0], (x, weight), grad_nD.double())
        for name, one, other in zip(("output", "gradient of x", "gradient of weight"), found, true, strict=False):
            other = other.detach()
            error = float((one.double() - other).square().mean().sqrt() / other.square().mean().sqrt().clamp_min(1e-30))
            self.errors[name] = max(error, self.errors.get(name, 0.0))
            if not error <= TOLERANCE[self.dtype]:
                raise CorrectnessError(
                    f"expert_parallel: the {name} is off by {error:.3g} of its RMS; {TOLERANCE[self.dtype]:g} is allowed for {self.dtype}"
                )

    def _check_exactly(self) -> None:
        """The same routing over small whole numbers in float64: sums are then exact in any order, so one wrong row shows."""
        hidden, width = EXACT_WIDTHS
        routing = self.router(self.logits[0])
        generator = torch.Generator().manual_seed(self.seed)
        w_in, w_out = (
            torch.randint(-2, 3, shape, generator=generator).double().to(self.device)
            for shape in ((self.cost.experts, width, hidden), (self.cost.experts, hidden, width))
        )
        generator.manual_seed(self.seed + self.rank + 1)
        x, grad = (torch.randint(-4, 5, (self.params.tokens, hidden), generator=generator).double() for _ in range(2))
        weight = torch.randint(1, 5, routing.weight.shape, generator=generator).double()
        x, grad, weight = (one.to(self.device) for one in (x, grad, weight))
        own = [one[self.where.held_by(self.rank)] for one in (w_in, w_out)]
        leaves = [one.requires_grad_(self.trains) for one in (x, weight, *own)]
        out = expert_parallel(
            x, Routing(routing.expert, weight), self.where, *own, act="relu", deduplicate=self.arm.deduplicate, group=self.group
        )
        found = [out.detach(), *(torch.autograd.grad(out, leaves, grad) if self.trains else ())]
        ranks = self._gathered([one.detach().cpu() for one in (x, routing.expert, weight, grad, *found)])
        if not ranks:
            return
        whole = [torch.cat(parts) for parts in list(zip(*ranks, strict=True))]
        leaves = [one.requires_grad_(self.trains) for one in (whole[0], whole[2], w_in.cpu(), w_out.cpu())]
        plan = sort(whole[1], self.cost.experts)
        alone = experts(leaves[0], leaves[2], leaves[3], plan, leaves[1], act="relu")
        true = [alone.detach(), *(torch.autograd.grad(alone, leaves, whole[3]) if self.trains else ())]
        order = torch.sort(self.router.place.cpu(), stable=True).indices  # of the experts, as the ranks hold them
        true[3:] = [one[order] for one in true[3:]]
        self.exact_error = max(float((one - other).abs().max()) for one, other in zip(whole[4:], true, strict=True))
        if self.exact_error:
            raise CorrectnessError(f"expert_parallel: whole numbers come out wrong by {self.exact_error:g}; a row went astray")

    # The work.

    def begin(self) -> None:
        self.parts.clear()
        self.sent.clear()

    def step(self) -> None:
        began_s, started = self.clock(), time.perf_counter()
        self._once(self.num_steps % NUM_ROUTINGS)
        whole_s, exchange_s = time.perf_counter() - started, self.meter.exchange_s()
        self.parts.append((began_s, exchange_s, whole_s - exchange_s))
        self.num_steps += 1

    def quality(self) -> None:
        """What a short window did not come to is sent now, so that counts are of all routings."""
        for number in set(range(NUM_ROUTINGS)) - set(self.sent):
            self._once(number)

    def _once(self, number: int) -> None:
        self.meter.clear()
        with torch.inference_mode(not self.trains):
            out_TD = self._forward(self.x_TD, self.router(self.logits[number]))
            if self.shared is not None:
                out_TD = out_TD + self.shared(self.x_TD)
        if self.trains:
            out_TD.backward(self.grad_TD)
            for leaf in self._leaves():
                leaf.grad = None
        total = float(out_TD.detach().sum(dtype=torch.float32))  # waits for the device
        if total != total or abs(total) == float("inf"):
            raise LaunchError("not_finite", f"the output of step {self.num_steps} is not finite")
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.sent[number] = (self.meter.rows, self.meter.sent_bytes, self.meter.between_bytes)

    def facts(self) -> dict[str, Any]:
        ranks: list[Any] = [None] * self.size
        dist.all_gather_object(ranks, (self.sent, self.router.counts(self.logits)))
        sent = np.array([[found[number] for number in range(NUM_ROUTINGS)] for found, _ in ranks]).sum(0)
        copies = np.array([counts["copies"] for _, counts in ranks]).sum(0)
        tokens, k = self.size * self.params.tokens, self.cost.top_k
        devices, pairs = float(copies.mean() / tokens), NUM_ROUTINGS * tokens * k
        figures: dict[str, Any] = {
            "replicas_per_token": float(sent[:, 0].mean() / tokens),
            "distinct_devices_per_token": devices,
            "held_out_replicas_per_token": devices if self.params.routing == "recorded" else "not_taken",
            "replicas_max": max(counts["most"] for _, counts in ranks),
            "rows_sent": float(sent[:, 0].mean()),
            "expected_rows_sent": float(copies.mean()) if self.arm.deduplicate else float(k * tokens),
            "bytes_sent": float(sent[:, 1].mean()),
            "bytes_sent_between_devices": float(sent[:, 2].mean()),
            "output_error": self.exact_error,
            **self.router.of_placement(self.routing_seed),
        }
        if self.arm.devices:
            figures |= {
                "devices_allowed": self.arm.devices,
                "distinct_experts_min": min(counts["distinct"] for _, counts in ranks),
                "routes_changed_by_full_pruning": sum(counts["changed"] for _, counts in ranks),
                "routes_kept_share": sum(counts["kept"] for _, counts in ranks) / pairs,
            }
        return {
            "params_total": self.cost.weights(),
            "params_active": self.cost.active_weights(),
            "params_trainable": sum(leaf.numel() for leaf in self._weights()) if self.trains else 0,
            "weight_bytes": sum(leaf.numel() * leaf.element_size() for leaf in self._weights()),
            "compute_dtype": dtype_name(self.dtype),
            "expert_backend": ran_on(self.x_TD),
            "check_errors": self.errors,
            "figures": figures,
        }

    def series(self) -> list[Series]:
        """The two parts of each step, the slowest rank's of each."""
        ranks: list[Any] = [None] * self.size
        dist.all_gather_object(ranks, [part[1:] for part in self.parts])
        slowest, start_s = np.array(ranks).max(0), np.array([part[0] for part in self.parts])
        return [
            Series(name=name, unit="s", scope="process", source="perf_counter", t_s=start_s, values=slowest[:, place])
            for place, name in enumerate(PARTS)
        ]

    # Parts.

    def _forward(self, x_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
        out_TD: torch.Tensor = expert_parallel(
            x_TD, routing, self.where, self.w_in, self.w_out, act=self.act, deduplicate=self.arm.deduplicate, group=self.group,
            meter=self.meter,
        )  # fmt: skip
        return out_TD

    def _expert(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + number)
        shapes = ((2 * self.cost.width, self.cost.hidden), (self.cost.hidden, self.cost.width))
        w_in, w_out = (torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for shape in shapes)
        return w_in.to(self.dtype), w_out.to(self.dtype)

    def _shared(self) -> nn.Module | None:
        """Every rank has the shared experts; that their gradients are summed over ranks is data parallelism's affair."""
        if not self.cost.shared_width:
            return None
        layer = GatedFeedForward(self.cost.hidden, self.cost.shared_width, self.act).to(self.dtype)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        return layer.to(self.device)

    def _weights(self) -> list[torch.Tensor]:
        return [self.w_in, self.w_out, *(self.shared.parameters() if self.shared else ())]

    def _leaves(self) -> list[torch.Tensor]:
        return [self.x_TD, *self.logits, *self._weights()]

    def _gathered(self, tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        """What each rank has, on rank 0; nothing elsewhere."""
        ranks: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object([tensor.contiguous() for tensor in tensors], ranks, 0)
        return ranks or []

    def _work(self) -> Step:
        """Tokens of all ranks; FLOPs of one rank's share of the products, and bytes that it must move if every tensor moves once.

        Of the experts a rank reads those that have tokens; rows come and go through the exchange, two planes of k / N a token.
        """
        cost, tokens, item = self.cost, self.params.tokens, self.dtype.itemsize
        load_E = torch.zeros(cost.experts)
        for logits_TE in self.logits:
            load_E += torch.bincount(self.router(logits_TE.detach()).expert.flatten().cpu(), minlength=cost.experts)
        dist.all_reduce(load_E)
        touched = int((load_E[self.held] > 0).sum())
        active = cost.active_weights() - cost.hidden * cost.experts
        read = (touched * cost.width + cost.shared_width) * 3 * cost.hidden
        flops, moved = 2 * tokens * active, 4 * tokens * cost.hidden + read
        if self.trains:
            flops, moved = 3 * flops, 3 * moved
        return Step(tokens=self.size * tokens, samples=1, model_flops=flops, model_bytes=item * moved)


def _cut(routing: Routing, trains: bool) -> Routing:
    """The routing with weights that are leaves."""
    return Routing(routing.expert, routing.weight.detach().requires_grad_(trains))
