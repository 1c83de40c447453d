"""One parquet file of another hand to a table, with what it may cost judged before and while it is decoded.

Judged before: the footer's size, the numbers of rows, columns, row groups and values that it claims, the sizes of its
columns, and a schema that is exactly ours. Judged while: the bytes of decoded rows, few rows at a time, because a short
dictionary can stand for gigabytes of text. What a header claims and a decoder believes is stopped by the address space of
the process (`sandbox.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from effbench.errors import BundleError
from effbench.exchange import limits
from effbench.schema import SCHEMA_VERSION, arrow_schemas
from effbench.store import TABLE_KEY, VERSION_KEY

if TYPE_CHECKING:
    import pyarrow

MAGIC = b"PAR1"
BATCH_ROWS = 32


def read_table(data: bytes, name: str, member: str, *, rows: int) -> pyarrow.Table:
    """The table `runs`, `launches` or `traces` in `data`, of at most `rows` rows, its marks kept. Raises BundleError."""
    import pyarrow as pa

    _check_ends(data, member)
    with _refusing(member), _opened(data) as file:
        _check_footer(file, name, member, len(data), rows)
        batches, size = [], 0
        for batch in file.iter_batches(BATCH_ROWS if name != "traces" else limits.SAMPLES_COUNT, use_threads=False):
            size += batch.nbytes
            if name != "traces" and size > limits.TABLE_BYTES:
                raise BundleError("size", f"its rows are more than {limits.TABLE_BYTES:,} bytes once decoded.", member)
            batches.append(batch)
        table = pa.Table.from_batches(batches, schema=file.schema_arrow)
        if table.num_rows != file.metadata.num_rows:
            raise BundleError("schema", f"it has {table.num_rows:,} rows and claims {file.metadata.num_rows:,}.", member)
        table.validate(full=True)  # offsets, indices and UTF-8, which decoding takes on trust
    return table


def _check_ends(data: bytes, member: str) -> None:
    if len(data) < 12 or not data.startswith(MAGIC) or not data.endswith(MAGIC):
        raise BundleError("schema", "it is not a parquet file, or an encrypted one.", member)
    footer = int.from_bytes(data[-8:-4], "little")
    if footer > min(limits.FOOTER_BYTES, len(data) - 12):
        raise BundleError("size", f"its footer is said to have {footer:,} bytes; at most {limits.FOOTER_BYTES:,}.", member)


@contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    bounds = {
        "thrift_string_size_limit": limits.FOOTER_BYTES,
        "thrift_container_size_limit": limits.FOOTER_BYTES,
        "schema_depth_limit": limits.SCHEMA_DEPTH_COUNT,
    }
    known = inspect.signature(pq.ParquetFile).parameters  # the last one is younger than the oldest pyarrow we support
    with pq.ParquetFile(
        pa.BufferReader(data),
        pre_buffer=False,
        page_checksum_verification=True,
        **{key: value for key, value in bounds.items() if key in known},
    ) as file:
        yield file


def _check_footer(file: Any, name: str, member: str, size: int, rows: int) -> None:
    """What the footer claims."""
    footer, schema = file.metadata, arrow_schemas()[name]
    claims = (("rows", footer.num_rows, rows), ("row groups", footer.num_row_groups, limits.ROW_GROUPS_COUNT))
    for what, value, most in claims:
        if not 0 <= value <= most:
            raise BundleError("size", f"it claims {value:,} {what}; at most {most:,}.", member)
    if not file.schema_arrow.equals(schema):
        raise BundleError("schema", f"its columns are not those of the table {name}.", member)
    marks: Mapping[bytes, bytes] = file.schema_arrow.metadata or {}
    version = marks.get(VERSION_KEY, b"")
    if marks.get(TABLE_KEY) != name.encode() or not version.isdigit() or len(version) > 9:
        raise BundleError("schema", f"it is not marked as a table of {name}.", member)
    if int(version) > SCHEMA_VERSION:
        message = f"it was written with schema version {int(version)}; this effbench reads up to {SCHEMA_VERSION}."
        raise BundleError("schema", message, member)
    groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
    columns = [group.column(index) for group in groups for index in range(group.num_columns)]
    unpacked, packed = (sum(getattr(c, f"total_{kind}_size") for c in columns) for kind in ("uncompressed", "compressed"))
    if any(min(c.total_uncompressed_size, c.total_compressed_size, c.num_values) < 0 for c in columns) or packed > size:
        raise BundleError("size", f"its columns claim {packed:,} bytes of a file of {size:,}.", member)
    most = rows * 16 + limits.MEMBER_BYTES if name == "traces" else limits.TABLE_BYTES
    if unpacked > most:
        raise BundleError("size", f"its columns claim {unpacked:,} bytes once unpacked; at most {most:,}.", member)
    values = max((c.num_values for c in columns), default=0)
    if values > rows * limits.METRICS_COUNT:
        raise BundleError("size", f"a column claims {values:,} values; at most {rows * limits.METRICS_COUNT:,}.", member)


@contextmanager
def _refusing(member: str) -> Iterator[None]:
    """What pyarrow cannot read is refused in its words; running out of memory is not its fault and passes."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowMemoryError, MemoryError):
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError, NotImplementedError) as fault:
        cause = " ".join(str(fault).split()) or type(fault).__name__
        raise BundleError("schema", f"it cannot be read ({cause}).", member) from None
