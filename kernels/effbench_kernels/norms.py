"""A norm with parameters of its own for each expert, on the expert's output.

Shapes: N pairs, E experts, O output width.
"""

from typing import NamedTuple

import torch

from effbench_kernels.plan import Plan


class Norm(NamedTuple):
    """gain (E, O), bias (E, O) or None, kind "layer" (mean and variance) or "rms" (root mean square only), eps inside the root."""

    gain: torch.Tensor
    bias: torch.Tensor | None = None
    kind: str = "layer"
    eps: float = 1e-5


def check_norm(norm: Norm, experts: int, width: int) -> None:
    """Raises ValueError for an unknown kind or parameters of another shape than (experts, width)."""
    if norm.kind not in ("layer", "rms"):
        raise ValueError(f"a norm is 'layer' or 'rms', got {norm.kind!r}")
    for name, tensor in (("gain", norm.gain), ("bias", norm.bias)):
        if tensor is not None and tuple(tensor.shape) != (experts, width):
            raise ValueError(f"the norm's {name} must have shape ({experts}, {width}), got {tuple(tensor.shape)}")


def norm_rows(rows_NO: torch.Tensor, plan: Plan, norm: Norm) -> torch.Tensor:
    """The rows (N, O), in the order of the plan, each normalised with the parameters of its expert. Differentiable.

    Statistics are taken in float32 at least. Rows of dropped pairs are finite and without meaning.
    """
    wide_NO = rows_NO if rows_NO.dtype == torch.float64 else rows_NO.float()
    width = (rows_NO.size(1),)
    if norm.kind == "layer":
        wide_NO = torch.nn.functional.layer_norm(wide_NO, width, eps=norm.eps)
    else:
        wide_NO = torch.nn.functional.rms_norm(wide_NO, width, eps=norm.eps)
    expert_N = plan.expert.clamp(max=plan.num_experts - 1)
    wide_NO = wide_NO * norm.gain.index_select(0, expert_N)
    if norm.bias is not None:
        wide_NO = wide_NO + norm.bias.index_select(0, expert_N)
    return wide_NO.to(rows_NO.dtype)
