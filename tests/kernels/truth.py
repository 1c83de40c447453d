"""The expert layer written from its formulas in float64, apart from the library's own code, and the inputs of the tests.

Shapes: T tokens, K experts a token, E experts, D input width, P width before the activation, F hidden width, O output width.
"""

import math
from dataclasses import dataclass, fields, replace

import torch

GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "swiglu_clamped": "", "swiglu_clamped_interleaved": ""}


def scalar_act(z, act):
    if act == "relu":
        return z * (z > 0)
    if act == "silu":
        return z * torch.sigmoid(z)
    if act == "gelu":
        return z * 0.5 * torch.special.erfc(-z / math.sqrt(2))
    return z * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z))  # gelu_tanh


def hidden(pre_P, act):
    if act.startswith("swiglu_clamped"):
        pairs = pre_P.view(-1, 2) if act.endswith("interleaved") else pre_P.view(2, -1).t()
        gate, value = pairs[:, 0].clamp(max=7), pairs[:, 1].clamp(-7, 7)
        return (value + 1) * gate * torch.sigmoid(1.702 * gate)
    if act in GATES:
        half = pre_P.size(0) // 2
        return scalar_act(pre_P[:half], GATES[act]) * pre_P[half:]
    return scalar_act(pre_P, act)


@dataclass
class Case:
    x: torch.Tensor
    w_in: torch.Tensor
    w_out: torch.Tensor
    index: torch.Tensor
    weight: torch.Tensor
    b_in: torch.Tensor | None = None
    b_out: torch.Tensor | None = None
    add: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    def leaves(self):
        """The differentiable inputs by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None and name != "index"}

    def to(self, dtype):
        return replace(self, **{name: tensor.detach().to(dtype) for name, tensor in self.leaves().items()})

    def fresh(self):
        """The same values as new leaves that want gradients."""
        return replace(self, **{name: tensor.detach().clone().requires_grad_() for name, tensor in self.leaves().items()})


def make(
    tokens=13,
    k=2,
    experts=5,
    d=6,
    f=7,
    out=4,
    act="swiglu",
    bias=True,
    add=True,
    norm=False,
    seed=0,
    scale=1.0,
    index=None,
    low=0,
    high=None,
):
    """Random float64 inputs; expert ids from ``low`` up to below ``high``, so some can be sentinels."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    wide = 2 * f if act in GATES else f
    if index is None:
        index = torch.randint(low, experts if high is None else high, (tokens, k), generator=g)
    return Case(
        x=normal(tokens, d) * scale,
        w_in=normal(experts, wide, d) / math.sqrt(d),
        w_out=normal(experts, out, f) / math.sqrt(f),
        index=index,
        weight=torch.rand(index.shape, generator=g, dtype=torch.float64) + 0.1,
        b_in=normal(experts, wide) if bias else None,
        b_out=normal(experts, out) if bias else None,
        add=normal(tokens, out) if add else None,
        gain=normal(experts, out) if norm else None,
        shift=normal(experts, out) if norm else None,
    )


def layer(case, act, kind="layer", eps=1e-5):
    """(T, O) by loops over tokens and their experts."""
    rows = []
    for t in range(case.x.size(0)):
        y = torch.zeros(case.w_out.size(1), dtype=case.x.dtype)
        for j, e in enumerate(case.index[t].tolist()):
            if not 0 <= e < case.w_in.size(0):
                continue
            pre = case.w_in[e] @ case.x[t]
            pre = pre if case.b_in is None else pre + case.b_in[e]
            z = case.w_out[e] @ hidden(pre, act)
            z = z if case.b_out is None else z + case.b_out[e]
            if case.gain is not None:
                centred = z - z.mean() if kind == "layer" else z
                z = centred / torch.sqrt((centred * centred).mean() + eps) * case.gain[e] + case.shift[e]
            y = y + case.weight[t, j] * z
        rows.append(y if case.add is None else y + case.add[t])
    return torch.stack(rows) if rows else torch.zeros(0, case.w_out.size(1), dtype=case.x.dtype)


def gradients(case, out, seed=99):
    """The gradients of every leaf for one fixed random output gradient, by name; zeros where a leaf is not reached."""
    leaves = case.leaves()
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
    if not out.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(out, list(leaves.values()), grad, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if got is None else got for (name, leaf), got in zip(leaves.items(), found, strict=True)
    }


def error(got, want):
    """Root mean square of the difference over that of the truth (over 1 where the truth is zero); inf if not finite."""
    if got.numel() == 0:
        return 0.0
    if not torch.isfinite(got).all():
        return math.inf
    size = want.double().square().mean().sqrt().item()
    return (got.double() - want.double()).square().mean().sqrt().item() / (size or 1.0)
