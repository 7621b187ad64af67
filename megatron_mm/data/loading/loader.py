"""Loader of a rank's microbatches: resumable, and independent of the layout."""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_mm.config.settings import RunConfig
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.collate import collate
from megatron_mm.data.loading.curriculum import open_curriculum
from megatron_mm.data.loading.reader import Labels, Place, Reader, in_worker
from megatron_mm.data.loading.sizes import Sizes
from megatron_mm.data.loading.steps import InOrder, Packed, assign
from megatron_mm.data.loading.workers import WorkerPool
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.errors import DataError


@dataclass
class _Upcoming:
    """Step whose samples are chosen, and which workers may be reading."""

    places: list[list[Place]]  # of each of this rank's microbatches
    skipped: list[str]  # rows left out that this rank reports
    after: dict[str, Any]  # state after training on the step
    fingerprint: int = 0  # of the whole step, the same on every rank
    tickets: list[int] = field(default_factory=list)  # of each microbatch, if workers read it
    error: DataError | None = None  # raised when the step's turn comes


class TrainLoader:
    """Loads the microbatches of one data-parallel rank.

    Without packing, microbatch m of rank r holds the global samples
    `consumed + (m * data_parallel_size + r) * micro_batch_size + [0, micro_batch_size)`, so the
    samples of a step do not depend on the layout. With packing, a step consists of
    global_batch_size / micro_batch_size packs (see `steps.py`), also the same on any layout,
    assigned to ranks so that tokens and tiles are balanced.

    With `num_workers` the next step is read while this one is trained on; the microbatches are
    bitwise identical. `state_dict` returns the state after the last step that `next_batch`
    returned, whatever has been read ahead. Workers start with the first step and end with `close`
    or the process.

    Args:
        labels: finds the skills of positions (`Reader`); None: microbatches have no `skill_T`.
    Raises:
        DataError: at construction, settings or files cannot be used.
    """

    reader_type: type[Reader] = Reader

    def __init__(
        self,
        run: RunConfig,
        tokenizer: Tokenizer,
        *,
        data_parallel_rank: int,
        data_parallel_size: int,
        pad_multiple: int = 1,
        consumed_samples: int = 0,
        labels: Labels | None = None,
    ) -> None:
        training, data = run.training, run.data
        per_step = training.micro_batch_size * data_parallel_size
        if per_step < 1 or training.global_batch_size % per_step or not training.global_batch_size:
            raise DataError(
                f"global_batch_size {training.global_batch_size} is not a multiple of "
                f"micro_batch_size {training.micro_batch_size} x data parallel size "
                f"{data_parallel_size} = {per_step}"
            )
        self.num_microbatches = training.global_batch_size // per_step
        self._rank, self._size = data_parallel_rank, data_parallel_size
        self._pad_multiple = pad_multiple
        self._num_workers = data.num_workers
        self._skip_bad = data.on_bad_sample == "skip"
        curriculum = open_curriculum(data.train_data, training.seed)
        self._order, self.order = curriculum.order, curriculum.description
        self._place = curriculum.place
        self._labelled = labels is not None
        self._reader = self.reader_type(run, tokenizer, curriculum.sources, labels=labels)
        self._sizes = Sizes(self._order, self._reader, self._place)
        self._sampler = self._make_sampler(run)
        self.fingerprint = 0  # of the step that next_batch returned last, over the whole job
        self._pool: WorkerPool | None = None
        self._ahead: deque[_Upcoming] = deque()
        self._go_to({"consumed_samples": consumed_samples})

    def _make_sampler(self, run: RunConfig) -> InOrder | Packed:
        total, size = self.num_microbatches * self._size, run.training.micro_batch_size
        if run.data.packing:
            capacity = size * run.data.seq_length
            most = run.data.max_pack_tiles
            return Packed(self._order, total, capacity, self._sizes, self._skip_bad, most)
        return InOrder(self._order, total, size)

    @property
    def consumed_samples(self) -> int:
        """Number of samples trained on or left out."""
        return self._state["consumed_samples"]

    @consumed_samples.setter
    def consumed_samples(self, value: int) -> None:
        self._go_to({"consumed_samples": value})

    def state_dict(self) -> dict[str, Any]:
        """JSON values, the same on every rank that reads."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a state. Packing may differ from the saved run if no held sample is lost.

        Raises:
            DataError: a held sample would be lost.
        """
        self._go_to(state)

    def _go_to(self, state: dict[str, Any]) -> None:
        self._drop_ahead()
        self._sampler.load_state_dict(state)
        self._state = self._sampler.state_dict()

    def next_batch(self) -> list[Microbatch]:
        """Returns this rank's microbatches of the next step. With `on_bad_sample: skip` bad rows
        are left out and named in `Microbatch.skipped`.

        Raises:
            DataError: a row is bad, or no samples are left; the position stays as it was.
        """
        if self._num_workers and self._pool is None:
            arguments = self._reader.for_workers(self._num_workers)
            self._pool = self._sizes.pool = WorkerPool(self._num_workers, in_worker, arguments)
        try:
            step = self._ahead.popleft() if self._ahead else self._choose_step()
            if self._pool is not None and step.error is None:
                self._ahead.append(self._choose_step())
            if step.error is not None:
                raise step.error
            batch = [self._microbatch(step, m) for m in range(len(step.places))]
        except BaseException:
            self._go_to(self._state)
            raise
        self._state, self.fingerprint = step.after, step.fingerprint
        return batch

    def pass_over(self) -> None:
        """Advances by a step that this replica's reader has read. With packing the state is known
        only on readers, which save it."""
        if isinstance(self._sampler, InOrder):
            self._sampler.pass_over()
            self._state = self._sampler.state_dict()

    def close(self) -> None:
        """Ends the workers, if there are any."""
        self._drop_ahead()
        if self._pool is not None:
            self._pool.close()
            self._pool = self._sizes.pool = None

    def _choose_step(self) -> _Upcoming:
        try:
            step = self._sampler.next_step()
        except DataError as error:
            return _Upcoming([], [], {}, error=error)
        mine = assign(step, self._size)[self._rank]
        places = [[self._place(n) for n in step.microbatches[m]] for m in mine]
        skipped = step.skipped if self._rank == 0 else []
        after = self._sampler.state_dict()
        whole = json.dumps([step.microbatches, len(step.skipped), after])
        upcoming = _Upcoming(places, skipped, after, zlib.crc32(whole.encode()))
        if self._pool is not None:
            for microbatch in places:
                at = self._reader.describe(microbatch)
                upcoming.tickets.append(self._pool.submit("build", microbatch, at))
        return upcoming

    def _microbatch(self, step: _Upcoming, number: int) -> Microbatch:
        if self._pool is not None:
            found = self._pool.result(step.tickets[number])
        else:
            found = self._reader.build(step.places[number])
        bad = [text for text in found if isinstance(text, str)]
        if bad and not self._skip_bad:
            raise DataError(bad[0])
        good = [made for made in found if not isinstance(made, str)]
        return self._join(good, [*(step.skipped if number == 0 else []), *bad])

    def _join(self, made: Sequence[Any], skipped: list[str]) -> Microbatch:
        return collate(
            made,
            settings=self._reader.builder.settings,
            pad_id=self._reader.builder.tokenizer.pad_id,
            pad_multiple=self._pad_multiple,
            skipped=skipped,
            labelled=self._labelled,
        )

    def _drop_ahead(self) -> None:
        if self._pool is not None:
            self._pool.forget([ticket for step in self._ahead for ticket in step.tickets])
        self._ahead.clear()
        self._sizes.forget()
