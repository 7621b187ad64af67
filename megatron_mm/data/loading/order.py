"""Maps the number of a global sample to its row: a pure function, the same on any layout.

Phases follow each other. Within a phase each source is read in shuffled epochs of its own. The
slots of a mixture follow the weights in every prefix: among the first n samples of a phase each
source has its share to within one sample, the exact one unless `whole_parts` rounds it.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

import numpy as np

from megatron_mm.data.loading.shuffle import RowGroup, shuffled, window
from megatron_mm.errors import DataError, EndOfData

# Longest period of a mixture, in slots; weights that need a longer one are rounded.
MAX_PERIOD = 2**16


class PhaseSize(NamedTuple):
    sources: tuple[Sequence[RowGroup], ...]  # row groups of each source
    weights: tuple[float, ...]
    samples: int | None  # samples of the phase; None: endless

    def rows(self, source: int) -> int:
        return sum(group.rows for group in self.sources[source])


class Position(NamedTuple):
    phase: int
    source: int  # within the phase
    epoch: int  # of the source
    place: int  # within the epoch's shuffled order


@dataclass(frozen=True)
class Deal:
    """Assignment of slots to sources in proportion to whole-number `parts`, with period
    sum(parts)."""

    parts: tuple[int, ...]

    def locate(self, slot: int) -> tuple[int, int]:
        """Returns (source of `slot`, number of earlier slots of that source)."""
        if len(self.parts) == 1:
            return 0, slot
        cycle, at = divmod(slot, sum(self.parts))
        source, before = self._cycle[at]
        return int(source), cycle * self.parts[source] + int(before)

    @cached_property
    def _cycle(self) -> np.ndarray:
        """int32 [period, 2]: source of each slot, and number of its earlier slots in the period.

        Slot k of a source with share w is released after (k - 1) / w slots and due before k / w.
        Because the shares add up to 1, earliest deadline first meets all deadlines, which keeps
        every prefix within one slot of the exact share.
        """
        period, dealt = sum(self.parts), [0] * len(self.parts)
        waiting = [(0, source) for source, part in enumerate(self.parts) if part]  # by release
        released: list[tuple[int, int]] = []  # by deadline
        table = np.empty((period, 2), dtype=np.int32)
        for slot in range(period):
            while waiting and waiting[0][0] <= slot:
                source = heapq.heappop(waiting)[1]
                deadline = -(-(dealt[source] + 1) * period // self.parts[source])
                heapq.heappush(released, (deadline, source))
            source = heapq.heappop(released)[1]
            table[slot] = source, dealt[source]
            dealt[source] += 1
            release = dealt[source] * period // self.parts[source]
            heapq.heappush(waiting, (release, source))
        return table


def whole_parts(weights: Sequence[float], where: str) -> tuple[int, ...]:
    """Returns whole numbers in the proportion of `weights`: exact if their sum is at most
    MAX_PERIOD, else rounded to about that sum, with positive weights at least 1.

    Raises:
        DataError: a weight is negative or not finite, or none is positive.
    """
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise DataError(f"{where}: weight {weight} is not allowed; use 0 or more")
    if not any(weights):
        listed = ", ".join(f"{weight:g}" for weight in weights)
        raise DataError(f"{where}: the mixture's weights are {listed}; use at least 1 above 0")
    # From the shortest decimal form, so that 0.1 means a tenth.
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(part.denominator for part in exact))
    parts = [int(part * scale) for part in exact]
    parts = [part // math.gcd(*parts) for part in parts]
    total = sum(parts)
    if total > MAX_PERIOD:
        parts = [max(1, round(part * MAX_PERIOD / total)) if part else 0 for part in parts]
    return tuple(parts)


class Order:
    """Order of all samples over phases, sources and epochs.

    Raises:
        DataError: at construction, a phase cannot be used.
    """

    def __init__(self, phases: Sequence[PhaseSize], seed: int) -> None:
        self._phases, self._seed = list(phases), seed
        self._rows = [[p.rows(source) for source in range(len(p.sources))] for p in phases]
        self._deals = []
        for number, phase in enumerate(phases, start=1):
            where = f"train_data: phase {number}"
            if phase.samples is not None and phase.samples < 1:
                raise DataError(f"{where} has samples {phase.samples}; use at least 1")
            if phase.samples is None and number < len(phases):
                raise DataError(
                    f"{where} of {len(phases)} has no `samples`; only the last phase may be endless"
                )
            self._deals.append(Deal(whole_parts(phase.weights, where)))
        endless = not phases or phases[-1].samples is None
        self.length = None if endless else sum(phase.samples or 0 for phase in phases)
        self._epochs: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()

    def locate(self, number: int) -> Position:
        """Returns the position of global sample `number` (from 0).

        Raises:
            EndOfData: the phases end before it.
        """
        start = 0
        for index, (phase, deal) in enumerate(zip(self._phases, self._deals, strict=True)):
            if phase.samples is None or number < start + phase.samples:
                source, drawn = deal.locate(number - start)
                return Position(index, source, *divmod(drawn, self._rows[index][source]))
            start += phase.samples
        raise EndOfData(
            f"train_data: sample {number + 1} is asked for but the phases hold {start}; raise "
            "`samples` of the last phase (or leave it out) or lower train_iters"
        )

    def row(self, number: int) -> tuple[int, int, int]:
        """Returns (phase, source, row) of global sample `number` (from 0).

        Raises:
            EndOfData: the phases end before it.
        """
        phase, source, epoch, index = self.locate(number)
        key = (phase, source, epoch)
        if key not in self._epochs:
            # The first source is seeded as if it were alone in its phase.
            seed = [self._seed, phase, epoch, source] if source else [self._seed, phase, epoch]
            sources = self._phases[phase].sources
            generator = np.random.default_rng(seed)
            self._epochs[key] = shuffled(sources[source], generator, window(sources))
            # Two epochs per source, at 8 bytes a row: readers may be an epoch apart.
            if len(self._epochs) > 2 * len(sources):
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(key)
        return phase, source, int(self._epochs[key][index])
