"""Loader of preference pairs: resumable, and independent of the layout, as that of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_mm.config import RunConfig, token_multiple
from megatron_mm.data.loading.loader import TrainLoader
from megatron_mm.data.loading.order import Order
from megatron_mm.data.loading.reader import Reader
from megatron_mm.data.loading.steps import InOrder, Step
from megatron_mm.data.sample import Size
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.errors import DataError
from megatron_mm.preference.pairs import Pair, build_pair, pair_size
from megatron_mm.rl.completion_batch import CompletionBatch, completion_batch, token_bins


class PairReader(Reader):
    """Builds pairs from rows."""

    def _training(self, row: dict[str, Any], where: str, folder: Path) -> Pair:
        return build_pair(self.builder, row, where, folder)

    def _measured(self, row: dict[str, Any], where: str, folder: Path) -> Size:
        return pair_size(self.builder, row, where, folder)


class PairBins(InOrder):
    """Sampler of a fixed number of pairs a step, in as few microbatches of at most `capacity`
    tokens and `most_tiles` as they come to. State: `consumed_samples`.

    Args:
        pairs: of a step of the whole job.
        multiple: what the number of microbatches is rounded up to; the last ones may be empty.
        measure: number -> size of a pair or why it is bad, the same on every rank.
        skip_bad: leave bad pairs out instead of raising.
    """

    def __init__(
        self,
        order: Order,
        pairs: int,
        capacity: int,
        multiple: int,
        measure: Callable[[int], Size | str],
        skip_bad: bool,
        most_tiles: int | None,
    ) -> None:
        super().__init__(order, pairs, 1)
        self._capacity, self._multiple, self._most_tiles = capacity, multiple, most_tiles
        self._measure, self._skip_bad = measure, skip_bad

    def next_step(self) -> Step:
        """Returns the next step.

        Raises:
            DataError: a pair is bad, or fewer than a whole step are left.
        """
        found = {number: self._measure(number) for number in self.pass_over()}
        skipped = [size for size in found.values() if isinstance(size, str)]
        if skipped and not self._skip_bad:
            raise DataError(skipped[0])
        sizes = {n: size for n, size in found.items() if isinstance(size, Size)}
        numbers = [*sizes]
        bins = token_bins([*sizes.values()], self._capacity, self._most_tiles)
        bins += [[] for _ in range(-max(len(bins), 1) % self._multiple + (not bins))]
        microbatches = [[numbers[i] for i in inside] for inside in bins]
        loads = [
            Size(sum(sizes[n].tokens for n in inside), sum(sizes[n].tiles for n in inside))
            for inside in microbatches
        ]
        return Step(microbatches, loads, skipped)


class PairLoader(TrainLoader):
    """Loads the microbatches of pairs of one data-parallel rank. A step has `global_batch_size`
    pairs. A microbatch has `micro_batch_size` of them or, with packing, as many as fit into
    micro_batch_size x 2 x seq_length tokens.

    Attributes:
        started_from: see `reference.open_reference`; saved with the position in the data.
    """

    reader_type = PairReader

    def __init__(
        self,
        run: RunConfig,
        tokenizer: Tokenizer,
        *,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        self.started_from: dict[str, str] | None = None
        self._reward_sum, self._reward_count = 0.0, 0
        super().__init__(
            run,
            tokenizer,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
            pad_multiple=token_multiple(run),
        )

    @property
    def delta(self) -> float:
        """The mean implicit reward of both sides of all pairs trained on so far, the same on every
        rank; 0 before the first step."""
        return self._reward_sum / self._reward_count if self._reward_count else 0.0

    def take_rewards(self, mean: float, pairs: int) -> None:
        """Takes the mean reward of both sides of some pairs into `delta`."""
        self._reward_sum += mean * pairs
        self._reward_count += pairs

    def state_dict(self) -> dict[str, Any]:
        """See `TrainLoader.state_dict`."""
        return super().state_dict() | {
            "reward_sum": self._reward_sum,
            "reward_count": self._reward_count,
            "started_from": self.started_from,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `TrainLoader.load_state_dict`."""
        super().load_state_dict(state)
        self._reward_sum, self._reward_count = state["reward_sum"], state["reward_count"]
        self.started_from = state["started_from"]

    def _make_sampler(self, run: RunConfig) -> InOrder:
        training, parallel = run.training, run.parallel
        if not run.data.packing:
            total = self.num_microbatches * self._size
            return InOrder(self._order, total, training.micro_batch_size)
        interleaved = (parallel.virtual_pipeline_model_parallel_size or 1) > 1
        rounds = parallel.pipeline_model_parallel_size if interleaved else 1
        return PairBins(
            self._order,
            training.global_batch_size,
            training.micro_batch_size * 2 * run.data.seq_length,
            self._size * rounds,
            self._sizes,
            self._skip_bad,
            run.data.max_pack_tiles,
        )

    def _join(self, made: Sequence[Pair], skipped: list[str]) -> CompletionBatch:
        builder = self._reader.builder
        samples = [*chain.from_iterable(made)]
        batch = completion_batch(
            samples,
            range(len(samples)),
            settings=builder.settings,
            pad_id=builder.tokenizer.pad_id,
            pad_multiple=self._pad_multiple,
        )
        return replace(batch, samples=[pair.chosen.where for pair in made], skipped=skipped)
