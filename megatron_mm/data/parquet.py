"""A parquet file read one row at a time."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_mm.data.errors import DataError
from megatron_mm.data.forms import check_columns, normalise_row

# Row groups kept in memory by each process that reads. Parquet is decoded by the row group,
# so shuffled rows are cheap only while a group is small (some 100 rows with images) or kept.
CACHE_BYTES = 256 * 2**20


class ParquetRows:
    """Random access to the rows of a parquet file, row group by row group, never the whole.

    Row numbers count from 1. Raises DataError at construction for a file that is missing, no
    parquet, empty or without a conversation column, and on access for one that is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not os.access(path, os.R_OK):
            raise DataError(f"{path}: may not be read; correct its permissions")
        self._open()
        metadata = self._file.metadata
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._starts = [0, *accumulate(groups)]
        if not len(self):
            raise DataError(f"{path}: 0 rows; a dataset needs at least 1")
        check_columns(self._file.schema_arrow.names, str(path))

    def _open(self) -> None:
        try:
            self._file = pq.ParquetFile(self.path)
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{self.path}: cannot be read as parquet ({reason})") from error
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # A worker opens the file for itself.
        return {"path": self.path, "_starts": self._starts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    @property
    def folder(self) -> Path:
        """Where relative image paths start."""
        return self.path.parent

    def __len__(self) -> int:
        return self._starts[-1]

    def where(self, index: int) -> str:
        """`file:row` of the row at `index` (from 0)."""
        return f"{self.path}:{index + 1}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = bisect_right(self._starts, index) - 1
        where = self.where(index)
        try:
            table = self._group(number)
            (row,) = table.slice(index - self._starts[number], 1).to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{where}: row group {number + 1} is damaged ({reason})") from error
        return normalise_row(row, where)

    def _group(self, number: int) -> pa.Table:
        if number in self._groups:
            self._groups.move_to_end(number)
            return self._groups[number]
        table = self._file.read_row_group(number)
        self._groups[number] = table
        while len(self._groups) > 1 and sum(t.nbytes for t in self._groups.values()) > CACHE_BYTES:
            self._groups.popitem(last=False)
        return table
