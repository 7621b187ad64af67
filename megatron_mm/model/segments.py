"""Samples laid end to end, and the rectangles that batched kernels want.

A microbatch is one stream of T tokens. Attention and looks see it as rectangles [samples,
longest, ...], padded on the right, where causality keeps the padding from reaching any real
position. Samples of similar size share a rectangle, so that a long sample does not make the short
ones as expensive as itself.

Lengths and indices are worked out on the CPU, where the batch keeps them, so nothing here
waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from megatron_mm import platform

# Padding of a rectangle: at most WASTE times the pairs (query, key) of its samples, or FREE_PAIRS
# pairs, which cost no more than another call of the kernel.
WASTE, FREE_PAIRS = 0.5, 1 << 14
CHUNK = 64  # positions that flash-linear-attention's kernels compute together


Box = tuple[int, int, int]  # rows, queries, keys of a rectangle


def similar(samples: Sequence[Sequence[tuple[int, int]]]) -> list[torch.Tensor]:
    """Groups samples whose attention is computed together: int64 indices, each group ascending.
    Samples without any pair are in no group.

    Args:
        samples: for each its rounds of attention, (queries, keys). The n-th rounds of a group are
            one rectangle, whose rows are the samples that have an n-th round.
    """
    groups: list[list[int]] = []
    boxes: list[Box] = []  # of the last group, by round
    held = 0  # pairs in it
    pairs = [sum(q * k for q, k in rounds) for rounds in samples]

    def size(n: int) -> tuple[int, int, int]:
        queries, keys = zip(*samples[n], strict=True)
        return max(keys), len(keys), sum(queries)

    for n in sorted((n for n, count in enumerate(pairs) if count), key=size, reverse=True):
        grown = _grown(boxes, samples[n])
        padding = sum(rows * q * k for rows, q, k in grown) - held - pairs[n]
        if groups and padding <= max(WASTE * (held + pairs[n]), FREE_PAIRS):
            groups[-1].append(n)
            boxes, held = grown, held + pairs[n]
        else:
            groups.append([n])
            boxes, held = _grown([], samples[n]), pairs[n]
    return [torch.tensor(sorted(group)) for group in groups]


def _grown(boxes: Sequence[Box], rounds: Sequence[tuple[int, int]]) -> list[Box]:
    """The rectangles of a group with one sample more."""
    grown = [*boxes, *[(0, 0, 0)] * (len(rounds) - len(boxes))]
    for place, (q, k) in enumerate(rounds):
        rows, queries, keys = grown[place]
        grown[place] = rows + 1, max(queries, q), max(keys, k)
    return grown


@dataclass(frozen=True)
class Bounds:
    """Segments of a packed stream of queries against those of a packed stream of keys, for kernels
    that take streams as they are. The n-th queries attend to the n-th keys.

    Attributes:
        queries, keys: int32 [segments + 1], on the device: from 0 to the end of the stream.
        most_queries, most_keys: of a segment.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    most_queries: int
    most_keys: int


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
    device: torch.device | str = "cpu"  # of the tensors that are rearranged
    first: int = 0
    origin: int = 0

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: torch.Tensor, device: torch.device | str = "cpu"
    ) -> Segments:
        """Samples between the boundaries, int64 [samples + 1], on the CPU as all lengths here;
        `device` is that of the tensors to be rearranged."""
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

    def pick(self, samples: torch.Tensor) -> Segments:
        """The segments of these samples alone, in the given order, in the same stream."""
        lengths = self.lengths[samples]
        width = max(1, int(lengths.max()))
        return Segments(self.starts[samples], lengths, width, self.total, self.device)

    def shortened(self, lengths: torch.Tensor) -> Segments:
        """The first positions of each segment."""
        return replace(self, lengths=lengths, width=max(1, int(lengths.max())))

    @cached_property
    def buckets(self) -> Buckets:
        """The samples in groups of similar length, for attention inside each sample."""
        groups = similar([[(length, length)] for length in self.sizes])
        return Buckets([self.pick(group) for group in groups])

    @property
    def count(self) -> int:
        return len(self.starts)

    @property
    def cells(self) -> int:
        return self.count * self.width

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The lengths as numbers."""
        return tuple(self.lengths.tolist())

    @cached_property
    def is_rectangle(self) -> bool:
        """The stream itself already is the rectangle: every row is full, in order."""
        if not self.cells == self.total == int(self.lengths.sum()):
            return False
        return bool((self.starts == torch.arange(self.count) * self.width).all())

    @cached_property
    def cu_seqlens_cpu(self) -> torch.Tensor:
        """int64 [samples that are not empty + 1], on the CPU: where each begins, then the total.
        For kernels that take the packed stream; some refuse an empty sample."""
        starts = self.starts[self.lengths > 0]
        return torch.cat((starts, starts.new_tensor([self.total])))

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """`cu_seqlens_cpu` on the device."""
        return platform.moved(self.cu_seqlens_cpu, self.device)

    @cached_property
    def chunks(self) -> torch.Tensor:
        """int64 [chunks of CHUNK positions, 2], on the device: which of the samples that are not
        empty each is in, and its number there (flash-linear-attention's `chunk_indices`)."""
        counts = -(-self.cu_seqlens_cpu.diff() // CHUNK)
        samples = torch.arange(len(counts)).repeat_interleave(counts)
        numbers = torch.arange(len(samples)) - (counts.cumsum(0) - counts)[samples]
        return platform.moved(torch.stack((samples, numbers), 1), self.device)

    @cached_property
    def bounds(self) -> Bounds:
        """Bounds of every sample against itself."""
        boundaries = self.cu_seqlens.int()
        return Bounds(boundaries, boundaries, self.width, self.width)

    @cached_property
    def valid(self) -> torch.Tensor:
        """bool [samples, width], on the CPU: which cells hold a position."""
        return torch.arange(self.width) < self.lengths[:, None]

    @cached_property
    def gather_index(self) -> torch.Tensor:
        """int64 [samples * width]: the stream position of each cell; padding repeats one."""
        last = (self.lengths - 1).clamp(min=0)[:, None]
        index = self.starts[:, None] + torch.minimum(torch.arange(self.width), last)
        return platform.moved(index.clamp(max=self.total - 1).flatten(), self.device)

    def to_rectangle(self, x: torch.Tensor) -> torch.Tensor:
        """[total, ...] -> [samples, width, ...]; of one sample it is a view."""
        if not self.is_rectangle:
            if self.sizes == (self.width,):
                x = x.narrow(0, int(self.starts[0]), self.width)
            else:
                x = x.index_select(0, self.gather_index)
        return x.reshape(self.count, self.width, *x.shape[1:])


@dataclass(frozen=True)
class Buckets:
    """Samples of one stream in groups, each of which is computed as a rectangle."""

    parts: Sequence[Segments]

    @cached_property
    def _places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int64, positions of the stream in order, and the cell of each among those of all
        parts."""
        before, cell = 0, torch.full((self.parts[0].total,), -1)
        for part in self.parts:
            every = part.starts[:, None] + torch.arange(part.width)
            cell[every[part.valid]] = before + part.valid.flatten().nonzero().flatten()
            before += part.cells
        (positions,) = (cell >= 0).nonzero(as_tuple=True)
        device = self.parts[0].device
        return tuple(platform.moved(x, device) for x in (positions, cell[positions]))

    def join(self, rectangles: Sequence[torch.Tensor]) -> torch.Tensor:
        """[samples, width, ...] of each part to the stream [total, ...]; zero where no part has
        the position."""
        cells = [rectangle.flatten(0, 1) for rectangle in rectangles]
        if len(cells) == 1 and self.parts[0].is_rectangle:
            return cells[0]
        positions, of_position = self._places
        found = torch.cat(cells).index_select(0, of_position)
        if len(positions) == self.parts[0].total:
            return found
        whole = found.new_zeros(self.parts[0].total, *found.shape[1:])
        return whole.index_copy(0, positions, found)
