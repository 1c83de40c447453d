"""AdamW whose states, fp32 weights and step are in host memory: ZeRO-Offload (arXiv 2101.06840), section 4, on one device.

At each step the gradients go to the host, torch's own AdamW updates the fp32 weights there, and the weights come back in the dtype
that they have on the device. The device keeps weights and gradients, in 16 bits where the model has 16, and no moments.
Nothing overlaps with the computation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class HostAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW on fp32 copies in host memory; the parameters themselves go back to the dtypes given for them."""

    def __init__(self, dtypes: Mapping[torch.nn.Parameter, torch.dtype], **options: Any):
        super().__init__(list(dtypes), options)
        self._pairs = [(own, torch.nn.Parameter(own.detach().to("cpu", torch.float32, copy=True))) for own in dtypes]
        self._adamw = torch.optim.AdamW([host for _, host in self._pairs], **options)
        for own, dtype in dtypes.items():
            own.data = own.data.to(dtype)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Any = None) -> None:
        """One update of every parameter that has a gradient."""
        assert closure is None, "no closure is evaluated again"
        for own, host in self._pairs:
            host.grad = None if own.grad is None else own.grad.to("cpu", torch.float32)
        self._adamw.step()
        for own, host in self._pairs:
            if host.grad is not None:
                own.copy_(host)
