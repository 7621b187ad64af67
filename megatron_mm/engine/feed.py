"""Distributes microbatches to ranks, and raises errors on all ranks together.

One rank of each data-parallel replica reads and broadcasts to the others, so a bad row is seen by
one rank only. Before any schedule starts, all ranks of the job exchange errors: either every rank
has its batches or every rank raises the same error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_mm import platform
from megatron_mm.data.batch import Microbatch
from megatron_mm.errors import DataError, RLError
from megatron_mm.parallel.groups import Groups


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
    notes: list = [None] * groups.world.size()
    dist.all_gather_object(notes, (error, stop, fingerprint), group=groups.world)
    for note, _, _ in notes:
        if note is not None:
            raise note if isinstance(note, DataError) else DataError(note)
    found = {mark: rank for rank, (_, _, mark) in enumerate(notes) if mark is not None}
    if len(found) > 1:
        one, other, *_ = sorted(found.values())
        raise DataError(
            f"ranks {one} and {other} chose different samples for a step: a data file differs "
            "between their machines, or one of them could not read a row; make the files the same "
            "and resume"
        )
    return any(wants for _, wants, _ in notes)


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


def broadcast_from_reader[T](groups: Groups, make: Callable[[], T]) -> T:
    """Calls `make` on the replica's reader and returns its result on all ranks of the replica.

    Raises:
        DataError: on every rank of the job, if it failed on any reader.
    """
    made: list = [None]  # the reader's result, then that of every rank
    error: DataError | str | None = None
    if groups.is_reader:
        try:
            made[0] = make()
        except DataError as problem:
            error = problem
        except RLError as problem:
            error = str(problem)
        except Exception as problem:  # of any kind: other ranks wait
            error = f"{type(problem).__name__}: {problem}"
    raise_together(groups, error)
    if groups.replica.size() > 1:
        dist.broadcast_object_list(made, group=groups.replica, group_src=0)
    return made[0]


def broadcast_batches[B: Microbatch](groups: Groups, batches: Sequence[B]) -> list[B]:
    """Broadcasts the reader's microbatches to its replica; pixels go to the first stage only."""
    if groups.replica.size() == 1:
        return list(batches)
    # A new tensor, because pickling a slice would send the whole storage.
    envelope = [replace(b, pixels_NCHW=b.pixels_NCHW.new_empty(0)) for b in batches]
    shapes = [tuple(b.pixels_NCHW.shape) for b in batches]
    message: list = [(envelope, shapes) if groups.is_reader else None]
    dist.broadcast_object_list(message, group=groups.replica, group_src=0)
    received, shapes = message[0]
    if not groups.is_first_stage:
        return received
    whole = []
    for index, (batch, shape) in enumerate(zip(received, shapes, strict=True)):
        pixels = batches[index].pixels_NCHW if groups.is_reader else torch.empty(shape)
        if groups.pg.tp_cp.size() > 1 and pixels.numel():
            pixels = pixels.to(platform.device()).contiguous()
            dist.broadcast(pixels, group=groups.pg.tp_cp, group_src=0)
        whole.append(replace(batch, pixels_NCHW=pixels))
    return whole
