"""Records at rest: full fidelity, and nothing lost when a disk, a file or a process fails."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effbench import files
from effbench import store as store_module
from effbench.errors import DamagedFile, NewerSchema, StoreError
from effbench.schema import (
    PROVENANCE_FIELDS,
    SCHEMA_VERSION,
    CaseRecord,
    Launch,
    MetricValue,
    ModelRef,
    Reading,
    Series,
    Spec,
    TechniqueRef,
    Trace,
    Window,
)
from effbench.store import Store
from tests.records import make_board, make_case, make_launch, make_trace, make_value

FEW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])

texts = st.text(max_size=12)
numbers = st.floats(allow_nan=False, allow_infinity=False)
maybe = st.none() | numbers
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(texts, plain, max_size=3)
reasons = st.lists(texts, max_size=2).map(tuple)
statuses = st.sampled_from(["ok", "failed", "skipped", "invalid"])
provenances = st.dictionaries(st.sampled_from(PROVENANCE_FIELDS), texts, max_size=3)
metric_values = st.builds(
    MetricValue, name=texts, value=maybe, lower=maybe, upper=maybe, n=st.integers(0, 99), ratio=maybe, ratio_lower=maybe,
    ratio_upper=maybe, unit=texts, source=texts, valid=st.booleans(), reasons=reasons,
)  # fmt: skip
readings = st.builds(
    Reading, name=texts, value=maybe, unit=texts, source=texts, scope=texts, valid=st.booleans(), reasons=reasons
)
specs = st.builds(
    Spec, workload=texts, params=objects,
    model=st.builds(ModelRef, name=texts, weights=st.sampled_from(["random", "trained"]), location=st.none() | texts, digest=texts),
    techniques=st.lists(st.builds(TechniqueRef, name=texts, axis=texts, params=objects, identity=texts), max_size=2).map(tuple),
    text=texts, text_digest=texts, seed=st.integers(), device=st.sampled_from(["cpu", "cuda"]), threads=st.integers(1, 64),
    protocol=texts, time_limit_s=numbers, environment=st.dictionaries(texts, texts, max_size=2), workload_identity=texts,
)  # fmt: skip
cases = st.builds(
    CaseRecord, run_id=st.uuids().map(str), case_id=texts, env_id=texts, schema_version=st.just(SCHEMA_VERSION),
    status=statuses, reason=texts, suite=texts, workload=texts, model=texts, techniques=reasons,
    baseline_case_id=st.none() | texts, hardware=texts, protocol=texts, launch_ids=reasons, baseline_launch_ids=reasons,
    started_at=texts, spec=texts, provenance=provenances, metrics=st.lists(metric_values, max_size=3).map(tuple),
)  # fmt: skip
windows = st.builds(Window, start_s=numbers, end_s=numbers, ended_by=texts)
launches = st.builds(
    Launch, launch_id=st.uuids().map(str), suite=texts, spec=specs, env_id=texts, block_id=texts, block=st.integers(0, 99),
    position=st.integers(0, 9), status=statuses, reason=texts, detail=texts, started_at=texts, hardware=texts,
    provenance=provenances, windows=st.dictionaries(texts, windows, max_size=2), facts=objects, reasons=reasons,
    metrics=st.lists(readings, max_size=3).map(tuple),
)  # fmt: skip
samples = st.lists(st.tuples(numbers, st.floats()), max_size=5).map(lambda rows: np.array(rows, np.float64).reshape(-1, 2))
series = st.builds(
    lambda name, unit, scope, source, rows: Series(
        name=name, unit=unit, scope=scope, source=source, t_s=rows[:, 0].copy(), values=rows[:, 1].copy()
    ),
    texts, texts, texts, texts, samples,
)  # fmt: skip
traces = st.lists(series, max_size=4, unique_by=lambda s: s.name).map(lambda found: Trace(series=tuple(found)))


@contextlib.contextmanager
def new_store() -> Iterator[Store]:
    with tempfile.TemporaryDirectory() as folder:
        yield Store(folder)


def assert_same_trace(one: Trace, other: Trace) -> None:
    assert [replace(s, t_s=None, values=None) for s in one.series] == [replace(s, t_s=None, values=None) for s in other.series]
    for a, b in zip(one.series, other.series, strict=True):
        np.testing.assert_array_equal(a.t_s, b.t_s)
        np.testing.assert_array_equal(a.values, b.values)  # NaN equals NaN here


def run_ids(store: Store) -> set[str]:
    return {row.run_id for row in store.cases()}


# Fidelity.


@FEW
@given(st.lists(cases, max_size=4, unique_by=lambda r: r.run_id))
def test_cases_come_back_as_they_were_loose_and_compacted(records: list[CaseRecord]) -> None:
    with new_store() as store:
        for record in records:
            store.write_case(record)
        wanted = tuple(sorted(records, key=lambda r: (r.started_at, r.run_id)))
        assert store.cases().rows == wanted
        store.compact()
        assert store.cases().rows == wanted
        assert store.loose_files == 0


@FEW
@given(launches, traces)
def test_launch_and_trace_come_back_as_they_were(launch: Launch, trace: Trace) -> None:
    with new_store() as store:
        store.write_launch(launch, trace)
        assert store.launches().rows == (launch,)
        store.compact()
        assert store.launches().rows == (launch,)
        assert_same_trace(store.trace(launch.launch_id), trace)


def test_realistic_records_come_back_as_they_were(tmp_path: Path) -> None:
    store = Store(tmp_path)
    board, launch, trace = make_board(40), make_launch(), make_trace()
    for record in board:
        store.write_case(record)
    store.write_launch(launch, trace)
    assert store.cases().rows == tuple(board)
    assert store.launches().rows == (launch,)
    assert_same_trace(store.trace("launch-0"), trace)


def test_number_that_is_not_finite_is_stored_as_missing_with_its_reason(tmp_path: Path) -> None:
    store = Store(tmp_path)
    broken = make_value("al_s", 1.0)
    metrics = (
        replace(broken, value=float("nan")),
        replace(broken, name="pcu", upper=float("inf"), reasons=("kept",)),
        replace(broken, name="mfu", ratio=np.float64("nan"), reasons=("not_a_number",)),
    )
    store.write_case(make_case(metrics=metrics))
    value, upper, ratio = store.cases().rows[0].metrics
    assert (value.value, value.lower, value.valid, value.reasons) == (None, broken.lower, False, ("not_a_number",))
    assert (upper.value, upper.upper, upper.valid, upper.reasons) == (1.0, None, True, ("kept", "not_a_number"))
    assert (ratio.ratio, ratio.valid, ratio.reasons) == (None, True, ("not_a_number",))


def test_fact_that_is_not_finite_is_null_and_the_launch_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path)
    facts = {"loss": float("nan"), "nested": {"scores": [1.0, np.float32("inf")]}, "steps": np.int64(3), "path": Path("a")}
    store.write_launch(make_launch(facts=facts, reasons=("throttled",)), Trace())
    launch = store.launches().rows[0]
    assert launch.facts == {"loss": None, "nested": {"scores": [1.0, None]}, "steps": 3, "path": "a"}
    assert launch.reasons == ("throttled", "not_a_number")


def test_numpy_scalars_are_numbers(tmp_path: Path) -> None:
    store = Store(tmp_path)
    metric = replace(make_value("al_s", 1.0), value=np.float32(0.5), n=np.int64(3), valid=np.bool_(True))
    store.write_case(make_case(metrics=(metric,)))
    found = store.cases().rows[0].metrics[0]
    assert (found.value, found.n, found.valid) == (0.5, 3, True)


def test_value_that_no_column_can_hold_is_one_sentence(tmp_path: Path) -> None:
    store = Store(tmp_path)
    short = Series(name="x", unit="", scope="", source="", t_s=np.zeros(2), values=np.zeros(3))
    for attempt in (
        lambda: store.write_launch(make_launch("odd"), Trace(series=(short,))),
        lambda: store.write_launch(make_launch("odd", spec=replace(make_launch().spec, seed=object())), Trace()),
        lambda: store.write_case(make_case(run_id="odd", metrics=(replace(make_value("al_s", 1.0), n="many"),))),
    ):
        with pytest.raises(StoreError, match="odd cannot be stored") as caught:
            attempt()
        assert_one_sentence(caught.value)
    assert (store.cases().rows, store.launches().rows) == ((), ())


def test_text_that_utf8_cannot_carry_is_escaped_and_not_lost(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_launch(make_launch(detail="file \udc80.py", facts={"name": "\udc80"}), Trace())
    store.write_case(make_case(reason="\udcff"))
    assert store.launches().rows[0].detail == "file \\udc80.py"
    assert store.cases().rows[0].reason == "\\udcff"


def test_provenance_is_text_and_loses_nothing_that_has_no_column_of_its_own(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_case(replace(make_case(), provenance={"driver": None, "cores": 2, "details": "{}", "hostname": "x"}))
    found = store.cases().rows[0].provenance
    assert found == {"cores": "2", "details": '{"details":"{}","hostname":"x"}'}


def test_projection_reads_only_what_is_asked_for(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = make_case()
    store.write_case(record)
    row = store.cases(columns=["model", "metrics"], metrics=["al_s", "mfu"]).rows[0]
    assert (row.run_id, row.model, row.spec, row.provenance) == (record.run_id, "tiny-llama", "", {})
    assert [m.name for m in row.metrics] == ["al_s", "mfu"]
    assert store.table("runs", ["status"])[0].column_names == ["run_id", "schema_version", "status"]


def test_directory_without_results_reads_as_empty(tmp_path: Path) -> None:
    store = Store(tmp_path / "absent")
    assert (store.cases().rows, store.launches().rows, store.loose_files) == ((), (), 0)
    assert store.compact().files == 0
    assert not store.path.exists()
    with pytest.raises(StoreError, match="no trace of launch nobody"):
        store.trace("nobody")


def test_launch_id_of_a_foreign_record_cannot_leave_the_folder(tmp_path: Path) -> None:
    store = Store(tmp_path / "results")
    for launch_id in ("../../escape", "/tmp/escape", ".hidden", "a/b", "x" * 400, "\udc80"):
        store._write_trace(launch_id, make_trace())
        assert_same_trace(store.trace(launch_id), make_trace())
    assert all(path.parent == store.path / "traces" for path in tmp_path.rglob("*.parquet"))


# Files of other days.


def rewrite(path: Path, change: Any, **marks: str) -> None:
    """Rewrite a parquet file with `change` applied to its table and other marks in its metadata."""
    table = pq.ParquetFile(path).read()
    known = {**table.schema.metadata, **{k.encode(): v.encode() for k, v in marks.items()}}
    pq.write_table(change(table).replace_schema_metadata(known), path)


def test_newer_schema_is_refused_naming_file_and_versions(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.write_case(make_case())
    trace = store._write_trace("t", make_trace())
    for file in (path, trace):
        rewrite(file, lambda table: table, effbench_schema_version="99")
    for read, file in ((store.cases, path), (store.compact, path), (lambda: store.trace("t"), trace)):
        with pytest.raises(NewerSchema) as caught:
            read()
        message = str(caught.value)
        assert str(file) in message
        assert "version 99" in message
        assert f"up to {SCHEMA_VERSION}" in message
    assert path.exists()


def test_newer_row_inside_an_unmarked_merge_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_case(replace(make_case(), schema_version=SCHEMA_VERSION + 1))
    with pytest.raises(NewerSchema):
        store.cases()


def test_columns_that_an_older_file_lacks_are_null(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = make_case()
    path = store.write_case(record)

    def older(table: pa.Table) -> pa.Table:
        metrics = [{k: v for k, v in m.items() if k != "source"} for m in table["metrics"][0].as_py()]
        return table.drop_columns(["suite", "metrics"]).append_column("metrics", pa.array([metrics]))

    rewrite(path, older, effbench_schema_version="0")
    assert store.compact().rows == 1
    row = store.cases().rows[0]
    assert (row.suite, row.metrics[0].source) == (None, None)
    assert row.metrics[0].value == record.metrics[0].value
    assert row.provenance == record.provenance


@pytest.mark.parametrize("place", ["column", "metric"])
def test_file_with_other_peoples_columns_is_read_and_never_merged_away(tmp_path: Path, place: str) -> None:
    store = Store(tmp_path)
    record = make_case()
    path = store.write_case(record)

    def invent(table: pa.Table) -> pa.Table:
        if place == "column":
            return table.append_column("invented", pa.array(["x"]))
        metrics = [{**m, "invented": "x"} for m in table["metrics"][0].as_py()]
        return table.drop_columns(["metrics"]).append_column("metrics", pa.array([metrics]))

    rewrite(path, invent)
    done = store.compact()
    assert (done.files, path.exists()) == (0, True)
    assert ("metrics" if place == "metric" else "invented") in done.warnings[0]
    found = store.cases()
    assert found.rows == (record,)
    assert found.warnings == ()


@pytest.mark.parametrize("damage", ["empty", "truncated", "garbage", "foreign", "folder", "dangling link", "other table"])
def test_damaged_file_is_named_and_skipped(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    good, bad = make_case(run_id="good"), tmp_path / "runs" / "bad.parquet"
    data = store.write_case(good).read_bytes()
    if damage == "folder":
        bad.mkdir()
    elif damage == "dangling link":
        bad.symlink_to(tmp_path / "nowhere")
    elif damage == "foreign":
        pq.write_table(pa.table({"run_id": ["x"]}), bad)
    elif damage == "other table":
        shutil.copy(store._write_trace("t", make_trace()), bad)
    else:
        bad.write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "garbage": b"PAR1" + b"\xff" * 500}[damage])
    store.compact()
    found = store.cases()
    assert [r.run_id for r in found] == ["good"]
    assert len(found.warnings) == 1
    assert str(bad) in found.warnings[0]
    assert "\n" not in found.warnings[0]
    assert os.path.lexists(bad)


def test_no_flipped_byte_raises_or_goes_unseen_in_the_data(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = make_case()
    path = store.write_case(record)
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    dice = random.Random(0)
    for _ in range(250):
        place = dice.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << dice.randrange(8))]) + data[place + 1 :])
        with contextlib.suppress(NewerSchema):  # the flipped byte may be the version's
            found = store.cases()
            if 4 <= place < footer and not found.warnings:
                assert found.rows == (record,)


def test_a_text_that_many_series_share_is_in_the_file_once_with_nothing_else(tmp_path: Path) -> None:
    """Where a dictionary repeats a text, pyarrow fills its page with what lay in the memory of the process."""
    unit = "a unit of forty characters, told by each"
    one = make_trace().series[0]
    many = tuple(replace(one, name=f"sensor {number}", unit=unit, source=unit) for number in range(200))
    Store(tmp_path).write_launch(make_launch("shared"), Trace(series=many))
    columns = pq.ParquetFile(tmp_path / "traces" / "shared.parquet").metadata.row_group(0)
    sizes = {columns.column(i).path_in_schema: columns.column(i).total_uncompressed_size for i in range(4)}
    assert max(sizes[name] for name in ("unit", "scope", "source")) < 1_000, sizes
    assert Store(tmp_path).trace("shared").series[199].unit == unit


def test_damaged_trace_raises_damaged_file(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store._write_trace("t", make_trace())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedFile, match=r"t\.parquet cannot be read"):
        store.trace("t")


def test_damaged_launch_row_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.write_launch(make_launch("bad"), Trace())
    store.write_launch(make_launch("good"), Trace())
    rewrite(path, lambda t: t.set_column(t.column_names.index("facts"), "facts", pa.array(["{half"])))
    found = store.launches()
    assert [launch.launch_id for launch in found] == ["good"]
    assert "launch bad" in found.warnings[0]


# Compaction.


def test_duplicate_ids_are_read_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record, launch = make_case(), make_launch()
    for _ in range(2):
        store.write_case(record)
        store.write_launch(launch, Trace())
    assert (store.cases().rows, store.launches().rows) == ((record,), (launch,))
    assert store.compact().rows == 2
    assert (store.cases().rows, store.launches().rows) == ((record,), (launch,))


def test_compaction_merges_to_one_file_a_table_and_leaves_traces(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for i in range(5):
        store.write_case(make_case(run_id=f"r{i}"))
        store.write_launch(make_launch(f"l{i}"), make_trace())
    before = store.fingerprint()
    assert store.loose_files == 10
    assert store.compact().files == 10
    assert {name: len(list((tmp_path / name).iterdir())) for name in store_module.FOLDERS} == {
        "runs": 1,
        "launches": 1,
        "traces": 5,
    }
    assert store.fingerprint() != before
    after = store.fingerprint()
    assert store.compact().files == 0
    assert store.fingerprint() == after


def test_full_merged_file_is_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MERGED_ROWS", 3)
    store = Store(tmp_path)
    for i in range(7):
        store.write_case(make_case(run_id=f"r{i}"))
        store.compact()
    assert sorted(p.name[:6] for p in (tmp_path / "runs").iterdir()) == ["merged", "sealed", "sealed"]
    assert run_ids(store) == {f"r{i}" for i in range(7)}


def test_compaction_that_cannot_write_deletes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    for i in range(3):
        store.write_case(make_case(run_id=f"r{i}"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(StoreError, match="full"):
            store.compact()
    assert run_ids(store) == {"r0", "r1", "r2"}
    assert store.loose_files == 3


def test_leftover_of_a_dead_writer_is_ignored_and_removed_and_a_live_one_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_case(make_case())
    dead = tmp_path / "runs" / ".0123456789abcdef.tmp"
    dead.write_bytes(b"half")
    live, handle = files._open_locked(tmp_path / "runs")
    assert store.cases().warnings == ()
    assert store.compact().leftovers == 1
    assert (dead.exists(), live.exists()) == (False, True)
    os.close(handle)
    assert store.compact().leftovers == 1


def test_reader_finds_rows_that_were_merged_while_it_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    for i in range(3):
        store.write_case(make_case(run_id=f"r{i}"))
    listing = Store._files

    def listed_then_merged(self: Store, name: str) -> list[Path]:
        files = listing(self, name)
        monkeypatch.setattr(Store, "_files", listing)
        Store(self.path).compact()
        return files

    monkeypatch.setattr(Store, "_files", listed_then_merged)
    assert run_ids(store) == {"r0", "r1", "r2"}


WRITER = """
import sys
from effbench.store import Store
from tests.records import make_case, make_launch, make_trace
store, name = Store(sys.argv[1]), sys.argv[2]
for i in range(int(sys.argv[3])):
    store.write_launch(make_launch(f"{name}-{i}"), make_trace(5))
    store.write_case(make_case(run_id=f"{name}-{i}"))
    print(i, flush=True)
