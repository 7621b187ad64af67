"""Samples laid end to end, and the rectangle that batched kernels want.

A microbatch is one stream of T tokens. Kernels that mix positions (attention, delta
rule, look) see it as a rectangle [samples, longest, ...], padded on the right, where
causality keeps the padding from reaching any real position.

Lengths and indices are worked out on the CPU, where the batch keeps them, so nothing here
waits for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Segments:
    """Row r of the rectangle holds stream positions starts[r] .. starts[r] + lengths[r].

    Attributes:
        first: number of the sample in row 0.
        origin: position 0 here, in the whole stream.
    """

    starts: torch.Tensor  # int64 [samples], on the CPU
    lengths: torch.Tensor  # int64 [samples], on the CPU; 0 is allowed
    width: int  # of the rectangle: the longest length, at least 1
    total: int  # positions in the stream
    device: torch.device | str = "cpu"  # of what is rearranged
    first: int = 0
    origin: int = 0

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: torch.Tensor, device: torch.device | str = "cpu"
    ) -> Segments:
        lengths = cu_seqlens.diff()
        width = max(1, int(lengths.max()))
        return cls(cu_seqlens[:-1], lengths, width, int(cu_seqlens[-1]), device)

    def within(self, positions: range) -> Segments:
        """The pieces of the samples that lie in a part of the stream."""
        if len(positions) == self.total:
            return self
        starts = self.starts.clamp(min=positions.start)
        lengths = (self.starts + self.lengths).clamp(max=positions.stop) - starts
        (there,) = (lengths > 0).nonzero(as_tuple=True)  # consecutive samples
        first, last = int(there[0]), int(there[-1]) + 1
        starts, lengths = starts[first:last] - positions.start, lengths[first:last]
        total, width = len(positions), int(lengths.max())
        return Segments(starts, lengths, width, total, self.device, first, positions.start)

    @property
    def count(self) -> int:
        return len(self.starts)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The lengths as numbers; one look at the device for all layers."""
        return tuple(self.lengths.tolist())

    @cached_property
    def is_rectangle(self) -> bool:
        """The stream itself already is the rectangle: every row is full, in order."""
        full = self.count * self.width
        return full == self.total == int(self.lengths.sum())

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """int64 [samples that are not empty + 1]: where each begins, then the total. For kernels
        that take the packed stream; some refuse an empty sample."""
        starts = self.starts[self.lengths > 0]
        whole = torch.cat((starts, starts.new_tensor([self.total])))
        return whole.to(self.device, non_blocking=True)

    @cached_property
    def valid(self) -> torch.Tensor:
        """bool [samples, width], on the CPU: which cells hold a position."""
        return torch.arange(self.width) < self.lengths[:, None]

    @cached_property
    def gather_index(self) -> torch.Tensor:
        """int64 [samples * width]: the stream position of each cell; padding repeats one."""
        last = (self.lengths - 1).clamp(min=0)[:, None]
        index = self.starts[:, None] + torch.minimum(torch.arange(self.width), last)
        return index.clamp(max=self.total - 1).flatten().to(self.device, non_blocking=True)

    @cached_property
    def scatter_index(self) -> torch.Tensor:
        """int64 [total]: the cell of each stream position."""
        return self.valid.flatten().nonzero().flatten().to(self.device, non_blocking=True)

    def to_rectangle(self, x: torch.Tensor) -> torch.Tensor:
        """[total, ...] -> [samples, width, ...]"""
        if not self.is_rectangle:
            x = x.index_select(0, self.gather_index)
        return x.reshape(self.count, self.width, *x.shape[1:])

    def to_stream(self, x: torch.Tensor) -> torch.Tensor:
        """[samples, width, ...] -> [total, ...]"""
        x = x.reshape(self.count * self.width, *x.shape[2:])
        return x if self.is_rectangle else x.index_select(0, self.scatter_index)
