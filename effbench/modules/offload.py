"""AdamW whose states, fp32 weights and step are in host memory: ZeRO-Offload (arXiv 2101.06840), section 4, on one device.

At each step the gradients go to the host, torch's own AdamW updates the weights there, and the weights come back. The device
keeps weights and gradients, not the two moments. Nothing overlaps with the computation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class HostAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW for parameters of any device, on copies of them on the host."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], **options: Any):
        super().__init__([p for p in parameters if p.requires_grad], options)
        self._own = [p for group in self.param_groups for p in group["params"]]
        self._host = [torch.nn.Parameter(p.detach().to("cpu", torch.float32, copy=True)) for p in self._own]
        self._adamw = torch.optim.AdamW(self._host, **options)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Any = None) -> None:
        """One update of every parameter that has a gradient."""
        assert closure is None, "no closure is evaluated again"
        for own, host in zip(self._own, self._host, strict=True):
            host.grad = None if own.grad is None else own.grad.to("cpu", torch.float32)
        self._adamw.step()
        for own, host in zip(self._own, self._host, strict=True):
            if host.grad is not None:
                own.copy_(host)
                host.grad = None
