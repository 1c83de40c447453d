"""The one interface all backends of the grouped products stand behind.

A backend is a module with the four functions of ``Backend``; it sees tensors only, never autograd. ``ops`` registers them once as
custom operators that carry the backend's name, so a new backend is one module and one line in ``_MODULES``. The "reference"
backend is not listed here: it is plain differentiable loops over float64 (``reference``) and goes around the operators.
"""

import importlib
import importlib.util
from typing import Protocol, cast

import torch

from effbench_kernels import native

_MODULES = {"torch": "effbench_kernels.torch_backend", "triton": "effbench_kernels.triton_backend"}
NAMES = (*_MODULES, "reference")
_HAS_TRITON = importlib.util.find_spec("triton") is not None


class Backend(Protocol):
    """Shapes as in ``torch_backend``; ``need`` says which gradients are wanted, the others come back as empty tensors."""

    def linear_forward(
        self, x_ND: torch.Tensor, w_EOD: torch.Tensor, bias_EO: torch.Tensor | None, offsets_E1: torch.Tensor, dense: bool
    ) -> torch.Tensor:
        """(N, O): each row times the weights of its expert; rows of dropped pairs are zero."""

    def linear_backward(
        self,
        grad_NO: torch.Tensor,
        x_ND: torch.Tensor,
        w_EOD: torch.Tensor,
        offsets_E1: torch.Tensor,
        dense: bool,
        need: list[bool],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of x, w and bias."""

    def experts_forward(
        self,
        x_TD: torch.Tensor,
        w_in_EPD: torch.Tensor,
        w_out_EOF: torch.Tensor,
        b_in_EP: torch.Tensor | None,
        b_out_EO: torch.Tensor | None,
        weight_TK: torch.Tensor | None,
        add_TO: torch.Tensor | None,
        offsets_E1: torch.Tensor,
        token_N: torch.Tensor,
        inverse_TK: torch.Tensor,
        dense: bool,
        act: str,
        keep_pre: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output (T, O), or the sorted rows (N, O) without weight; and the pre-activations (N, P), empty if not kept."""

    def experts_backward(
        self,
        grad: torch.Tensor,
        x_TD: torch.Tensor,
        w_in_EPD: torch.Tensor,
        w_out_EOF: torch.Tensor,
        b_in_EP: torch.Tensor | None,
        b_out_EO: torch.Tensor | None,
        weight_TK: torch.Tensor | None,
        pre_NP: torch.Tensor,
        offsets_E1: torch.Tensor,
        token_N: torch.Tensor,
        inverse_TK: torch.Tensor,
        dense: bool,
        act: str,
        need: list[bool],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of x, w_in, w_out, b_in, b_out and weight."""


def resolve(name: str | None, x: torch.Tensor) -> str:
    """The backend's name: the one asked for, else the best one on the device of x. Raises ValueError for an unknown one.

    The best one is "triton" on an NVIDIA GPU from compute capability 8.0 on, if triton is installed; else "torch".
    """
    if name is None:
        return "triton" if x.device.type == "cuda" and _HAS_TRITON and _fits_triton(x.device) else "torch"
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    if name == "triton" and not _HAS_TRITON:
        raise ImportError("backend 'triton' needs triton, which is not installed: pip install 'triton>=3.6', or use 'torch'")
    return name


def ran_on(x: torch.Tensor) -> str:
    """What computes a layer whose input is x, for a record to say: "triton", "c" (``native``) or "torch"."""
    name = resolve(None, x)
    return "c" if name == "torch" and native.computes(x) else name


def _fits_triton(device: torch.device) -> bool:
    """Compiled code cannot ask for the capability; there an older GPU is refused when the backend is called."""
    if torch.version.cuda is None or torch.compiler.is_compiling():
        return torch.version.cuda is not None
    return bool(torch.cuda.get_device_capability(device) >= (8, 0))


def load(name: str) -> Backend:
    """The module of a backend."""
    return cast(Backend, importlib.import_module(_MODULES[name]))
