"""Division of a conversion among ranks, and its progress bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from megatron_mm.cli import printable


def share[T](parts: Sequence[T], size: Callable[[T], int], rank: int, ranks: int) -> list[T]:
    """Returns the parts of one rank, in order. The largest are assigned first, each to the rank
    with the least so far. Every rank computes the same assignment without communication."""
    if ranks == 1:
        return list(parts)
    loads, owner = [0] * ranks, {}
    for number in sorted(range(len(parts)), key=lambda i: -size(parts[i])):
        least = min(range(ranks), key=loads.__getitem__)
        loads[least] += size(parts[number])
        owner[number] = least
    return [part for number, part in enumerate(parts) if owner[number] == rank]


def row_ranges(rows: int, row_bytes: int, limit: int) -> Iterator[tuple[int, int]]:
    """Yields ranges (first, last) of rows, each of at most `limit` bytes or of one row."""
    step = max(1, limit // max(1, row_bytes))
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def nbytes(shape: Sequence[int], itemsize: int) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * itemsize


@contextmanager
def progress(total: int, what: str, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar of bytes on stderr. Yields a function that adds bytes done."""
    with tqdm(
        total=total,
        desc=printable(what),
        unit="B",
        unit_scale=True,
        disable=not enabled,
        leave=False,
    ) as bar:
        yield bar.update
