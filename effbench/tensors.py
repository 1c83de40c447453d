"""The peak of tensor bytes over one step on a CPU, which has no allocator that keeps it as CUDA's does.

    start    every tensor that is alive: weights, buffers, optimizer states, caches, data
    step     each operator's results while their storages live, gradients and what autograd keeps among them

A storage counts once, whatever views there are of it, from the operator that makes it until it is freed. Operators of other
packages are entered, so what they allocate counts as well; what one of torch's own allocates and frees inside is not seen.
A dispatch mode costs some 10 µs an operator: the step is taken after the window and enters no time.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

OWN_NAMESPACES = ("aten", "prim", "prims", "profiler")
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def step_peak_bytes(step: Callable[[], None]) -> int:
    """Peak of the bytes of all tensor storages on the CPU over one call, those alive at its start included."""
    tracker = TensorTracker()
    tracker.count_living()
    gc.freeze()  # half a million objects, which no collection need walk during the step
    try:
        with tracker:
            step()
    finally:
        gc.unfreeze()
    return tracker.peak_bytes


class TensorTracker(TorchDispatchMode):  # type: ignore[misc]
    """Follows storages on the CPU: `now_bytes` alive, and `peak_bytes`, their most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now_bytes = self.peak_bytes = 0
        self._living: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def count_living(self) -> None:
        """Count what is there already; half a million objects are looked at in some 0.1 s."""
        gc.collect()  # before the next line, since frozen objects are not walked
        gc.unfreeze()
        everything = gc.get_objects()
        kinds = {kind for kind in set(map(type, everything)) if issubclass(kind, torch.Tensor)}
        for found in everything:
            if type(found) in kinds:
                self.note(found)

    def note(self, tensor: torch.Tensor) -> None:
        """Count the storage behind a tensor unless it is counted."""
        if tensor.device.type != "cpu" or is_traceable_wrapper_subclass(tensor):  # its parts are tensors and are met as such
            return
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse, or a stand-in without memory
            return
        key, size = storage._cdata, storage.nbytes()
        known = self._living.get(key)
        if known is not None and known[1] == size:
            return
        before = known[1] if known else 0
        watch = known[0] if known else weakref.ref(storage, partial(self._freed, key))
        self._living[key] = watch, size
        self.now_bytes += size - before
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a tensor made of others: its own operator runs first, and what that calls comes here
        if func.namespace in OWN_NAMESPACES:
            out = func(*args, **(kwargs or {}))
        else:
            with self:
                out = func.redispatch(_CPU, *args, **(kwargs or {}))
        self._note_all(out)
        return out

    def _note_all(self, out: Any) -> None:
        if isinstance(out, torch.Tensor):
            self.note(out)
        elif isinstance(out, list | tuple):
            for part in out:
                self._note_all(part)

    def _freed(self, key: int, _: Any) -> None:
        self.now_bytes -= self._living.pop(key)[1]
