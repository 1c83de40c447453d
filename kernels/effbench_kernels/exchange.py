"""Experts on several devices: which rows travel, the exchanges, and the sums before and after them (Occult, arXiv 2505.13345).

    ORI (T, D) ─ sort by device ─▶ SFD (S, D) ══ all-to-all ══▶ (R, D) ─ one row an expert ─▶ EPD (P, D) ─ experts ─▶ (P, O) ─┐
    out (T, O) ◀─ add up by token ─ (S, O) ◀══ all-to-all ══ (R, O) ◀─ add up by row ─────────────────────────────────────────┘

Deduplicated, a token has one row for each device among its experts: the numbers of its experts there and their weights travel
beside it, and their outputs are summed before the return. Naive, it has one row for each expert, and the weighted sum is taken
where it came from. Sums are taken in float32, or in float64 where the rows are; on CUDA their order is not fixed.

Every rank of the group calls the same functions in the same order, with tokens or without, and goes backward as the others do.

Shapes: T tokens of a rank, K experts a token, E experts, N devices, S rows sent, R rows received, C experts of a row, P pairs of a row
received and an expert, D input width, O output width.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from effbench_kernels.checks import check_index
from effbench_kernels.layer import experts
from effbench_kernels.placement import check_place
from effbench_kernels.plan import sort
from effbench_kernels.routing import Routing


class Shards(NamedTuple):
    """Where experts live. device (E,): the rank that holds each; local (E,): its number there, in the order of the experts.

    counts: how many each rank holds.
    """

    device: torch.Tensor
    local: torch.Tensor
    counts: list[int]

    def held_by(self, device: int) -> torch.Tensor:
        """(E_local,) int64: the experts of a device, in the order of its stack."""
        return (self.device == device).nonzero()[:, 0]


class Rows(NamedTuple):
    """What one rank sends, grouped by device; inside a device in the order of the tokens.

    token (S,): whose row it is. send: rows for each device. expert (S, C) int32: numbers of its experts on that device, -1 where
    there is none, with C = K deduplicated and 1 naive. weight (S, C): their weights.
    """

    token: torch.Tensor
    send: list[int]
    expert: torch.Tensor
    weight: torch.Tensor


class Meter:
    """What one rank gave to its exchanges since `clear`: rows on their way to experts, bytes both ways, forward and backward.

    Bytes are those of rows and of what travels beside them; the row counts that the ranks tell each other first are left out.
    `between_bytes` leaves out the rank's rows to itself. `exchange_s()`: time in all exchanges, waiting for slower ranks included.
    """

    def __init__(self, rank: int):
        self.rank = rank
        self.clear()

    def clear(self) -> None:
        self.rows = self.sent_bytes = self.between_bytes = 0
        self._host_s, self._events = 0.0, list[tuple[Any, Any]]()

    def count(self, tensor: torch.Tensor, send: list[int]) -> None:
        row_bytes = tensor[:1].numel() * tensor.element_size() if tensor.size(0) else 0
        self.sent_bytes += row_bytes * sum(send)
        self.between_bytes += row_bytes * (sum(send) - send[self.rank])

    @contextmanager
    def exchanging(self, device: torch.device) -> Iterator[None]:
        """Time what is done inside; on CUDA by events, without waiting for the device."""
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            started_s = time.perf_counter()
            yield
            self._host_s += time.perf_counter() - started_s

    def exchange_s(self) -> float:
        """Seconds in exchanges. On CUDA the device must have been waited for."""
        device_ms: float = sum(start.elapsed_time(end) for start, end in self._events)
        return self._host_s + device_ms * 1e-3


def shards(place: torch.Tensor, num_devices: int) -> Shards:
    """From a placement (E,), the device of each expert. Raises ValueError as `check_place` does."""
    check_place(place, int(place.numel()), num_devices)
    place_E = place.to(torch.int64)
    order_E = torch.sort(place_E, stable=True).indices
    count_N = torch.bincount(place_E, minlength=num_devices)
    start_N = count_N.cumsum(0) - count_N
    local_E = torch.empty_like(place_E)
    local_E[order_E] = torch.arange(place_E.numel(), device=place_E.device) - start_N[place_E[order_E]]
    return Shards(place_E, local_E, count_N.tolist())


def rows_of(routing: Routing, where: Shards, deduplicate: bool = True) -> Rows:
    """The rows of a rank's tokens: one for each device among a token's experts, or one for each expert.

    Dropped pairs (an expert outside 0..E-1) have none. Reads the row counts back to the host, which the exchange needs.
    """
    num_experts = int(where.device.numel())
    check_index(routing.expert, num_experts)
    kept_TK = (routing.expert >= 0) & (routing.expert < num_experts)
    expert_TK = torch.where(kept_TK, routing.expert.to(torch.int64), 0)
    device_TK = torch.where(kept_TK, where.device[expert_TK], -1)
    first_TK = device_TK
    if deduplicate:
        repeated_TK = (device_TK[:, :, None] == device_TK[:, None, :]).tril(-1).any(2)
        first_TK = device_TK.masked_fill(repeated_TK, -1)
    num_devices = len(where.counts)
    plan = sort(first_TK, num_devices)
    send = plan.offsets.diff().tolist()
    total = sum(send)
    token_S = plan.token[:total]
    if not deduplicate:
        slot_S = plan.slot[:total]
        expert_S1, weight_S1 = (one[token_S, slot_S][:, None] for one in (where.local[expert_TK], routing.weight))
        return Rows(token_S, send, expert_S1.to(torch.int32), weight_S1)
    here_SK = device_TK[token_S] == plan.expert[:total, None]
    expert_SK = torch.where(here_SK, where.local[expert_TK[token_S]], -1)
    return Rows(token_S, send, expert_SK.to(torch.int32), torch.where(here_SK, routing.weight[token_S], 0))


def expert_parallel(
    x: torch.Tensor,
    routing: Routing,
    where: Shards,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    *,
    act: str = "swiglu",
    deduplicate: bool = True,
    group: Any = None,
    meter: Meter | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """(T, O) = Σ_k weight[t, k] · expert(x[t]), where this rank has the experts `where.held_by(rank)` and others have the rest.

    x (T, D), routing (T, K) of this rank's tokens. w_in (E_local, P, D) and w_out (E_local, O, F) as `experts` takes them, stacked
    in the order of `held_by`. group: the process group, None: the default one, of as many ranks as `where` has devices.
    Differentiable once, in x, both weights and `routing.weight`; all ranks must ask for the same gradients.
    Raises ValueError for weights of another number of experts, a group of another size, and as `experts` does.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if size != len(where.counts):
        raise ValueError(f"the placement is on {len(where.counts)} devices, and the group has {size} ranks")
    held = where.counts[rank]
    if w_in.size(0) != held or w_out.size(0) != held:
        raise ValueError(f"rank {rank} holds {held} experts, got weights of {w_in.size(0)} and {w_out.size(0)}")
    meter = meter or Meter(rank)
    rows = rows_of(routing, where, deduplicate)
    receive = _counts(rows.send, group, x.device, meter)
    meter.rows += sum(rows.send)
    expert_RC = _all_to_all(rows.expert, rows.send, receive, group, meter)
    there = (rows.send, receive, group, meter)
    if deduplicate:
        x_RD, weight_RC = _Exchange.apply(*there, x.index_select(0, rows.token), rows.weight)
        y_RO = _merged(x_RD, expert_RC, weight_RC, w_in, w_out, act, backend)
    else:
        (x_RD,) = _Exchange.apply(*there, x.index_select(0, rows.token))
        y_RO = experts(x_RD, w_in, w_out, sort(expert_RC, held), x_RD.new_ones(x_RD.size(0), 1), act=act, backend=backend)
    del x_RD  # a plane of rows that nothing needs any more
    (y_SO,) = _Exchange.apply(receive, rows.send, group, meter, y_RO)
    del y_RO
    return _add_up(y_SO if deduplicate else y_SO * rows.weight, rows.token, x.size(0)).to(x.dtype)


