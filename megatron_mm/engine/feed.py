"""The way of microbatches to the ranks, and the agreement of ranks before they compute.

One rank of each data-parallel replica reads; the others receive what it read. A bad row
is therefore seen by one rank only, so before any schedule starts all ranks of the job
compare notes: either everyone has a batch, or everyone raises the same error.
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
    groups: Groups, error: DataError | str | None, stop: bool = False, plan: int | None = None
) -> bool:
    """Whether any rank wants to stop; every rank must call it.

    Args:
        plan: of a reader, what it takes the whole job's step to be made of.
    Raises:
        DataError: on every rank, the first rank's error, if any rank has one, or if readers
            have different plans.
    """
    notes: list = [None] * groups.world.size()
    dist.all_gather_object(notes, (error, stop, plan), group=groups.world)
    for note, _, _ in notes:
        if note is not None:
            raise note if isinstance(note, DataError) else DataError(note)
    plans = {plan: rank for rank, (_, _, plan) in enumerate(notes) if plan is not None}
    if len(plans) > 1:
        one, other, *_ = sorted(plans.values())
        raise DataError(
            f"ranks {one} and {other} plan different steps: a data file differs between their "
            "machines, or one of them could not read a row; make the files the same and resume"
        )
    return any(wants for _, wants, _ in notes)


def receive(
    groups: Groups,
    read: Callable[[], list[Microbatch]],
    stop: bool = False,
    plan: Callable[[], int] | None = None,
) -> tuple[list[Microbatch], bool]:
    """Returns the microbatches that the replica's reader read, and whether any rank wants to stop.

    Args:
        read: called on the reader only; may raise DataError.
        stop: this rank's wish (a signal arrived).
        plan: called after `read`; see `raise_together`.
    Raises:
        DataError: on every rank of the job, if any reader's `read` raised it.
    """
    batches, error, planned = [], None, None
    if groups.is_reader:
        try:
            batches = read()
            planned = plan() if plan else None
        except DataError as problem:
            error = problem
        # Nobody may be left waiting for a reader that failed, for whatever reason.
        except Exception as problem:
            error = f"reading failed: {type(problem).__name__}: {problem}"
    stopping = raise_together(groups, error, stop, planned)
    return broadcast_batches(groups, batches), stopping


def broadcast_from_reader[T](groups: Groups, make: Callable[[], T]) -> T:
    """Returns the value that `make` gives on the replica's reader, on all ranks of the replica.

    Raises:
        DataError: on every rank of the job, if it failed on any reader.
    """
    value, error = None, None
    if groups.is_reader:
        try:
            value = make()
        except DataError as problem:
            error = problem
        except RLError as problem:
            error = str(problem)
        except Exception as problem:  # nobody may be left waiting
            error = f"{type(problem).__name__}: {problem}"
    raise_together(groups, error)
    if groups.replica.size() == 1:
        return value
    message = [value]
    dist.broadcast_object_list(message, group=groups.replica, group_src=0)
    return message[0]


def broadcast_batches(groups: Groups, batches: Sequence[Microbatch]) -> list[Microbatch]:
    """Hand the reader's microbatches to its replica; pixels travel to the first stage only."""
    if groups.replica.size() == 1:
        return list(batches)
    # A new tensor, not a slice: pickling a slice would send all that it is a slice of.
    envelope = [replace(b, pixels_NCHW=b.pixels_NCHW.new_empty(0)) for b in batches]
    shapes = [tuple(b.pixels_NCHW.shape) for b in batches]
    message = [(envelope, shapes) if groups.is_reader else None]
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
