"""Datasheet rows, names of devices, and calibrations that are kept whole or not at all."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from effbench import hardware
from effbench.hardware import (
    DEVICES,
    DTYPES,
    Calibration,
    calibration,
    calibration_key,
    calibration_path,
    cpu_model,
    device,
    hardware_name,
    num_cores,
    peaks,
    save_calibration,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made_up(key: str) -> Calibration:
    return Calibration(
        key=key, copy_bytes_per_s=3e10, matrix_flops_per_s={"fp32": 1.5e11}, threads=2,
        measured_at="2026-11-23T12:00:00+00:00", versions={"torch": "2.13.0"}, details={"copy": {"repeats": 9}},
    )  # fmt: skip


@pytest.mark.parametrize("row", DEVICES, ids=lambda row: row.name)
def test_a_row_is_plausible_and_names_its_source(row: hardware.Device) -> None:
    rates = row.flops_per_s
    assert row.source.startswith("https://")
    assert set(rates) <= set(DTYPES)
    assert rates["bf16"] == rates["fp16"]
    assert rates["tf32"] == pytest.approx(rates["bf16"] / 2, rel=0.02)
    assert rates["fp32"] <= rates["tf32"] < rates["bf16"] < rates["int8"]
    if "fp8" in rates:
        assert rates["fp8"] == pytest.approx(2 * rates["bf16"], rel=0.02)
    assert 1e11 < row.memory_bytes_per_s < 1e13
    assert 24 * 2**30 <= row.memory_bytes <= 192 * 2**30
    assert row.power_scope == ("module" if "GH200" in row.name else "gpu")


def test_every_reported_name_belongs_to_one_row() -> None:
    names = [name.lower() for row in DEVICES for name in row.reported_as]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA GH200 480GB", "GH200 96 GB HBM3"),
        ("NVIDIA GH200 144G HBM3e", "GH200 144 GB HBM3e"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA A100 80GB PCIe", "A100 80 GB PCIe"),
        ("A100-SXM4-40GB", "A100 40 GB SXM"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_a_gpu_is_known_by_the_name_its_driver_gives(reported: str, expected: str) -> None:
    row = device(reported)
    assert row is not None
    assert row.name == expected


@pytest.mark.parametrize(
    "reported",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H20",
        "AMD EPYC · 2 cores",
        "",
    ],
)
def test_an_unknown_device_has_no_peak_and_is_never_guessed(reported: str) -> None:
    assert device(reported) is None
    assert peaks(reported)["datasheet_flops_per_s"] == {}
    assert peaks(reported)["datasheet_bytes_per_s"] is None


def test_peaks_hold_the_datasheet_and_what_was_measured() -> None:
    before = peaks("NVIDIA H200")
    assert before["datasheet_flops_per_s"]["bf16"] == pytest.approx(989.4e12)
    assert before["copy_bytes_per_s"] is None
    save_calibration(replace(made_up("NVIDIA H200"), threads=None))
    after = peaks("NVIDIA H200")
    assert after["matrix_flops_per_s"] == {"fp32": 1.5e11}
    assert (after["copy_bytes_per_s"], after["calibrated_threads"]) == (3e10, None)


def test_a_cpu_is_calibrated_per_number_of_threads() -> None:
    here = hardware_name()
    save_calibration(made_up(calibration_key(here, num_cores())))
    assert peaks(here)["copy_bytes_per_s"] == 3e10
    assert peaks(here, threads=num_cores() + 1)["copy_bytes_per_s"] is None


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("AMD EPYC 9654 96-Core Processor", "AMD EPYC 9654"),
        ("Intel(R) Xeon(R) Platinum 8480C", "Intel Xeon Platinum 8480C"),
        ("Intel(R) Core(TM) i7-8650U CPU @ 1.90GHz", "Intel Core i7-8650U"),
        ("AMD EPYC", "AMD EPYC"),
    ],
)
def test_a_cpu_is_named_by_its_model_without_decoration(tmp_path: Path, model: str, expected: str) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: X\nmodel\t\t: 17\nmodel name\t: {model}\n")
    assert cpu_model(tmp_path / "cpuinfo") == expected


def test_a_cpu_without_a_model_name_is_named_by_its_machine_type(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nCPU implementer\t: 0x41\n")
    assert cpu_model(tmp_path / "cpuinfo")
    assert cpu_model(tmp_path / "absent")


def test_rows_are_labelled_with_model_and_usable_cores() -> None:
    assert hardware_name().endswith(f"{num_cores()} core{'s' * (num_cores() != 1)}")
    assert hardware_name("cuda", "NVIDIA H200") == "NVIDIA H200"


def test_the_kernel_driver_names_the_gpu_unless_models_differ(tmp_path: Path) -> None:
    for folder, model in (("0000:0a:00.0", "NVIDIA H200"), ("0000:0b:00.0", "NVIDIA H200")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "information").write_text(f"Model: \t\t {model}\nIRQ: 5\n")
    assert hardware._driver_gpu_name(tmp_path) == "NVIDIA H200"
    (tmp_path / "0000:0b:00.0" / "information").write_text("Model: NVIDIA L4\n")
    assert hardware._driver_gpu_name(tmp_path) is None


def test_a_calibration_survives_the_file(cache: Path) -> None:
    path = save_calibration(made_up("AMD EPYC · 2 cores · 2 threads"))
    assert path.is_relative_to(cache / "calibration")
    assert calibration("AMD EPYC · 2 cores · 2 threads") == made_up("AMD EPYC · 2 cores · 2 threads")
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": "other"}', '{"unheard": 1}'])
def test_a_calibration_that_cannot_be_read_is_none(content: str) -> None:
    path = calibration_path("some device")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert calibration("some device") is None


def test_a_failed_write_leaves_the_old_calibration_and_nothing_half(monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_calibration(made_up("some device"))
    monkeypatch.setattr(hardware.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_calibration(replace(made_up("some device"), copy_bytes_per_s=1.0))
    assert calibration("some device") == made_up("some device")
    assert list(path.parent.iterdir()) == [path]


def test_names_that_read_alike_have_files_of_their_own() -> None:
    assert calibration_path("a · b") != calibration_path("a - b")


def test_this_machine_can_be_calibrated_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    from effbench import calibrate

    monkeypatch.setattr(calibrate, "_BUDGET_S", 0.05)
    monkeypatch.setattr(calibrate, "_copy_bytes", lambda device: 1 << 24)
    found = calibrate.run("cpu", threads=1)
    assert calibration(found.key) == found
    assert found.key.endswith("1 thread")
    assert found.copy_bytes_per_s > 1e8
    assert found.matrix_flops_per_s["fp32"] > 1e8


def test_the_copied_buffer_is_larger_than_the_caches(tmp_path: Path) -> None:
    from effbench import calibrate

    for index, size in enumerate(("32K", "1024K", "32M", "odd")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert calibrate._last_level_cache_bytes(tmp_path) == 32 << 20
    assert calibrate._last_level_cache_bytes(tmp_path / "absent") == 0
    assert calibrate._copy_bytes("cpu") >= 1 << 20


def test_looking_up_a_device_imports_nothing_heavy() -> None:
    code = textwrap.dedent("""
        import sys
        from effbench import calibrate, hardware
        hardware.peaks(hardware.hardware_name())
        heavy = {"torch", "pandas", "scipy", "transformers", "pynvml"} & set(sys.modules)
        sys.exit(f"imported {heavy}" if heavy else 0)
    """)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
