"""Plans: the order of the pairs against a plain argsort."""

import numpy as np
import pytest
import torch
from effbench_kernels import dense_plan, sort


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "k", "experts"), [(0, 2, 3), (1, 1, 1), (1, 8, 64), (65, 3, 7), (1000, 8, 300)])
def test_sort_is_a_stable_argsort(tokens, k, experts, dtype):
    index = torch.randint(-2, experts + 3, (tokens, k), generator=torch.Generator().manual_seed(tokens), dtype=dtype)
    plan = sort(index, experts)
    key = index.numpy().reshape(-1).astype(np.int64)
    key[(key < 0) | (key >= experts)] = experts
    order = np.argsort(key, kind="stable")
    assert np.array_equal(plan.token, order // k)
    assert np.array_equal(plan.slot, order % k)
    assert np.array_equal(plan.expert, key[order])
    assert np.array_equal(plan.offsets, [0, *np.cumsum(np.bincount(key, minlength=experts + 1))[:experts]])
    assert np.array_equal(plan.inverse.reshape(-1)[order], np.arange(tokens * k))
    assert np.array_equal(plan.kept().reshape(-1), key < experts)
    assert plan.num_experts == experts and not plan.dense


def test_sort_does_not_depend_on_strides():
    index = torch.randint(0, 5, (9, 4), generator=torch.Generator().manual_seed(1))
    for one, two in zip(sort(index, 5)[:5], sort(index.t().contiguous().t(), 5)[:5], strict=True):
        assert torch.equal(one, two)


def test_sort_can_be_traced_without_a_device_round_trip():
    """On a fake tensor every read back to the host would raise."""
    with torch._subclasses.FakeTensorMode():
        assert sort(torch.zeros(5, 2, dtype=torch.int64), 3).inverse.shape == (5, 2)


@pytest.mark.parametrize(
    ("index", "experts", "kind", "words"),
    [
        (torch.zeros(3, 2), 4, TypeError, "index must hold integers"),
        (torch.zeros(3, dtype=torch.int64), 4, ValueError, r"index must have shape \(tokens, k\)"),
        (torch.zeros(3, 2, dtype=torch.int64), 0, ValueError, "num_experts must be at least 1"),
    ],
)
def test_bad_indices_are_refused(index, experts, kind, words):
    with pytest.raises(kind, match=words):
        sort(index, experts)


def test_bad_dense_plans_are_refused():
    with pytest.raises(ValueError, match="dense_plan needs"):
        dense_plan(3, 0)
