"""Who may look at which patch of a vision memory: samples of a stream against their patches.

Shapes: M memory patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_mm import platform
from megatron_mm.model.segments import Buckets, Segments, similar


@dataclass(frozen=True)
class View:
    """Samples of similar size that look: who may see which patch, as one rectangle."""

    stream: Segments
    patches: Segments  # of the memory; the same samples
    position: torch.Tensor  # int64 [samples, width of the stream], in the whole stream
    visible_from: torch.Tensor  # int64 [samples, width of the memory], likewise

    @property
    def visible(self) -> torch.Tensor:
        """bool [samples, width of the stream, width of the memory]"""
        return self.position[:, :, None] >= self.visible_from[:, None, :]

    @cached_property
    def sees(self) -> torch.Tensor:
        """bool [samples, 1, width of the stream, 1]: the positions that see any patch."""
        first = self.visible_from.amin(-1, keepdim=True)
        return (self.position >= first)[:, None, :, None]

    @cached_property
    def mask(self) -> torch.Tensor:
        """bool [samples, 1, width of the stream, width of the memory] for attention. Softmax
        over nothing is NaN, so positions that see nothing may see all; `sees` mends it after."""
        return self.visible.unsqueeze(1) | ~self.sees


@dataclass(frozen=True)
class MemoryMap:
    """Who may look at which patch of one memory. Samples without patches are in no view.

    Attributes:
        samples: int64, those of each view, counted in `local`.
        patches: of every sample of the stream, in the memory.
    """

    local: Segments
    patches: Segments
    samples: list[torch.Tensor]
    views: list[View]
    coordinates_M2: torch.Tensor  # float32 (y, x), 0..1

    @cached_property
    def buckets(self) -> Buckets:
        return Buckets([view.stream for view in self.views])

    @classmethod
    def build(
        cls,
        stream: Segments,
        local: Segments,
        visible_M2: torch.Tensor,
        coordinates_M2: torch.Tensor,
        rows: int,
    ) -> MemoryMap:
        """
        Args:
            stream, local: all samples, and the pieces of them that look here.
            visible_M2: [from, to) of the whole stream for each patch, patches ordered by sample;
                on the CPU.
            rows: length of the padded memory; the rows past M belong to no sample.
        """
        ends = stream.starts + stream.lengths
        sample = torch.searchsorted(ends, visible_M2[:, 1].contiguous())
        here = slice(local.first, local.first + local.count)
        lengths = torch.bincount(sample, minlength=stream.count)
        starts, width = lengths.cumsum(0) - lengths, max(1, int(lengths.max()))
        whole = Segments(starts, lengths, width, rows, local.device)
        memory = Segments(starts[here], lengths[here], width, rows, local.device)
        groups = similar(torch.stack((local.lengths, memory.lengths), 1))
        views = [
            _view(local.pick(group), memory.pick(group), local.origin, visible_M2[:, 0], ends[-1])
            for group in groups
        ]
        patches = len(visible_M2)
        padded = coordinates_M2.new_zeros(rows, 2)
        padded[:patches] = coordinates_M2
        return cls(local, whole, groups, views, padded)


def _view(
    stream: Segments,
    patches: Segments,
    origin: int,
    visible_from_M: torch.Tensor,
    never: torch.Tensor,
) -> View:
    index = patches.starts[:, None] + torch.arange(patches.width)
    visible_from = visible_from_M[index.clamp(max=len(visible_from_M) - 1)]
    visible_from = torch.where(patches.valid, visible_from, never)
    position = origin + stream.starts[:, None] + torch.arange(stream.width)
    position = position.clamp(max=never - 1)  # padding of the rectangle sees what the last sees
    moved = (platform.moved(x, stream.device) for x in (position, visible_from))
    return View(stream, patches, *moved)
