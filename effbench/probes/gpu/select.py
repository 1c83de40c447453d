"""Which GPU a CUDA program will use, told from CUDA_VISIBLE_DEVICES without starting CUDA. Pure: NVML is read elsewhere.

CUDA numbers devices its own way: by bus address only under CUDA_DEVICE_ORDER=PCI_BUS_ID, else the fastest first, which
is the same order as long as all GPUs are alike. A mask may hold indices, `GPU-<uuid>` or `MIG-<uuid>` (any unique
beginning); at the first entry that names nothing CUDA ignores the rest. Source: CUDA C++ programming guide,
environment variables.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NO_DEVICES = ("", "-1", "NoDevFiles")  # the last one is what some container runtimes set


@dataclass(frozen=True, kw_only=True)
class DeviceInfo:
    """One GPU, or one MIG slice of a GPU. `uuid` is what CUDA_VISIBLE_DEVICES would call it."""

    index: int  # NVML's number of the GPU
    uuid: str
    name: str
    pci_bus_id: str
    memory_bytes: int | None
    mig: bool = False  # a slice, or a GPU that is split: power and energy mean nothing for it
    gpu_uuid: str  # of the whole GPU; the same as `uuid` unless this is a slice
    gpu_instance: int | None = None  # of a slice


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The visible devices in CUDA's order, and reason codes (see reasons.py)."""

    devices: tuple[DeviceInfo, ...]
    reasons: tuple[str, ...] = ()


def select(
    gpus: Sequence[DeviceInfo], slices: Sequence[DeviceInfo] = (), environment: Mapping[str, str] | None = None
) -> Selection:
    """The devices that CUDA shows in this environment (default: this process's), out of all GPUs and MIG slices."""
    environment = os.environ if environment is None else environment
    mask = environment.get("CUDA_VISIBLE_DEVICES")
    ordered = sorted(gpus, key=lambda gpu: gpu.pci_bus_id)
    numbered = [_as_cuda_sees(gpu, slices) for gpu in ordered]
    by_address = environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({gpu.name for gpu in gpus}) <= 1
    if mask is None:
        return _selection(numbered, () if by_address else ("device_order_unknown",))
    chosen: list[DeviceInfo] = []
    reasons: dict[str, None] = {}
    if mask.strip() in NO_DEVICES:
        return _selection(chosen)
    for entry in (part.strip() for part in mask.split(",")):
        if entry.isdigit() and not by_address:
            reasons["device_order_unknown"] = None
        device = _named(entry, numbered, slices)
        if device is None or device in chosen:
            reasons["mask_truncated"] = None
            break
        chosen.append(device)
    return _selection(chosen, reasons)


def _selection(devices: Sequence[DeviceInfo], reasons: Sequence[str] | Mapping[str, None] = ()) -> Selection:
    flags = [*reasons, *(["no_device"] if not devices else [])]
    if devices and devices[0].mig:
        flags.append("mig")
    return Selection(devices=tuple(devices), reasons=tuple(flags))


def _as_cuda_sees(gpu: DeviceInfo, slices: Sequence[DeviceInfo]) -> DeviceInfo:
    """The first slice of a split GPU, which is the one CUDA offers by number, else the GPU itself."""
    return next((part for part in slices if part.gpu_uuid == gpu.uuid), gpu) if gpu.mig else gpu


def _named(entry: str, numbered: Sequence[DeviceInfo], slices: Sequence[DeviceInfo]) -> DeviceInfo | None:
    if entry.isdigit():
        return numbered[int(entry)] if int(entry) < len(numbered) else None
    if not entry.startswith(("GPU-", "MIG-")):
        return None
    pool, whole = (slices, False) if entry.startswith("MIG-") else (numbered, True)
    found = [device for device in pool if (device.gpu_uuid if whole else device.uuid).lower().startswith(entry.lower())]
    return found[0] if len(found) == 1 else None
