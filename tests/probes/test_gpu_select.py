"""Which GPU a CUDA program will use, from its environment alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from effbench.probes.gpu.select import DeviceInfo, Selection, select


def gpu(index: int, uuid: str, bus: int, name: str = "NVIDIA H200", mig: bool = False) -> DeviceInfo:
    address = f"00000000:{bus:02X}:00.0"
    return DeviceInfo(index=index, uuid=uuid, name=name, pci_bus_id=address, memory_bytes=1, mig=mig, gpu_uuid=uuid)


# NVML's order is not the order of the bus addresses here.
ALIKE = [gpu(0, "GPU-bbbb", 0x2A), gpu(1, "GPU-abcd", 0x19), gpu(2, "GPU-abff", 0x3B)]
SPLIT = gpu(0, "GPU-split", 0x10, mig=True)
SLICES = [
    dataclasses.replace(SPLIT, uuid=f"MIG-{number}{number}", gpu_uuid="GPU-split", gpu_instance=number) for number in (1, 2)
]


def chosen(
    mask: str | None, gpus: Sequence[DeviceInfo] = ALIKE, slices: Sequence[DeviceInfo] = (), order: str = ""
) -> Selection:
    environment = {"CUDA_DEVICE_ORDER": order} | ({} if mask is None else {"CUDA_VISIBLE_DEVICES": mask})
    return select(gpus, slices, environment)


@pytest.mark.parametrize(
    ("mask", "uuids", "reasons"),
    [
        (None, ["GPU-abcd", "GPU-bbbb", "GPU-abff"], ()),
        ("0", ["GPU-abcd"], ()),
        ("2, 0", ["GPU-abff", "GPU-abcd"], ()),
        ("GPU-bbbb", ["GPU-bbbb"], ()),
        ("gpu-BBBB", [], ("mask_truncated", "no_device")),
        ("GPU-b", ["GPU-bbbb"], ()),
        ("GPU-ab", [], ("mask_truncated", "no_device")),  # two begin so
        ("GPU-abf,1", ["GPU-abff", "GPU-bbbb"], ()),
        ("1,9,0", ["GPU-bbbb"], ("mask_truncated",)),
        ("1,1", ["GPU-bbbb"], ("mask_truncated",)),
        ("", [], ("no_device",)),
        ("-1", [], ("no_device",)),
        ("NoDevFiles", [], ("no_device",)),
        ("nonsense", [], ("mask_truncated", "no_device")),
        ("MIG-11", [], ("mask_truncated", "no_device")),
    ],
)
def test_a_mask_names_devices_in_cudas_order(mask: str | None, uuids: list[str], reasons: tuple[str, ...]) -> None:
    found = chosen(mask)
    assert [device.uuid for device in found.devices] == uuids
    assert found.reasons == reasons


def test_without_gpus_there_is_no_device() -> None:
    assert chosen(None, []) == Selection(devices=(), reasons=("no_device",))


def test_unlike_gpus_have_an_unknown_order_unless_it_is_by_bus_address() -> None:
    unlike = [*ALIKE, gpu(3, "GPU-cccc", 0x4C, name="NVIDIA L4")]
    assert "device_order_unknown" in chosen(None, unlike).reasons
    assert "device_order_unknown" in chosen("0", unlike).reasons
    assert chosen("0", unlike, order="PCI_BUS_ID").reasons == ()
    assert chosen("GPU-cccc", unlike).reasons == ()  # a UUID needs no order


def test_a_slice_is_found_by_its_uuid_and_a_split_gpu_shows_its_first_slice() -> None:
    by_uuid = chosen("MIG-22", [SPLIT], SLICES)
    assert (by_uuid.devices[0].gpu_instance, by_uuid.reasons) == (2, ("mig",))
    for mask in ("0", "GPU-split", None):
        first = chosen(mask, [SPLIT], SLICES)
        assert (first.devices[0].uuid, first.reasons) == ("MIG-11", ("mig",))
    assert chosen(None, [SPLIT]).reasons == ("mig",)  # split, and no slice made yet
