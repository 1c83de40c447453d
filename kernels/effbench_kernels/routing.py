"""Routers: which experts a token goes to and with what weight, and the two losses that keep routers healthy.

Shapes: T tokens, E experts, K experts a token, G groups of experts.
"""

from typing import NamedTuple

import torch

from effbench_kernels.checks import check_index, check_logits

SCORES = ("softmax", "sigmoid")


class Groups(NamedTuple):
    """Group-limited routing: E experts in ``number`` equal, consecutive groups, of which a token may use ``keep``.

    by: "max" ranks a group by its best expert (DeepSeek-V2, arXiv 2405.04434, section 2.2.2, device-limited routing), "top2" by
    the sum of its two best (DeepSeek-V3, arXiv 2412.19437, section 2.1.2, node-limited routing).
    """

    number: int
    keep: int
    by: str = "max"


class Routing(NamedTuple):
    """expert (T, K) int64: an expert, or -1 for a dropped pair. weight (T, K): its weight, 0 where dropped.

    The weights are float32, or float64 for float64 logits.
    """

    expert: torch.Tensor
    weight: torch.Tensor


def route(
    logits: torch.Tensor,
    k: int,
    score: str = "softmax",
    renorm: bool = False,
    bias: torch.Tensor | None = None,
    groups: Groups | tuple[int, int] | tuple[int, int, str] | None = None,
    scale: float = 1.0,
    allow: torch.Tensor | None = None,
) -> Routing:
    """Choose the k best experts of each token. Differentiable in the logits through the weights.

    score: "softmax" over all E experts (Switch, arXiv 2101.03961; Mixtral with ``renorm``) or "sigmoid" (DeepSeek-V3).
    renorm: the k weights of a token are divided by their sum. With softmax this equals a softmax over the k best logits.
    bias (E,): added to the scores for the choice only, never to the weights (balancing without a loss, arXiv 2408.15664).
    groups: see ``Groups``; the score a group is ranked by includes the bias.
    scale: a factor on the weights, after ``renorm``.
    allow (T, M) bool with M = E or a divisor of E: the experts, or the equal consecutive blocks of experts (devices), a token
    may use. It limits the choice; the scores are still taken over all experts. A token with fewer than k experts allowed gets
    -1 and weight 0 in its last places.

    The experts of a token stand in descending order of the score they were chosen by. The order of equal scores is not defined,
    but is the same in every run. Raises ValueError for k outside 1..E, unknown names, wrong shapes and logits that are not finite.
    """
    check_logits(logits)
    num_experts = int(logits.size(1))
    if not 1 <= k <= num_experts:
        raise ValueError(f"k must lie between 1 and the {num_experts} experts, got {k}")
    score_TE = _scores(logits, score)
    choice_TE = score_TE.detach()
    if bias is not None:
        if tuple(bias.shape) != (num_experts,):
            raise ValueError(f"bias must have shape ({num_experts},), got {tuple(bias.shape)}")
        choice_TE = choice_TE + bias.detach().to(choice_TE.dtype)
    if allow is not None:
        choice_TE = choice_TE.masked_fill(~_spread(allow, logits), -torch.inf)
    if groups is not None:
        choice_TE = _limit(choice_TE, Groups(*groups), k)
    best_TK, index_TK = torch.topk(choice_TE, k, dim=-1)
    weight_TK = score_TE.gather(1, index_TK)
    if allow is not None:
        dropped_TK = best_TK == -torch.inf
        index_TK = index_TK.masked_fill(dropped_TK, -1)
        weight_TK = weight_TK.masked_fill(dropped_TK, 0)
    if renorm:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    return Routing(index_TK, weight_TK * scale if scale != 1.0 else weight_TK)


def load_balance_loss(logits: torch.Tensor, index: torch.Tensor, score: str = "softmax") -> torch.Tensor:
    """E · Σ_e f_e · P_e: 1 where the load is even, at most E. Switch (arXiv 2101.03961), equations 4 to 6.

    f_e: the share of the T·K pairs that go to expert e (dropped pairs count in the denominator only). P_e: the mean over tokens of
    the scores, divided by their sum for each token. Differentiable in the logits through P. A scalar; 0 where there is no token.
    """
    check_logits(logits)
    num_experts = int(logits.size(1))
    check_index(index, num_experts)
    if index.size(0) != logits.size(0):
        raise ValueError(f"index has {index.size(0)} tokens, logits have {logits.size(0)}")
    score_TE = _scores(logits, score)
    if index.numel() == 0:
        return score_TE.sum() * 0
    pair_N = index.reshape(-1).to(torch.int64)
    key_N = torch.where((pair_N >= 0) & (pair_N < num_experts), pair_N, num_experts)
    count_E1 = torch.zeros(num_experts + 1, dtype=torch.int64, device=key_N.device).scatter_add_(
        0, key_N, torch.ones_like(key_N)
    )
    share_E = count_E1[:-1].to(score_TE.dtype) / index.numel()
    mean_E = (score_TE / score_TE.sum(-1, keepdim=True)).mean(0)
    return num_experts * (share_E * mean_E).sum()


def z_loss(logits: torch.Tensor) -> torch.Tensor:
    """The mean over tokens of (log Σ_e exp logit_e)². ST-MoE (arXiv 2202.08906), equation 5. 0 where there is no token."""
    check_logits(logits)
    log_T = torch.logsumexp(_wide(logits), -1)
    return log_T.square().sum() / max(int(logits.size(0)), 1)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _scores(logits: torch.Tensor, score: str) -> torch.Tensor:
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    wide_TE = _wide(logits)
    return torch.softmax(wide_TE, -1) if score == "softmax" else torch.sigmoid(wide_TE)


def _spread(allow: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """(T, M) permission by block of experts -> (T, E)."""
    tokens, num_experts = logits.shape
    if allow.dtype != torch.bool:
        raise TypeError(f"allow must be bool, got {allow.dtype}")
    if allow.dim() != 2 or allow.size(0) != tokens or allow.size(1) < 1 or num_experts % allow.size(1):
        raise ValueError(f"allow must have shape ({tokens}, M) with M a divisor of {num_experts}, got {tuple(allow.shape)}")
    return allow.repeat_interleave(num_experts // allow.size(1), dim=1)


def _limit(choice_TE: torch.Tensor, groups: Groups, k: int) -> torch.Tensor:
    """-inf for every expert outside the groups a token keeps."""
    tokens, num_experts = choice_TE.shape
    number, keep, by = groups
    if number < 1 or num_experts % number or not 1 <= keep <= number or keep * (num_experts // number) < k:
        raise ValueError(f"{keep} of {number} groups cannot give {k} of {num_experts} experts")
    if by not in ("max", "top2"):
        raise ValueError(f"groups are ranked by 'max' or 'top2', got {by!r}")
    choice_TGS = choice_TE.view(tokens, number, num_experts // number)
    best = min(2, num_experts // number) if by == "top2" else 1
    rank_TG = choice_TGS.topk(best, dim=-1).values.sum(-1)
    outside_TG = torch.ones_like(rank_TG, dtype=torch.bool).scatter_(1, rank_TG.topk(keep, dim=-1).indices, False)
    return choice_TGS.masked_fill(outside_TG[:, :, None], -torch.inf).reshape(tokens, num_experts)