def _merged(
    x_RD: torch.Tensor,
    expert_RC: torch.Tensor,
    weight_RC: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    act: str,
    backend: str | None,
) -> torch.Tensor:
    """(R, O): the weighted sum over each row's experts here. Places without an expert have no row in the products."""
    there_RC = expert_RC >= 0
    row_P = there_RC.nonzero()[:, 0]
    plan = sort(expert_RC[there_RC][:, None], w_in.size(0))
    y_PO = experts(
        x_RD.index_select(0, row_P), w_in, w_out, plan, weight_RC[there_RC][:, None], act=act, backend=backend
    )  # fmt: skip
    return _add_up(y_PO, row_P, x_RD.size(0)).to(x_RD.dtype)


def _add_up(rows: torch.Tensor, index: torch.Tensor, length: int) -> torch.Tensor:
    """Rows (P, O) added up by `index` (P,), which lies in 0..length-1: (length, O)."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return wide.new_zeros(length, rows.size(1)).index_add(0, index, wide)


class _Exchange(torch.autograd.Function):  # type: ignore[misc]
    """Several tensors of the same rows to the ranks they belong to; the gradients go the other way."""

    @staticmethod
    def forward(
        ctx: Any, send: list[int], receive: list[int], group: Any, meter: Meter, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.back = (receive, send, group, meter)
        return tuple(_all_to_all(tensor, send, receive, group, meter) for tensor in tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[4:]
        found = [_all_to_all(grad, *ctx.back) if asked else None for grad, asked in zip(grads, wanted, strict=True)]
        return (None, None, None, None, *found)


def _all_to_all(tensor: torch.Tensor, send: list[int], receive: list[int], group: Any, meter: Meter) -> torch.Tensor:
    """Rows grouped by destination -> rows grouped by source."""
    tensor = tensor.contiguous()
    out = tensor.new_empty(sum(receive), *tensor.shape[1:])
    with meter.exchanging(tensor.device):
        dist.all_to_all_single(out, tensor, receive, send, group=group)
    meter.count(tensor, send)
    return out


def _counts(send: list[int], group: Any, device: torch.device, meter: Meter) -> list[int]:
    """How many rows come from each rank."""
    ours = torch.tensor(send, device=device)
    theirs = torch.empty_like(ours)
    with meter.exchanging(device):
        dist.all_to_all_single(theirs, ours, group=group)
    found: list[int] = theirs.tolist()
    return found
