"""Rows of a file, read by all replicas in rounds: of microbatches as many as keep every rank busy.

What ranks learn of their rows goes to rank 0, round by round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mm.config import token_multiple
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.collate import collate
from megatron_mm.data.files.rows import RowFiles, open_row_files
from megatron_mm.data.loading.reader import reading
from megatron_mm.data.loading.shuffle import RowGroupCache
from megatron_mm.data.sample import Sample, SampleBuilder
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import broadcast_from_reader, receive, rounds
from megatron_mm.errors import DataError
from megatron_mm.mimic.recorded import place_of

BATCH_SIZE = 16


@dataclass(frozen=True)
class Rows:
    """The rows that are read.

    Args:
        data: files, or patterns of files.
        samples: how many; None: all. In an order drawn from `seed`.
    """

    data: Sequence[str]
    samples: int | None = None
    batch_size: int = BATCH_SIZE
    seed: int = 1


def open_rows(rows: Rows) -> tuple[RowFiles, list[int]]:
    """Opens the rows, and returns them with the numbers of those that are read.

    Raises:
        DataError: a file cannot be read, or two have one name.
    """
    cache = RowGroupCache()
    held = [file for path in rows.data for file in open_row_files(path, cache).files]
    files = RowFiles(held, [0, *accumulate(map(len, held))])
    names = [place_of(file.where(0))[0] for file in held]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(
            f"{', '.join(rows.data)}: {len(twice)} files have the name {twice[0]}, by which routes "
            "are found again; give each a name of its own"
        )
    generator = torch.Generator().manual_seed(rows.seed)
    order = torch.randperm(len(files), generator=generator)[: rows.samples].tolist()
    return files, sorted(order)


# (row, "file:row", its sample) -> what the reader adds to a microbatch
Seeing = Callable[[dict[str, Any], str, Sample], Any]


def read_rounds(
    engine: Engine,
    tokenizer: Tokenizer,
    rows: Rows,
    see: Seeing,
    join: Callable[[Microbatch, Sequence[Any]], Microbatch],
) -> Iterator[tuple[list[Microbatch], list[bool]]]:
    """Yields this replica's microbatches of each round, and which of them are new: the others hold
    a row again, to keep company. Every rank of the job runs it.

    Args:
        see: called on readers, for every row.
        join: makes a microbatch of one and of what `see` returned for its samples.
    Raises:
        DataError: on every rank, if a row is bad.
    """
    groups, size = engine.groups, rows.batch_size
    held: list[RowFiles] = []
    builder = SampleBuilder(engine.run, tokenizer)

    def plan() -> list[int]:
        files, order = open_rows(rows)
        held.append(files)
        return order

    order = broadcast_from_reader(groups, plan)
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    for mine in rounds(groups, chunks):

        def read(mine: Sequence[Sequence[int]] = mine) -> list[Microbatch]:
            return [_batch(chunk or order[:1]) for chunk in mine]

        def _batch(numbers: Sequence[int]) -> Microbatch:
            made, seen = [], []
            for number in numbers:
                file, index = held[0].locate(number)
                where = file.where(index)
                with reading(where):
                    row = file[index]
                    made.append(builder.training(row, where, Path(file.folder)))
                    seen.append(see(row, where, made[-1]))
            batch = collate(
                made,
                settings=builder.settings,
                pad_id=tokenizer.pad_id,
                pad_multiple=token_multiple(engine.run),
            )
            return join(batch, seen)

        batches, _ = receive(groups, read)
        yield batches, [bool(chunk) for chunk in mine]


def to_rank_0(engine: Engine, found: Any) -> list[Any]:
    """Returns what every rank found, on rank 0; elsewhere nothing. Every rank calls it."""
    world = engine.groups.world
    parts: list[Any] | None = [None] * world.size() if dist.get_rank() == 0 else None
    dist.gather_object(found, parts, dst=0, group=world)
    return parts or []
