"""Reads the records of a growing file from its end: a run may write gigabytes of completions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

BLOCK = 1 << 20  # bytes read at a time


class Found(NamedTuple):
    """A record, and where the next one would begin, in bytes."""

    end: int
    record: dict[str, Any]


def from_the_end(path: Path) -> Iterator[Found]:
    """Yields the records of a file of JSON lines, the last one first; none if there is no file. An
    incomplete last line, which a killed writer leaves, is passed over.

    Raises:
        ValueError: another line is no record of a run, a JSON object with its `iteration`.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        last = True
        for end, line in _lines(file):
            incomplete, last = last and not line.endswith(b"\n"), False
            if incomplete or not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict) or not isinstance(record.get("iteration"), int):
                raise ValueError(
                    f"{path}: the line that ends at byte {end} is not a record of a run; use "
                    "another output_dir"
                )
            yield Found(end, record)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yields (where it ends, line) of a file, the last one first."""
    begin = end = file.seek(0, 2)
    held: list[bytes] = []  # parts of the line that is being read, the last one first
    while begin:
        size = min(BLOCK, begin)
        begin -= size
        file.seek(begin)
        *whole, rest = file.read(size).split(b"\n")[::-1]
        # `whole` and `rest` are what stands between line breaks, the last one first.
        for part in whole:
            held.append(part)
            line = b"".join(reversed(held))
            if line:
                yield end, line
            end -= len(line)
            held = [b"\n"]
        held.append(rest)
    line = b"".join(reversed(held))
    if line:
        yield end, line
