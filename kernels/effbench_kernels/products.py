"""The two products of an expert layer, by expert: rows times weights, and rows times rows.

Shapes: N sorted rows of which the first n are kept, E experts, D and O widths.

In C where ``native`` can have it (a CPU, float32 and bfloat16), else one matrix product of torch an expert that has rows, or one
batched product for a dense plan. Both write into place.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from effbench_kernels import native

_SMALL, _HEAP = 1 << 20, 32 << 20  # bytes; glibc keeps freed memory below the second and asks the system for more


@dataclass(frozen=True)
class Groups:
    """Which rows belong to which expert: ``Plan.offsets`` and ``Plan.dense``."""

    offsets: torch.Tensor
    dense: bool

    @cached_property
    def bounds(self) -> list[int]:
        """The offsets on the host."""
        return [int(bound) for bound in self.offsets.tolist()]

    @property
    def kept(self) -> int:
        """n."""
        return self.bounds[-1]

    @property
    def sizes(self) -> list[int]:
        """Rows of each expert."""
        return [end - start for start, end in pairwise(self.bounds)]


def linear(
    x: torch.Tensor,
    row_N: torch.Tensor | None,
    w_EOD: torch.Tensor,
    bias_EO: torch.Tensor | None,
    groups: Groups,
    out: torch.Tensor,
) -> None:
    """out[i] = w[e] · x[row[i]] + bias[e] for the n kept rows, e the expert of i; row None: x[i]. Other rows are left alone."""
    if native.product(x, row_N, w_EOD, bias_EO, groups.offsets, out):
        return
    out_nO, w_EDO = out[: groups.kept], w_EOD.mT
    if groups.dense:
        experts, _, width = w_EDO.shape
        rows_ETD, out_ETO = _by_expert(x, row_N, groups), out_nO.view(experts, groups.bounds[1], width)
        if bias_EO is None:
            torch.bmm(rows_ETD, w_EDO, out=out_ETO)
        else:
            torch.baddbmm(bias_EO[:, None], rows_ETD, w_EDO, out=out_ETO)
        return
    active = [(expert, size) for expert, size in enumerate(groups.sizes) if size]
    sizes = [size for _, size in active]
    for (expert, _), part, out_mO in zip(active, _rows(x, row_N, groups).split(sizes), out_nO.split(sizes), strict=True):
        if bias_EO is None:
            torch.mm(part, w_EDO[expert], out=out_mO)
        else:
            torch.addmm(bias_EO[expert], part, w_EDO[expert], out=out_mO)


def outer(
    left: torch.Tensor, left_row_N: torch.Tensor | None, right: torch.Tensor, right_row_N: torch.Tensor | None, groups: Groups
) -> torch.Tensor:
    """(E, O, D): Σ left[left_row[i]] ⊗ right[right_row[i]] over the rows i of each expert, zero for one without rows."""
    shape = (len(groups.bounds) - 1, left.size(1), right.size(1))
    fresh = native.computes(left) and _pays(groups.sizes, math.prod(shape) * left.element_size())
    out_EOD = native.zeros(shape, left) if fresh else left.new_empty(shape)
    if native.outer(left, left_row_N, right, right_row_N, groups.offsets, out_EOD, fresh):
        return out_EOD
    if groups.dense:
        return torch.bmm(_by_expert(left, left_row_N, groups).mT, _by_expert(right, right_row_N, groups))
    sizes = groups.sizes
    parts = _rows(left, left_row_N, groups).split(sizes), _rows(right, right_row_N, groups).split(sizes)
    for size, part_mO, part_mD, out_OD in zip(sizes, *parts, out_EOD.unbind(0), strict=True):
        if size:
            torch.mm(part_mO.t(), part_mD, out=out_OD)
        elif not fresh:
            out_OD.zero_()
    return out_EOD


def _pays(sizes: list[int], num_bytes: int) -> bool:
    """Whether a gradient is better made in zeros fresh from the system, where experts without rows need not be written.

    New pages cost four times what writing old ones does, so they pay where few are touched, or where none would be old.
    """
    touched = sum(size > 0 for size in sizes)
    return touched < len(sizes) and num_bytes >= _SMALL and (num_bytes >= _HEAP or 5 * touched <= len(sizes))


def _rows(x: torch.Tensor, row_N: torch.Tensor | None, groups: Groups) -> torch.Tensor:
    return x[: groups.kept] if row_N is None else x.index_select(0, row_N[: groups.kept])


def _by_expert(x: torch.Tensor, row_N: torch.Tensor | None, groups: Groups) -> torch.Tensor:
    """(E, T, D) of a dense plan: of an indexed x every expert reads the same rows."""
    shape = (len(groups.bounds) - 1, groups.bounds[1], x.size(1))
    return x[: groups.kept].view(shape) if row_N is None else x.expand(shape)
