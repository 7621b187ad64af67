"""Gathering what the stages of a replica hold of completions, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_mm.generation.lanes import Completion
from megatron_mm.parallel.groups import Groups


def gather_layers(
    groups: Groups,
    completions: Sequence[Completion],
    layers: Sequence[int],
    held: Callable[[Completion], torch.Tensor],
) -> list[torch.Tensor]:
    """Returns, on the replica's reader, a tensor [..., all layers, ...] of each completion, from
    all stages and in the order of the layers; elsewhere nothing. Every rank of the replica calls
    it.

    Args:
        layers: numbers of the layers that this rank's stages hold.
        held: this rank's tensor of a completion; its dimension 1 is `layers`. It is called where
            there are any.
    """
    mine = None
    if groups.pg.tp_cp.rank() == 0 and layers:
        mine = list(layers), [held(completion) for completion in completions]
    parts: list = [None] * groups.replica.size()
    dist.gather_object(mine, parts if groups.is_reader else None, group=groups.replica, group_dst=0)
    if not groups.is_reader:
        return []
    parts = [part for part in parts if part]
    order = torch.tensor([layer for layers, _ in parts for layer in layers]).argsort()
    return [
        torch.cat(of_one, 1)[:, order]
        for of_one in zip(*(tensors for _, tensors in parts), strict=True)
    ]
