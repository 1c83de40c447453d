"""What leaves a machine: the records whole, their identity the same, and nothing that names its owner or its devices."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from effbench.errors import BundleError, StoreError, UsageError
from effbench.exchange import privacy
from effbench.exchange.bundle import Written, contents_of, make_bundle, write_bundle
from effbench.exchange.privacy import DEVICE, HOST, PATH, USER, Scrubber
from effbench.schema import Case, ModelRef, Series, Spec, Trace, canonical_json
from effbench.store import Store
from tests.exchange.bundles import NOBODY, make_plugin, make_store, members_of, table_of
from tests.records import PROVENANCE, make_case, make_launch, make_spec, make_trace

ROOT = Path(__file__).parents[2]
WHO = {"contact": "someone@example.org", "licence": "CC-BY-4.0"}
ALICE = {"alice.smith": USER, "falcon-7.lab.example": HOST, "falcon-7": HOST}
GPU_UUID = "GPU-7f3a6c1e-0b52-4d0e-9a7b-2f1d3c4b5a69"
SECRETS = ("alice", "smith", "falcon", "scratch", "my runs", "7f3a6c1e", "00000000:65:00", "1650123006871", "secret")
DETAIL = """Traceback (most recent call last):
  File "/home/alice.smith/secret plan/train.py", line 3, in <module>
  File "/opt/conda/envs/secret/lib/python3.11/site-packages/torch/nn/module.py", line 7, in forward
