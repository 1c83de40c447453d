"""Memory that nobody wrote is never read, dropped pairs are never used, and the same input gives the same bits."""

import itertools

import pytest
import torch
from effbench_kernels import combine, dense_plan, grouped_linear, sort
from effbench_kernels.backends import NAMES

from tests.kernels.test_experts import ROUTINGS, agree, run
from tests.kernels.truth import error, gradients, make


@pytest.fixture
def poisoned():
    """Memory that is allocated without being written holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ROUTINGS)
def test_nothing_unwritten_is_read(name):
    index = ROUTINGS[name]
    for norm, save in itertools.product((False, True), ("pre", "none")):
        agree(make(tokens=index.size(0), index=index, norm=norm), "swiglu", limit=1e-11, save=save)
    if index.numel():
        plan = sort(index, 5)
        case = make(tokens=index.size(0), index=index)
        assert torch.isfinite(grouped_linear(case.x, case.w_in, plan, case.b_in)).all()


@pytest.mark.usefixtures("poisoned")
def test_nothing_unwritten_is_read_in_the_dense_way():
    agree(make(tokens=6, experts=3, index=torch.arange(3).repeat(6, 1)), "swiglu", plan=dense_plan(6, 3))


@pytest.mark.parametrize("backend", NAMES)
def test_weights_of_dropped_pairs_do_not_matter(backend):
    case = make(index=torch.tensor([[0, -1], [2, 7]]), tokens=2)
    want = run(case, "swiglu")
    case.weight[:, 1] = torch.nan
    assert error(run(case, "swiglu", backend=backend), want) <= 1e-14
    rows = grouped_linear(case.x, case.w_in, sort(case.index, 5))
    rows[2:] = torch.nan
    assert torch.isfinite(combine(rows, sort(case.index, 5), case.weight)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_runs_give_the_same_bits(dtype):
    case = make(tokens=64, k=4, experts=8, d=48, f=40, out=32).to(dtype)

    def once():
        own = case.fresh()
        out = run(own, "swiglu")
        return [out, *gradients(own, out).values()]

    first = once()
    for _ in range(19):
        assert all(torch.equal(one, two) for one, two in zip(first, once(), strict=True))
