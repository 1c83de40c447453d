"""Fewer devices for a token, at the price of other experts (Occult, arXiv 2505.13345): an approximation that is fine-tuned away.

A token's experts are walked from the first on until the allowed number of devices is fixed. Experts on other devices are replaced by
unused ones on the fixed devices: those of the best router score, or the ones most similar to the expert that goes.

    routing = route(logits_TE, k=8)
    pruned = prune(torch.softmax(logits_TE, -1), *routing, place_E, devices_allowed=2)

Shapes: T tokens, K experts a token, E experts, N devices.
"""

import torch

from effbench_kernels.checks import check_index, check_logits
from effbench_kernels.placement import check_place
from effbench_kernels.routing import Routing

POLICIES = ("score", "similarity")


def prune(
    scores: torch.Tensor,
    expert: torch.Tensor,
    weight: torch.Tensor | None,
    place: torch.Tensor,
    devices_allowed: int,
    policy: str = "score",
    similarity: torch.Tensor | None = None,
    renorm: bool = False,
    scale: float = 1.0,
) -> Routing:
    """The routing with at most `devices_allowed` devices a token, k distinct experts each.

    scores (T, E): what the router gave every expert, after softmax or sigmoid; differentiable, the new weights are taken from it.
    expert (T, K): distinct experts in descending order, as `route` gives them; a dropped pair (below 0 or from E on) stays so.
    weight (T, K): their weights; None: taken from `scores` as the new ones are.
    place (E,): the device of each expert. similarity (E, E): row e holds how much each expert is like e (`router_similarity`).
    renorm, scale: as `route` was called, for the tokens that change. A token's weights stay untouched where none of its experts is
    replaced, so that with all devices allowed the routing is the given one, bit for bit.

    A replacement stands in the column of the expert it replaces, with its own score as weight (our reading of the paper, for both
    policies). Of equal candidates the lowest expert is taken.
    Raises ValueError for unknown policies, a missing similarity, wrong shapes, no device allowed, and where k experts do not fit on
    some `devices_allowed` devices.
    """
    num_experts, num_devices = int(place.numel()), _num_devices(place)
    check_index(expert, num_experts)
    check_place(place, num_experts, num_devices)
    _check(scores, expert, weight, num_experts, policy, similarity)
    _check_room(place, devices_allowed, expert.size(1))
    expert_TK = expert.to(torch.int64)
    kept_TK = (expert_TK >= 0) & (expert_TK < num_experts)
    if weight is None:
        weight = _weights(scores, expert_TK.where(kept_TK, 0), kept_TK, renorm, scale)
    if devices_allowed >= num_devices:
        return Routing(expert, weight)
    place_E = place.to(expert.device, torch.int64)
    device_TK = place_E[expert_TK.where(kept_TK, 0)]
    allowed_TN = _first_devices(device_TK, kept_TK, num_devices, devices_allowed)
    out_TK = kept_TK & ~allowed_TN.gather(1, device_TK)
    used_TE = torch.zeros(expert.size(0), num_experts + 1, dtype=torch.bool, device=expert.device)
    used_TE.scatter_(1, expert_TK.where(kept_TK, num_experts), True)
    free_TE = allowed_TN[:, place_E] & ~used_TE[:, :num_experts]
    chosen_TK = expert_TK.clone()
    like_EE = None if similarity is None else similarity.to(expert.device, torch.float64)
    for column in range(expert.size(1)):
        row_R = out_TK[:, column].nonzero()[:, 0]
        wish_RE = scores.detach()[row_R] if like_EE is None or policy == "score" else like_EE[expert_TK[row_R, column]]
        new_R = wish_RE.masked_fill(~free_TE[row_R], -torch.inf).argmax(1)
        chosen_TK[row_R, column] = new_R
        free_TE[row_R, new_R] = False
    changed_T1 = out_TK.any(1, keepdim=True)
    new_weight_TK = _weights(scores, chosen_TK.where(kept_TK, 0), kept_TK, renorm, scale).to(weight.dtype)
    return Routing(chosen_TK.to(expert.dtype), torch.where(changed_T1, new_weight_TK, weight))


