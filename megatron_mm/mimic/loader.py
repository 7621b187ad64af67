"""Rows with what a teacher recorded for them: readers and loaders of fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_mm.config import RunConfig
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.files.rows import RowFiles
from megatron_mm.data.loading.loader import TrainLoader
from megatron_mm.data.loading.reader import Labels, Reader
from megatron_mm.data.sample import CACHE_BYTES, Sample
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.errors import DataError
from megatron_mm.mimic.batch import MimicBatch, TopExperts, TopTokens
from megatron_mm.mimic.route_file import AlignedRow, RouteFile
from megatron_mm.mimic.settings import MimicConfig


class SeenSample(NamedTuple):
    """A sample that a teacher has seen."""

    sample: Sample
    seen: AlignedRow


def open_routes(run: RunConfig) -> RouteFile:
    """Opens the file of routes that the settings name.

    Raises:
        DataError: it cannot be used, or lacks what the settings distil.
    """
    mimic = run.section(MimicConfig)
    assert mimic.mimic_routes is not None  # nothing asks otherwise
    routes = RouteFile(mimic.mimic_routes, mimic.mimic_row_shuffle_seed)
    if mimic.mimic_kd_coeff and not routes.answers:
        raise DataError(
            f"{routes.name}: 0 next tokens are recorded at a position, mimic_kd_coeff is "
            f"{mimic.mimic_kd_coeff}; record with --answers 64, or set it to 0"
        )
    here, there = run.model.language.vocab_size, routes.teacher.vocab_size
    if mimic.mimic_kd_coeff and there > here:
        raise DataError(
            f"{routes.name}: the teacher's vocab_size is {there}, this model's is {here}; next "
            "tokens can be distilled into a model with all of them, set mimic_kd_coeff to 0"
        )
    return routes


class MimicReader(Reader):
    """Builds samples from rows, with what the teacher of the settings says of them.

    Raises:
        DataError: at construction, for a file of routes that cannot be used.
    """

    def __init__(
        self,
        run: RunConfig,
        tokenizer: Tokenizer,
        sources: Sequence[RowFiles],
        cache_bytes: int = CACHE_BYTES,
        labels: Labels | None = None,
    ) -> None:
        super().__init__(run, tokenizer, sources, cache_bytes, labels)
        self.routes = open_routes(run)
        self._distils = run.section(MimicConfig).mimic_kd_coeff > 0

    def _training(self, row: dict[str, Any], where: str, folder: Path) -> SeenSample:
        sample = super()._training(row, where, folder)
        tokenizer = self.builder.tokenizer
        seen = self.routes.aligned(row, where, sample, tokenizer, answers=self._distils)
        return SeenSample(sample, seen)


class MimicLoader(TrainLoader):
    """A loader whose microbatches hold a teacher's routes; to be mixed into one of rows."""

    reader_type = MimicReader

    @property
    def routes(self) -> RouteFile:
        assert isinstance(self._reader, MimicReader)  # `reader_type` made it
        return self._reader.routes

    def _join(self, made: Sequence[SeenSample], skipped: list[str]) -> MimicBatch:
        batch = super()._join([one.sample for one in made], skipped)
        return with_teacher(batch, [one.seen for one in made], self.routes)


def with_teacher(batch: Microbatch, seen: Sequence[AlignedRow], routes: RouteFile) -> MimicBatch:
    """Lays what the teacher says of each sample where the sample lies in the microbatch."""
    length, layers = len(batch.tokens_T), len(routes.layers)
    begins = batch.cu_seqlens.tolist()
    none = torch.zeros(0, dtype=torch.int64)
    pairs = zip(seen, begins, strict=False)  # the tail is a segment of its own
    positions_P = torch.cat([none, *(one.positions_P + begin for one, begin in pairs)])

    def spread(values: list[torch.Tensor], *shape: int, dtype: torch.dtype) -> torch.Tensor:
        whole = torch.zeros(length, *shape, dtype=dtype)
        if values:
            whole[positions_P] = torch.cat(values)
        return whole

    k = seen[0].experts_PLk.shape[2] if seen else 1
    experts_TLk = spread([one.experts_PLk for one in seen], layers, k, dtype=torch.int16)
    weights_TLk = spread([one.weights_PLk for one in seen], layers, k, dtype=torch.float16)
    held = {
        layer: TopExperts(experts_TLk[:, n].contiguous(), weights_TLk[:, n].contiguous())
        for n, layer in enumerate(routes.layers)
    }
    answers = None
    if seen and len(seen[0].answers_Pn):
        n = routes.answers
        answers = TopTokens(
            spread([one.answers_Pn for one in seen], n, dtype=torch.int32),
            spread([one.logprobs_Pn for one in seen], n, dtype=torch.float32),
        )
    return MimicBatch(**vars(batch), teacher_routes=held, teacher_answers=answers)
