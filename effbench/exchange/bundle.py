"""One file that carries results to somebody else: rows, launches and raw traces, and the source of a plugin.

    manifest.json               who, under what licence; size and SHA-256 of every other member
    runs.parquet                the rows                     ┐
    launches.parquet            their launches               ├ the very files of a results directory (store.py)
    traces/<launch_id>.parquet  the raw series of each       ┘
    plugin/…                    source of a plugin, as text: nobody who verifies ever runs it

Equal results give equal bytes: members are sorted and carry no time.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from effbench.errors import BundleError, StoreError, UsageError
from effbench.exchange import limits, manifest, privacy, tables
from effbench.exchange.contents import Contents
from effbench.exchange.opening import LAUNCHES, PLUGIN, RUNS, open_bundle, trace_member
from effbench.exchange.plugin_source import Source, source_of
from effbench.exchange.privacy import Scrubber
from effbench.files import publish
from effbench.schema import CaseRecord, Launch, Trace
from effbench.store import Store


@dataclass(frozen=True, kw_only=True)
class Written:
    """A bundle: its bytes, what leaves the machine with it, and what does not. `path` is None until it is written."""

    data: bytes
    path: Path | None = None
    cases: tuple[CaseRecord, ...]  # as they leave
    launches: int
    samples: int
    plugin: Source | None
    removed: Mapping[str, int]  # kind → how often
    examples: Mapping[str, str]  # kind → one that was removed
    remaining: tuple[str, ...]  # private parts that stay in, a sentence each
    left_out: tuple[str, ...]  # rows and files that are not in it, and why

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def write(self, out: Path) -> Path:
        """Put it at `out`, whole or not at all. Raises StoreError."""
        try:
            return publish(out.absolute().parent, out.name, self.data)
        except StoreError as fault:
            raise StoreError(str(fault).replace("--results", "--out")) from None


def write_bundle(
    store: Store, out: Path, *, contact: str, licence: str, plugin: Path | None = None, private_kept: bool = False
) -> Written:
    """The results of `store` as one file at `out`. Raises UsageError, StoreError and BundleError, see `make_bundle`."""
    made = make_bundle(store, contact=contact, licence=licence, plugin=plugin, private_kept=private_kept)
    return replace(made, path=made.write(out))


def make_bundle(
    store: Store,
    *,
    contact: str,
    licence: str,
    plugin: Path | None = None,
    private_kept: bool = False,
    not_own: Iterable[str] = (),
    scrub: Scrubber | None = None,
) -> Written:
    """The same in memory. `not_own` are run ids that others submitted; `scrub` says what is private.

    Raises UsageError where nothing can be submitted or a spec has a private part that cannot be taken out, StoreError where
    results cannot be read, and BundleError where the bundle would be refused (size, contact)."""
    scrub = scrub or Scrubber.of_this_machine(store.path)
    rows, launches, traces, left_out = _own(store, frozenset(not_own))
    source = source_of(plugin, scrub) if plugin else None
    remaining = list(source.remaining) if source else []
    if not private_kept:
        remaining += _remaining(rows, launches, scrub)
        scrub.kept = frozenset(privacy.machine_texts([*rows, *launches]))
        rows = [privacy.case(row, scrub) for row in rows]
        launches = [privacy.launch(launch, scrub) for launch in launches]
        traces = {launch_id: privacy.trace(trace, scrub) for launch_id, trace in traces.items()}
    members = _encoded(rows, launches, traces)
    members |= {PLUGIN + name: data for name, data in source.files.items()} if source else {}
    samples = sum(len(series.t_s) for trace in traces.values() for series in trace.series)
    counts = manifest.Counts(rows=len(rows), launches=len(launches), samples=samples)
    listed = {name: manifest.Member(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data)) for name, data in members.items()}
    head = manifest.of(contact=contact, licence=licence, private_kept=private_kept, counts=counts, members=listed)
    data = packed({manifest.NAME: head.to_bytes(), **members})
    contents_of_bytes(data)  # what `verify` would refuse for its form is never written
    return Written(
        data=data, cases=tuple(rows), launches=len(launches), samples=samples, plugin=source,
        removed=dict(scrub.removed), examples=dict(scrub.examples), remaining=tuple(dict.fromkeys(remaining)),
        left_out=(*left_out, *(source.left_out if source else ())),
    )  # fmt: skip


def packed(members: Mapping[str, bytes]) -> bytes:
    """A zip of these members: sorted, the manifest first, without times."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name in sorted(members, key=lambda each: (each != manifest.NAME, each)):
            info = zipfile.ZipInfo(name)
            info.compress_type, info.create_system, info.external_attr = zipfile.ZIP_DEFLATED, 3, 0o100644 << 16
            archive.writestr(info, members[name])
    return sink.getvalue()


