"""Samples laid end to end, and the rectangle that batched kernels want.

A microbatch is one stream of T tokens. Kernels that mix positions (attention, delta
rule, look) see it as a rectangle [samples, longest, ...], padded on the right, where
causality keeps the padding from reaching any real position.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Segments:
    """Row r of the rectangle holds stream positions starts[r] .. starts[r] + lengths[r]."""

    starts: torch.Tensor  # int64 [samples]
    lengths: torch.Tensor  # int64 [samples]; 0 is allowed
    width: int  # of the rectangle: the longest length, at least 1
    total: int  # positions in the stream

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: torch.Tensor) -> Segments:
        lengths = cu_seqlens.diff()
        return cls(cu_seqlens[:-1], lengths, max(1, int(lengths.max())), int(cu_seqlens[-1]))

    @property
    def count(self) -> int:
        return len(self.starts)

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
        return torch.cat((starts, starts.new_tensor([self.total])))

    @cached_property
    def valid(self) -> torch.Tensor:
        """bool [samples, width]: which cells hold a position."""
        columns = torch.arange(self.width, device=self.starts.device)
        return columns < self.lengths[:, None]

    @cached_property
    def gather_index(self) -> torch.Tensor:
        """int64 [samples * width]: the stream position of each cell; padding repeats one."""
        columns = torch.arange(self.width, device=self.starts.device)
        last = (self.lengths - 1).clamp(min=0)[:, None]
        index = self.starts[:, None] + torch.minimum(columns, last)
        return index.clamp(max=self.total - 1).flatten()

    @cached_property
    def scatter_index(self) -> torch.Tensor:
        """int64 [total]: the cell of each stream position."""
        return self.valid.flatten().nonzero().flatten()

    def to_rectangle(self, x: torch.Tensor) -> torch.Tensor:
        """[total, ...] -> [samples, width, ...]"""
        if not self.is_rectangle:
            x = x.index_select(0, self.gather_index)
        return x.reshape(self.count, self.width, *x.shape[1:])

    def to_stream(self, x: torch.Tensor) -> torch.Tensor:
        """[samples, width, ...] -> [total, ...]"""
        x = x.reshape(self.count * self.width, *x.shape[2:])
        return x if self.is_rectangle else x.index_select(0, self.scatter_index)
