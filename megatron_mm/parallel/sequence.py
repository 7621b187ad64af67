"""Context parallelism: parts of the stream, and exchange of sequence for heads.

The stream of T tokens is cut into equal consecutive parts, one per context-parallel rank,
regardless of sample boundaries; under sequence parallelism each part is cut again over
tensor-parallel ranks. Layers that mix positions (attention, delta rule) exchange their part of the
sequence for a part of the heads and back (Jacobs et al. 2023, "DeepSpeed Ulysses",
arXiv:2309.14509). Every rank then sees whole samples and has equal work for any lengths; samples
need no padding to a multiple of 2 x CP, as a causal zigzag split does.

Shapes: T stream, t = T / CP, h heads of this tensor-parallel rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    all_to_all,
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch.distributed import ProcessGroup


def part(length: int, group: ProcessGroup) -> range:
    """Returns the positions of this rank's part of a sequence cut into equal parts."""
    size = length // group.size()
    return range(group.rank() * size, (group.rank() + 1) * size)


def held_positions(positions: torch.Tensor, length: int, cp: ProcessGroup) -> torch.Tensor:
    """Returns those of `positions` that lie in this rank's part of a sequence. If there are none,
    returns the first position of the part, so that computations on them are never empty."""
    mine = part(length, cp)
    held = positions[(positions >= mine.start) & (positions < mine.stop)]
    return held if len(held) else torch.tensor([mine.start])


def shard(length: int, pg: ProcessGroupCollection) -> range:
    """Returns the positions whose hidden state this rank holds between layers: its tensor-parallel
    part of its context-parallel part."""
    mine = part(length, pg.cp)
    return mine[part(len(mine), pg.tp).start : part(len(mine), pg.tp).stop]


def take(x: torch.Tensor, positions: range) -> torch.Tensor:
    """Returns a view of the given entries of the first dimension."""
    return x[positions.start : positions.stop]


def gather_shards(x_t: torch.Tensor, pg: ProcessGroupCollection) -> torch.Tensor:
    """Gathers the shards of all ranks: [shard, ...] -> [T, ...] on every rank of tp_cp."""
    if pg.tp_cp.size() == 1:
        return x_t
    # As bytes, because gloo has no int16. Ranks of tp_cp are in the order of their shards.
    mine = x_t.contiguous().view(torch.uint8)
    parts = [torch.empty_like(mine) for _ in range(pg.tp_cp.size())]
    dist.all_gather(parts, mine, group=pg.tp_cp)
    return torch.cat(parts).view(x_t.dtype)


def both_ways(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Sums over a group, and backward sums what its ranks ask of the sum: each of them has a part
    of the terms and computes a part of what follows."""
    return copy_to_tensor_model_parallel_region(
        reduce_from_tensor_model_parallel_region(x, group=group), group=group
    )


def sequence_to_heads(x_th: torch.Tensor, cp: ProcessGroup) -> torch.Tensor:
    """Exchanges [t, h, ...] of all heads for [T, h / CP, ...] of this rank's. Differentiable."""
    if cp.size() == 1:
        return x_th
    tokens, heads = x_th.shape[:2]
    parts = x_th.reshape(tokens, cp.size(), heads // cp.size(), *x_th.shape[2:])
    return all_to_all(cp, parts.transpose(0, 1).flatten(0, 1).contiguous())


def heads_to_sequence(x_Th: torch.Tensor, cp: ProcessGroup) -> torch.Tensor:
    """Exchanges [T, h / CP, ...] of this rank's heads for [t, h, ...] of all. Differentiable."""
    if cp.size() == 1:
        return x_Th
    received = all_to_all(cp, x_Th.contiguous())
    parts = received.reshape(cp.size(), -1, *received.shape[1:]).transpose(0, 1)
    return parts.flatten(1, 2)
