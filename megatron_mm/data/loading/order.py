"""Which row is global sample number n: a pure function of n, whatever the layout.

Phases follow each other. Inside a phase each source is read in shuffled epochs of its own,
and the slots of a mixture are dealt so that every prefix follows the weights: of the first n
samples of a phase each source has its exact share, give or take less than one.
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

from megatron_mm.data.loading.shuffle import WINDOW_BYTES, RowGroup, shuffled
from megatron_mm.errors import DataError

# Weights that are no small whole numbers to each other are rounded to shares of this many slots.
MAX_PERIOD = 2**16


class PhaseSize(NamedTuple):
    sources: tuple[Sequence[RowGroup], ...]  # the rows of each source, as they are read
    weights: tuple[float, ...]
    samples: int | None  # samples to draw in all; None: without end

    def rows(self, source: int) -> int:
        return sum(block.rows for block in self.sources[source])


class Position(NamedTuple):
    phase: int
    source: int  # within the phase
    epoch: int  # of the source
    index: int  # within the epoch's shuffled order


@dataclass(frozen=True)
class Deal:
    """Slots dealt to sources in the proportion of their whole-number `parts`; the deal repeats
    after sum(parts) slots."""

    parts: tuple[int, ...]

    def locate(self, slot: int) -> tuple[int, int]:
        """The source of `slot` and how many slots before it are of the same source."""
        if len(self.parts) == 1:
            return 0, slot
        cycle, at = divmod(slot, sum(self.parts))
        source, before = self._cycle[at]
        return int(source), cycle * self.parts[source] + int(before)

    @cached_property
    def _cycle(self) -> np.ndarray:
        """int32 [period, 2]: the source of each slot, and its earlier slots in the period.

        Slot k of a source with share w belongs after k/w - 1/w slots and before k/w of them.
        Serving the earliest deadline among those released meets all of them (the shares add
        up to 1), which is what keeps every prefix within one slot of the exact share.
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
    """Weights as whole numbers in the same proportion: exactly if their sum is then at most
    MAX_PERIOD, else rounded to that sum, no positive weight to 0. Raises DataError for a weight
    that is negative or not finite, and if none is positive."""
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise DataError(f"{where}: weight {weight} is not allowed; use 0 or more")
    if not any(weights):
        listed = ", ".join(f"{weight:g}" for weight in weights)
        raise DataError(f"{where}: the mixture's weights are {listed}; use at least 1 above 0")
    # By its shortest decimal form, so that 0.1 means a tenth.
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(part.denominator for part in exact))
    parts = [int(part * scale) for part in exact]
    parts = [part // math.gcd(*parts) for part in parts]
    total = sum(parts)
    if total > MAX_PERIOD:
        parts = [max(1, round(part * MAX_PERIOD / total)) if part else 0 for part in parts]
    return tuple(parts)


class Order:
    """Raises DataError at construction for phases that cannot be read."""

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
        self.length = None if endless else sum(phase.samples for phase in phases)
        self._epochs: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()

    def locate(self, number: int) -> Position:
        """Where global sample `number` (from 0) lies. Raises DataError past the end."""
        start = 0
        for index, (phase, deal) in enumerate(zip(self._phases, self._deals, strict=True)):
            if phase.samples is None or number < start + phase.samples:
                source, drawn = deal.locate(number - start)
                return Position(index, source, *divmod(drawn, self._rows[index][source]))
            start += phase.samples
        raise DataError(
            f"train_data: sample {number + 1} is asked for but the phases hold {start}; raise "
            "`samples` of the last phase (or leave it out) or lower train_iters"
        )

    def row(self, number: int) -> tuple[int, int, int]:
        """(phase, source, row) of global sample `number`. Raises DataError past the end."""
        phase, source, epoch, index = self.locate(number)
        key = (phase, source, epoch)
        if key not in self._epochs:
            # A first source is seeded as if it were alone in its phase.
            seed = [self._seed, phase, epoch, source] if source else [self._seed, phase, epoch]
            sources = self._phases[phase].sources
            self._epochs[key] = shuffled(
                sources[source], np.random.default_rng(seed), WINDOW_BYTES // len(sources)
            )
            # 8 bytes a row: of each source the epoch that is read, and the next or the last.
            if len(self._epochs) > 2 * len(sources):
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(key)
        return phase, source, int(self._epochs[key][index])
