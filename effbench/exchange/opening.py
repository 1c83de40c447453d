"""A bundle's members, read from memory: nothing is ever written to a path that a bundle names.

The zip has to be as `submit` writes it, byte for byte in its structure: members one after the other from the first byte,
the directory behind them, its end record last. What other tools would also read (data before, between or after, members
that share bytes, sizes that only one of two headers has) is how archives are made that two readers see differently, and
is refused. Sizes are judged twice: as claimed, before anything is unpacked, and while it is unpacked.
"""

from __future__ import annotations

import hashlib
import io
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from effbench.errors import BundleError
from effbench.exchange import limits, manifest
from effbench.exchange.manifest import Manifest

RUNS, LAUNCHES, TRACES, PLUGIN = "runs.parquet", "launches.parquet", "traces/", "plugin/"
END, LOCAL, CENTRAL_BYTES = struct.Struct("<4s4H2IH"), struct.Struct("<4s5H3I2H"), 46
_TRACE = re.compile(rf"traces/({manifest.PLAIN_ID})\.parquet")
_PLUGIN_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
SOURCE_SUFFIXES = frozenset(
    {".py", ".pyi", ".toml", ".cfg", ".ini", ".md", ".rst", ".txt", ".yaml", ".yml", ".json"}
    | {".c", ".h", ".cpp", ".hpp", ".cu", ".cuh"}
)
SOURCE_NAMES = frozenset({"LICENSE", "LICENCE", "NOTICE", "README", "COPYING"})


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A bundle whose structure, sizes and hashes are right. Members are unpacked when they are asked for."""

    manifest: Manifest
    entries: Mapping[str, zipfile.ZipInfo]
    data: bytes

    def read(self, name: str) -> bytes:
        """The content of a member. Raises KeyError."""
        return _unpacked(self.data, self.entries[name])

    @property
    def launch_ids(self) -> list[str]:
        """Those that have a trace, in order of name."""
        return [found[1] for name in sorted(self.entries) if (found := _TRACE.fullmatch(name))]


def trace_member(launch_id: str) -> str:
    return f"{TRACES}{launch_id}.parquet"


def open_bundle(data: bytes) -> Opened:
    """Check structure, sizes, names and hashes of a bundle. Raises BundleError."""
    if len(data) > limits.BUNDLE_BYTES:
        raise BundleError("size", f"{len(data):,} bytes; a bundle has at most {limits.BUNDLE_BYTES:,}.")
    entries = {info.filename: info for info in _directory(data)}
    _check_layout(data, list(entries.values()))
    _check_sizes(list(entries.values()))
    found = manifest.read(_unpacked(data, entries[manifest.NAME]))
    _check_hashes(data, entries, found)
    return Opened(manifest=found, entries=entries, data=data)


def _directory(data: bytes) -> list[zipfile.ZipInfo]:
    """The entries, once their number and names are known to be harmless."""
    start, size, count = _end_record(data)
    if count > limits.MEMBERS_COUNT or size > limits.MEMBERS_COUNT * (CENTRAL_BYTES + limits.NAME_BYTES):
        raise BundleError("size", f"{count:,} members in a directory of {size:,} bytes; at most {limits.MEMBERS_COUNT:,}.")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries, found_at = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError, EOFError) as fault:
        raise _malformed(f"its directory cannot be read ({fault})") from None
    if len(entries) != count or found_at != start:
        raise _malformed(f"its end record counts {count} members, its directory has {len(entries)}")
    seen: dict[str, str] = {}
    for info in entries:
        _check_name(info)
        if (other := seen.get(info.filename.casefold())) is not None:
            same = other == info.filename
            message = "is there twice" if same else f"differs from {other!r} in upper and lower case only"
            raise _refused_member(info, message)
        seen[info.filename.casefold()] = info.filename
    folders = {"/".join(parts[:n]) for name in seen for parts in [name.split("/")] for n in range(1, len(parts))}
    if both := sorted(folders & seen.keys()):
        raise BundleError("member", "is a file and a folder of others at once.", both[0])
    for name in (manifest.NAME, RUNS, LAUNCHES):
        if name not in seen:
            raise BundleError("member", "is missing.", name)
    return entries


def _end_record(data: bytes) -> tuple[int, int, int]:
    """Offset and size of the directory, and how many entries it has."""
    if len(data) < END.size or not data.startswith(b"PK\x03\x04"):
        raise _malformed("it does not begin with the first member of a zip file")
    mark, disk, first_disk, here, count, size, start, comment = END.unpack(data[-END.size :])
    if mark != b"PK\x05\x06" or comment:
        raise _malformed("it does not end with the end record of a zip file: it was cut off, or something follows")
    if disk or first_disk or here != count:
        raise _malformed("it is one part of several")
    if start + size + END.size != len(data) or data[-END.size - 20 :].startswith(b"PK\x06\x07"):
        raise _malformed(f"its directory is said to be {size:,} bytes at {start:,}, which is not what lies before its end")
    return start, size, count


def _check_name(info: zipfile.ZipInfo) -> None:
    name, mode = info.orig_filename, info.external_attr >> 16
    if len(name.encode("utf-8", "backslashreplace")) > limits.NAME_BYTES:
        raise _refused_member(info, f"has a name of {len(name):,} characters; at most {limits.NAME_BYTES}")
    if info.flag_bits & 0x41:
        raise _refused_member(info, "is encrypted")
    if stat.S_ISLNK(mode):
        raise _refused_member(info, "is a link")
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG) or info.external_attr & 0x10 or name.endswith("/"):
        raise _refused_member(info, "is a folder or a device; a bundle has files only")
    if not name.isascii() or not name.isprintable() or name != info.filename:
        raise _refused_member(info, "has a name with characters other than printable ASCII")
    if "\\" in name or ":" in name:
        raise _refused_member(info, "has a backslash or a colon in its name")
    if name.startswith(("/", "~")):
        raise _refused_member(info, "has an absolute path")
    parts = name.split("/")
    if ".." in parts:
        raise _refused_member(info, "leaves the bundle with '..'")
    if info.flag_bits or info.extra or info.comment or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _refused_member(info, "is packed in a way that `effbench submit` does not use")
    if name in (manifest.NAME, RUNS, LAUNCHES) or _TRACE.fullmatch(name):
        return
    if not (name.startswith(PLUGIN) and is_plugin_path(name.removeprefix(PLUGIN))):
        raise _refused_member(info, "is not a part of a bundle")


def is_plugin_path(path: str) -> bool:
    """Whether a bundle can carry this file of a plugin: source text, few parts of plain letters, none of them hidden."""
    parts = path.split("/")
    short = len(path) + len(PLUGIN) <= limits.NAME_BYTES and len(parts) < limits.PATH_PARTS_COUNT
    source = PurePosixPath(path).suffix in SOURCE_SUFFIXES or parts[-1] in SOURCE_NAMES
    return short and source and all(_PLUGIN_PART.fullmatch(part) for part in parts)


def _check_layout(data: bytes, entries: list[zipfile.ZipInfo]) -> None:
    """Members fill the file from its first byte to the directory, and both headers of each say the same."""
    position, directory = 0, END.unpack(data[-END.size :])[6]
    for info in sorted(entries, key=lambda entry: entry.header_offset):
        if info.header_offset != position:
            raise _refused_member(info, f"begins at byte {info.header_offset:,}; the one before it ends at {position:,}")
        name = info.filename.encode()
        header = data[position : position + LOCAL.size + len(name)]
        if len(header) < LOCAL.size:
            raise _refused_member(info, "is cut off")
        mark, _, flags, method, _, _, crc, packed, size, name_length, extra = LOCAL.unpack(header[: LOCAL.size])
        given = (mark, flags, method, crc, packed, size, name_length, extra, header[LOCAL.size :])
        claimed = (info.CRC, info.compress_size, info.file_size, len(name), 0, name)
        if given != (b"PK\x03\x04", 0, info.compress_type, *claimed):
            raise _refused_member(info, "has a header that says something else than the directory")
        position += LOCAL.size + len(name) + info.compress_size
    if position != directory:
        raise _malformed(f"its members end at byte {position:,}, its directory begins at {directory:,}")


def _check_sizes(entries: list[zipfile.ZipInfo]) -> None:
    """What the directory claims, before anything is unpacked."""
    for info in entries:
        most = limits.MANIFEST_BYTES if info.filename == manifest.NAME else limits.MEMBER_BYTES
        if info.file_size > most:
            raise _refused_member(info, f"unpacks to {info.file_size:,} bytes; at most {most:,}", "size")
        if info.file_size > limits.SMALL_MEMBER_BYTES + limits.EXPANSION_RATIO * info.compress_size:
            ratio = info.file_size / max(info.compress_size, 1)
            raise _refused_member(info, f"unpacks to {ratio:,.0f} times its size; at most {limits.EXPANSION_RATIO}", "size")
    plugin = [info for info in entries if info.filename.startswith(PLUGIN)]
    totals = (
        ("bytes unpacked", sum(info.file_size for info in entries), limits.UNPACKED_BYTES),
        ("files of a plugin", len(plugin), limits.PLUGIN_FILES_COUNT),
        ("bytes of a plugin", sum(info.file_size for info in plugin), limits.PLUGIN_BYTES),
    )
    for what, value, most in totals:
        if value > most:
            raise BundleError("size", f"{value:,} {what}; at most {most:,}.")


def _check_hashes(data: bytes, entries: Mapping[str, zipfile.ZipInfo], found: Manifest) -> None:
    names = entries.keys() - {manifest.NAME}
    if unnamed := sorted(names - found.members.keys()):
        raise BundleError("hash", "is not in the manifest.", unnamed[0])
    if absent := sorted(found.members.keys() - names):
        raise BundleError("hash", "is in the manifest but not in the bundle.", absent[0][: limits.NAME_BYTES])
    for name, member in found.members.items():
        content = _unpacked(data, entries[name])
        if len(content) != member.bytes:
            raise BundleError("hash", f"has {len(content):,} bytes, the manifest says {member.bytes:,}.", name)
        if hashlib.sha256(content).hexdigest() != member.sha256:
            raise BundleError("hash", "has another SHA-256 than the manifest says.", name)


def _unpacked(data: bytes, info: zipfile.ZipInfo) -> bytes:
    """Exactly the bytes that the directory claims, or an error; never more of them."""
    start = info.header_offset + LOCAL.size + len(info.filename)
    content = data[start : start + info.compress_size]
    if info.compress_type == zipfile.ZIP_DEFLATED:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            content, packed = inflate.decompress(content, info.file_size + 1), len(content)
        except zlib.error as fault:
            raise _refused_member(info, f"cannot be unpacked ({fault})") from None
        if not inflate.eof and len(content) <= info.file_size:
            raise _refused_member(info, f"ends early: {len(content):,} bytes of {info.file_size:,} after {packed:,} packed")
        if not inflate.eof or inflate.unused_data:
            raise _refused_member(info, f"holds more than the {info.file_size:,} bytes that the directory claims", "size")
    if len(content) != info.file_size or zlib.crc32(content) != info.CRC:
        raise _refused_member(info, "is damaged: size or checksum is not that of the directory")
    return content


def _malformed(message: str) -> BundleError:
    return BundleError("form", f"This is not a bundle as `effbench submit` writes it: {message}.")


def _refused_member(info: zipfile.ZipInfo, message: str, check: str = "member") -> BundleError:
    name = info.orig_filename.encode("unicode_escape").decode()
    return BundleError(check, f"{message}.", name if len(name) <= limits.NAME_BYTES else f"{name[: limits.NAME_BYTES]}…")
