"""The suite of one row plans to that row's case, for every shape of case that the shipped suites have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from effbench import planning
from effbench.analysis import launches as launches_module
from effbench.analysis.launches import launches_of, trace_frame
from effbench.analysis.reproduce import Reproduction, read_spec, reproduction
from effbench.errors import UsageError
from effbench.schema import SCHEMA_VERSION, Case, CaseRecord, ModelRef, Spec, Trace, Window, canonical_json
from effbench.store import Store
from effbench.suite import read_suite
from tests.records import make_case, make_launch, make_spec, make_trace

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "results" / "reference"
SUITES = [ROOT / "suites" / "quick.yaml", *sorted((ROOT / "suites" / "cpu").glob("*.yaml"))]


def record_of(case: Case) -> CaseRecord:
    """The row that a measured case would have."""
    changes: dict[str, Any] = {"spec": canonical_json(case.spec.to_json()), "case_id": case.case_id}
    changes |= {"workload": case.spec.workload, "model": case.spec.model.name, "protocol": case.spec.protocol}
    return replace(make_case(), techniques=case.spec.stack, baseline_case_id=case.baseline_case_id, **changes)


def own_spec(technique: str = "mha") -> Spec:
    """A spec that needs nothing from outside."""
    spec = make_spec(techniques=(technique,))
    return replace(
        spec, text="builtin", techniques=tuple(replace(t, identity=f"effbench:{t.name}@1+a") for t in spec.techniques)
    )


def planned(made: Reproduction, folder: Path, device: str = "cpu") -> list[Case]:
    path = folder / made.file_name
    path.write_text(made.suite)
    return planning.plan(read_suite(path), planning.Options(device=device))


@pytest.mark.parametrize("suite", SUITES, ids=lambda path: path.stem)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_case_of_the_shipped_suites_plans_to_itself(suite: Path, device: str, tmp_path: Path) -> None:
    cases = planning.plan(read_suite(suite), planning.Options(device=device))
    assert cases
    for case in cases:
        made = reproduction(record_of(case), case.baseline)
        again = planned(made, tmp_path, device)
        assert again[0].case_id == case.case_id, made.suite
        assert len(again) == (1 if case.baseline is None else 2)
        assert again[0].spec.label == case.spec.label
        assert again[0].spec.to_json() == case.spec.to_json()
        assert made.commands[-1] == f"effbench run {made.file_name} --device {device} --fresh"
        assert made.inexact == ()


def test_reference_rows_are_reproduced_with_the_baseline_of_their_launches(tmp_path: Path) -> None:
    store = Store(REFERENCE)
    for record in store.cases():
        found = launches_of(store, record)
        assert found.warnings == ()
        assert {launch.launch_id for launch in found.rows if launch.side == "row"} == set(record.launch_ids)
        assert (found.baseline is None) == (record.baseline_case_id is None)
        made = reproduction(record, found.baseline)
        assert made.inexact == ()  # so the case_id follows from spec and baseline
        assert made.commands[0] == f"git checkout {record.provenance['git_commit']}"
        first = planned(made, tmp_path)[0]
        spec = read_spec(record.spec)
        assert spec is not None
        same = (
            "workload",
            "text",
            "text_digest",
            "seed",
            "device",
            "threads",
            "protocol",
            "time_limit_s",
            "environment",
            "label",
        )
        assert all(getattr(first.spec, name) == getattr(spec, name) for name in same)
        pairs = [(first.spec.params, spec.params)]
        pairs += [(a.params, b.params) for a, b in zip(first.spec.techniques, spec.techniques, strict=True)]
        for now, then in pairs:
            assert now.items() >= then.items()  # the source has gained parameters since


def test_a_row_with_a_baseline_that_is_gone_says_so(tmp_path: Path) -> None:
    case = planning.plan(read_suite(SUITES[0]), planning.Options())[1]
    assert case.baseline is not None
    made = reproduction(record_of(case))
    assert any("compared with is not in these results" in line for line in made.inexact)
    assert planned(made, tmp_path)[0].spec.spec_id == case.spec.spec_id


def test_a_case_id_that_does_not_follow_is_said() -> None:
    record = replace(make_case(baseline=None), case_id="0" * 64)
    assert any("case_id does not follow" in line for line in reproduction(record).inexact)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"workload_identity": "their-plugin:pretrain@2+ab"}, "plugin: install their-plugin:pretrain@2+ab"),
        ({"workload_identity": ""}, "a package that the row does not name"),
        ({"model": ModelRef(name="m", weights="path", location="/models/m", digest="ab" * 32)}, "local folder, '/models/m'"),
        ({"model": ModelRef(name="m", weights="hub", location="org/m@main")}, "from a hub, 'org/m@main'"),
        ({"text": "/data/text"}, "local path, '/data/text'"),
        ({"text": "hub:org/data"}, "hub:org/data"),
        ({"environment": {"LD_PRELOAD": "evil.so"}}, "environment variables (LD_PRELOAD)"),
        ({"protocol": "mine"}, "protocol 'mine' is not known"),
        ({"device": "tpu"}, "device 'tpu' cannot be asked for"),
    ],
)
def test_what_a_file_cannot_bring_along_is_said(change: dict[str, Any], said: str) -> None:
    case = Case(spec=replace(own_spec(), **change))
    (line,) = reproduction(record_of(case)).inexact
    assert said in line


def test_changed_files_and_a_missing_commit_are_said() -> None:
    record = record_of(Case(spec=own_spec()))
    commit = "0123456789abcdef0123456789abcdef01234567"
    changed = reproduction(replace(record, provenance={"git_commit": f"{commit}+changes"}))
    assert changed.commands[0] == f"git checkout {commit}"
    assert "files changed since" in changed.inexact[0]
    assert "names no commit" in reproduction(replace(record, provenance={})).inexact[0]


def test_a_baseline_that_a_suite_cannot_express_is_said() -> None:
    spec = own_spec("gqa")
    case = Case(spec=spec, baseline=replace(spec, threads=1, techniques=own_spec().techniques), baseline_case_id="b")
    assert "more than its techniques (threads)" in reproduction(record_of(case), case.baseline).inexact[0]


def test_hostile_texts_stay_in_their_line_and_in_their_quotes(tmp_path: Path) -> None:
    evil = "x\n  - workload: generate\r\u2028cases: [] # \x00\x85\u202e\u200f\ufeff'\"`$(id);{{ "
    spec = make_spec(model=evil)
    environment = {"A B": evil, "yes": "no"}
    spec = replace(spec, workload=evil, text=evil, environment=environment, protocol=evil, device="$(id)")
    given = replace(spec.techniques[0], name=evil, params={"a": 1e-5, "b": evil, "c": None, "d": True}, given=("a",))
    spec = replace(spec, techniques=(given,))
    record = replace(
        record_of(Case(spec=spec)), run_id=evil, hardware=evil, case_id=evil, provenance={"git_commit": "; rm -rf /"}
    )
    made = reproduction(record)
    assert made.commands == (f"effbench run {made.file_name} --fresh",)
    assert set(made.file_name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    raw = _parsed(made.suite, tmp_path)
    (entry,) = raw["cases"]
    assert entry["workload"] == entry["model"] == raw["text"] == raw["protocol"] == evil
    assert entry["environment"] == environment
    assert entry["techniques"] == [[{evil: {"a": 1e-05}}]]
    assert all(line.startswith("#") for line in made.suite.splitlines()[:3])


def _parsed(text: str, folder: Path) -> Any:
    from ruamel.yaml import YAML

    reader = YAML(typ="safe", pure=True)
    reader.version = (1, 2)
    return reader.load(text)


@pytest.mark.parametrize("spec", ["", "{broken", "[]", '{"workload": "pretrain"}', "null", '{"techniques": 3, "model": {}}'])
def test_a_row_without_a_readable_spec_cannot_be_reproduced(spec: str) -> None:
    with pytest.raises(UsageError, match="no spec that this effbench can read"):
        reproduction(replace(make_case(), spec=spec))


# -- launches and traces


def filled_store(path: Path, *, baseline: bool = True) -> tuple[Store, CaseRecord]:
    """A row with two launches and one of its baseline, among launches of others, in two files."""
    store = Store(path)
    windows = {"warm_up": Window(start_s=0.5, end_s=1.0), "window": Window(start_s=1.0, end_s=2.5, ended_by="rule")}
    for name, block in (("a1", 1), ("a0", 0), ("b0", 0), ("other", 0)):
        spec = make_spec(techniques=("mha",) if name == "b0" else ("gqa",))
        store.write_launch(make_launch(name, block=block, spec=spec, windows=windows), make_trace(seed=block))
        if name == "a0":
            store.compact()
    record = replace(make_case(), launch_ids=("a0", "a1"), baseline_launch_ids=("b0",))
    store.write_case(record)
    return store, record


def test_launches_of_a_row_are_found_in_any_file_and_ordered_by_block(tmp_path: Path) -> None:
    store, record = filled_store(tmp_path)
    found = launches_of(store, record)
    assert [(launch.launch_id, launch.side, launch.block) for launch in found.rows] == [
        ("a0", "row", 0), ("a1", "row", 1), ("b0", "baseline", 0),
    ]  # fmt: skip
    assert found.rows[0].windows["window"] == Window(start_s=1.0, end_s=2.5, ended_by="rule")
    assert found.baseline is not None and found.baseline.stack == ("mha",)
    assert found.warnings == ()


@pytest.mark.parametrize("windows", ["no JSON", "[1]", '{"window": {"start": 1}}', "[" * 100_000])
def test_windows_of_another_hand_are_none(windows: str) -> None:
    assert launches_module._windows(windows) == {}


def test_only_files_that_hold_a_wanted_launch_are_read_beyond_their_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, record = filled_store(tmp_path)
    read: list[list[str]] = []
    plain = launches_module.read_file

    def counting(path: Path, name: str, columns: list[str]) -> Any:
        read.append(columns)
        return plain(path, name, columns)

    monkeypatch.setattr(launches_module, "read_file", counting)
    launches_of(store, replace(record, launch_ids=("other",), baseline_launch_ids=()))
    assert sum(len(columns) > 1 for columns in read) == 1
    assert not any("facts" in columns or "metrics" in columns for columns in read)


def test_lost_damaged_and_newer_launches_are_named(tmp_path: Path) -> None:
    store, record = filled_store(tmp_path)
    (tmp_path / "launches" / "broken.parquet").write_bytes(b"no parquet")
    found = launches_of(store, replace(record, launch_ids=("a0", "gone")))
    assert [launch.launch_id for launch in found.rows] == ["a0", "b0"]
    assert any("broken.parquet cannot be read" in line for line in found.warnings)
    assert any("1 of the row's 3 launches are not in" in line and "gone" in line for line in found.warnings)
    newer = make_launch("new")
    store.write_launch(newer, Trace())
    _make_newer(tmp_path)
    found = launches_of(store, replace(record, launch_ids=("new",), baseline_launch_ids=()))
    assert any(f"schema version {SCHEMA_VERSION + 1}" in line for line in found.warnings)


def _make_newer(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    newest = max((path / "launches").glob("2*.parquet"), key=lambda p: p.stat().st_mtime_ns)
    table = pq.read_table(newest)
    index = table.column_names.index("schema_version")
    pq.write_table(table.set_column(index, "schema_version", pa.array([SCHEMA_VERSION + 1] * len(table))), newest)


def test_no_launches_folder_is_a_sentence(tmp_path: Path) -> None:
    found = launches_of(Store(tmp_path / "none"), make_case())
    assert found.rows == () and "6 of the row's 6 launches" in found.warnings[0]


def test_traces_are_aligned_at_the_window_and_missing_ones_are_named(tmp_path: Path) -> None:
    store, record = filled_store(tmp_path)
    (tmp_path / "traces" / "a1.parquet").unlink()
    frame, missing = trace_frame(store, launches_of(store, record).rows)
    assert set(frame["launch"]) == {"block 0", "block 0 · baseline"}
    np.testing.assert_allclose(frame["since_s"], frame["t_s"] - 1.0)
    assert any("no trace of launch a1" in line for line in missing)
    assert any("gpu_energy_counter gave no samples" in line for line in missing)
    empty, _ = trace_frame(store, [])
    assert list(empty.columns) == list(frame.columns) and empty.empty
