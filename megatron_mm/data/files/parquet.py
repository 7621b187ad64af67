"""Random access to the rows of a parquet file."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_mm.data.files.forms import SIDES, check_columns, normalise_row
from megatron_mm.data.files.keys import LOOKS
from megatron_mm.data.loading.shuffle import RowGroup, RowGroupCache
from megatron_mm.errors import DataError

# Columns of objects. Parquet gives each object the keys of all, null where it had none.
NESTED = (
    *("messages", "prompt", "tools", "spans", "conversations", *SIDES),
    *(LOOKS, "ground_truth", "reward_model"),
)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


class ParquetRows:
    """Rows of a parquet file, read by row group. No file stays open: a dataset may have thousands.

    Row numbers count from 1.

    Raises:
        DataError: at construction, the file is missing, not parquet, empty or has no conversation
            column; on access, it is damaged.
    """

    def __init__(self, path: Path, cache: RowGroupCache) -> None:
        self.path, self._cache = path, cache
        # A rewritten file must not match cached row groups of the old one.
        self._version = path.stat().st_mtime_ns
        if not os.access(path, os.R_OK):
            raise DataError(f"{path}: may not be read; correct its permissions")
        try:
            with pq.ParquetFile(path) as file:
                metadata, names = file.metadata, file.schema_arrow.names
        except (pa.ArrowException, OSError, ValueError) as error:  # or a name that is no UTF-8
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{path}: cannot be read as parquet ({reason})") from error
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        self.row_groups = [RowGroup(group.num_rows, group.total_byte_size) for group in groups]
        for number, group in enumerate(self.row_groups, start=1):
            if min(group) < 0:
                raise DataError(
                    f"{path}: row group {number} has {group.rows} rows of {group.num_bytes} bytes; "
                    "it is damaged, write it again"
                )
        counted = sum(group.rows for group in self.row_groups)
        if counted != metadata.num_rows:
            raise DataError(
                f"{path}: its {len(groups)} row groups have {counted} rows, the file says "
                f"{metadata.num_rows}; it is damaged, write it again"
            )
        self._starts = [0, *accumulate(group.rows for group in self.row_groups)]
        if not len(self):
            raise DataError(f"{path}: 0 rows; a dataset needs at least 1")
        check_columns(names, str(path))
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise DataError(f"{path}: the column {twice[0]!r} is there twice; rename one")
        derived = {"ground_truth": "reward_model", "skill": "data_source"}  # in verl's form
        known = {*names} | {key for key, source in derived.items() if source in names}
        self.columns = frozenset(known - {"prompt", "response", "image"})  # see `normalise_row`

    @property
    def folder(self) -> Path:
        """Folder in which relative image paths start."""
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
        except MemoryError:  # pyarrow's is an ArrowException too, and not caused by the row
            raise
        except pa.ArrowNotImplementedError as error:
            rows, num_bytes = self.row_groups[number]
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"{where}: row group {number + 1} has {rows} rows in {num_bytes} bytes, which "
                f"pyarrow cannot read ({reason}); write the file with smaller row groups"
            ) from error
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{where}: row group {number + 1} is damaged ({reason})") from error
        for key in NESTED:
            if key in row:
                row[key] = _without_nulls(row[key])
        return normalise_row(row, where)

    def _group(self, number: int) -> pa.Table:
        def read() -> pa.Table:
            with pq.ParquetFile(self.path) as file:
                return file.read_row_group(number)

        return self._cache.get((self.path, self._version, number), read)
