"""Experts on several devices against one process: outputs and gradients, what is sent, empty experts, devices and ranks."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from effbench_kernels import Routing, experts, in_order, replicas, route, sort
from effbench_kernels.exchange import Meter, expert_parallel, rows_of, shards

E, K, D, F = 8, 3, 6, 4


def on_ranks(size: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(rank)` returns in each of so many forked gloo processes, which are gone afterwards."""
    meeting, pids, ends = os.memfd_create("meeting", 0), [], []
    for rank in range(size):
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(read_end)
                os.environ["GLOO_SOCKET_IFNAME"] = "lo"
                torch.set_num_threads(1)
                dist.init_process_group("gloo", init_method=f"file:///proc/self/fd/{meeting}", rank=rank, world_size=size)
                found = work(rank)
                dist.barrier()
                with os.fdopen(write_end, "wb") as pipe:
                    pickle.dump(found, pipe)
                code = 0
            finally:
                os._exit(code)
        os.close(write_end)
        pids.append(pid)
        ends.append(read_end)
    found = []
    for read_end in ends:
        with os.fdopen(read_end, "rb") as pipe:
            found.append(pipe.read())
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    os.close(meeting)
    assert codes == [0] * size, codes
    return [pickle.loads(one) for one in found]


class Case:
    """A layer and the tokens of each rank: whole numbers in float64, so that no sum is rounded, or normal ones in float32."""

    def __init__(self, tokens: tuple[int, ...], *, whole: bool, place: torch.Tensor | None = None, used: int = E):
        generator = torch.Generator().manual_seed(7)
        self.size, self.whole = len(tokens), whole
        self.act, wide = ("relu", F) if whole else ("swiglu", 2 * F)
        draw = lambda *shape: (  # noqa: E731
            torch.randint(-3, 4, shape, generator=generator).double() if whole else torch.randn(shape, generator=generator)
        )
        self.w_in, self.w_out = draw(E, wide, D), draw(E, D, F)
        self.place = in_order(E, self.size) if place is None else place
        self.x, self.grad = ([draw(n, D) for n in tokens] for _ in range(2))
        self.routing = []
        for n in tokens:
            logits = torch.randn(n, E, generator=generator)
            logits[:, used:] = -1e9  # experts, and devices, that no token goes to
            expert = route(logits, K).expert
            expert[torch.rand(expert.shape, generator=generator) < 0.2] = -1
            weight = torch.randint(1, 4, expert.shape, generator=generator).double() if whole else torch.rand(expert.shape)
            self.routing.append(Routing(expert, weight))

    def alone(self) -> list[torch.Tensor]:
        """Output and gradients of x, the routing weights and both weights, in one process."""
        x, expert, weight, grad = (
            torch.cat(parts)
            for parts in (self.x, [r.expert for r in self.routing], [r.weight for r in self.routing], self.grad)
        )
        wide = [one.double().requires_grad_() for one in (x, weight, self.w_in, self.w_out)]
        out = experts(
            wide[0], wide[2], wide[3], sort(expert, E), wide[1], act=self.act, backend="reference" if len(x) else None
        )
        return [out.detach(), *torch.autograd.grad(out, wide, grad.double())]

    def together(self, deduplicate: bool) -> tuple[list[torch.Tensor], list[Meter]]:
        """The same over ranks, in the order of `alone`, and the meters."""

        def work(rank: int) -> Any:
            where, meter = shards(self.place, self.size), Meter(rank)
            held = where.held_by(rank)
            leaves = [self.x[rank], self.routing[rank].weight, self.w_in[held], self.w_out[held]]
            leaves = [one.clone().requires_grad_() for one in leaves]
            routing = Routing(self.routing[rank].expert, leaves[1])
            out = expert_parallel(
                leaves[0], routing, where, *leaves[2:], act=self.act, deduplicate=deduplicate, meter=meter
            )  # fmt: skip
            found = [out.detach(), *torch.autograd.grad(out, leaves, self.grad[rank])]
            return [one.numpy() for one in found], meter

        ranks = on_ranks(self.size, work)
        parts = [torch.cat([torch.from_numpy(found[n]) for found, _ in ranks]) for n in range(5)]
        order = torch.cat([shards(self.place, self.size).held_by(rank) for rank in range(self.size)])
        back = torch.argsort(order)
        return [*parts[:3], parts[3][back], parts[4][back]], [meter for _, meter in ranks]


