"""Numbers that all ranks of the job exchange: always as many, over the device's own group.

Pickled objects would cost a gather of lengths and one of texts over the CPU's network, which at a
thousand ranks takes longer than what they say.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_mm import platform


def largest(values: Sequence[int]) -> list[int]:
    """Returns the largest over all ranks of each value. Every rank of the job calls it, with as
    many. The host waits for the device once."""
    mine = platform.moved(torch.tensor(values, dtype=torch.int64), platform.device())
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    return mine.tolist()


def everyone(values: Sequence[float]) -> list[list[float]]:
    """Returns the values of every rank, exactly, in fp64. Every rank of the job calls it, with as
    many. The host waits for the device once."""
    mine = platform.moved(torch.tensor(values, dtype=torch.float64), platform.device())
    whole = mine.new_empty(dist.get_world_size() * len(values))
    dist.all_gather_into_tensor(whole, mine)
    return whole.view(-1, len(values)).tolist()


def everyones(values: torch.Tensor) -> torch.Tensor:
    """Returns the int64 values [n] of every rank as [ranks, n], on the CPU. Every rank of the job
    calls it, with as many, on its device. The host waits for the device once."""
    whole = values.new_empty(dist.get_world_size() * len(values))
    dist.all_gather_into_tensor(whole, values.contiguous())
    return whole.view(-1, len(values)).cpu()