def contents_of(path: str | Path, *, expected_sha256: str | None = None) -> Contents:
    """The records of a bundle, decoded in this process: only for a bundle that `verify` has accepted.

    `expected_sha256` is of that verification's report: another file is refused. Raises BundleError and UsageError."""
    from effbench.exchange.verify import read

    data = read(path)
    if expected_sha256 is not None and hashlib.sha256(data).hexdigest() != expected_sha256:
        raise BundleError("hash", f"{path} is not the file that was verified.")
    return contents_of_bytes(data)


def contents_of_bytes(data: bytes) -> Contents:
    """The same from memory. Raises BundleError."""
    return tables.contents(open_bundle(data))


def _own(store: Store, not_own: frozenset[str]) -> tuple[list[CaseRecord], list[Launch], dict[str, Trace], list[str]]:
    """Rows measured here whose launches and traces are all there, these, and a sentence for each row left out."""
    known = {launch.launch_id: launch for launch in store.launches()}
    rows: list[CaseRecord] = []
    traces: dict[str, Trace] = {}
    found = store.cases()
    left_out = list(found.warnings)
    for row in found:
        ids = (*row.launch_ids, *row.baseline_launch_ids)
        if row.run_id in not_own:
            left_out.append(f"Row {row.run_id}: somebody else submitted it.")
            continue
        try:
            if absent := [launch_id for launch_id in ids if launch_id not in known or not manifest.is_plain_id(launch_id)]:
                raise StoreError(f"there is no launch {absent[0]!r}, or its name is none that a file can have.")
            traces |= {launch_id: store.trace(launch_id) for launch_id in ids if launch_id not in traces}
            rows.append(row)
        except StoreError as fault:
            left_out.append(f"Row {row.run_id}: {fault}")
    if not traces:
        why = f" {left_out[0]}" if left_out else " Try: effbench run suites/quick.yaml"
        raise UsageError(f"{store.path} has no row with launches that can be submitted.{why}")
    return rows, [known[launch_id] for launch_id in sorted(traces)], traces, left_out


def _remaining(rows: Sequence[CaseRecord], launches: Sequence[Launch], scrub: Scrubber) -> list[str]:
    """Private parts of what identifies a case: names are listed; paths and device identifiers stop the bundle."""
    found = []
    for spec in {launch.spec.spec_id: launch.spec for launch in launches}.values():
        for kind, sentence in privacy.kept_in_spec(spec, scrub):
            if kind in (privacy.PATH, privacy.DEVICE):
                raise UsageError(
                    f"{sentence}, which cannot be taken out: it is part of what identifies the case. Run it without, "
                    "or submit it as it is with --keep-private."
                )
            found.append(f"{sentence}.")
    said = {getattr(row, what) for row in rows for what in ("suite", "model", "hardware")}
    for text in sorted(said | privacy.machine_texts([*rows, *launches])):
        found += [f"{text[:100]!r} has a {kind}." for kind in scrub.found_in(text)]
    return found


def _encoded(rows: Sequence[CaseRecord], launches: Sequence[Launch], traces: Mapping[str, Trace]) -> dict[str, bytes]:
    """The records as the store writes them."""
    for what, count, most in (("rows", len(rows), limits.ROWS_COUNT), ("launches", len(launches), limits.LAUNCHES_COUNT)):
        if count > most:
            raise BundleError("size", f"{count:,} {what}; a bundle has at most {most:,}. Submit them in several directories.")
    with tempfile.TemporaryDirectory(prefix="effbench-submit-") as folder:
        store = Store(folder)
        for row in rows:
            store.write_case(row)
        for launch in launches:
            store.write_launch(launch, traces[launch.launch_id])
        store.compact()
        (runs, _), *_ = store.files("runs")
        (started, _), *_ = store.files("launches")
        encoded = {RUNS: runs.read_bytes(), LAUNCHES: started.read_bytes()}
        return encoded | {name: _trace_bytes(store.path / name) for name in map(trace_member, traces)}


def _trace_bytes(path: Path) -> bytes:
    """A trace of the store, encoded once more: where several series share a unit or source, the first encoding pads the
    dictionary of such texts with whatever lay in this process's memory, which must not leave the machine."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False) as file:
        table = file.read(use_threads=False)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue())
