"""Bundles that were made to hurt, and the rule by which each has to be refused."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from effbench.exchange import limits
from effbench.exchange.bundle import packed
from effbench.schema import canonical_json
from effbench.store import SERIES_KEY, TABLE_KEY, VERSION_KEY
from tests.exchange.bundles import OWNED, Entry, Members, entries_of, members_of, parquet, signed, table_of, with_rows, zipped

TRACE = "traces/launch-0-0.parquet"


class Exploit:
    """Unpickling it runs a command."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {OWNED}",)


def plus(members: Members, *more: Entry) -> bytes:
    return zipped([*entries_of(members), *more])


def changed(members: Members, name: str, **fields: Any) -> bytes:
    """The bundle with one member whose headers say something else."""
    return zipped([Entry(n, d, **(fields if n == name else {})) for n, d in members.items()])


def deflated(data: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflate.compress(data) + deflate.flush()


@cache
def bomb() -> bytes:
    """Deflated zeros, 600 MB of them."""
    deflate, part, found = zlib.compressobj(1, zlib.DEFLATED, -15), bytes(1_000_000), bytearray()
    for _ in range(600):
        found += deflate.compress(part)
    return bytes(found + deflate.flush())


def manifest(members: Members, **changes: Any) -> bytes:
    return canonical_json(json.loads(members["manifest.json"]) | changes).encode()


def with_manifest(members: Members, data: bytes) -> bytes:
    return packed({**members, "manifest.json": data})


def overlapping(members: Members) -> bytes:
    """Many entries of the directory that share the bytes of one member (Fifield, A better zip bomb, 2019)."""
    first = Entry("manifest.json", members["manifest.json"])
    again = [Entry(f"plugin/f{n}.txt", b"0" * 1000, at=0) for n in range(50)]
    return zipped([first, *again, *(e for e in entries_of(members) if e.name != "manifest.json")])


def in_zip64(members: Members) -> bytes:
    """A member of 10 GB, as zip64 says it."""
    extra = struct.pack("<2HQ", 1, 8, 10_000_000_000)
    return changed(members, TRACE, size=0xFFFFFFFF, extra=extra)


def text_cell(name: str, column: str, text: str) -> Callable[[Members], bytes]:
    return lambda members: signed(with_rows(members, name, lambda rows: rows[0].update({column: text})))


def series(members: Members, change: Callable[[list[Any]], Any]) -> bytes:
    """The first trace with other marks."""
    table = table_of(members[TRACE])
    marks = json.loads(table.schema.metadata[SERIES_KEY])
    marks = change(marks) or marks
    data = marks if isinstance(marks, bytes) else canonical_json(marks).encode()
    return signed({**members, TRACE: parquet(table.replace_schema_metadata({**table.schema.metadata, SERIES_KEY: data}))})


def columns(members: Members, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The first trace with other columns."""
    table = table_of(members[TRACE])
    arrays = {name: table[name].combine_chunks() for name in table.column_names}
    change(arrays)
    return signed({**members, TRACE: parquet(pa.Table.from_arrays(list(arrays.values()), schema=table.schema))})


def other_unit(arrays: dict[str, Any]) -> None:
    unit = arrays["unit"]
    arrays["unit"] = pa.DictionaryArray.from_arrays(unit.indices, pa.array(["W"] * len(unit.dictionary)))


def null_sample(arrays: dict[str, Any]) -> None:
    values = arrays["value"].to_pylist()
    arrays["value"] = pa.array([None, *values[1:]], pa.float64())


def remarked(members: Members, **marks: bytes) -> bytes:
    table = table_of(members["runs.parquet"])
    metadata = {VERSION_KEY: b"1", TABLE_KEY: b"runs"} | {k.encode(): v for k, v in marks.items()}
    return signed({**members, "runs.parquet": parquet(table.replace_schema_metadata(metadata))})


def nested_schema(depth: int) -> bytes:
    kind: Any = pa.int64()
    for _ in range(depth):
        kind = pa.struct([("a", kind)])
    return parquet(pa.Table.from_batches([], schema=pa.schema([("run_id", kind)])))


def broken_text(members: Members) -> bytes:
    """A text column whose bytes are no UTF-8."""
    table = table_of(members["runs.parquet"])
    place = table.schema.get_field_index("suite")
    wrong = pa.array([b"\xff\xfe" for _ in range(table.num_rows)], pa.binary()).view(pa.string())
    return signed({**members, "runs.parquet": parquet(table.set_column(place, table.schema.field(place), wrong))})


def footer_length(members: Members, length: int) -> bytes:
    data = members["runs.parquet"]
    return signed({**members, "runs.parquet": data[:-8] + struct.pack("<I", length) + data[-4:]})


def claims_rows(members: Members, rows: int = 10_000_000_000 // 8) -> bytes:
    """A footer that claims ten gigabytes of rows: the number of rows is the third field, a zigzag varint after the schema."""
    data = parquet(pa.Table.from_pylist([{"a": 1}] * 77))
    length = struct.unpack("<I", data[-8:-4])[0]
    footer = data[-8 - length : -8].replace(b"\x16\x9a\x01", b"\x16" + varint(2 * rows))
    return signed({**members, "runs.parquet": data[: -8 - length] + footer + struct.pack("<I", len(footer)) + b"PAR1"})


def varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def twice_the_key(members: Members) -> bytes:
    data = manifest(members)
    return with_manifest(members, b'{"contact":"another",' + data[1:])


HOSTILE: dict[str, tuple[str, str, Callable[[Members], bytes]]] = {
    # name: (check that refuses, part of the message, how it is made)
    "empty file": ("form", "does not begin", lambda m: b""),
    "no zip": ("form", "does not begin", lambda m: b"<html>hello</html>" * 100),
    "a pickle": ("form", "does not begin", lambda m: pickle.dumps(Exploit())),
    "25 MB and more": ("size", "at most 25,000,000", lambda m: bytes(limits.BUNDLE_BYTES + 1)),
    "cut off": ("form", "cut off", lambda m: signed(m)[:-1]),
    "cut off half-way": ("form", "cut off", lambda m: signed(m)[: len(signed(m)) // 2]),
    "data before": ("form", "does not begin", lambda m: b"#!/bin/sh\n" + signed(m)),
    "data before, offsets right": ("form", "does not begin", lambda m: zipped(entries_of(m), before=b"#!/bin/sh\n")),
    "a member before": ("member", "begins at byte", lambda m: zipped(entries_of(m), before=b"PK\x03\x04" + bytes(60))),
    "data after": ("form", "cut off", lambda m: signed(m) + b"\0"),
    "a comment": ("form", "something follows", lambda m: zipped(entries_of(m), comment=b"hi")),
    "another count": ("form", "counts", lambda m: zipped(entries_of(m), count=3)),
    "a directory of 65,000": ("size", "65,000 members", lambda m: plus(m, *[Entry(f"plugin/{n}.py") for n in range(65_000 - len(m))])),
    "zip bomb": ("size", "times its size", lambda m: plus(m, Entry("plugin/zeros.txt", bytes(2_000_000)))),
    "zip bomb, honest size": ("size", "unpacks to", lambda m: changed(m, TRACE, raw=bomb(), size=600_000_000)),
    "zip bomb, small claim": ("size", "holds more", lambda m: changed(m, TRACE, raw=bomb(), size=len(m[TRACE]))),
    "10 GB in zip64": ("member", "packed in a way", in_zip64),
    "10 GB claim": ("size", "unpacks to 4,294,967,294", lambda m: changed(m, TRACE, size=0xFFFFFFFE)),
    "shared bytes": ("member", "begins at byte", overlapping),
    "too much together": ("size", "bytes of a plugin", lambda m: plus(m, *[Entry(f"plugin/{n}.txt", os.urandom(700_000)) for n in range(3)])),
    "too many files": ("size", "files of a plugin", lambda m: plus(m, *[Entry(f"plugin/{n}.txt", b"a") for n in range(201)])),
    "two headers": ("member", "says something else", lambda m: changed(m, TRACE, local={"size": 5})),
    "two names": ("member", "says something else", lambda m: changed(m, "plugin/suite.yaml", local={"name": b"plugin/evil.yaml"})),
    "hidden bytes in a header": ("member", "says something else", lambda m: changed(m, TRACE, local_extra=b"\x99\x99\x02\0ab")),
    "extra field": ("member", "packed in a way", lambda m: changed(m, TRACE, extra=b"\x99\x99\x02\0ab")),
    "unknown packing": ("member", "packed in a way", lambda m: changed(m, TRACE, method=99, raw=b"a")),
    "bzip2": ("member", "packed in a way", lambda m: changed(m, TRACE, method=zipfile.ZIP_BZIP2, raw=b"a")),
    "sizes after the data": ("member", "packed in a way", lambda m: changed(m, TRACE, flags=8)),
    "encrypted": ("member", "encrypted", lambda m: changed(m, TRACE, flags=1)),
    "wrong checksum": ("member", "damaged", lambda m: changed(m, TRACE, crc=1)),
    "packed data cut off": ("member", "ends early", lambda m: changed(m, TRACE, raw=deflated(m[TRACE])[:-20])),
    "packed data and more": ("size", "holds more", lambda m: changed(m, TRACE, raw=deflated(m[TRACE]) + b"secret")),
    "packed data is none": ("member", "cannot be unpacked", lambda m: changed(m, TRACE, raw=b"\xff" * 3000)),
    "parent folder": ("member", "'..'", lambda m: plus(m, Entry("../../home/someone/.bashrc", b"a"))),
    "parent folder inside": ("member", "'..'", lambda m: plus(m, Entry("plugin/../../x.py", b"a"))),
    "absolute path": ("member", "absolute", lambda m: plus(m, Entry("/etc/cron.d/x", b"a"))),
    "home": ("member", "absolute", lambda m: plus(m, Entry("~/x.py", b"a"))),
    "drive": ("member", "backslash or a colon", lambda m: plus(m, Entry("C:/x.py", b"a"))),
    "backslash": ("member", "backslash or a colon", lambda m: plus(m, Entry("plugin\\..\\x.py", b"a"))),
    "link": ("member", "is a link", lambda m: plus(m, Entry("plugin/x.py", b"/etc/passwd", mode=0o120777))),
    "device": ("member", "folder or a device", lambda m: plus(m, Entry("plugin/x.py", mode=0o020666))),
    "folder": ("member", "folder or a device", lambda m: plus(m, Entry("plugin/x/"))),
    "file and folder": ("member", "file and a folder", lambda m: plus(m, Entry("plugin/README", b"a"), Entry("plugin/README/x.py", b"a"))),
    "twice": ("member", "twice", lambda m: plus(m, Entry("plugin/suite.yaml", b"other"))),
    "manifest twice": ("member", "twice", lambda m: plus(m, Entry("manifest.json", b"{}"))),
    "upper and lower case": ("member", "case only", lambda m: plus(m, Entry("plugin/Suite.yaml", b"other"))),
    "name with a null": ("member", "printable ASCII", lambda m: plus(m, Entry(b"plugin/x.py\0.txt", b"a"))),
    "name with an escape": ("member", "printable ASCII", lambda m: plus(m, Entry(b"plugin/\x1b[2Jx.py", b"a"))),
    "name in no encoding": ("form", "directory cannot be read", lambda m: plus(m, Entry(b"plugin/\xff\xfe.py", b"a", flags=0x800))),
    "name in Unicode": ("member", "printable ASCII", lambda m: plus(m, Entry("plugin/ｘ.py", b"a", flags=0x800))),
    "long name": ("member", "a name of", lambda m: plus(m, Entry("plugin/" + "x" * 60_000 + ".py", b"a"))),
    "deep path": ("member", "not a part", lambda m: plus(m, Entry("plugin/" + "a/" * 50 + "x.py", b"a"))),
    "hidden file": ("member", "not a part", lambda m: plus(m, Entry("plugin/.git/config.txt", b"a"))),
    "pickle as a member": ("member", "not a part", lambda m: plus(m, Entry("plugin/weights.pkl", pickle.dumps(Exploit())))),
    "library as a member": ("member", "not a part", lambda m: plus(m, Entry("plugin/x.so", b"\x7fELF"))),
    "unknown member": ("member", "not a part", lambda m: plus(m, Entry("setup.py", b"a"))),
    "no manifest": ("member", "missing", lambda m: packed({k: v for k, v in m.items() if k != "manifest.json"})),
    "no rows member": ("member", "missing", lambda m: signed({k: v for k, v in m.items() if k != "runs.parquet"})),
    "unlisted": ("hash", "not in the manifest", lambda m: plus(m, Entry("plugin/more.py", b"a"))),
    "listed only": ("hash", "not in the bundle", lambda m: packed({k: v for k, v in m.items() if k != "plugin/suite.yaml"})),
    "wrong hash": ("hash", "another SHA-256", lambda m: packed({**m, TRACE: m[TRACE][:-1] + b"0"})),
    "wrong size": ("hash", "the manifest says", lambda m: packed({**m, TRACE: m[TRACE] + b"0"})),
    "nesting": ("manifest", "nested too deeply", lambda m: with_manifest(m, b"[" * 9_000)),
    "a megabyte of nesting": ("manifest", "nested too deeply", lambda m: changed({**m, "manifest.json": b"[" * 999_999}, "manifest.json", method=0)),
    "a megabyte of nesting, packed": ("size", "times its size", lambda m: with_manifest(m, b'{"a":' * 190_000)),
    "large manifest": ("size", "unpacks to", lambda m: with_manifest(m, os.urandom(600_000).hex().encode())),
    "manifest in no encoding": ("manifest", "not UTF-8", lambda m: with_manifest(m, b'{"contact":"\xff"}')),
    "manifest in another encoding": ("manifest", "not UTF-8", lambda m: with_manifest(m, manifest(m).decode().encode("utf-16"))),
    "manifest no JSON": ("manifest", "not JSON", lambda m: with_manifest(m, b"!!python/object/apply:os.system [id]")),
    "manifest a pickle": ("manifest", "not UTF-8", lambda m: with_manifest(m, pickle.dumps(Exploit()))),
    "key twice": ("manifest", "canonical", twice_the_key),
    "huge number": ("manifest", "not JSON", lambda m: with_manifest(m, b'{"a":' + b"123456789" * 700 + b"}")),
    "NaN": ("manifest", "should be 1", lambda m: with_manifest(m, manifest(m).replace(b'"format_version":1', b'"format_version":NaN'))),
    "later version": ("manifest", "Update effbench", lambda m: with_manifest(m, manifest(m, format_version=2))),
    "unknown key": ("manifest", "Extra inputs", lambda m: with_manifest(m, manifest(m, run="os.system('id')"))),
    "contact of two lines": ("manifest", "contact", lambda m: with_manifest(m, manifest(m, contact="a\nb"))),
    "lone surrogate": ("manifest", "", lambda m: with_manifest(m, manifest(m).replace(b"someone", b"\\ud800omeone"))),
    "counts": ("manifest", "it says 7 rows", lambda m: signed(m, counts=json.loads(m["manifest.json"])["counts"] | {"rows": 7})),
    "rows a pickle": ("schema", "not a parquet file", lambda m: signed({**m, "runs.parquet": pickle.dumps(Exploit())})),
    "rows empty": ("schema", "no rows", lambda m: signed(with_rows(m, "runs.parquet", list.clear))),
    "footer of 4 GB": ("size", "footer", lambda m: footer_length(m, 0xFFFFFFFF)),
    "footer larger than the file": ("size", "footer", lambda m: footer_length(m, 499_999)),
    "footer shifted": ("schema", "", lambda m: footer_length(m, 99)),
    "claim of 10 GB of rows": ("size", "claims 1,250,000,000 rows", claims_rows),
    "too many rows": ("size", "claims", lambda m: signed(with_rows(m, "runs.parquet", lambda rows: rows.extend(rows * 300)))),
    "many row groups": ("size", "row groups", lambda m: signed({**m, TRACE: parquet(table_of(m[TRACE]), row_group_size=2)})),
    "absurd metadata": ("size", "footer", lambda m: remarked(m, junk=os.urandom(600_000).hex().encode())),
    "deep schema": ("schema", "", lambda m: signed({**m, "runs.parquet": nested_schema(60)})),
    "other columns": ("schema", "columns are not", lambda m: signed({**m, "runs.parquet": m["launches.parquet"]})),
    "not marked": ("schema", "not marked", lambda m: remarked(m, effbench_table=b"launches")),
    "version no number": ("schema", "not marked", lambda m: remarked(m, effbench_schema_version=b"one")),
    "later schema": ("schema", "reads up to", lambda m: remarked(m, effbench_schema_version=b"99")),
    "later schema in a row": ("schema", "schema version", text_cell("runs.parquet", "schema_version", 99)),  # type: ignore[arg-type]
    "text no UTF-8": ("schema", "cannot be read", broken_text),
    "null id": ("schema", "without a value", text_cell("runs.parquet", "run_id", None)),  # type: ignore[arg-type]
    "unknown status": ("schema", "status", text_cell("runs.parquet", "status", "splendid")),
    "id a path": ("schema", "is no run_id", text_cell("runs.parquet", "run_id", "../../x")),
    "id twice": ("schema", "one run_id", text_cell("runs.parquet", "run_id", "RUN-1")),
    "case no digest": ("schema", "no SHA-256", text_cell("runs.parquet", "case_id", "<b>")),
    "spec no JSON": ("schema", "no JSON", text_cell("runs.parquet", "spec", "!!python/object:os.system")),
    "spec nested": ("schema", "nested too deeply", text_cell("runs.parquet", "spec", "[" * 100_000)),
    "spec a list": ("schema", "spec is none", text_cell("runs.parquet", "spec", "[]")),
    "spec without fields": ("schema", "spec is none", text_cell("runs.parquet", "spec", "{}")),
    "spec not canonical": ("schema", "not canonical", text_cell("runs.parquet", "spec", '{"b":1, "a":2}')),
    "launch id of another spec": ("schema", "not that of its spec", text_cell("launches.parquet", "spec_id", "0" * 64)),
    "facts nested": ("schema", "nested too deeply", text_cell("launches.parquet", "facts", '{"a":' * 100_000)),
    "facts not finite": ("schema", "no JSON", text_cell("launches.parquet", "facts", '{"a":Infinity}')),
    "facts a list": ("schema", "no JSON object", text_cell("launches.parquet", "facts", "[]")),
    "window a text": ("schema", "no start_s", text_cell("launches.parquet", "windows", '{"window":{"end_s":"1","ended_by":"","start_s":0}}')),
    "window without end": ("schema", "no start_s", text_cell("launches.parquet", "windows", '{"window":{"start_s":0}}')),
    "metric infinite": ("schema", "not finite", lambda m: signed(with_rows(m, "runs.parquet", lambda r: r[0]["metrics"][0].update(value=np.inf)))),
    "metric twice": ("schema", "one name", lambda m: signed(with_rows(m, "runs.parquet", lambda r: r[0]["metrics"].append(r[0]["metrics"][0])))),
    "trace without launch": ("trace", "no launch", lambda m: signed({**m, "traces/more.parquet": m[TRACE]})),
    "launch without trace": ("trace", "no trace", lambda m: signed({k: v for k, v in m.items() if k != TRACE})),
    "marks of other length": ("trace", "samples", lambda m: series(m, lambda marks: marks[0].__setitem__(4, marks[0][4] + 1))),
    "marks negative": ("trace", "no list", lambda m: series(m, lambda marks: marks[0].__setitem__(4, -1))),
    "marks no list": ("trace", "no list", lambda m: series(m, lambda marks: {"a": 1})),
    "marks no JSON": ("schema", "no JSON", lambda m: series(m, lambda marks: b"cos\nsystem\n(S'id'\ntR.")),
    "series twice": ("trace", "one name", lambda m: series(m, lambda marks: marks[1].__setitem__(0, marks[0][0]))),
    "columns of another unit": ("trace", "column unit", lambda m: columns(m, other_unit)),
    "sample null": ("trace", "without a value", lambda m: columns(m, null_sample)),
}  # fmt: skip


def huge_text(members: Members) -> bytes:
    """A dictionary of one text of 3 MB, and rows that each say it: 180 MB in a few kilobytes."""
    table = table_of(members["runs.parquet"])
    rows = pa.concat_tables([table] * 30)
    columns = {name: rows[name] for name in rows.column_names}
    columns["run_id"] = pa.array([f"run-{n}" for n in range(60)])
    columns["suite"] = pa.array(["x" * 3_000_000] * 60)
    wide = pa.Table.from_arrays(list(columns.values()), schema=table.schema)
    return signed({**members, "runs.parquet": parquet(wide, dictionary_pagesize_limit=1 << 23)})


def huge_list(members: Members) -> bytes:
    """A list of a million reasons in one row."""
    return signed(with_rows(members, "runs.parquet", lambda rows: rows[0]["metrics"][0].update(reasons=["a"] * 1_000_000)))


def huge_json(members: Members) -> bytes:
    """Facts that take thirty times their text once they are objects."""
    text = '{"a":[' + ",".join(["[]"] * 1_300_000) + "]}"
    rows = table_of(members["launches.parquet"]).to_pylist()
    for row in rows:
        row["facts"] = text
    table = pa.Table.from_pylist(rows, schema=table_of(members["launches.parquet"]).schema)
    return signed({**members, "launches.parquet": parquet(table)})


def believed_page(members: Members) -> bytes:
    """A page that says it unpacks to 2 GB, in the place of its checksum, so that everything else stays where it is.

    A page's header in compact thrift: type (15 00), size (15 …), packed size (15 …), checksum (15 …), a struct (1c, or 2c without)."""
    options = {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    data = parquet(table_of(members["runs.parquet"]), **options)
    assert data[4:7] == b"\x15\x00\x15"
    packed_at = after_varint(data, 7)
    checksum_at = after_varint(data, packed_at + 1)
    end = after_varint(data, checksum_at + 1)
    assert (data[packed_at], data[checksum_at], data[end]) == (0x15, 0x15, 0x1C)
    rest = data[packed_at:checksum_at] + b"\x2c"
    size = varint(2 * 0x7FFFFF00)
    room = end + 1 - 7 - len(rest)
    size = size[:-1] + bytes([size[-1] | 0x80]) + b"\x80" * (room - len(size) - 1) + b"\x00"
    return signed({**members, "runs.parquet": data[:7] + size + rest + data[end + 1 :]})


def after_varint(data: bytes, at: int) -> int:
    return next(place + 1 for place in range(at, at + 10) if data[place] < 0x80)


def deep_footer(members: Members, depth: int) -> bytes:
    """A schema of many groups, each inside the one before, as the thrift of a footer says it; stored, so that no ratio tells."""
    root = b"\x48\x01a\x15\x02\x00"  # name "a", one child
    leaf = b"\x15\x02\x25\x00\x18\x01a\x00"  # INT32, required, name "a"
    schema = b"\x19\xfc" + varint(depth + 1) + root * depth + leaf
    footer = b"\x15\x04" + schema + b"\x16\x00\x19\x0c\x00"
    data = signed({**members, "runs.parquet": b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1"})
    return changed(members_of(data), "runs.parquet", method=0)


COSTLY: dict[str, tuple[str, Callable[[Members], bytes]]] = {
    "a long text in every row": ("size", huge_text),
    "a long list": ("size", huge_list),
    "large JSON": ("", huge_json),
    "a page of 2 GB": ("", believed_page),
    "a deep footer": ("", lambda m: deep_footer(m, 1_000)),
    "a very deep footer": ("", lambda m: deep_footer(m, 80_000)),
    "zip bomb": ("size", HOSTILE["zip bomb, small claim"][2]),
    "nesting": ("manifest", HOSTILE["a megabyte of nesting"][2]),
    "claim of 10 GB": ("size", claims_rows),
}
