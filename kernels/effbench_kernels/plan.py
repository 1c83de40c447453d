"""The order in which (token, expert) pairs are computed: grouped by expert, made without reading anything back to the host.

Shapes: T tokens, K experts a token, E experts, N = T·K pairs.
"""

from typing import NamedTuple

import torch

from effbench_kernels import native
from effbench_kernels.checks import check_index


class Plan(NamedTuple):
    """Pairs grouped by expert; inside an expert in the order of the tokens. Dropped pairs come last.

    offsets (E+1,): pairs offsets[e] up to offsets[e+1] belong to expert e; offsets[E] is the number of pairs kept.
    token (N,) and slot (N,): the token and the column of ``index`` a pair comes from.
    expert (N,): its expert; E for a dropped pair.
    inverse (T, K): where the pair (t, k) is in the sorted order.
    dense: every token goes to every expert and column e of ``weight`` belongs to expert e (``dense_plan``).
    """

    offsets: torch.Tensor
    token: torch.Tensor
    slot: torch.Tensor
    expert: torch.Tensor
    inverse: torch.Tensor
    dense: bool = False

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.offsets.size(0)) - 1

    def kept(self) -> torch.Tensor:
        """(T, K) bool: True where the pair goes to an expert, False where it is dropped."""
        return self.inverse < self.offsets[-1]


def sort(index: torch.Tensor, num_experts: int) -> Plan:
    """Group the pairs of a routing by expert, stably.

    index (T, K): expert of each pair, any integer type. A value below 0 or from num_experts upwards drops the pair: it costs
    nothing and adds nothing. The same expert may stand twice in a row. Several banks of experts share one call when their
    weights are stacked and the ids of bank b are shifted by the number of experts before it.

    One stable sort and one binary search, no atomics and no synchronisation with the host; on a CPU a counting sort in C.
    Raises TypeError for a floating index, ValueError for a wrong number of dimensions or num_experts < 1.
    """
    check_index(index, num_experts)
    if type(index) is torch.Tensor and not torch.compiler.is_compiling() and (made := native.sort(index, num_experts)):
        return Plan(*made)
    experts_a_token = index.size(1)
    pair_N = index.reshape(-1).to(torch.int64)
    kept_N = (pair_N >= 0) & (pair_N < num_experts)
    key_N = torch.where(kept_N, pair_N, num_experts)
    expert_N, order_N = torch.sort(key_N, stable=True)
    bound_E1 = torch.arange(num_experts + 1, device=index.device)
    offsets_E1 = torch.searchsorted(expert_N, bound_E1)
    position_N = torch.arange(order_N.size(0), device=index.device)
    inverse_TK = torch.empty_like(order_N).scatter_(0, order_N, position_N).view(index.shape)
    divisor = max(experts_a_token, 1)
    token_N = torch.div(order_N, divisor, rounding_mode="floor")
    return Plan(offsets_E1, token_N, order_N - token_N * divisor, expert_N, inverse_TK)


def by_position(weight_TK: torch.Tensor, inverse_TK: torch.Tensor) -> torch.Tensor:
    """(N,): the weights of the pairs in the order of the plan."""
    weight_N = weight_TK.reshape(-1)
    return torch.empty_like(weight_N).scatter_(0, inverse_TK.reshape(-1), weight_N)


def dense_plan(tokens: int, num_experts: int, device: torch.device | str | None = None) -> Plan:
    """The plan of a layer in which every token goes to every expert (K = E), the weights in the order of the experts.

    It needs no sort, and backends compute it as one batched product. ``weight`` is then the (T, E) gate itself.
    Raises ValueError for num_experts < 1 or tokens < 0.
    """
    if num_experts < 1 or tokens < 0:
        raise ValueError(f"dense_plan needs num_experts >= 1 and tokens >= 0, got {num_experts} and {tokens}")
    token_T = torch.arange(tokens, device=device)
    expert_E = torch.arange(num_experts, device=device)
    expert_N = expert_E.repeat_interleave(tokens)
    return Plan(
        offsets=torch.arange(num_experts + 1, device=device) * tokens,
        token=token_T.repeat(num_experts),
        slot=expert_N,
        expert=expert_N,
        inverse=(expert_E[None, :] * tokens + token_T[:, None]).contiguous(),
        dense=True,
    )
