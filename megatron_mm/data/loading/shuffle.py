"""Shuffling and keeping rows that are read by the block, such as the row groups of parquet.

In a plain shuffle the next row is in another block nearly always, and each costs the decoding
of a whole block. So a source too large to be kept is shuffled in windows: the blocks are
shuffled, as many as can be kept make a window, and the rows of a window are shuffled.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

WINDOW_BYTES = 128 * 2**20


# At the end of one window the next has begun.
CACHE_BYTES = 2 * WINDOW_BYTES


class RowGroupCache:
    """The blocks that were read last, of all files together, up to `limit` bytes; at least one.
    Pickling it hands another process an empty one."""

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self.limit = limit
        self._blocks: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, read: Callable[[], Any]) -> Any:
        """The block of this key, which has `nbytes`; `read()` if it is not kept."""
        if key not in self._blocks:
            self._blocks[key] = read()
            while len(self._blocks) > 1 and self._held > self.limit:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(key)
        return self._blocks[key]

    @property
    def _held(self) -> int:
        return sum(block.nbytes for block in self._blocks.values())

    def __reduce__(self) -> tuple:
        return RowGroupCache, (self.limit,)


class RowGroup(NamedTuple):
    """Rows that are read together. `num_bytes` is 0 where each row is read by itself."""

    rows: int
    num_bytes: int


def shuffled(
    blocks: Sequence[RowGroup], generator: np.random.Generator, window_bytes: int = WINDOW_BYTES
) -> np.ndarray:
    """All rows of `blocks` in a new order, int64. If they fit into one window it is
    `generator.permutation` of the rows, whatever the blocks."""
    rows = np.array([block.rows for block in blocks])
    if sum(block.num_bytes for block in blocks) <= window_bytes:
        return generator.permutation(int(rows.sum()))
    starts = np.cumsum(rows) - rows
    windows: list[list[np.ndarray]] = []
    room = -1
    for number in generator.permutation(len(blocks)):
        room -= blocks[number].num_bytes
        if room < 0:
            windows.append([])
            room = window_bytes - blocks[number].num_bytes
        windows[-1].append(np.arange(starts[number], starts[number] + rows[number]))
    return np.concatenate([generator.permutation(np.concatenate(window)) for window in windows])
