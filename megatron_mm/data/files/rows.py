"""Random access to rows of one or several files: JSONL here, parquet in parquet.py."""

from __future__ import annotations

import errno
import json
import os
from array import array
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from glob import glob
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from megatron_mm.data.files.forms import normalise_row
from megatron_mm.data.loading.shuffle import RowGroup, RowGroupCache
from megatron_mm.errors import DataError


class RowFile(Protocol):
    """Rows of one file, in our form (see `forms.py`). Pickling copies the index, not the rows."""

    path: Path

    @property
    def folder(self) -> Path: ...  # in which relative image paths start

    @property
    def row_groups(self) -> list[RowGroup]: ...

    @property
    def columns(self) -> frozenset[str]: ...  # keys that its rows are known to have

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    def where(self, index: int) -> str: ...


@dataclass(frozen=True)
class RowFiles:
    """Rows of one or several files, one after the other."""

    files: list[RowFile]
    starts: list[int]  # first row of each file, then the number of rows

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def row_groups(self) -> list[RowGroup]:
        return [group for file in self.files for group in file.row_groups]

    @property
    def columns(self) -> frozenset[str]:
        """The keys that rows of any file are known to have: JSONL says them row by row, and the
        first row of each file is asked."""
        return frozenset().union(*(file.columns for file in self.files))

    def locate(self, index: int) -> tuple[RowFile, int]:
        """Returns the file of row `index` (from 0) and the row's index in it."""
        number = bisect_right(self.starts, index) - 1
        return self.files[number], index - self.starts[number]


def open_row_files(path: str | Path, cache: RowGroupCache) -> RowFiles:
    """Opens the file at `path`, or all files that match its pattern (`*`, `?`), sorted by name.

    Args:
        cache: cache of row groups, which other sources may share.

    Raises:
        DataError: a file is missing, empty or unreadable.
    """
    names = [str(path)]
    if any(mark in names[0] for mark in "*?") and not Path(path).exists():
        names = sorted(glob(names[0], recursive=True))
        if not names:
            raise DataError(f"{path}: 0 files match; correct the data path")
    files = [_open_file(Path(name), cache) for name in names]
    return RowFiles(files, [0, *accumulate(map(len, files))])


def _open_file(path: Path, cache: RowGroupCache) -> RowFile:
    if path.suffix == ".parquet" and path.is_file():
        from megatron_mm.data.files.parquet import ParquetRows  # pyarrow is slow to import

        return ParquetRows(path, cache)
    return Rows(path)


class Rows:
    """Rows of a JSONL file. Only byte offsets are kept in memory.

    Blank lines are skipped but counted, so row numbers are line numbers, from 1.

    Raises:
        DataError: at construction, the file is missing or empty; on access, the row is not a JSON
            object.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{self.path}: there is no such file; correct the data path")
        if not os.access(self.path, os.R_OK):
            raise DataError(f"{self.path}: may not be read; correct its permissions")
        self._starts, self._lengths, self._lines = array("q"), array("q"), array("q")
        self._open()
        start = 0
        try:
            for number, line in enumerate(self._file, start=1):
                if line.strip():
                    self._starts.append(start)
                    self._lengths.append(len(line))
                    self._lines.append(number)
                start += len(line)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from error
        if not self._starts:
            raise DataError(f"{self.path}: 0 rows; a dataset needs at least 1")

    def _open(self) -> None:
        try:
            self._file = self.path.open("rb")
        except OSError as error:
            more = "; raise `ulimit -n` or join files" if error.errno == errno.EMFILE else ""
            raise DataError(f"{self.path}: cannot be opened ({error.strerror}){more}") from error

    @property
    def columns(self) -> frozenset[str]:
        """The keys of the first row; none if it is bad."""
        try:
            return frozenset(self[0])
        except DataError:
            return frozenset()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    @property
    def row_groups(self) -> list[RowGroup]:
        return [RowGroup(len(self), 0)]

    @property
    def folder(self) -> Path:
        """Folder in which relative image paths start."""
        return self.path.parent

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, index: int) -> str:
        """`file:row` of the row at `index` (from 0)."""
        return f"{self.path}:{self._lines[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        # pread has no file position, so threads and forked workers may share the file.
        try:
            line = os.pread(self._file.fileno(), self._lengths[index], self._starts[index])
            row = json.loads(line, object_pairs_hook=_object)
        except OSError as error:
            raise DataError(f"{self.where(index)}: cannot be read ({error})") from error
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self.where(index)}: not valid JSON ({reason})") from error
        if not isinstance(row, dict):
            raise DataError(
                f"{self.where(index)}: a row must be a JSON object, this is a {type(row).__name__}"
            )
        return normalise_row(row, self.where(index))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object of JSON's keys and values. Of equal keys JSON would keep the last alone."""
    made = dict(pairs)
    if len(made) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} is given twice")
    return made
