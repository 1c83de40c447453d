"""The activations of expert layers and their derivatives.

Shapes: N pairs, F hidden width, P width before the activation: 2F when gated, else F. A gated input holds the gate in its first
half and the value in its second; an "_interleaved" one holds them in turns, gate first.

swiglu and geglu: Shazeer, "GLU variants improve transformer" (arXiv 2002.05202), section 2, without biases of their own.
swiglu_clamped: gpt-oss (arXiv 2508.10925), section 2.1: with g = min(gate, 7) and v = value held between -7 and 7, it is
g · sigmoid(1.702 · g) · (v + 1). A clamped entry has gradient 0; at the limit itself the gradient passes.
"""

import math
from collections.abc import Callable

import torch

ACTIVATIONS = (
    "swiglu",
    "geglu",
    "geglu_tanh",
    "swiglu_clamped",
    "swiglu_clamped_interleaved",
    "silu",
    "gelu",
    "gelu_tanh",
    "relu",
)
CLAMP_ALPHA, CLAMP_LIMIT = 1.702, 7.0
_GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
_CLAMPED = ("swiglu_clamped", "swiglu_clamped_interleaved")


def is_gated(act: str) -> bool:
    """Whether the activation takes 2F columns and gives F."""
    return act in _GATED or act in _CLAMPED


def activate(pre_NP: torch.Tensor, act: str) -> torch.Tensor:
    """(N, P) -> (N, F): act(gate) · value when gated, else act(pre). Differentiable."""
    if not is_gated(act):
        return _FORWARD[act](pre_NP)
    gate_NF, value_NF = _parts(pre_NP, act)
    if act in _CLAMPED:
        return _clamped_glu(gate_NF) * _clamped_value(value_NF)
    return _FORWARD[_GATED[act]](gate_NF) * value_NF


def activate_backward(grad_NF: torch.Tensor, pre_NP: torch.Tensor, act: str) -> torch.Tensor:
    """The gradient (N, P) of ``pre_NP``, given that of ``activate(pre_NP, act)``. Not differentiable itself."""
    if not is_gated(act):
        return _BACKWARD[act](grad_NF, pre_NP)
    gate_NF, value_NF = _parts(pre_NP, act)
    out_NP = torch.empty_like(pre_NP)
    out_gate_NF, out_value_NF = _parts(out_NP, act)
    if act in _CLAMPED:
        torch.mul(grad_NF, _clamped_glu(gate_NF), out=out_value_NF)
        out_value_NF.masked_fill_(value_NF.abs() > CLAMP_LIMIT, 0)
        inner_NF = gate_NF.clamp(max=CLAMP_LIMIT) * CLAMP_ALPHA
        out_gate_NF.copy_(_BACKWARD["silu"](grad_NF * _clamped_value(value_NF), inner_NF))
        out_gate_NF.masked_fill_(gate_NF > CLAMP_LIMIT, 0)
        return out_NP
    plain = _GATED[act]
    torch.mul(grad_NF, _FORWARD[plain](gate_NF), out=out_value_NF)
    out_gate_NF.copy_(_BACKWARD[plain](grad_NF * value_NF, gate_NF))
    return out_NP


def formula(pre_NP: torch.Tensor, act: str) -> torch.Tensor:
    """``activate`` written out in elementary functions, for the reference backend. Any floating type, differentiable."""
    if act in _CLAMPED:
        gate_NF, value_NF = _parts(pre_NP, act)
        gate_NF = torch.where(gate_NF > CLAMP_LIMIT, CLAMP_LIMIT, gate_NF)
        value_NF = torch.where(value_NF > CLAMP_LIMIT, CLAMP_LIMIT, value_NF)
        value_NF = torch.where(value_NF < -CLAMP_LIMIT, -CLAMP_LIMIT, value_NF)
        return gate_NF / (1 + torch.exp(-CLAMP_ALPHA * gate_NF)) * (value_NF + 1)
    if act in _GATED:
        gate_NF, value_NF = _parts(pre_NP, act)
        return formula(gate_NF, _GATED[act]) * value_NF
    if act == "relu":
        return torch.where(pre_NP > 0, pre_NP, 0)
    if act == "silu":
        return pre_NP / (1 + torch.exp(-pre_NP))
    if act == "gelu":
        return 0.5 * pre_NP * (1 + torch.erf(pre_NP / math.sqrt(2)))
    inner_NP = math.sqrt(2 / math.pi) * (pre_NP + 0.044715 * pre_NP**3)
    return 0.5 * pre_NP * (1 + torch.tanh(inner_NP))


def _parts(pre_NP: torch.Tensor, act: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The gate and the value, as views."""
    if act.endswith("_interleaved"):
        return pre_NP[..., ::2], pre_NP[..., 1::2]
    half = pre_NP.size(-1) // 2
    return pre_NP[..., :half], pre_NP[..., half:]


def _clamped_glu(gate_NF: torch.Tensor) -> torch.Tensor:
    gate_NF = gate_NF.clamp(max=CLAMP_LIMIT)
    return gate_NF * torch.sigmoid(gate_NF * CLAMP_ALPHA)


def _clamped_value(value_NF: torch.Tensor) -> torch.Tensor:
    return value_NF.clamp(-CLAMP_LIMIT, CLAMP_LIMIT) + 1


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
