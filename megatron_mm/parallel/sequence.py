"""Context parallelism: who holds which part of the stream, and trading it for heads.

The stream of T tokens is cut into equal consecutive parts, one for each context-parallel
rank, whatever samples lie in them; under sequence parallelism each part is cut again over
tensor-parallel ranks. Layers that mix positions (attention, delta rule) trade their part
of the sequence for a part of their heads and back (Jacobs et al. 2023, "DeepSpeed Ulysses",
arXiv 2309.14509): every rank then sees whole samples, with equal work whatever their
lengths, so a sample need not be padded to 2 x CP as a causal zigzag split would ask.

Shapes: T stream, t = T / CP, h heads of this tensor-parallel rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import all_to_all
from torch.distributed import ProcessGroup


def part(length: int, group: ProcessGroup) -> range:
    """The positions of this rank's equal part of a sequence."""
    size = length // group.size()
    return range(group.rank() * size, (group.rank() + 1) * size)


def held_positions(positions: torch.Tensor, length: int, cp: ProcessGroup) -> torch.Tensor:
    """Those of some positions of a sequence that lie in this rank's part. If none does, the first
    of the part: what is computed for them is then never empty."""
    mine = part(length, cp)
    held = positions[(positions >= mine.start) & (positions < mine.stop)]
    return held if len(held) else torch.tensor([mine.start])


def shard(length: int, pg: ProcessGroupCollection) -> range:
    """The positions whose hidden state this rank holds between layers: of the context
    part, its tensor-parallel part."""
    mine = part(length, pg.cp)
    return mine[part(len(mine), pg.tp).start : part(len(mine), pg.tp).stop]


def take(x: torch.Tensor, positions: range) -> torch.Tensor:
    """A view of those entries of the first dimension."""
    return x[positions.start : positions.stop]


def gather_shards(x_t: torch.Tensor, pg: ProcessGroupCollection) -> torch.Tensor:
    """[t, ...] of what this rank's `shard` holds -> [T, ...] on every rank of tp_cp."""
    if pg.tp_cp.size() == 1:
        return x_t
    # As bytes: gloo knows no int16. Ranks of tp_cp are in the order of their shards.
    mine = x_t.contiguous().view(torch.uint8)
    parts = [torch.empty_like(mine) for _ in range(pg.tp_cp.size())]
    dist.all_gather(parts, mine, group=pg.tp_cp)
    return torch.cat(parts).view(x_t.dtype)


def sequence_to_heads(x_th: torch.Tensor, cp: ProcessGroup) -> torch.Tensor:
    """[t, h, ...] of all heads -> [T, h / CP, ...] of this rank's heads; differentiable."""
    if cp.size() == 1:
        return x_th
    tokens, heads = x_th.shape[:2]
    parts = x_th.reshape(tokens, cp.size(), heads // cp.size(), *x_th.shape[2:])
    return all_to_all(cp, parts.transpose(0, 1).flatten(0, 1).contiguous())


def heads_to_sequence(x_Th: torch.Tensor, cp: ProcessGroup) -> torch.Tensor:
    """[T, h / CP, ...] of this rank's heads -> [t, h, ...] of all heads; differentiable."""
    if cp.size() == 1:
        return x_Th
    received = all_to_all(cp, x_Th.contiguous())
    parts = received.reshape(cp.size(), -1, *received.shape[1:]).transpose(0, 1)
    return parts.flatten(1, 2)
