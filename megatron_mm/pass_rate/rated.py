"""Rated rows: rows with what a model answered and how that was scored.

accuracy      share of right completions among those that were judged; null without any
completions   the texts
finished      whether each ended before the length limit
right         whether each reaches the threshold; null where its reward does not apply or failed
scores        by the reward's name, the value of each; null likewise
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mm.data.files.forms import Row, held_and_box, to_json
from megatron_mm.data.files.keys import RATED
from megatron_mm.data.files.rows import Rows
from megatron_mm.data.messages import check_messages, is_unicode
from megatron_mm.errors import DataError


@dataclass(frozen=True)
class Rated:
    """A rated row.

    Attributes:
        row: all of it.
        where: "file:row".
    """

    row: Row
    where: str
    accuracy: float | None
    completions: tuple[str, ...]
    finished: tuple[bool, ...]
    right: tuple[bool | None, ...]

    @property
    def bare(self) -> Row:
        """The row as it was before it was rated."""
        return {key: value for key, value in self.row.items() if key not in RATED}


def read_rated(path: Path) -> Iterator[Rated]:
    """Yields the rows of a rated file.

    Raises:
        DataError: it cannot be read, or a row is not rated.
    """
    rows = Rows(path)
    for index in range(len(rows)):
        yield rated(rows[index], rows.where(index))


def rated(row: Row, where: str) -> Rated:
    """Returns a row of a rated file. Raises DataError."""
    lacking = [key for key in RATED if key not in row]
    if lacking:
        raise DataError(
            f"{where}: no {lacking[0]!r}; rate the rows first: tools/pass_rate.py measure"
        )
    check_messages(row, where)
    accuracy, said = row["accuracy"], row["completions"]
    known = accuracy is None or (
        isinstance(accuracy, (int, float)) and not isinstance(accuracy, bool) and 0 <= accuracy <= 1
    )
    if not known:
        raise DataError(f"{where}: 'accuracy' is {accuracy!r}; allowed: 0 to 1, or null")
    if not isinstance(said, list) or not all(isinstance(text, str) for text in said):
        raise DataError(f"{where}: 'completions' is no list of texts")
    if not all(map(is_unicode, said)):
        raise DataError(
            f"{where}: 'completions' holds half a surrogate pair (\\ud800 to \\udfff); remove it"
        )
    return Rated(
        row,
        where,
        accuracy,
        tuple(said),
        tuple(_flags(row, "finished", len(said), (True, False), where)),
        tuple(_flags(row, "right", len(said), (True, False, None), where)),
    )


def _flags(row: Row, key: str, count: int, allowed: tuple, where: str) -> list[Any]:
    values = row[key]
    if not isinstance(values, list) or not all(any(v is a for a in allowed) for v in values):
        raise DataError(f"{where}: {key!r} is no list of true and false")
    if len(values) != count:
        raise DataError(
            f"{where}: {len(values)} values of {key!r} for {count} completions; rate the row again"
        )
    return values


def line_of(row: Row, where: str) -> str:
    """Returns a row as a line of JSON. Raises DataError."""
    try:
        text = to_json(row, "row", where)
    except DataError:
        for key, value in row.items():  # the column that is to blame
            to_json(value, key, where)
        raise
    # A column may hold half a character, which JSON can spell and UTF-8 cannot.
    return text if is_unicode(text) else json.dumps(row)


def check_images_beside(row: Row, where: str, folder: Path, out: Path) -> None:
    """Raises DataError for a row with image paths, which start at its file's folder, that is to be
    written to a file in another folder."""
    images = row.get("images") or []
    if not isinstance(images, list):
        raise DataError(f"{where}: 'images' must be a list of paths or bytes")
    names = [held for held, _ in map(held_and_box, images) if isinstance(held, str)]
    if names and folder.resolve() != out.parent.resolve():
        raise DataError(
            f"{where}: the path of image {names[0]!r} starts at {folder}, and {out} is not there; "
            "write --out beside the data"
        )
