"""What must not matter: the order of the tokens, the names of the experts, who else is in the batch."""

import pytest
import torch
from effbench_kernels import experts, sort
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.truth import error, make

LIMIT = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}
CASES = st.builds(
    dict,
    tokens=st.integers(1, 90),
    k=st.integers(1, 4),
    experts=st.integers(1, 9),
    d=st.integers(1, 80),
    f=st.integers(1, 70),
    out=st.integers(1, 70),
    act=st.sampled_from(["swiglu", "relu", "gelu"]),
    bias=st.booleans(),
    add=st.booleans(),
    seed=st.integers(0, 2**16),
    low=st.integers(-1, 0),
)


def run(case, act):
    plan = sort(case.index, case.w_in.size(0))
    return experts(case.x, case.w_in, case.w_out, plan, case.weight, act, case.b_in, case.b_out, case.add)


def part(case, chosen):
    """The same layer for some of the tokens."""
    add = None if case.add is None else case.add[chosen]
    return type(case)(
        case.x[chosen], case.w_in, case.w_out, case.index[chosen], case.weight[chosen], case.b_in, case.b_out, add
    )


def check(given_case, dtype, change):
    case = make(**given_case).to(dtype)
    got, want = change(case, torch.Generator().manual_seed(given_case["seed"]), given_case["act"])
    assert error(got, want.double()) <= LIMIT[dtype]


def other_order(case, generator, act):
    order = torch.randperm(case.x.size(0), generator=generator)
    return run(part(case, order), act), run(case, act)[order]


def other_names(case, generator, act):
    """Expert e is called name[e]."""
    name = torch.randperm(case.w_in.size(0), generator=generator)
    place = torch.argsort(name)
    index = torch.where(case.index >= 0, name[case.index.clamp(min=0)], case.index)
    stacks = (None if t is None else t[place] for t in (case.b_in, case.b_out))
    renamed = type(case)(case.x, case.w_in[place], case.w_out[place], index, case.weight, *stacks, case.add)
    return run(renamed, act), run(case, act)


def two_batches(case, generator, act):
    cut = int(torch.randint(0, case.x.size(0) + 1, (), generator=generator))
    parts = [run(part(case, chosen), act) for chosen in (slice(0, cut), slice(cut, None))]
    return torch.cat(parts), run(case, act)


def other_places(case, generator, act):
    """The experts of a token stand in another order."""
    order = torch.argsort(torch.rand(case.index.shape, generator=generator), 1)
    moved = type(case)(
        case.x,
        case.w_in,
        case.w_out,
        case.index.gather(1, order),
        case.weight.gather(1, order),
        case.b_in,
        case.b_out,
        case.add,
    )
    return run(moved, act), run(case, act)


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("change", [other_order, other_names, two_batches, other_places])
def test_what_must_not_matter_does_not(change, dtype):
    @settings(max_examples=25, deadline=None)
    @given(CASES)
    def holds(given_case):
        check(given_case, dtype, change)

    holds()


def test_the_checks_bite():
    case = make(tokens=20)
    case.weight[3] += 0.01
    with pytest.raises(AssertionError):
        check({"tokens": 20, "act": "swiglu", "seed": 1}, torch.float64, lambda c, g, act: (run(case, act), run(c, act)))
