"""Shares of a conversion, and how far it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm


def share[T](jobs: Sequence[T], size: Callable[[T], int], rank: int, ranks: int) -> list[T]:
    """The jobs of one rank, in their order: each goes to the rank that has least so far, the
    largest first. Every rank comes to the same answer by itself."""
    if ranks == 1:
        return list(jobs)
    loads, owner = [0] * ranks, {}
    for number in sorted(range(len(jobs)), key=lambda i: -size(jobs[i])):
        least = min(range(ranks), key=loads.__getitem__)
        loads[least] += size(jobs[number])
        owner[number] = least
    return [job for number, job in enumerate(jobs) if owner[number] == rank]


def row_ranges(rows: int, row_bytes: int, limit: int) -> Iterator[tuple[int, int]]:
    """(first, last) over `rows` such that a range has at most `limit` bytes, or one row."""
    step = max(1, limit // max(1, row_bytes))
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def nbytes(shape: Sequence[int], itemsize: int) -> int:
    return math.prod(shape) * itemsize


@contextmanager
def progress(total: int, what: str, enabled: bool) -> Iterator[Callable[[int], None]]:
    """A bar of bytes and bytes per second on stderr; call what it gives with bytes done."""
    with tqdm(
        total=total, desc=what, unit="B", unit_scale=True, disable=not enabled, leave=False
    ) as bar:
        yield bar.update