def router_similarity(logits: torch.Tensor, batch_tokens: int | None = None) -> torch.Tensor:
    """(E, E) float64 in 0..1: the squared cosine of two experts' router logits over the tokens, its mean over batches.

    logits (T, E), of calibration. batch_tokens: tokens of a batch, the last one may be shorter; None: one batch.
    Source: Occult, section on pruning (cosine of router logits, squared, accumulated batch by batch). Raises ValueError for no token.
    """
    check_logits(logits)
    if logits.size(0) < 1 or (batch_tokens is not None and batch_tokens < 1):
        raise ValueError(f"router_similarity needs tokens and batches of at least 1, got {logits.size(0)} and {batch_tokens}")
    batches = logits.detach().double().split(batch_tokens or logits.size(0))
    total_EE = torch.zeros(logits.size(1), logits.size(1), dtype=torch.float64, device=logits.device)
    for logits_BE in batches:
        unit_BE = logits_BE / logits_BE.norm(dim=0).clamp_min(1e-300)
        total_EE += (unit_BE.T @ unit_BE).square()
    return total_EE / len(batches)


def _first_devices(device_TK: torch.Tensor, kept_TK: torch.Tensor, num_devices: int, limit: int) -> torch.Tensor:
    """(T, N) bool: the first `limit` distinct devices of each row."""
    allowed_TN = torch.zeros(device_TK.size(0), num_devices, dtype=torch.bool, device=device_TK.device)
    for column in range(device_TK.size(1)):
        here_T1 = device_TK[:, column : column + 1]
        room_T1 = kept_TK[:, column : column + 1] & (allowed_TN.sum(1, keepdim=True) < limit)
        allowed_TN.scatter_(1, here_T1, allowed_TN.gather(1, here_T1) | room_T1)
    return allowed_TN


def _weights(scores: torch.Tensor, expert_TK: torch.Tensor, kept_TK: torch.Tensor, renorm: bool, scale: float) -> torch.Tensor:
    """As `route` makes them."""
    weight_TK = scores.gather(1, expert_TK).masked_fill(~kept_TK, 0)
    if renorm:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    return weight_TK * scale if scale != 1.0 else weight_TK


def _num_devices(place: torch.Tensor) -> int:
    return int(place.max()) + 1 if place.numel() else 1


def _check_room(place: torch.Tensor, devices_allowed: int, k: int) -> None:
    if devices_allowed < 1:
        raise ValueError(f"devices_allowed must be at least 1, got {devices_allowed}")
    fewest = int(torch.bincount(place).sort().values[:devices_allowed].sum())
    if k > fewest:
        raise ValueError(f"{devices_allowed} allowed devices hold {fewest} experts, and a token needs {k}; allow more devices")


def _check(
    scores: torch.Tensor,
    expert: torch.Tensor,
    weight: torch.Tensor | None,
    num_experts: int,
    policy: str,
    similarity: torch.Tensor | None,
) -> None:
    check_logits(scores)
    if tuple(scores.shape) != (expert.size(0), num_experts):
        raise ValueError(f"scores must have shape ({expert.size(0)}, {num_experts}), got {tuple(scores.shape)}")
    if weight is not None and weight.shape != expert.shape:
        raise ValueError(f"weight must have shape {tuple(expert.shape)}, got {tuple(weight.shape)}")
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    if policy == "similarity":
        if similarity is None:
            raise ValueError("the policy 'similarity' needs a similarity, such as router_similarity of calibration logits")
        if tuple(similarity.shape) != (num_experts, num_experts):
            raise ValueError(f"similarity must have shape ({num_experts}, {num_experts}), got {tuple(similarity.shape)}")
