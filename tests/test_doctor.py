"""The doctor's report: complete, never silent about a no, and the same in JSON and as a table."""

from __future__ import annotations

import json
import os
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest

from effbench import doctor, hardware, registry
from effbench.doctor import Section, render, report, to_json
from effbench.errors import EffbenchError
from effbench.hardware import Calibration
from effbench.probe import Capability


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def sections() -> list[Section]:
    return report()


def shown(sections: list[Section], width: int = 160) -> str:
    from rich.console import Console

    console = Console(file=StringIO(), width=width)
    console.print(render(sections))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def item(sections: list[Section], what: str) -> Capability:
    return next(i for s in sections for i in s.items if i.what.startswith(what))


def test_every_no_names_what_would_change_it(sections: list[Section]) -> None:
    missing = [i for s in sections for i in s.items if not i.available]
    assert [i.what for i in missing if not i.remedy] == []


def test_every_probe_has_a_section(sections: list[Section]) -> None:
    titles = {s.title for s in sections}
    assert {f"Probe {name}" for name in registry.entries("probe")} <= titles


def test_every_optional_library_of_the_project_is_looked_up(sections: list[Section]) -> None:
    for library in ("streamlit", "bitsandbytes", "torchao", "ray", "lm-eval", "flash-attn", "flash-linear-attention"):
        found = item(sections, library)
        assert found.available or found.remedy.startswith("pip install")


def test_the_report_is_one_json_document_with_the_same_items(sections: list[Section]) -> None:
    document = json.loads(json.dumps(to_json(sections)))
    assert [s["title"] for s in document["sections"]] == [s.title for s in sections]
    assert document["available"] + document["missing"] == sum(len(s.items) for s in sections)
    assert set(document["sections"][0]["items"][0]) == {"what", "available", "detail", "remedy"}


def test_the_table_shows_every_item_and_remedy_once_per_cause(sections: list[Section]) -> None:
    text = shown(sections, width=400)
    flat = " ".join(text.split())
    for section in sections:
        for each in section.items:
            assert each.remedy in flat
    same = [Capability(what=w, available=False, detail="no driver", remedy="install it") for w in ("power", "energy")]
    table = shown([Section(title="GPU", items=tuple(same))])
    assert "power, energy" in table
    assert table.count("install it") == 1


def test_a_probe_that_cannot_be_imported_is_a_line_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise EffbenchError(f"The probe {name!r} cannot be imported")

    monkeypatch.setattr(registry, "probe", broken)
    [found] = doctor._probe("nvml")
    assert not found.available
    assert "cannot be imported" in found.detail


def test_a_broken_plugin_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = registry.Entry(
        kind="technique", name="odd", target="no_such_module:Odd", distribution="odd-techniques", version="1"
    )
    monkeypatch.setattr(registry, "entries", lambda kind: {"odd": entry} if kind == "technique" else {})
    monkeypatch.setattr(
        registry, "load", lambda kind, name: (_ for _ in ()).throw(EffbenchError("no module named no_such_module"))
    )
    [found] = doctor._plugins()
    assert not found.available
    assert "odd-techniques" in found.remedy


def calibrated(relative_iqr: float) -> Capability:
    """What is said of this CPU after a calibration whose repeats spread so."""
    here, cores = hardware.hardware_name(), hardware.num_cores()
    key = hardware.calibration_key(here, cores)
    details = {"copy": {"relative_iqr": relative_iqr, "repeats": 20}, "bf16_failed": "no such product"}
    hardware.save_calibration(
        Calibration(key=key, copy_bytes_per_s=3e10, matrix_flops_per_s={"fp32": 1.5e11}, threads=cores, details=details)
    )
    return doctor._peaks()[0]


def test_a_missing_calibration_says_how_to_take_it() -> None:
    assert "doctor --calibrate" in doctor._peaks()[0].remedy


def test_a_calibration_is_shown_with_its_rates() -> None:
    found = calibrated(0.02)
    assert found.available
    assert "30 GB/s" in found.detail
    assert "fp32 0.15 TFLOP/s" in found.detail


def test_a_calibration_that_other_work_disturbed_is_not_accepted() -> None:
    found = calibrated(0.4)
    assert not found.available
    assert "40%" in found.detail


def test_a_busy_machine_is_said_to_be_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (64.0, 0.0, 0.0))
    assert not item([Section(title="", items=tuple(doctor._machine()))], "quiet").available


def test_a_torch_without_cuda_and_one_without_a_device_have_different_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    remedies = []
    for version in (None, "12.8"):
        monkeypatch.setattr(torch, "version", SimpleNamespace(cuda=version))
        remedies.append(item([Section(title="", items=tuple(doctor._software()))], "measuring on a GPU").remedy)
    assert "pip install" in remedies[0]
    assert "driver" in remedies[1]


def test_a_place_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place, _ = doctor._places(tmp_path / "file" / "results")
    assert not place.available
    assert str(tmp_path / "file") in place.remedy
    assert doctor._places(tmp_path / "new" / "results")[0].available


def test_expert_layers_in_c_are_there_or_the_reason_is_told(monkeypatch: pytest.MonkeyPatch, sections: list[Section]) -> None:
    from effbench_kernels import native

    assert item(sections, "expert layers in C").available == (not native.why_not())
    monkeypatch.setattr(native, "why_not", lambda: "there is no C compiler; install gcc")
    found = doctor._expert_layers()
    assert not found.available
    assert "no C compiler" in found.detail
    assert "gcc" in found.remedy
