"""Measures the sizes of upcoming samples before any image is decoded.

Every replica's reader measures the samples of the whole job, because sizes decide which rank
computes a sample. Measuring tokenises the text and reads image headers. Workers share the work,
and sizes are remembered for later epochs.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_mm.data.loading.order import Order
from megatron_mm.data.loading.reader import Place, Reader
from megatron_mm.data.loading.workers import WorkerPool
from megatron_mm.data.sample import Size

CHUNK = 32  # samples measured by one task
AHEAD = 16  # chunks requested at a time, from the needed one on
MAX_REMEMBERED = 10**6  # sizes, about 200 MB


class Sizes:
    """Callable: `sizes(number)` returns the size of a global sample, or why its row is bad."""

    def __init__(self, order: Order, reader: Reader, place: Callable[[int], Place]) -> None:
        self._order, self._reader, self._place = order, reader, place
        self._known: dict[Place, Size | str] = {}
        self._asked: dict[int, tuple[int, list[Place]]] = {}  # by chunk: ticket and places
        self.pool: WorkerPool | None = None

    def __call__(self, number: int) -> Size | str:
        """Returns the size, or why the row is bad.

        Raises:
            DataError: a worker died.
        """
        place = self._place(number)
        while place not in self._known:
            if self.pool is None:
                self._remember([place], self._reader.measure([place]))
            else:
                self._ask(self.pool, number // CHUNK)
                # The chunk was requested without places known at that time. If this one has been
                # forgotten since, the loop requests it again.
                ticket, places = self._asked.pop(number // CHUNK)
                self._remember(places, self.pool.result(ticket))
        found = self._known[place]
        if isinstance(found, str):  # the next epoch looks again: a file may be back by then
            del self._known[place]
        return found

    def forget(self, before: int | None = None) -> None:
        """Drops requests to the workers: all, or those of chunks below `before`."""
        chunks = [chunk for chunk in self._asked if before is None or chunk < before]
        dropped = [self._asked.pop(chunk)[0] for chunk in chunks]
        if self.pool is not None:
            self.pool.forget(dropped)

    def _ask(self, pool: WorkerPool, first: int) -> None:
        self.forget(first)  # all of their samples are known
        for chunk in range(first, first + AHEAD):
            numbers = range(chunk * CHUNK, (chunk + 1) * CHUNK)
            if self._order.length is not None:
                numbers = range(numbers.start, min(numbers.stop, self._order.length))
            if chunk in self._asked or not numbers:
                continue
            places = [self._place(number) for number in numbers]
            if chunk > first:
                places = [place for place in places if place not in self._known]
            if places:
                ticket = pool.submit("measure", places, self._reader.describe(places))
                self._asked[chunk] = ticket, places

    def _remember(self, places: list[Place], found: list[Size | str]) -> None:
        if len(self._known) + len(places) > MAX_REMEMBERED:
            self._known.clear()
        self._known.update(zip(places, found, strict=True))
