"""The custom operators: registration, and whole graphs under torch.compile."""

import pytest
import torch
from effbench_kernels import dense_plan, experts, grouped_linear, route, sort

from tests.kernels.truth import error, gradients, make

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck_of_the_layer(weighted, dense):
    case = make(tokens=4, experts=3, index=torch.tensor([[0, 1, 2]] * 4)).fresh()
    plan = dense_plan(4, 3) if dense else sort(case.index, 3)
    weight, add = (case.weight, case.add) if weighted else (None, None)
    tensors = (case.x, case.w_in, case.w_out, case.b_in, case.b_out, weight, add)
    call = (*tensors, plan.offsets, plan.token, plan.inverse, plan.dense, "swiglu", "torch", True)
    torch.library.opcheck(torch.ops.effbench_kernels.experts.default, call, test_utils=CHECKS)


def test_opcheck_of_the_primitive():
    case = make(tokens=4, experts=3).fresh()
    plan = sort(case.index, 3)
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    call = (x, case.w_in, case.b_in, plan.offsets, False, "torch")
    torch.library.opcheck(torch.ops.effbench_kernels.grouped_linear.default, call, test_utils=CHECKS)


@pytest.mark.parametrize("save", ["pre", "none"])
def test_a_routed_layer_compiles_to_one_graph(save):
    case = make(tokens=10)
    router = torch.randn(5, 6, dtype=torch.float64)

    def moe(x, w_in, w_out, b_in, b_out, add):
        routing = route(x @ router.t(), 2, renorm=True)
        return experts(x, w_in, w_out, sort(routing.expert, 5), routing.weight, "swiglu", b_in, b_out, add, save)

    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    results = []
    for call in (moe, compiled):
        own = case.fresh()
        out = call(own.x, own.w_in, own.w_out, own.b_in, own.b_out, own.add)
        results.append([out, *gradients(own, out).values()])
    for one, two in zip(*results, strict=True):
        assert error(two, one) <= 1e-13


def test_the_primitive_compiles_to_one_graph():
    case = make(tokens=10)

    def linear(x, w):
        return grouped_linear(x, w, sort(case.index, 5), out="sum", weight=case.weight)

    got = torch.compile(linear, fullgraph=True, backend="aot_eager")(case.x, case.w_in)
    assert error(got, linear(case.x, case.w_in)) <= 1e-14
