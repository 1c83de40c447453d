"""Routing of `expert_parallel`: drawn or recorded logits, the placement that they give, and what can be counted from both alone.

Every draw has a generator of its own, from the suite's seed: one of calibration, and one for each rank and number of a step.
"topics" is synthetic and stands for no model: experts lie on a ring in a hidden order, each topic prefers 2 k neighbours by `strength`
over all others, and each token is of one topic. The noise of a token is Gumbel's, so that the k best are a draw without replacement.

Shapes: T tokens, E experts, K experts a token, Z topics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from effbench_kernels import (
    Routing,
    coactivation,
    greedy,
    in_order,
    prune,
    refine,
    replica_bounds,
    replicas,
    route,
    router_similarity,
    uniform_replicas,
)

from effbench.costs import FeedForwardCost
from effbench.modules.parallel_arms import Arm
from effbench.workloads.expert_parallel import NUM_ROUTINGS

TOPICS, CALIBRATION, UNIFORM, MEASURED = range(4)  # what a generator is for
UNIFORM_TOKENS = 20_000


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Logits of calibration (T', E), the same on all ranks, and of this rank's steps, (T, E) each, in float32."""

    calibration: torch.Tensor
    measured: list[torch.Tensor]


def draw(params: Any, cost: FeedForwardCost, seed: int) -> Drawn:
    """The routing of this rank. Every rank of the process group calls it."""
    if params.routing == "recorded":
        return _recorded(params, seed)
    rank, size = dist.get_rank(), dist.get_world_size()
    likes_ZE = _likes(params.topics, cost, _generator(seed, TOPICS))

    def logits(tokens: int, generator: torch.Generator) -> torch.Tensor:
        noise_TE = -torch.empty(tokens, cost.experts).exponential_(generator=generator).log()
        if params.routing == "zipf":
            return noise_TE - torch.arange(1.0, cost.experts + 1).log()
        if params.routing == "topics":
            topic_T = torch.randint(params.topics, (tokens,), generator=generator)
            return noise_TE + params.strength * likes_ZE[topic_T]
        return noise_TE

    return Drawn(
        calibration=logits(params.calibration_tokens, _generator(seed, CALIBRATION)),
        measured=[logits(params.tokens, _generator(seed, MEASURED + n * size + rank)) for n in range(NUM_ROUTINGS)],
    )


def _likes(topics: int, cost: FeedForwardCost, generator: torch.Generator) -> torch.Tensor:
    """(Z, E): 1 for the experts that a topic prefers."""
    hidden_E = torch.randperm(cost.experts, generator=generator)
    start_Z = torch.arange(topics) * cost.experts // topics
    offset_ZE = (torch.arange(cost.experts) - start_Z[:, None]) % cost.experts
    return (offset_ZE < min(2 * cost.top_k, cost.experts)).float()[:, hidden_E]


