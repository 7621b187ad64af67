"""How microbatches reach the ranks, and how ranks agree before they compute.

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
from megatron_mm.data.errors import DataError
from megatron_mm.parallel.groups import Groups


def agree(groups: Groups, error: str | None, stop: bool = False) -> bool:
    """Whether any rank wants to stop; every rank must call it.

    Raises:
        DataError: on every rank, the first rank's error, if any rank has one.
    """
    notes: list = [None] * groups.world.size()
    dist.all_gather_object(notes, (error, stop), group=groups.world)
    for note, _ in notes:
        if note is not None:
            raise DataError(note)
    return any(wants for _, wants in notes)


def receive(
    groups: Groups, read: Callable[[], list[Microbatch]], stop: bool = False
) -> tuple[list[Microbatch], bool]:
    """The microbatches that the replica's reader read, and whether any rank wants to stop.

    Args:
        read: called on the reader only; may raise DataError.
        stop: this rank's wish (a signal arrived).
    Raises:
        DataError: on every rank of the job, if any reader's `read` raised it.
    """
    batches, error = [], None
    if groups.is_reader:
        try:
            batches = read()
        except DataError as problem:
            error = str(problem)
        # Nobody may be left waiting for a reader that failed, for whatever reason.
        except Exception as problem:
            error = f"reading failed: {type(problem).__name__}: {problem}"
    stopping = agree(groups, error, stop)
    return share(groups, batches), stopping


def share(groups: Groups, batches: Sequence[Microbatch]) -> list[Microbatch]:
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
