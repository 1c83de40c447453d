"""Bad input is refused before anything is computed, in the same words on every backend."""

import pytest
import torch
from effbench_kernels import Norm, combine, experts, grouped_linear, sort
from effbench_kernels.backends import NAMES

from tests.kernels.truth import make


def bad(**changes):
    case = make(tokens=4, experts=3)
    arguments = {
        "x": case.x,
        "w_in": case.w_in,
        "w_out": case.w_out,
        "plan": sort(case.index, 3),
        "weight": case.weight,
    }
    return arguments | changes


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"act": "swish"}, ValueError, "act must be one of swiglu"),
        ({"save": "all"}, ValueError, "save must be"),
        ({"x": torch.zeros(5, 6).double()}, ValueError, r"x must have shape \(4, D\), got \(5, 6\)"),
        ({"x": torch.zeros(4, 5).double()}, ValueError, r"w_in must have shape \(3, P, 5\)"),
        ({"x": torch.zeros(4, 6).long()}, TypeError, "x must be floating"),
        ({"x": torch.zeros(4, 6)}, TypeError, "w_in is torch.float64, x torch.float32"),
        ({"x": torch.zeros(4, 6, device="meta").double()}, ValueError, "w_in is on cpu, x on meta"),
        ({"w_in": torch.zeros(3, 13, 6).double()}, ValueError, "even number of rows"),
        ({"w_in": torch.zeros(2, 14, 6).double()}, ValueError, r"w_in must have shape \(3, P, 6\)"),
        ({"w_out": torch.zeros(3, 4, 8).double()}, ValueError, r"w_out must have shape \(3, O, 7\)"),
        ({"b_in": torch.zeros(3, 7).double()}, ValueError, r"b_in must have shape \(3, 14\)"),
        ({"b_out": torch.zeros(4).double()}, ValueError, r"b_out must have shape \(3, 4\)"),
        ({"add": torch.zeros(4, 6).double()}, ValueError, r"add must have shape \(4, 4\)"),
        ({"weight": torch.zeros(4, 3).double()}, ValueError, r"weight must have shape \(4, 2\)"),
        ({"weight": torch.zeros(4, 2).half()}, TypeError, "weight must be torch.float64 as x, or torch.float32"),
        ({"norm": Norm(torch.ones(3, 4), kind="batch")}, ValueError, "a norm is 'layer' or 'rms'"),
        ({"norm": Norm(torch.ones(4))}, ValueError, "the norm's gain must have shape"),
    ],
)
def test_bad_input_is_refused_in_the_same_words(changes, kind, words, backend):
    with pytest.raises(kind, match=words):
        experts(**bad(**changes), backend=backend)


def test_unknown_backends_and_forms_are_refused():
    with pytest.raises(ValueError, match="backend must be one of torch"):
        experts(**bad(), backend="tpu")
    case = make()
    with pytest.raises(ValueError, match="rows must be one of gather, sorted"):
        grouped_linear(case.x, case.w_in, sort(case.index, 5), rows="all")
    with pytest.raises(ValueError, match=r"x must have shape \(26, D\)"):
        grouped_linear(case.x, case.w_in, sort(case.index, 5), rows="sorted")
    with pytest.raises(ValueError, match=r"rows must have shape \(26, O\)"):
        combine(case.x, sort(case.index, 5))
