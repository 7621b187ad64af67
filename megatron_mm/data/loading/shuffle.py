"""Shuffles and caches rows that are read in groups, such as the row groups of parquet.

After a plain shuffle nearly every row lies in another row group than the one before, and reading
it decodes the whole group. A source too large for the cache is therefore shuffled in windows: the
row groups are shuffled, as many as fit form a window, and the rows of a window are shuffled.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

WINDOW_BYTES = 128 * 2**20
# Room for two windows: the next is begun before the last is finished.
CACHE_BYTES = 2 * WINDOW_BYTES


class RowGroupCache:
    """Cache of the row groups read last, of all files, up to `limit` bytes; it keeps at least one.
    Pickling gives an empty cache with its limit."""

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self.limit = limit
        self._groups: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, read: Callable[[], Any]) -> Any:
        """Returns the row group of `key`, which has `nbytes`; calls `read` if it is not cached."""
        if key not in self._groups:
            self._groups[key] = read()
            while len(self._groups) > 1 and self._held > self.limit:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    @property
    def _held(self) -> int:
        return sum(group.nbytes for group in self._groups.values())

    def __reduce__(self) -> tuple:
        return RowGroupCache, (self.limit,)


class RowGroup(NamedTuple):
    """Number of rows that are read together. `num_bytes` is 0 if each row is read by itself."""

    rows: int
    num_bytes: int


def window(sources: Sequence[Sequence[RowGroup]]) -> int:
    """Returns the bytes of a window of each source of a mixture."""
    return WINDOW_BYTES // len(sources)


def cache_bytes(sources: Sequence[Sequence[RowGroup]]) -> int:
    """Returns the bytes of a cache in which two windows of each source of a mixture have room. Its
    sources take turns: with less, each would evict what the next needs."""
    largest = [max(group.num_bytes for group in groups) for groups in sources]
    return sum(2 * max(window(sources), one) for one in largest)


def shuffled(
    groups: Sequence[RowGroup], generator: np.random.Generator, window_bytes: int = WINDOW_BYTES
) -> np.ndarray:
    """Returns all row numbers in a shuffled order, int64. If they fit into one window this is
    `generator.permutation` of the rows, whatever the row groups."""
    rows = np.array([group.rows for group in groups])
    if sum(group.num_bytes for group in groups) <= window_bytes:
        return generator.permutation(int(rows.sum()))
    starts = np.cumsum(rows) - rows
    windows: list[list[np.ndarray]] = []
    room = -1
    for number in generator.permutation(len(groups)):
        room -= groups[number].num_bytes
        if room < 0:
            windows.append([])
            room = window_bytes - groups[number].num_bytes
        windows[-1].append(np.arange(starts[number], starts[number] + rows[number]))
    return np.concatenate([generator.permutation(np.concatenate(window)) for window in windows])