def record(params: Any, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of calibration and of the steps of all ranks, of the last mixture layer of a model trained here; made once, then read."""
    from effbench.workloads._recorded import recorded

    held_out = NUM_ROUTINGS * size * params.tokens
    found = recorded(calibration_tokens=params.calibration_tokens, held_out_tokens=held_out, seed=seed)
    return found.calibration[-1], found.held_out[-1]


def _recorded(params: Any, seed: int) -> Drawn:
    """Rank 0 reads the record, which other machines may not have, and each rank takes its part."""
    rank, size = dist.get_rank(), dist.get_world_size()
    parts: list[Any] = [one.numpy() for one in record(params, size, seed)] if rank == 0 else [None, None]
    dist.broadcast_object_list(parts, 0)
    calibration, measured = (torch.from_numpy(part) for part in parts)
    return Drawn(calibration=calibration, measured=[part.clone() for part in measured.split(params.tokens)][rank::size])


def _generator(seed: int, purpose: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed + 1) * 1_000_003 + purpose)


class Router:
    """Routes as the arm has it. `place` (E,) and `similarity` (E, E) come from rank 0's calibration."""

    def __init__(self, arm: Arm, cost: FeedForwardCost, options: dict[str, Any], drawn: Drawn):
        self.arm, self.cost, self.options, self.num_devices = arm, cost, options, dist.get_world_size()
        calibration = route(drawn.calibration, cost.top_k, **options).expert
        self.place = in_order(cost.experts, self.num_devices)
        if dist.get_rank() == 0 and arm.placement != "in_order":
            self.place = greedy(coactivation(calibration, cost.experts), self.num_devices)
            if arm.placement == "refined":
                self.place = refine(self.place, calibration, self.num_devices, max_sweeps=arm.max_sweeps)
        dist.broadcast(self.place, 0)
        self.calibration_replicas = float(replicas(calibration, self.place, self.num_devices).double().mean())
        self.similarity = router_similarity(drawn.calibration) if arm.policy == "similarity" and arm.devices else None

    def to(self, device: torch.device) -> Router:
        """Put what routing needs on the device."""
        self.place = self.place.to(device)
        self.similarity = None if self.similarity is None else self.similarity.to(device)
        return self

    def unpruned(self, logits_TE: torch.Tensor) -> Routing:
        return route(logits_TE, self.cost.top_k, **self.options)

    def __call__(self, logits_TE: torch.Tensor) -> Routing:
        return self._pruned(logits_TE, self.arm.devices) if self.arm.devices else self.unpruned(logits_TE)

    def _pruned(self, logits_TE: torch.Tensor, devices: int) -> Routing:
        routing, score = self.unpruned(logits_TE), self.options["score"]
        scores_TE = torch.softmax(logits_TE, -1) if score == "softmax" else torch.sigmoid(logits_TE)
        return prune(
            scores_TE, *routing, self.place, devices, self.arm.policy, self.similarity,
            renorm=self.options["renorm"], scale=self.options["scale"],
        )  # fmt: skip

    def counts(self, logits: list[torch.Tensor]) -> dict[str, Any]:
        """What the routes of this rank's steps are, without anything sent: sums and extremes, to be put together over ranks."""
        routes, chosen = [self.unpruned(one).expert for one in logits], [self(one).expert for one in logits]
        copies = [replicas(expert, self.place, self.num_devices) for expert in chosen]
        found = {
            "copies": [int(one.sum()) for one in copies],
            "most": max(int(one.max()) for one in copies),
            "distinct": min(_fewest_distinct(one) for one in chosen),
            "kept": sum(int((one == other).sum()) for one, other in zip(routes, chosen, strict=True)),
            "changed": 0,
        }
        if self.arm.devices:
            whole = (self._pruned(one, self.num_devices).expert for one in logits)
            found["changed"] = sum(int((one != other).sum()) for one, other in zip(routes, whole, strict=True))
        return found

    def of_placement(self, seed: int) -> dict[str, float]:
        """What is known of the placement: bounds of C_T, C_T of calibration, and of uniform routing as drawn and as it should be."""
        place, devices, k = self.place.cpu(), self.num_devices, self.cost.top_k
        lower, upper = replica_bounds(k, self.cost.experts, devices)
        scores = torch.rand(UNIFORM_TOKENS, self.cost.experts, generator=_generator(seed, UNIFORM))
        held = torch.bincount(place, minlength=devices)
        return {
            "replicas_lower_bound": lower,
            "replicas_upper_bound": upper,
            "experts_per_token": k,
            "experts_per_device_range": int(held.max() - held.min()),
            "uniform_replicas_per_token": float(replicas(scores.topk(k).indices, place, devices).double().mean()),
            "expected_uniform_replicas_per_token": uniform_replicas(place, k, devices),
            "calibration_replicas_per_token": self.calibration_replicas,
        }


def _fewest_distinct(expert_TK: torch.Tensor) -> int:
    ordered_TK = expert_TK.sort(1).values
    return int((ordered_TK.diff(dim=1) != 0).sum(1).min()) + 1 if expert_TK.numel() else 0