"""


def start_writer(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", WRITER, str(path), name, str(count)]
    return subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, stdout=subprocess.PIPE, text=True)


def test_two_writers_a_reader_and_compactions_at_once_lose_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    writers = [start_writer(tmp_path, name, 40) for name in "ab"]
    done = threading.Event()
    rival = threading.Thread(target=lambda: [Store(tmp_path).compact() for _ in iter(done.is_set, True)])
    rival.start()
    seen: set[str] = set()
    try:
        while any(writer.poll() is None for writer in writers):
            found = store.cases(columns=[])
            assert found.warnings == ()
            now = {row.run_id for row in found}
            assert seen <= now
            seen = now
            store.compact()
    finally:
        done.set()
        rival.join()
        outcomes = [(writer.communicate()[0], writer.returncode)[1] for writer in writers]
    assert outcomes == [0, 0]
    wanted = {f"{name}-{i}" for name in "ab" for i in range(40)}
    assert run_ids(store) == wanted
    assert {launch.launch_id for launch in store.launches()} == wanted


def test_writer_killed_at_a_random_moment_leaves_only_whole_records(tmp_path: Path) -> None:
    dice = random.Random(1)
    for round_ in range(6):
        store = Store(tmp_path / str(round_))
        with start_writer(store.path, "w", 10_000) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(dice.uniform(0, 0.05))
            writer.send_signal(signal.SIGKILL)
            told = {f"w-{line.strip()}" for line in writer.stdout} | {"w-0"}
        found = store.cases()
        assert told <= {row.run_id for row in found}
        launches_found = store.launches()
        assert found.warnings == launches_found.warnings == ()
        for launch in launches_found:
            assert_same_trace(store.trace(launch.launch_id), make_trace(5))
        store.compact()
        assert not list(store.path.rglob(".*.tmp"))
        assert told <= run_ids(store)


# What the operating system refuses.


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def assert_one_sentence(fault: StoreError, *parts: str) -> None:
    assert "\n" not in str(fault)
    for part in parts:
        assert part in str(fault)


def test_full_disk_is_one_sentence_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.check_writable()
    monkeypatch.setattr(os, "fsync", full_disk)
    for attempt in (lambda: store.write_case(make_case()), lambda: store.write_launch(make_launch(), make_trace())):
        with pytest.raises(StoreError) as caught:
            attempt()
        assert_one_sentence(caught.value, "Cannot write", str(tmp_path), "full")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


FILE_LIMIT = """
import resource, sys
from effbench.errors import StoreError
from effbench.store import Store
from tests.records import make_case, make_trace
store = Store(sys.argv[1])
store.write_case(make_case())
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
store.check_writable()
try:
    store.write_case(make_case(run_id="second"))
