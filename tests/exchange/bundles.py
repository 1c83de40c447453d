"""Bundles for tests: a good one, its parts, and what one can do to them."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from effbench.exchange.bundle import make_bundle, packed
from effbench.exchange.privacy import Scrubber
from effbench.schema import Case, canonical_json
from effbench.store import Store
from tests.records import make_case, make_launch, make_spec, make_trace

Members = dict[str, bytes]
NOBODY = Scrubber(names={})
OWNED = Path("/tmp/effbench-test-owned")  # what code of a hostile bundle would write
PLUGIN_FILES = {
    "pyproject.toml": '[project]\nname = "some-plugin"\n',
    "some_plugin.py": "raise SystemExit('this must never run')\n",
    "suite.yaml": f"a: !!python/object/apply:os.system ['touch {OWNED}']\n",
}


def make_store(
    folder: Path, rows: int = 2, blocks: int = 2, steps: int = 30, environment: Mapping[str, str] | None = None, **changes: Any
) -> Store:
    """Rows with their launches and traces, of one baseline and others; made up, but sound in form."""
    store = Store(folder)
    for number in range(rows):
        techniques = ("mha",) if number == 0 else ("gqa",)
        spec = replace(make_spec(techniques=techniques, seed=number), environment=environment or {})
        ids = [f"launch-{number}-{block}" for block in range(blocks)]
        row = make_case(techniques=techniques, baseline=None, seed=number, run_id=f"run-{number}")
        case_id = Case(spec=spec).case_id
        store.write_case(replace(row, case_id=case_id, launch_ids=tuple(ids), spec=canonical_json(spec.to_json()), **changes))
        for block, launch_id in enumerate(ids):
            launch = make_launch(launch_id, block=block)
            store.write_launch(replace(launch, spec=spec), make_trace(steps, seed=10 * number + block))
    return store


def make_plugin(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in PLUGIN_FILES.items():
        (folder / name).write_text(text)
    return folder


def make_good(folder: Path, **store: Any) -> bytes:
    """A bundle that is sound in form, with a plugin."""
    made = make_bundle(
        make_store(folder / "results", **store), contact="someone@example.org", licence="CC-BY-4.0",
        plugin=make_plugin(folder / "plugin"), scrub=NOBODY,
    )  # fmt: skip
    return made.data


def members_of(data: bytes) -> Members:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def signed(members: Mapping[str, bytes], **changes: Any) -> bytes:
    """These members as a bundle whose manifest is right about them, but for `changes`."""
    head = json.loads(members["manifest.json"])
    others = {name: data for name, data in members.items() if name != "manifest.json"}
    head["members"] = {n: {"sha256": hashlib.sha256(d).hexdigest(), "bytes": len(d)} for n, d in others.items()}
    return packed({"manifest.json": canonical_json(head | changes).encode(), **others})


@dataclass
class Entry:
    """One member as a hostile hand writes it; None is the honest value."""

    name: str | bytes
    data: bytes = b""
    raw: bytes | None = None  # what stands in the file instead of deflated data
    size: int | None = None
    crc: int | None = None
    flags: int = 0
    method: int = zipfile.ZIP_DEFLATED
    mode: int = 0o100644
    extra: bytes = b""
    local_extra: bytes | None = None
    at: int | None = None  # offset that the directory claims
    local: dict[str, Any] = field(default_factory=dict)  # values of the local header that differ


def zipped(entries: Iterable[Entry], *, comment: bytes = b"", count: int | None = None, before: bytes = b"") -> bytes:
    """A zip, written field by field."""
    import zlib

    body, directory, number = bytearray(before), bytearray(), 0
    for entry in entries:
        number += 1
        name = entry.name if isinstance(entry.name, bytes) else entry.name.encode()
        raw = entry.raw
        if raw is None:
            deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
            raw = deflate.compress(entry.data) + deflate.flush() if entry.method == 8 else entry.data
        at = len(body) if entry.at is None else entry.at
        crc = zlib.crc32(entry.data) if entry.crc is None else entry.crc
        size = len(entry.data) if entry.size is None else entry.size
        own = {
            "flags": entry.flags,
            "method": entry.method,
            "crc": crc,
            "packed": len(raw),
            "size": size,
            "name": name,
        } | entry.local
        extra = entry.extra if entry.local_extra is None else entry.local_extra
        if entry.at is None:
            body += struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, own["flags"], own["method"], 0, 33, own["crc"], own["packed"],
                                own["size"], len(own["name"]), len(extra)) + own["name"] + extra + raw  # fmt: skip
        directory += struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 3 << 8 | 20, 20, entry.flags, entry.method, 0, 33, crc, len(raw), size,
                                 len(name), len(entry.extra), 0, 0, 0, entry.mode << 16, at) + name + entry.extra  # fmt: skip
    total = number if count is None else count
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, total, total, len(directory), len(body), len(comment))
    return bytes(body + directory + end + comment)


def entries_of(members: Mapping[str, bytes]) -> list[Entry]:
    return [Entry(name, data) for name, data in members.items()]


@lru_cache(maxsize=8)
def table_of(data: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(data), use_threads=False)


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **({"compression": "zstd"} | options))
    return sink.getvalue()


def with_rows(members: Mapping[str, bytes], name: str, change: Any) -> Members:
    """The members with a table whose rows (a list of dicts) `change` has changed in place."""
    table = table_of(members[name])
    rows = table.to_pylist()
    change(rows)
    return {**members, name: parquet(pa.Table.from_pylist(rows, schema=table.schema))}
