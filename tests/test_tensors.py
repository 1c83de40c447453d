"""The tracker of tensor bytes against cases whose peak is known by hand."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from effbench_kernels import experts, route, sort

from effbench.tensors import TensorTracker, step_peak_bytes

KB = 1024  # bytes of 256 numbers in fp32


def tracked(step: Callable[[], Any]) -> tuple[int, int]:
    """Most bytes above the start, and bytes above the start at the end while the result is held."""
    tracker = TensorTracker()
    with tracker:
        held = step()
    del held
    return tracker.peak_bytes, tracker.now_bytes


def numbers(count: int = 256, **options: Any) -> torch.Tensor:
    return torch.ones(count, **options)


def test_results_count_while_they_live() -> None:
    def step() -> torch.Tensor:
        a = numbers()
        b = a + 1
        del a
        return b + 1

    assert tracked(step) == (2 * KB, 0)


def test_a_chain_of_temporaries_holds_two_at_once() -> None:
    x = numbers()
    assert tracked(lambda: ((x + 1) * 2 - 3) / 4)[0] == 2 * KB


def test_views_count_once_and_keep_their_storage() -> None:
    def step() -> torch.Tensor:
        whole = numbers(1024)
        parts = [whole[:256], whole.view(4, 256), whole.view(4, 256).t()]
        del whole
        return parts[2].contiguous()

    assert tracked(step)[0] == 8 * KB


def test_in_place_operators_take_nothing() -> None:
    x = numbers()
    assert tracked(lambda: x.add_(1).mul_(2).relu_())[0] == KB  # x itself, once it is met


def test_a_storage_that_grows_counts_what_it_became() -> None:
    def step() -> torch.Tensor:
        return torch.ones(1024, out=numbers(256).resize_(1024))

    assert tracked(step)[0] == 4 * KB


def test_what_autograd_saves_lives_until_the_backward_pass() -> None:
    x = numbers(requires_grad=True)

    def forward() -> torch.Tensor:
        y = x.exp()  # keeps its result
        z = y * y.sin()  # keeps both factors; sin keeps y
        return z.sum()

    tracker = TensorTracker()
    with tracker:
        loss = forward()
        between = tracker.now_bytes
        loss.backward()
        loss = None
    assert between == 2 * KB + 4, "exp's result and the sine; the product is gone"
    assert tracker.now_bytes == KB, "the gradient of x"
    assert tracker.peak_bytes >= 4 * KB


def test_optimizer_states_and_gradients_are_counted_at_the_start() -> None:
    weight = torch.nn.Parameter(torch.zeros(256, 256))
    optimizer = torch.optim.AdamW([weight])

    def step() -> None:
        (weight * 1.0).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    before = TensorTracker()
    before.count_living()
    without = before.now_bytes
    size = weight.nbytes
    tracker = TensorTracker()
    tracker.count_living()
    assert tracker.now_bytes == without
    with tracker:
        step()
    # Beside what was there: the gradient, and AdamW's denominator in two tensors.
    assert tracker.peak_bytes - without == pytest.approx(3 * size, rel=0.01)
    assert tracker.now_bytes == without


def test_what_is_there_already_counts_once_frozen_or_not() -> None:
    gc.collect()
    first, second = TensorTracker(), TensorTracker()
    first.count_living()
    held = [torch.zeros(4096), torch.zeros(4096)]
    views = [x[1:] for x in held]
    gc.freeze()
    try:
        second.count_living()
    finally:
        gc.unfreeze()
    assert second.now_bytes - first.now_bytes == 2 * 4096 * 4
    assert len(views) == 2


def test_operators_of_other_packages_are_entered() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens, hidden, width, top_k = 64, 32, 16, 2
    x = torch.randn(tokens, hidden, generator=generator)
    w_in = torch.randn(4, 2 * width, hidden, generator=generator)
    w_out = torch.randn(4, hidden, width, generator=generator)
    routing = route(torch.randn(tokens, 4, generator=generator), top_k)
    plan = sort(routing.expert, 4)
    pairs = tokens * top_k
    result = tokens * hidden * 4
    inside = result + pairs * (width + hidden) * 4  # hidden rows and the products' rows
    peak, _ = tracked(lambda: experts(x, w_in, w_out, plan, routing.weight))
    known = sum(t.nbytes for t in (x, w_in, w_out, routing.weight, plan.offsets, plan.token, plan.inverse))
    assert inside <= peak <= inside + known + pairs * (2 * width) * 4


class Pair(torch.Tensor):
    """A tensor made of another, as quantised formats are."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pair:
        made: Pair = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [a.inner if isinstance(a, Pair) else a for a in args]
        return func(*plain, **(kwargs or {})) * 1


def test_a_tensor_made_of_others_counts_by_its_parts() -> None:
    pair = Pair(numbers())
    tracker = TensorTracker()
    tracker.count_living()
    before = tracker.now_bytes
    with tracker:
        out = pair + 1
    assert tracker.now_bytes - before == out.nbytes == KB
    assert tracker.peak_bytes - before == 2 * KB, "the sum, and its product with one"


def test_a_step_that_fails_leaves_no_mode_behind() -> None:
    def fail() -> None:
        raise RuntimeError("no memory for this")

    with pytest.raises(RuntimeError, match="no memory"):
        step_peak_bytes(fail)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert gc.get_freeze_count() == 0


def test_the_step_runs_once_and_gives_what_it_gives_without_a_tracker() -> None:
    x, results = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)), list[torch.Tensor]()
    step_peak_bytes(lambda: results.append(x @ x))
    assert len(results) == 1 and torch.equal(results[0], x @ x)