NAMES = ("output", "gradient of x", "gradient of the routing weights", "gradient of w_in", "gradient of w_out")
SCATTERED = torch.tensor([1, 0, 3, 2, 0, 3, 1, 2])
CASES = {
    "two ranks": {"tokens": (5, 9)},
    "four ranks, experts scattered": {"tokens": (5, 9, 1, 4), "place": SCATTERED},
    "a rank without tokens": {"tokens": (6, 0)},
    "devices without tokens": {"tokens": (5, 3, 2, 4), "used": 3},
    "no tokens at all": {"tokens": (0, 0)},
    "unequal numbers of experts": {"tokens": (4, 5, 6), "place": torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])},
}


@pytest.mark.parametrize("deduplicate", [True, False], ids=["deduplicated", "naive"])
@pytest.mark.parametrize("case", CASES)
def test_ranks_compute_what_one_process_does_exactly_where_no_sum_is_rounded(case: str, deduplicate: bool) -> None:
    made = Case(**CASES[case], whole=True)
    for name, one, other in zip(NAMES, made.together(deduplicate)[0], made.alone(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("deduplicate", [True, False], ids=["deduplicated", "naive"])
def test_in_float32_to_rounding(deduplicate: bool) -> None:
    made = Case((33, 20, 7, 41), whole=False, place=SCATTERED)
    for name, one, other in zip(NAMES, made.together(deduplicate)[0], made.alone(), strict=True):
        assert one.dtype == torch.float32
        error = float((one.double() - other).square().mean().sqrt() / other.square().mean().sqrt())
        assert error < 1e-6, name


def test_bytes_are_rows_times_the_bytes_of_a_row_both_ways_forward_and_backward() -> None:
    made = Case((33, 20), whole=False)
    copies = [int(replicas(r.expert, made.place, 2).sum()) for r in made.routing]
    kept = [int((r.expert >= 0).sum()) for r in made.routing]
    beside = {True: K * (4 + 4), False: 4}  # numbers of experts, and weights where these travel
    for deduplicate, rows in ((True, copies), (False, kept)):
        _, meters = made.together(deduplicate)
        assert [meter.rows for meter in meters] == rows
        forward = sum(rows) * (2 * 4 * D + beside[deduplicate])
        backward = sum(rows) * (2 * 4 * D + (4 * K if deduplicate else 0))
        assert sum(meter.sent_bytes for meter in meters) == forward + backward
        assert 0 < sum(meter.between_bytes for meter in meters) < forward + backward


def test_what_stays_on_its_rank_is_not_between_devices() -> None:
    made = Case((6, 0), whole=True, used=4)  # all tokens of rank 0, all experts there
    _, meters = made.together(True)
    assert meters[0].sent_bytes > 0
    assert [meter.between_bytes for meter in meters] == [0, 0]


def test_rows_are_grouped_by_device_and_once_for_each() -> None:
    expert = torch.tensor([[0, 1, 5], [-1, 6, 2], [3, 3, -1], [-1, -1, -1]])
    weight = torch.arange(12.0).view(4, 3)
    where = shards(torch.tensor([1, 1, 0, 0, 0, 1, 0, 1]), 2)
    rows = rows_of(Routing(expert, weight), where)
    assert rows.send == [2, 1]
    assert rows.token.tolist() == [1, 2, 0]
    assert rows.expert.tolist()[0] == [-1, 3, 0]  # experts 6 and 2 of device 0, which holds 2, 3, 4 and 6
    assert rows.weight.tolist()[0] == [0, 4, 5]
    assert rows.expert.tolist()[1] == [1, 1, -1]  # the same expert twice counts twice and travels once
    naive = rows_of(Routing(expert, weight), where, deduplicate=False)
    assert naive.send == [4, 3]
    assert naive.token.tolist() == [1, 1, 2, 2, 0, 0, 0]
    assert naive.expert.shape == (7, 1)


def test_what_cannot_be_is_refused() -> None:
    def work(rank: int) -> list[str]:
        made, said = Case((3, 3), whole=True), []
        where = shards(made.place, 2)
        tries = (
            (shards(in_order(E, 4), 4), made.w_in[:2], made.w_out[:2]),
            (where, made.w_in, made.w_out),
        )
        for shard, w_in, w_out in tries:
            with pytest.raises(ValueError) as caught:
                expert_parallel(made.x[rank], made.routing[rank], shard, w_in, w_out, act="relu")
            said.append(str(caught.value))
        return said

    first, second = on_ranks(2, work)[0]
    assert "on 4 devices, and the group has 2 ranks" in first
    assert "holds 4 experts, got weights of 8" in second
    with pytest.raises(ValueError, match="more than"):
        shards(torch.zeros(2, dtype=torch.int64), 3)
