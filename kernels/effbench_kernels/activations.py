"""The activations of expert layers and their derivatives.

Shapes: N pairs, F hidden width, P width before the activation: 2F when gated, else F. A gated input holds the gate in its first
half and the value in its second.

swiglu and geglu: Shazeer, "GLU variants improve transformer" (arXiv 2002.05202), section 2, without biases of their own.
"""

import math
from collections.abc import Callable

import torch

ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh", "silu", "gelu", "gelu_tanh", "relu")
_GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}


def is_gated(act: str) -> bool:
    """Whether the activation takes 2F columns and gives F."""
    return act in _GATED


def activate(pre_NP: torch.Tensor, act: str) -> torch.Tensor:
    """(N, P) -> (N, F): act(gate) · value when gated, else act(pre)."""
    if act not in _GATED:
        return _FORWARD[act](pre_NP)
    gate_NF, value_NF = pre_NP.chunk(2, -1)
    return _FORWARD[_GATED[act]](gate_NF) * value_NF


def activate_backward(grad_NF: torch.Tensor, pre_NP: torch.Tensor, act: str) -> torch.Tensor:
    """The gradient (N, P) of ``pre_NP``, given that of ``activate(pre_NP, act)``. Not differentiable itself."""
    if act not in _GATED:
        return _BACKWARD[act](grad_NF, pre_NP)
    plain = _GATED[act]
    gate_NF, value_NF = pre_NP.chunk(2, -1)
    out_NP = torch.empty_like(pre_NP)
    out_gate_NF, out_value_NF = out_NP.chunk(2, -1)
    torch.mul(grad_NF, _FORWARD[plain](gate_NF), out=out_value_NF)
    out_gate_NF.copy_(_BACKWARD[plain](grad_NF * value_NF, gate_NF))
    return out_NP


def formula(pre_NP: torch.Tensor, act: str) -> torch.Tensor:
    """``activate`` written out in elementary functions, for the reference backend. Any floating type, differentiable."""
    if act in _GATED:
        gate_NF, value_NF = pre_NP.chunk(2, -1)
        return formula(gate_NF, _GATED[act]) * value_NF
    if act == "relu":
        return torch.where(pre_NP > 0, pre_NP, 0)
    if act == "silu":
        return pre_NP / (1 + torch.exp(-pre_NP))
    if act == "gelu":
        return 0.5 * pre_NP * (1 + torch.erf(pre_NP / math.sqrt(2)))
    inner_NP = math.sqrt(2 / math.pi) * (pre_NP + 0.044715 * pre_NP**3)
    return 0.5 * pre_NP * (1 + torch.tanh(inner_NP))


_FORWARD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda pre_NF: torch.nn.functional.gelu(pre_NF, approximate="tanh"),
    "relu": torch.relu,
}
_BACKWARD: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "silu": lambda grad_NF, pre_NF: torch.ops.aten.silu_backward(grad_NF, pre_NF),
    "gelu": lambda grad_NF, pre_NF: torch.ops.aten.gelu_backward(grad_NF, pre_NF),
    "gelu_tanh": lambda grad_NF, pre_NF: torch.ops.aten.gelu_backward(grad_NF, pre_NF, approximate="tanh"),
    "relu": lambda grad_NF, pre_NF: torch.ops.aten.threshold_backward(grad_NF, pre_NF, 0),
}
