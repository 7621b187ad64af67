"""Which samples a rank trains on next: resumable, and the same under any layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_mm.config.schema import RunConfig
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.collate import collate
from megatron_mm.data.errors import DataError
from megatron_mm.data.rows import Rows
from megatron_mm.data.sample import Sample, SampleBuilder
from megatron_mm.data.tokenizer import Tokenizer


class PhaseSize(NamedTuple):
    rows: int  # rows in the file
    samples: int | None  # samples to draw in all; None: without end


class Position(NamedTuple):
    phase: int
    epoch: int
    index: int  # within the epoch's shuffled order


def locate(consumed: int, phases: Sequence[PhaseSize]) -> Position:
    """Where global sample number `consumed` (from 0) lies. Raises DataError past the end."""
    start = 0
    for number, phase in enumerate(phases):
        if phase.samples is None or consumed < start + phase.samples:
            epoch, index = divmod(consumed - start, phase.rows)
            return Position(number, epoch, index)
        start += phase.samples
    raise DataError(
        f"train_data: sample {consumed + 1} is asked for but the phases hold {start}; raise "
        "`samples` of the last phase (or leave it out) or lower train_iters"
    )


class TrainLoader:
    """The microbatches of one data-parallel rank.

    Microbatch m of rank r holds the global samples
    `consumed + (m * data_parallel_size + r) * micro_batch_size + [0, micro_batch_size)`, so
    the samples of a step depend on neither the layout nor the rank. The only state is
    `consumed_samples`. Raises DataError at construction for unusable settings or files.
    """

    def __init__(
        self,
        run: RunConfig,
        tokenizer: Tokenizer,
        *,
        data_parallel_rank: int,
        data_parallel_size: int,
        pad_multiple: int = 1,
        consumed_samples: int = 0,
    ) -> None:
        training, data = run.training, run.data
        per_step = training.micro_batch_size * data_parallel_size
        if per_step < 1 or training.global_batch_size % per_step or not training.global_batch_size:
            raise DataError(
                f"global_batch_size {training.global_batch_size} is not a multiple of "
                f"micro_batch_size {training.micro_batch_size} x data parallel size "
                f"{data_parallel_size} = {per_step}"
            )
        if not data.train_data:
            raise DataError("train_data has 0 phases; name at least 1 JSONL file")
        self.num_microbatches = training.global_batch_size // per_step
        self._global_batch_size = training.global_batch_size
        self._micro_batch_size = training.micro_batch_size
        self._rank, self._size = data_parallel_rank, data_parallel_size
        self._pad_multiple = pad_multiple
        self._seed = training.seed
        self._skip_bad = data.on_bad_sample == "skip"
        self._builder = SampleBuilder(run, tokenizer)
        self._rows = [Rows(phase.path) for phase in data.train_data]
        self._phases = [
            PhaseSize(len(rows), phase.samples)
            for rows, phase in zip(self._rows, data.train_data, strict=True)
        ]
        for number, phase in enumerate(self._phases, start=1):
            if phase.samples is not None and phase.samples < 1:
                raise DataError(
                    f"train_data: phase {number} has samples {phase.samples}; use at least 1"
                )
            if phase.samples is None and number < len(self._phases):
                raise DataError(
                    f"train_data: phase {number} of {len(self._phases)} has no `samples`; only "
                    "the last phase may be endless"
                )
        self._order: tuple[tuple[int, int], np.ndarray] | None = None
        self.consumed_samples = consumed_samples

    def next_batch(self) -> list[Microbatch]:
        """This rank's microbatches of the next step. A bad row raises DataError, or under
        `on_bad_sample: skip` is left out and named in `Microbatch.skipped`."""
        base, size = self.consumed_samples, self._micro_batch_size
        # Every rank checks the whole step, so that none is left waiting for one that failed.
        locate(base + self._global_batch_size - 1, self._phases)
        batch = []
        for m in range(self.num_microbatches):
            start = base + (m * self._size + self._rank) * size
            batch.append(self._microbatch(range(start, start + size)))
        self.consumed_samples = base + self._global_batch_size
        return batch

    def state_dict(self) -> dict[str, int]:
        return {"consumed_samples": self.consumed_samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consumed_samples = int(state["consumed_samples"])

    def _microbatch(self, numbers: range) -> Microbatch:
        samples: list[Sample] = []
        skipped: list[str] = []
        for number in numbers:
            phase, index = self._row_index(number)
            rows = self._rows[phase]
            try:
                where = rows.where(index)
                samples.append(self._builder.training(rows[index], where, rows.folder))
            except DataError as error:
                if not self._skip_bad:
                    raise
                skipped.append(str(error))
        return collate(
            samples,
            settings=self._builder.settings,
            pad_id=self._builder.tokenizer.pad_id,
            pad_multiple=self._pad_multiple,
            skipped=skipped,
        )

    def _row_index(self, number: int) -> tuple[int, int]:
        phase, epoch, index = locate(number, self._phases)
        if self._order is None or self._order[0] != (phase, epoch):
            generator = np.random.default_rng([self._seed, phase, epoch])
            self._order = ((phase, epoch), generator.permutation(self._phases[phase].rows))
        return phase, int(self._order[1][index])