FileNotFoundError: /scratch/my runs/a.bin on falcon-7.lab.example, C:\\Users\\secret\\x.txt, ~alice/secret.txt (falcon-7)
"""


def alice() -> Scrubber:
    """What is private on her machine."""
    return Scrubber(names=ALICE, folders=("/home/alice.smith", "/scratch/my runs"))


def alices(**changes: Any) -> Spec:
    """A spec with places that only its owner has."""
    model = ModelRef(name="tiny-llama", weights="path", location="/home/alice.smith/secret/checkpoint", digest="5e" * 32)
    return replace(make_spec(), model=model, text="/scratch/my runs/secret.txt", **changes)


def private_store(folder: Path, spec: Spec) -> Store:
    """One row of a person who has left traces everywhere."""
    gpu = {"name": "NVIDIA H200", "uuid": GPU_UUID, "pci_bus_id": "00000000:65:00.0", "board_serial": "1650123006871"}
    provenance = {**PROVENANCE, "details": json.dumps(gpu), "platform": "Linux-6.8 on falcon-7 of alice.smith"}
    store = Store(folder)
    row = replace(
        make_case(baseline=None), case_id=Case(spec=spec).case_id, spec=canonical_json(spec.to_json()), run_id="run-1",
        launch_ids=("launch-1",), provenance=provenance, reason="out_of_memory on falcon-7",
    )  # fmt: skip
    row = replace(row, metrics=tuple(replace(m, source=f"{m.source} · /home/alice.smith/probe") for m in row.metrics))
    facts = {
        "checkpoint": "/home/alice.smith/secret",
        "hostname": "falcon-7",
        "host_private_bytes": 5,
        "gpus": [{"uuid": GPU_UUID}],
    }
    launch = replace(make_launch("launch-1", status="failed", detail=DETAIL), spec=spec, provenance=provenance, facts=facts)
    sensor = Series(name="own", unit="W", scope="gpu", source=f"/scratch/my runs/{GPU_UUID}", t_s=np.ones(3), values=np.ones(3))
    store.write_case(row)
    store.write_launch(launch, Trace(series=(*make_trace().series, sensor)))
    return store


def everything_said(made: Written) -> str:
    """Every text that a bundle holds, decoded."""
    found = []
    for name, data in members_of(made.data).items():
        if name.endswith(".parquet"):
            table = table_of(data)
            found += [json.dumps(table.to_pylist()), str({k: v for k, v in table.schema.metadata.items() if b"ARROW" not in k})]
        else:
            found.append(data.decode())
    return "\n".join(found)


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    store = make_store(tmp_path / "results", rows=3)
    written = write_bundle(store, tmp_path / "out.zip", **WHO, plugin=make_plugin(tmp_path / "plugin"), private_kept=True)
    found = contents_of(tmp_path / "out.zip", expected_sha256=written.sha256)
    assert found.cases == store.cases().rows
    assert list(found.launches.values()) == sorted(store.launches(), key=lambda launch: launch.launch_id)
    assert found.traces.keys() == found.launches.keys()
    for launch_id, trace in found.traces.items():
        expected = store.trace(launch_id)
        assert [(s.name, s.unit, s.scope, s.source) for s in trace.series] == [
            (s.name, s.unit, s.scope, s.source) for s in expected.series
        ]
        for ours, theirs in zip(trace.series, expected.series, strict=True):
            np.testing.assert_array_equal(ours.t_s, theirs.t_s)
            np.testing.assert_array_equal(ours.values, theirs.values)
    assert found.manifest["contact"] == WHO["contact"]
    assert found.manifest["counts"] == {"rows": 3, "launches": 6, "samples": written.samples}


def test_a_failure_is_submitted_too(tmp_path: Path) -> None:
    """Its launch has a trace without a sample."""
    store = Store(tmp_path)
    spec = make_spec()
    row = make_case(baseline=None, status="failed", reason="out_of_memory", run_id="run-1")
    store.write_case(
        replace(row, case_id=Case(spec=spec).case_id, launch_ids=("launch-1",), spec=canonical_json(spec.to_json()))
    )
    store.write_launch(replace(make_launch("launch-1", status="failed", metrics=(), windows={}), spec=spec), Trace())
    found = contents_of_made(make_bundle(store, **WHO, scrub=NOBODY))
    assert found.traces == {"launch-1": Trace()}
    assert found.cases[0].reason == "out_of_memory"


def test_the_committed_results_can_be_submitted(tmp_path: Path) -> None:
    written = write_bundle(Store(ROOT / "results" / "reference"), tmp_path / "out.zip", **WHO)
    assert not written.left_out
    assert len(contents_of(tmp_path / "out.zip").cases) == len(written.cases) >= 12


def test_equal_results_give_equal_bytes(tmp_path: Path) -> None:
    """Also byte by byte in traces, where an encoder would pad a dictionary with what lay in memory."""
    first, second = (
        make_bundle(make_store(tmp_path / name), **WHO, plugin=make_plugin(tmp_path / "plugin"), scrub=NOBODY) for name in "ab"
    )
    assert first.data == second.data


def test_another_file_than_the_verified_one_is_refused(tmp_path: Path) -> None:
    write_bundle(make_store(tmp_path / "results"), tmp_path / "out.zip", **WHO)
    with pytest.raises(BundleError, match="not the file that was verified"):
        contents_of(tmp_path / "out.zip", expected_sha256="0" * 64)


def test_nothing_private_leaves_and_the_case_stays_the_same(tmp_path: Path) -> None:
    store = private_store(tmp_path / "results", alices())
    made = make_bundle(store, **WHO, scrub=alice())
    said = everything_said(made)
    assert [secret for secret in SECRETS if secret in said] == []
    assert set(made.removed) == {PATH, USER, HOST, DEVICE}
    assert made.remaining == ()
    (row,), (launch,) = made.cases, contents_of_made(made).launches.values()
    (before,) = store.cases()
    assert Case(spec=Spec.from_json(json.loads(row.spec))).case_id == row.case_id == before.case_id
    assert launch.spec.spec_id == alices().spec_id
    assert "torch/nn/module.py" in launch.detail
    assert launch.facts["host_private_bytes"] == 5
    assert json.loads(row.provenance["details"])["name"] == "NVIDIA H200"


def contents_of_made(made: Written) -> Any:
    from effbench.exchange.bundle import contents_of_bytes

    return contents_of_bytes(made.data)


def test_private_parts_stay_when_that_is_asked_for(tmp_path: Path) -> None:
    store = private_store(tmp_path / "results", alices(environment={"CACHE": "/home/alice.smith/cache"}))
    made = make_bundle(store, **WHO, private_kept=True, scrub=alice())
    said = everything_said(made)
    assert [secret for secret in SECRETS if secret not in said] == []
    assert json.loads(members_of(made.data)["manifest.json"])["private_kept"] is True


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"environment": {"HF_HOME": "/home/alice.smith/cache"}}, "spec.environment.HF_HOME"),
        ({"environment": {"CUDA_VISIBLE_DEVICES": GPU_UUID}}, "spec.environment.CUDA_VISIBLE_DEVICES"),
        ({"params": {"files": ["/scratch/my runs/x"]}}, r"spec.params.files\[0\]"),
    ],
)
def test_what_identifies_a_case_is_never_changed(changes: dict[str, Any], place: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"{place} .* cannot be taken out.*--keep-private"):
        make_bundle(private_store(tmp_path / "results", alices(**changes)), **WHO, scrub=alice())


def test_names_in_what_identifies_a_case_are_told(tmp_path: Path) -> None:
    store = private_store(tmp_path / "results", alices(workload_identity="alice.smith-plugin:x@1+a"))
    made = make_bundle(store, **WHO, scrub=alice())
    assert any("workload_identity" in sentence and USER in sentence for sentence in made.remaining)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/proc/self/statm · process", "/proc/self/statm · process"),
        ("tokens/s and J/token, 1/2, and/or", "tokens/s and J/token, 1/2, and/or"),
        ("see https://arxiv.org/abs/2305.13245", "see https://arxiv.org/abs/2305.13245"),
        ("/sys/class/powercap/intel-rapl:0/energy_uj", "/sys/class/powercap/intel-rapl:0/energy_uj"),
        ("cannot open /data/x/y.bin, sorry", "cannot open <path>, sorry"),
        ('File "/data/a b/c.py", line 1', 'File "<path>", line 1'),
        ("HF_HOME=/data/x:/data/y", "HF_HOME=<path>"),
        ("file:///data/x", "<path>"),
        (r"\\server\share\x and D:\a\b", "<path> and <path>"),
        ("/usr/lib/python3.11/json/decoder.py", "<path>/json/decoder.py"),
        ("by Alice.Smith@FALCON-7", "by <user name>@<host name>"),
        ("alice.smithson", "alice.smithson"),
        ("MIG-7f3a6c1e-0b52-4d0e-9a7b-2f1d3c4b5a69", "<device identifier>"),
        ("driver 570.86.10, 2026-11-20T10:00:00+00:00", "driver 570.86.10, 2026-11-20T10:00:00+00:00"),
        ("/scratch/my runs/a/b.txt gone", "<path> gone"),
    ],
)
def test_texts_are_cleaned_of_paths_names_and_devices(text: str, expected: str) -> None:
    assert alice().text(text) == expected


def test_a_name_that_is_a_part_of_the_hardware_changes_no_environment(tmp_path: Path) -> None:
    """A host called after its processor: env_id is made of that text, so it stays and is told."""
    store = make_store(tmp_path / "results", provenance={**PROVENANCE, "cpu": "AMD EPYC", "platform": "Linux-6.8 on epyc"})
    made = make_bundle(store, **WHO, scrub=Scrubber(names={"epyc": HOST}))
    assert made.cases[0].provenance["cpu"] == "AMD EPYC"
    assert made.cases[0].provenance["platform"] == "Linux-6.8 on <host name>"
    assert made.remaining == ("'AMD EPYC' has a host name.",)


def test_common_names_are_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "_user", lambda: "root")
    monkeypatch.setattr(privacy.socket, "gethostname", lambda: "box-17.lab")
    found = Scrubber.of_this_machine()
    assert "root" not in found.names
    assert found.names["box-17"] == HOST
    assert found.text(f"{Path.home()}/x of root on box-17") == "<path> of root on <host name>"


def test_a_plugin_leaves_as_source_and_nothing_else(tmp_path: Path) -> None:
    folder = make_plugin(tmp_path / "plugin")
    (folder / ".git").mkdir()
    (folder / ".git" / "config.txt").write_text("secret")
    (folder / "weights.pkl").write_bytes(b"\x80")
    (folder / "link.py").symlink_to("/etc/passwd")
    (folder / "note.md").write_text("built in /home/alice.smith/x")
    made = make_bundle(make_store(tmp_path / "results"), **WHO, plugin=folder, scrub=alice())
    names = {name for name in members_of(made.data) if name.startswith("plugin/")}
    assert names == {"plugin/note.md", "plugin/pyproject.toml", "plugin/some_plugin.py", "plugin/suite.yaml"}
    assert {sentence.partition(":")[0] for sentence in made.left_out} == {"plugin/link.py", "plugin/weights.pkl"}
    assert set(made.remaining) == {"plugin/note.md has a path.", "plugin/suite.yaml has a path."}
    assert members_of(made.data)["plugin/note.md"] == b"built in /home/alice.smith/x"
    with pytest.raises(UsageError, match="is not there"):
        make_bundle(make_store(tmp_path / "results"), **WHO, plugin=tmp_path / "absent", scrub=NOBODY)


def test_rows_that_nobody_could_verify_stay_behind(tmp_path: Path) -> None:
    store = make_store(tmp_path / "results", rows=3)
    (store.path / "traces" / "launch-1-0.parquet").unlink()
    made = make_bundle(store, **WHO, not_own={"run-2"}, scrub=NOBODY)
    assert [row.run_id for row in made.cases] == ["run-0"]
    assert made.launches == 2
    assert len(made.left_out) == 2
    with pytest.raises(UsageError, match="no row with launches that can be submitted"):
        make_bundle(store, **WHO, not_own={"run-0", "run-2"}, scrub=NOBODY)


def test_a_bundle_that_cannot_be_written_says_where_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    made = make_bundle(make_store(tmp_path / "results"), **WHO, scrub=NOBODY)
    with pytest.raises(StoreError, match="--out"):
        made.write(tmp_path / "file" / "out.zip")


def test_rows_without_launches_are_nothing_to_verify(tmp_path: Path) -> None:
    Store(tmp_path).write_case(replace(make_case(baseline=None, status="skipped", reason="no_gpu"), launch_ids=()))
    with pytest.raises(UsageError, match="no row with launches"):
        make_bundle(Store(tmp_path), **WHO, scrub=NOBODY)


@pytest.mark.parametrize("given", [{"contact": "a\nb"}, {"licence": "  "}, {"contact": "x" * 201}])
def test_contact_and_licence_are_one_line(given: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(given))}"):
        make_bundle(make_store(tmp_path / "results"), **{**WHO, **given}, scrub=NOBODY)