except StoreError as fault:
    print(fault)
print(len(store.cases()))
"""


def test_write_that_the_kernel_cuts_short_is_one_sentence_and_loses_nothing(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", FILE_LIMIT, str(tmp_path)]
    told = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(told) == 2
    assert "the disk or quota is full" in told[0]
    assert told[1] == "1"
    assert list(tmp_path.rglob(".*")) == []


@contextlib.contextmanager
def without_root() -> Iterator[None]:
    """Permissions do not bind root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_read_only_directory_is_one_sentence_before_anything_is_measured() -> None:
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    try:
        store = Store(folder)
        store.write_case(make_case())
        folder.chmod(0o555)
        (folder / "runs").chmod(0o555)
        with without_root():
            with pytest.raises(StoreError) as caught:
                store.check_writable()
            assert_one_sentence(caught.value, str(folder), "permission denied or read-only")
            assert len(store.cases()) == 1
    finally:
        folder.chmod(0o755)
        (folder / "runs").chmod(0o755)
        shutil.rmtree(folder)


def test_file_without_read_permission_is_named_and_skipped() -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        store = Store(folder)
        store.write_case(make_case(run_id="open"))
        shut = store.write_case(make_case(run_id="shut"))
        shut.chmod(0)
        with without_root():
            found = store.cases()
        assert [row.run_id for row in found] == ["open"]
        assert str(shut) in found.warnings[0]
    finally:
        shutil.rmtree(folder)


def test_results_path_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "results"
    path.write_text("not a folder")
    for attempt in (Store(path).check_writable, Store(path).cases, Store(path).compact):
        with pytest.raises(StoreError) as caught:
            attempt()
        assert_one_sentence(caught.value, str(path), "is a file, not a folder")


def test_check_writable_makes_the_folders_and_leaves_no_file(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "results")
    store.check_writable()
    assert sorted(p.name for p in store.path.rglob("*")) == ["launches", "runs", "traces"]


def test_reading_imports_nothing_heavy(tmp_path: Path) -> None:
    Store(tmp_path).write_case(make_case())
    script = (
        "import json, sys\nfrom effbench.store import Store\nfirst = sorted(sys.modules)\n"
        f"assert len(Store({str(tmp_path)!r}).cases()) == 1\nprint(json.dumps([first, sorted(sys.modules)]))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    first, second = (set(names) for names in json.loads(out))
    assert not first & {"pyarrow", "pandas", "torch", "duckdb"}
    assert not second & {"pyarrow.compute", "pyarrow.dataset", "pandas", "torch", "duckdb", "scipy"}
