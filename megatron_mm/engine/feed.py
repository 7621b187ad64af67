"""Distributes microbatches to ranks, and raises errors on all ranks together.

One rank of each data-parallel replica reads and broadcasts to the others, so a bad row is seen by
one rank only. Before any schedule starts, all ranks of the job exchange whether there is an error:
either every rank has its batches or every rank raises the same error. Its text is sent only then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from megatron_mm import platform
from megatron_mm.data.batch import Dealt, Microbatch
from megatron_mm.data.loading.loader import TrainLoader
from megatron_mm.engine import parcel
from megatron_mm.errors import DataError, RLError
from megatron_mm.parallel.agreement import largest
from megatron_mm.parallel.groups import Groups

NO_MARK = -(2**63)  # below every fingerprint


def raise_together(
    groups: Groups,
    error: DataError | str | None,
    stop: bool = False,
    fingerprint: int | None = None,
) -> bool:
    """Raises on every rank if any rank has an error. Every rank of the job calls it.

    Args:
        error: this rank's error, if any.
        stop: whether this rank wants to stop.
        fingerprint: on readers, a checksum of the samples in the whole job's step.

    Returns:
        Whether any rank wants to stop.

    Raises:
        DataError: on every rank, the error of the first rank that has one, or if fingerprints of
            readers differ.
    """
    marks = [NO_MARK, NO_MARK] if fingerprint is None else [fingerprint, -fingerprint]
    wrong, stopping, most, least = largest([error is not None, stop, *marks])
    if wrong or most > -least:
        _raise(groups, error, fingerprint)
    return bool(stopping)


def _raise(groups: Groups, error: DataError | str | None, fingerprint: int | None) -> NoReturn:
    notes: list = [None] * groups.world.size()
    dist.all_gather_object(notes, (error, fingerprint), group=groups.world)
    for note, _ in notes:
        if note is not None:
            raise note if isinstance(note, DataError) else DataError(note)
    found = {mark: rank for rank, (_, mark) in enumerate(notes) if mark is not None}
    one, other, *_ = sorted(found.values())
    raise DataError(
        f"ranks {one} and {other} chose different samples for a step: a data file differs "
        "between their machines, or one of them could not read a row; make the files the same "
        "and resume"
    )


def receive[B: Microbatch](
    groups: Groups,
    read: Callable[[], list[B]],
    stop: bool = False,
    fingerprint: Callable[[], int] | None = None,
) -> tuple[list[B], bool]:
    """Returns (the microbatches that the replica's reader read, whether any rank wants to stop).

    Args:
        read: called only on readers; may raise DataError.
        stop: whether this rank wants to stop (a signal arrived).
        fingerprint: called after `read`; see `raise_together`.

    Raises:
        DataError: on every rank of the job, if `read` failed on any reader.
    """
    batches: list[B] = []
    error: DataError | str | None = None
    mark = None
    if groups.is_reader:
        try:
            batches = read()
            mark = fingerprint() if fingerprint else None
        except DataError as problem:
            error = problem
        # Of any kind: other ranks wait for this reader.
        except Exception as problem:
            error = f"reading failed: {type(problem).__name__}: {problem}"
    stopping = raise_together(groups, error, stop, mark)
    return broadcast_batches(groups, batches), stopping


def receive_step(groups: Groups, loader: TrainLoader, stop: bool) -> tuple[list[Any], bool]:
    """Returns the loader's next step as `receive` does. Every rank of the job calls it. If any rank
    wants to stop, the position is as it was.

    Raises:
        DataError: on every rank of the job; the position is as it was.
    """
    position = loader.state_dict()
    try:
        batches, stopping = receive(groups, loader.next_batch, stop, lambda: loader.fingerprint)
    except DataError:
        loader.load_state_dict(position)  # some readers had read, others had not
        raise
    if stopping:
        loader.load_state_dict(position)  # what was read is read again on resume
    elif not groups.is_reader:
        loader.pass_over()
    return batches, stopping


def rounds[T](groups: Groups, chunks: Sequence[Sequence[T]]) -> Iterator[list[Sequence[T]]]:
    """Yields this replica's part of each round of `chunks`: one for every pipeline stage. Empty
    ones fill the last round, where a replica must still keep the others company."""
    dp, stages = groups.pg.dp, groups.pg.pp.size()
    together = dp.size() * stages
    whole = [*chunks, *[()] * (-len(chunks) % together)]
    for first in range(0, len(whole), together):
        yield whole[first : first + together][dp.rank() :: dp.size()]


def sum_over_readers(groups: Groups, values: torch.Tensor) -> torch.Tensor:
    """Returns the sum of values, on the CPU, over the readers of all replicas, on every rank. Every
    rank of the job calls it; what others than readers hand in does not count."""
    total = values.clone() if groups.is_reader else torch.zeros_like(values)
    dist.all_reduce(total, group=groups.world)
    return total


def values_of_readers(groups: Groups, values_K: torch.Tensor) -> torch.Tensor:
    """Returns the values of all replicas, fp32 on the CPU, one replica's after the other, on every
    rank. Every rank of the job calls it; all ranks of a replica hand in the same."""
    group = groups.pg.dp  # the ranks at this place in each replica
    if group.size() == 1:
        return values_K
    device = platform.device()
    counts = torch.zeros(group.size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([len(values_K)], device=device), group=group)
    most = int(counts.max())
    padded = torch.cat((values_K, values_K.new_zeros(most - len(values_K))))
    whole = torch.empty(group.size() * most, device=device)
    dist.all_gather_into_tensor(whole, platform.moved(padded, device), group=group)
    rows = whole.cpu().view(group.size(), most)
    return torch.cat([row[:count] for row, count in zip(rows, counts.tolist(), strict=True)])


def broadcast_from_reader[T](groups: Groups, make: Callable[[], T]) -> T:
    """Calls `make` on the replica's reader and returns its result on all ranks of the replica.

    Raises:
        DataError: on every rank of the job, if it failed on any reader.
    """
    made: Any = None
    error: DataError | str | None = None
    if groups.is_reader:
        try:
            made = make()
        except DataError as problem:
            error = problem
        except RLError as problem:
            error = str(problem)
        except Exception as problem:  # of any kind: other ranks wait
            error = f"{type(problem).__name__}: {problem}"
    raise_together(groups, error)
    return from_reader(groups, made)


def broadcast_batches[B: Microbatch](groups: Groups, batches: Sequence[B]) -> list[B]:
    """Broadcasts the reader's microbatches to its replica. Pixels go to the first stage only, or,
    with an encoder beside the pipeline, to the ranks that the tiles are dealt to."""
    if groups.replica.size() == 1:
        return list(batches)
    envelope = [replace(b, pixels_NCHW=b.pixels_NCHW.new_empty(0)) for b in batches]
    shapes = [tuple(b.pixels_NCHW.shape) for b in batches]
    received, shapes = from_reader(groups, (envelope, shapes))
    if groups.encoder is not None:
        return _deal(groups, batches, received, shapes)
    if not groups.is_first_stage:
        return received
    whole, device = [], platform.device()
    for index, (batch, shape) in enumerate(zip(received, shapes, strict=True)):
        if groups.is_reader:
            pixels = batches[index].pixels_NCHW
        else:
            pixels = torch.empty(shape, dtype=torch.uint8, device=device)
        if groups.pg.tp_cp.size() > 1 and pixels.numel():
            pixels = platform.moved(pixels, device).contiguous()
            dist.broadcast(pixels, group=groups.pg.tp_cp, group_src=0)
        whole.append(replace(batch, pixels_NCHW=pixels))
    return whole


def _deal[B: Microbatch](
    groups: Groups, read: Sequence[B], received: Sequence[B], shapes: Sequence[tuple[int, ...]]
) -> list[B]:
    """Gives every owner its tiles.

    Args:
        read: the microbatches as the reader has them; elsewhere anything.
        received: the same on every rank, without pixels.
        shapes: of their pixels.
    """
    assert groups.encoder is not None  # it has a group of owners
    group, tp, device = groups.encoder.owners, groups.encoder.pg.tp, platform.device()
    owners, me = group.size(), group.rank()
    firsts = [0, *accumulate(shape[0] for shape in shapes)]
    dealt = [Dealt(first, shape[0]) for first, shape in zip(firsts, shapes, strict=False)]
    tile = next((shape[1:] for shape in shapes if shape[0]), (0, 0, 0))
    counts = [sum(len(deal.of(owner, owners)) for deal in dealt) for owner in range(owners)]
    mine = torch.empty(counts[me], *tile, dtype=torch.uint8, device=device)
    if tp.rank() == 0 and sum(counts):
        out = mine.new_empty(0, *tile)
        if groups.is_reader:
            out = platform.moved(
                torch.cat(
                    [
                        batch.pixels_NCHW[_slice(deal.of(owner, owners))]
                        for owner in range(owners)
                        for batch, deal in zip(read, dealt, strict=True)
                        if deal.count
                    ]
                ),
                device,
            )
        sent = counts if groups.is_reader else [0] * owners
        there = [counts[me], *[0] * (owners - 1)]  # the reader is the first of its owners
        dist.all_to_all_single(mine, out, there, sent, group=group)
    if tp.size() > 1 and len(mine):
        dist.broadcast(mine, group=tp, group_src=0)
    each = mine.split([len(deal.of(me, owners)) for deal in dealt])
    return [
        replace(batch, pixels_NCHW=pixels, dealt=deal)
        for batch, pixels, deal in zip(received, each, dealt, strict=True)
    ]


def _slice(places: range) -> slice:
    return slice(places.start, places.stop, places.step)


def from_reader[T](groups: Groups, value: T) -> T:
    """Returns the reader's value on all ranks of the replica: its length is sent, then its bytes.
    On the CPU, where lengths and positions are read."""
    if groups.replica.size() == 1:
        return value
    block = parcel.wrap(value) if groups.is_reader else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor(len(block))
    dist.broadcast(length, group=groups.replica, group_src=0)
    if not groups.is_reader:
        block = block.new_empty(int(length))
    dist.broadcast(block, group=groups.replica, group_src=0)
    return value if groups.is_reader else parcel.unwrap(block)
