"""Phases of training data as one numbered sequence of rows."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mm.config.settings import DataPhase, DataSource
from megatron_mm.data.files.rows import RowFiles, open_row_files
from megatron_mm.data.loading.order import Order, PhaseSize
from megatron_mm.data.loading.reader import Place
from megatron_mm.data.loading.shuffle import RowGroupCache, cache_bytes
from megatron_mm.errors import DataError


@dataclass(frozen=True)
class Curriculum:
    """Sequence of all training samples.

    Attributes:
        first_source: index into `sources` of each phase's first source.
        description: JSON values that determine which sample a number stands for. A saved position
            resumes with the right samples only if it is unchanged. Of each source it has the name,
            the weight, the rows and a checksum of its files' names and row groups, which decide the
            shuffle. The end of the last phase moves no sample and is left out.
    """

    order: Order
    sources: list[RowFiles]
    first_source: list[int]
    description: dict[str, Any]

    def place(self, number: int) -> Place:
        """Returns the place of sample `number` (from 0).

        Raises:
            EndOfData: the phases end before it.
        """
        phase, source, row = self.order.row(number)
        return Place(self.first_source[phase] + source, row)


def open_curriculum(phases: Sequence[DataPhase], seed: int) -> Curriculum:
    """Opens the files of all phases.

    Raises:
        DataError: phases or files cannot be used.
    """
    if not phases:
        raise DataError("train_data has 0 phases; name at least 1 JSONL or parquet file")
    sources: list[RowFiles] = []
    sizes, first_source, described = [], [], []
    cache = RowGroupCache()
    for number, phase in enumerate(phases, start=1):
        first_source.append(len(sources))
        parts = _parts(phase)
        opened = [open_row_files(part.path, cache) for part in parts]
        weights = tuple(part.weight for part in parts)
        sizes.append(PhaseSize(tuple(s.row_groups for s in opened), weights, phase.samples))
        cache.limit = max(cache.limit, cache_bytes(sizes[-1].sources))
        described.append(
            [
                phase.samples if number < len(phases) else None,
                [
                    [Path(part.path).name, part.weight, len(source), _checksum(source)]
                    for part, source in zip(parts, opened, strict=True)
                ],
            ]
        )
        sources += opened
    description = {"seed": seed, "phases": described}
    return Curriculum(Order(sizes, seed), sources, first_source, description)


def _checksum(source: RowFiles) -> int:
    files = [(file.path.name, file.row_groups) for file in source.files]
    return zlib.crc32(json.dumps(files).encode())


def _parts(phase: DataPhase) -> list[DataSource]:
    if phase.mixture and phase.path:
        raise DataError(f"train_data: {phase.path} stands beside a mixture; use one of the two")
    return phase.mixture or [DataSource(phase.path)]
