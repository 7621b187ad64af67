"""A JSONL file read one row at a time."""

from __future__ import annotations

import json
import os
from array import array
from pathlib import Path
from typing import Any

from megatron_mm.data.errors import DataError


class Rows:
    """Random access to the rows of a JSONL file. Only byte offsets are held in memory.

    Blank lines are passed over but counted, so row numbers are line numbers, from 1.
    Raises DataError at construction for a missing or empty file, and on access for a row
    that is not a JSON object.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{self.path}: there is no such file; correct the data path")
        if not os.access(self.path, os.R_OK):
            raise DataError(f"{self.path}: may not be read; correct its permissions")
        self._starts, self._lengths, self._lines = array("q"), array("q"), array("q")
        start = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._starts.append(start)
                    self._lengths.append(len(line))
                    self._lines.append(number)
                start += len(line)
        if not self._starts:
            raise DataError(f"{self.path}: 0 rows; a dataset needs at least 1")
        self._file = self.path.open("rb")

    @property
    def folder(self) -> Path:
        """Where relative image paths start."""
        return self.path.parent

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, index: int) -> str:
        """`file:row` of the row at `index` (from 0)."""
        return f"{self.path}:{self._lines[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        # pread keeps no position, so threads and forked workers may share the file.
        try:
            line = os.pread(self._file.fileno(), self._lengths[index], self._starts[index])
            row = json.loads(line)
        except OSError as error:
            raise DataError(f"{self.where(index)}: cannot be read ({error})") from error
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self.where(index)}: not valid JSON ({reason})") from error
        if not isinstance(row, dict):
            raise DataError(
                f"{self.where(index)}: a row must be a JSON object, this is a {type(row).__name__}"
            )
        return row
