"""Blocks of tensors, gathered from all ranks to rank 0."""

from __future__ import annotations

import torch
import torch.distributed as dist

# name -> (shape of the whole, place of the block in it, the block)
Blocks = dict[str, tuple[tuple[int, ...], tuple[slice, ...], torch.Tensor]]


def at_rank_0(mine: Blocks) -> list[Blocks]:
    """Returns every rank's blocks on rank 0, [] elsewhere.

    They travel as arrays: a pickled tensor is a small file with headers of its own, and reading
    hundreds of them on every rank took longer than the training between.
    """
    arrays = {
        name: (*where, block.detach().cpu().numpy()) for name, (*where, block) in mine.items()
    }
    parts = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(arrays, parts)
    return [
        {name: (*where, torch.from_numpy(block)) for name, (*where, block) in part.items()}
        for part in parts or []
    ]
