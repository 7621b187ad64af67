"""Samplers: choose the samples of each step's microbatches.

A step is a pure function of the sampler's state and the order, the same on every rank. The number
of data-parallel ranks only decides, in `assign`, which rank computes which microbatch. A saved
state therefore resumes on any number of ranks, with no sample lost or repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_mm.data.loading.order import Order
from megatron_mm.data.loading.packing import pack, spread
from megatron_mm.data.sample import Size
from megatron_mm.errors import DataError, EndOfData

# Size of the buffer beyond the step's own samples, in packs: a share of the step, and at least 8.
SPARE_SHARE, MIN_SPARE = 0.5, 8
# Consecutive bad rows after which the data is considered unusable.
MAX_BAD_RUN = 1000


class Step(NamedTuple):
    """Samples of one step of the whole job."""

    microbatches: list[list[int]]  # sample numbers of each microbatch
    loads: list[Size] | None  # cost of each microbatch, if known
    skipped: list[str]  # bad rows passed over, with the reason


class InOrder:
    """Sampler of a fixed number of samples per microbatch, in order. State: `consumed_samples`."""

    def __init__(self, order: Order, num_microbatches: int, micro_batch_size: int) -> None:
        self._order = order
        self._count, self._size = num_microbatches, micro_batch_size
        self._consumed = 0

    def next_step(self) -> Step:
        """Returns the next step.

        Raises:
            DataError: fewer samples than a whole step are left.
        """
        numbers, size = self.pass_over(), self._size
        return Step([[*numbers[n : n + size]] for n in range(0, len(numbers), size)], None, [])

    def pass_over(self) -> range:
        """Advances by a step and returns its samples. Raises like `next_step`."""
        start = self._consumed
        end = start + self._count * self._size
        self._order.locate(end - 1)
        self._consumed = end
        return range(start, end)

    def state_dict(self) -> dict[str, Any]:
        return {"consumed_samples": self._consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        held = state.get("held")
        if held:
            raise DataError(
                f"the checkpoint was packing and holds {len(held)} samples that were read but not "
                "trained on; set packing, or use finetune to start the data anew"
            )
        self._consumed = int(state["consumed_samples"])


class Packed:
    """Sampler that fills microbatches with whole samples, up to `capacity` tokens and `most_tiles`.

    State: `position`, the next sample to read; `held`, the samples read but not yet trained on;
    `consumed_samples`, the number trained on or left out.

    Args:
        measure: number -> size of a sample or why it is bad, the same on every rank.
        skip_bad: leave bad samples out instead of raising.
    """

    def __init__(
        self,
        order: Order,
        num_microbatches: int,
        capacity: int,
        measure: Callable[[int], Size | str],
        skip_bad: bool,
        most_tiles: int | None = None,
    ) -> None:
        self._order, self._measure, self._skip_bad = order, measure, skip_bad
        self._count, self._capacity, self._most_tiles = num_microbatches, capacity, most_tiles
        spare = max(int(SPARE_SHARE * num_microbatches), MIN_SPARE)
        self._wanted_tokens = (num_microbatches + spare) * capacity
        self._position = 0
        self._held: list[int] = []
        self._sizes: dict[int, Size] = {}

    def next_step(self) -> Step:
        """Returns the next step. The last steps of finite phases hold what is left.

        Raises:
            EndOfData: no samples are left.
            DataError: a sample is bad.
        """
        skipped = self._fill()
        if not self._held:
            raise EndOfData(
                f"train_data: the phases' {self._order.length} samples are used up; raise "
                "`samples` of the last phase (or leave it out) or lower train_iters"
            )
        sizes = [self._sizes[number] for number in self._held]
        bins = pack(sizes, self._count, self._capacity, self._most_tiles)
        microbatches = [[self._held[i] for i in bin_] for bin_ in bins]
        loads = [
            Size(sum(sizes[i].tokens for i in bin_), sum(sizes[i].tiles for i in bin_))
            for bin_ in bins
        ]
        taken = {number for numbers in microbatches for number in numbers}
        self._held = [number for number in self._held if number not in taken]
        self._sizes = {number: self._sizes[number] for number in self._held}
        return Step(microbatches, loads, skipped)

    def _fill(self) -> list[str]:
        """Measures samples until enough are held. Returns the bad rows passed over."""
        skipped = self._still_good()
        run = 0
        tokens = sum(self._sizes[number].tokens for number in self._held)
        end = self._order.length
        while tokens < self._wanted_tokens and (end is None or self._position < end):
            found = self._measure(self._position)
            if isinstance(found, str):
                run += 1
                if not self._skip_bad:
                    raise DataError(found)
                if run == MAX_BAD_RUN:
                    raise DataError(f"{run} rows one after the other are bad, the last: {found}")
                skipped.append(found)
            else:
                run = 0
                tokens += found.tokens
                self._held.append(self._position)
                self._sizes[self._position] = found
            self._position += 1
        return skipped

    def _still_good(self) -> list[str]:
        """Measures held samples again after a resume. Returns those that are bad by now, which are
        held no more."""
        skipped: list[str] = []
        for number in self._held:
            if number in self._sizes:
                continue
            found = self._measure(number)
            if isinstance(found, Size):
                self._sizes[number] = found
            elif self._skip_bad:
                skipped.append(found)
            else:
                raise DataError(found)
        self._held = [number for number in self._held if number in self._sizes]
        return skipped

    def state_dict(self) -> dict[str, Any]:
        return {
            "consumed_samples": self._position - len(self._held),
            "position": self._position,
            "held": list(self._held),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state, also one saved without packing."""
        self._position = int(state.get("position", state["consumed_samples"]))
        self._held = [int(number) for number in state.get("held", [])]
        held = set(self._held)
        self._sizes = {n: size for n, size in self._sizes.items() if n in held}


def assign(step: Step, num_ranks: int) -> list[list[int]]:
    """Returns the microbatches (indices) of each rank, equally many for all: in turn, or balanced
    if their loads are known."""
    if step.loads is None:
        return [list(range(rank, len(step.microbatches), num_ranks)) for rank in range(num_ranks)]
    return spread(step.loads, num_ranks)
