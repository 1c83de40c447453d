"""A table of rows as columns on disk, read through memory maps: what lets a board of a million rows stay small in memory.

    append(name, values, at)  ──▶  one file a column, grown at its end; rows that a column never got hold its filler
    take(name, positions)     ──▶  the values of these rows; only the pages that are touched come into memory

The files are working copies in a private temporary folder that goes with the object. Text is kept as codes.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pyarrow

Array = npt.NDArray[Any]
Positions = npt.NDArray[np.int64]


class Columns:
    """Columns of doubles (filler NaN) and of codes (filler −1)."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="effbench-columns-")
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)  # at the latest when the process ends
        self._files: dict[str, tuple[Path, np.dtype[Any], int]] = {}  # name → file, type, rows written

    def append(self, name: str, values: Array, at: int) -> None:
        """Write `values` (doubles or int32 codes) as the rows from `at` on; rows in between that were never written are filled."""
        number = len(self._files)
        path, dtype, length = self._files.get(name, (Path(self._folder) / str(number), values.dtype, 0))
        assert values.dtype == dtype, f"{name} holds {dtype}"
        assert at >= length, "a column only grows"
        with path.open("ab") as file:
            file.write(np.full(at - length, _filler(dtype), dtype).tobytes())
            file.write(values.tobytes())
        self._files[name] = (path, dtype, at + len(values))

    def take(self, name: str, positions: Positions) -> Array | None:
        """The values of these rows; None for a column that does not exist."""
        if name not in self._files:
            return None
        path, dtype, length = self._files[name]
        found = np.full(len(positions), _filler(dtype), dtype)
        if length:
            inside = positions < length
            found[inside] = np.memmap(path, dtype, mode="r", shape=(length,))[positions[inside]]
        return found

    def __contains__(self, name: str) -> bool:
        return name in self._files


class Codes:
    """Texts (or other values) as small numbers, each once."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._code: dict[Any, int] = {}

    def encode(self, values: Iterable[Any]) -> npt.NDArray[np.int32]:
        """The codes of `values`, new ones added."""
        return np.fromiter((self.code(value) for value in values), np.int32)

    def encode_texts(self, column: pyarrow.Array) -> npt.NDArray[np.int32]:
        """The codes of a column of texts, −1 for null; each text of the column is looked up once."""
        found = column.dictionary_encode()
        codes = np.array([*map(self.code, found.dictionary.to_pylist()), -1], np.int32)
        places: Positions = found.indices.fill_null(-1).to_numpy()
        return codes[places]

    def code(self, value: Any) -> int:
        found = self._code.get(value)
        if found is None:
            found = self._code[value] = len(self.values)
            self.values.append(value)
        return found

    def find(self, value: Any) -> int:
        """The code of a value, −2 where it has none."""
        return self._code.get(value, -2)

    def decode(self, codes: Array, missing: Any = None) -> Array:
        """Codes → values, as an array of objects; −1 gives `missing`."""
        if len(codes) < len(self.values):  # of a few rows among many: no table of all texts
            some = np.empty(len(codes), object)
            some[:] = [self.values[code] if code >= 0 else missing for code in codes.tolist()]
            return some
        table = np.empty(len(self.values) + 1, object)
        table[:-1] = self.values
        table[-1] = missing
        return table[codes]


def _filler(dtype: np.dtype[Any]) -> float:
    return np.nan if dtype.kind == "f" else -1
