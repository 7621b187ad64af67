"""A stream of samples cut into chunks of one size, for kernels that carry a state along.

Every sample is cut by itself, so that the cost of a short sample does not depend on the longest.
Only a sample's last chunk holds padding: repeats of its last position, which causality keeps from
everything real.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from megatron_mm import platform
from megatron_mm.config import RunConfig
from megatron_mm.model.segments import Segments


@dataclass(frozen=True)
class ChunkPlan:
    """Chunks are ordered by step, and within a step longest sample first: the samples still
    active at a step are then the first of the step before, and every step is one slice.

    Attributes:
        active: how many samples have a chunk at each step.
        cell_index: int64 [B * C], the stream position in each cell.
        position_index: int64 [T], the cell of each stream position.
    """

    size: int
    active: tuple[int, ...]
    cell_index: torch.Tensor
    position_index: torch.Tensor

    @property
    def steps(self) -> list[slice]:
        """The chunks of each step."""
        ends = [sum(self.active[: i + 1]) for i in range(len(self.active))]
        return [slice(end - count, end) for end, count in zip(ends, self.active, strict=True)]


def chunk_length(longest: int, key_width: int, value_width: int) -> int:
    """Work inside a chunk grows with its length, the number of state updates falls with it.
    Measured on a CPU: 32 is best for heads of up to 64, 64 for Qwen3-Next's 128
    (examples/benchmarks/log.md). A sample of one chunk needs no state at all."""
    return min(longest, 32 if max(key_width, value_width) <= 64 else 64)


@lru_cache(maxsize=32)  # every layer of a stage asks for the same one
def chunk_plan(lengths: tuple[int, ...], size: int, device: torch.device) -> ChunkPlan:
    """Cut samples of these lengths, laid end to end, into chunks of `size`."""
    length = torch.tensor(lengths)
    begin = length.cumsum(0) - length
    chunks = (length + size - 1) // size
    order = torch.argsort(chunks, descending=True, stable=True)
    active = [int((chunks > step).sum()) for step in range(int(chunks.max()))]
    sample = torch.cat([order[:count] for count in active])
    step = torch.repeat_interleave(torch.arange(len(active)), torch.tensor(active))
    inside = step[:, None] * size + torch.arange(size)  # position in the sample
    real = inside < length[sample, None]
    cell = begin[sample, None] + torch.minimum(inside, length[sample, None] - 1)
    position = torch.empty(sum(lengths), dtype=torch.int64)
    position[cell[real]] = real.flatten().nonzero().flatten()
    cell, position = (platform.moved(x, device) for x in (cell.flatten(), position))
    return ChunkPlan(size, tuple(active), cell, position)


class _ToCells(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_T, plan: ChunkPlan):
        ctx.plan = plan
        return x_T.index_select(0, plan.cell_index).view(-1, plan.size, *x_T.shape[1:])

    @staticmethod
    def backward(ctx, d_cells):
        # Padding has no gradient (causality), so there is nothing to add up.
        return d_cells.flatten(0, 1).index_select(0, ctx.plan.position_index), None


class _ToStream(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cells, plan: ChunkPlan):
        ctx.shape, ctx.plan = cells.shape, plan
        return cells.flatten(0, 1).index_select(0, plan.position_index)

    @staticmethod
    def backward(ctx, d_T):
        d_cells = d_T.new_zeros(len(ctx.plan.cell_index), *d_T.shape[1:])
        return d_cells.index_copy_(0, ctx.plan.position_index, d_T).view(ctx.shape), None


def to_cells(x_T: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
    """[T, ...] -> [B, C, ...]. Its backward pass takes for granted that the gradient of padding
    cells is zero, as it is in a causal kernel whose output goes through `to_stream`."""
    return _ToCells.apply(x_T, plan)


def to_stream(cells: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
    """[B, C, ...] -> [T, ...]"""
    return _ToStream.apply(cells, plan)


def delta_rule_flops(run: RunConfig, segments: Segments) -> tuple[float, float]:
    """FLOPs (forward, backward) of `delta_rule.py` over these samples: chunks of C positions,
    `later` of them with a state to begin with. Solving for the inverse is no product and not
    counted."""
    lm = run.model.language
    keys, values = lm.linear_num_key_heads, lm.linear_num_value_heads
    K, V = lm.linear_key_head_dim, lm.linear_value_head_dim
    C = chunk_length(max(segments.sizes), K, V)
    active = chunk_plan(segments.sizes, C, torch.device("cpu")).active
    chunks, later = sum(active), sum(active[1:])
    by_key, by_value = 2.0 * chunks * keys * C * C * K, 2.0 * chunks * values * C * C * V
    state = 2.0 * later * values * C * K * V
    forward = 2 * by_key + 2 * by_value + 2.0 * later * values * C * C * K + 3 * state
    return forward, 4 * by_key + 4 * by_value + 6 * state
