"""Who may look at which patch of a vision memory: samples of a stream against their patches.

A position sees the patches of all images before it in its sample, so what a sample sees is a
staircase. Between two images all positions see the same patches, the first ones of the sample:
such a run is a step, and attention inside a step needs no mask. The n-th steps of all samples are
a round, computed together. There are as many rounds as a sample has images at most, and nothing
here or in a look is larger than O(T + M).

Shapes: T stream, M memory patches, S positions that see any patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, zip_longest
from typing import NamedTuple

import torch

from megatron_mm import platform
from megatron_mm.model.segments import Bounds, Buckets, Segments, similar


class Step(NamedTuple):
    """A run of positions of a sample that see its first `patches` patches and no others."""

    start: int  # position in the part of the stream that looks
    queries: int
    patches: int


Stairs = list[Step]  # of one sample; empty if it sees nothing


@dataclass(frozen=True)
class Rectangle:
    """A round of a group of samples, for batched kernels."""

    queries: Segments
    patches: int  # of each row, padding included
    mask: torch.Tensor | None  # bool [rows, 1, 1, patches]: no padding; None if there is none

    @property
    def rows(self) -> int:
        return self.queries.count


@dataclass(frozen=True)
class Group:
    """Samples of similar size. Those with the most steps come first, so that a round is of the
    first rows."""

    patches: Segments
    rounds: list[Rectangle]


@dataclass(frozen=True)
class Packed:
    """All rounds, for kernels that take the streams as they are.

    Attributes:
        positions: int64 [S], round by round.
        counts: positions of each round.
        bounds: of each round, its queries against the whole memory.
    """

    positions: torch.Tensor
    counts: list[int]
    bounds: list[Bounds]


@dataclass(frozen=True)
class MemoryMap:
    """Who may look at which patch of one memory.

    Attributes:
        local: the pieces of samples that look here.
        patches: of every sample of the stream, in the memory.
        stairs: of each sample of `local`.
        coordinates_M2: float32 (y, x), 0..1.
    """

    local: Segments
    patches: Segments
    stairs: list[Stairs]
    coordinates_M2: torch.Tensor

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
            visible_M2: [from, to) of the whole stream for each patch, ordered by sample and inside
                it by `from`; on the CPU.
            rows: length of the padded memory; the rows past M belong to no sample.

        Raises:
            ValueError: the patches are in another order.
        """
        ends = stream.starts + stream.lengths
        owner = torch.searchsorted(ends, visible_M2[:, 1].contiguous())
        _check_order(owner, visible_M2)
        padded = coordinates_M2.new_zeros(rows, 2)
        padded[: len(visible_M2)] = coordinates_M2
        return cls.by_owner(stream, local, owner, visible_M2[:, 0], padded)

    @classmethod
    def by_owner(
        cls,
        stream: Segments,
        local: Segments,
        owner_M: torch.Tensor,
        visible_from_M: torch.Tensor,
        padded_M2: torch.Tensor,
    ) -> MemoryMap:
        """
        Args:
            owner_M: the sample of each patch, ascending.
            visible_from_M: the first position of the whole stream that sees it, ascending inside a
                sample.
            padded_M2: coordinates of the padded memory.
        """
        lengths = torch.bincount(owner_M, minlength=stream.count)
        starts, width = lengths.cumsum(0) - lengths, max(1, int(lengths.max()))
        patches = Segments(starts, lengths, width, len(padded_M2), local.device)
        return cls(local, patches, _stairs(local, owner_M, visible_from_M), padded_M2)

    @cached_property
    def here(self) -> Segments:
        """The patches of each sample of `local`."""
        samples = torch.arange(self.local.first, self.local.first + self.local.count)
        return self.patches.pick(samples)

    @cached_property
    def groups(self) -> list[Group]:
        samples = [[(step.queries, step.patches) for step in stairs] for stairs in self.stairs]
        return [self._group(group.tolist()) for group in similar(samples)]

    def _group(self, samples: list[int]) -> Group:
        samples.sort(key=lambda n: -len(self.stairs[n]))
        seen = [self.stairs[n][-1].patches for n in samples]
        patches = self.here.pick(torch.tensor(samples)).shortened(torch.tensor(seen))
        rounds = zip_longest(*(self.stairs[n] for n in samples))
        return Group(patches, [self._rectangle([s for s in steps if s]) for steps in rounds])

    def _rectangle(self, steps: Sequence[Step]) -> Rectangle:
        starts, queries, patches = torch.tensor(steps).unbind(1)
        local, most = self.local, int(patches.max())
        mask = None
        if int(patches.min()) < most:
            mask = (torch.arange(most) < patches[:, None])[:, None, None]
            mask = platform.moved(mask, local.device)
        width = int(queries.max())
        return Rectangle(Segments(starts, queries, width, local.total, local.device), most, mask)

    @cached_property
    def buckets(self) -> Buckets:
        """The queries of all rectangles, group by group."""
        return Buckets([rectangle.queries for group in self.groups for rectangle in group.rounds])

    @cached_property
    def packed(self) -> Packed:
        first = self.here.starts.tolist()
        rounds = [
            [(first[n], step) for n, step in enumerate(steps) if step]
            for steps in zip_longest(*self.stairs)
        ]
        positions = [
            torch.arange(step.start, step.start + step.queries)
            for steps in rounds
            for _, step in steps
        ]
        device = self.local.device
        ends = [_ends(steps, self.patches.total) for steps in rounds]
        there = platform.moved(torch.cat(ends, 1), device)  # one copy for all
        bounds = [
            Bounds(*both.unbind(), *here.diff().amax(1).tolist())
            for both, here in zip(there.split([x.shape[1] for x in ends], 1), ends, strict=True)
        ]
        counts = [sum(step.queries for _, step in steps) for steps in rounds]
        return Packed(platform.moved(torch.cat(positions), device), counts, bounds)


def _check_order(owner_M: torch.Tensor, visible_M2: torch.Tensor) -> None:
    later = owner_M.diff()
    wrong = (later < 0) | ((later == 0) & (visible_M2[:, 0].diff() < 0))
    if wrong.any():
        patch = int(wrong.nonzero()[0]) + 1
        before, this = visible_M2[patch - 1 : patch + 1].tolist()
        raise ValueError(
            f"patch {patch} of a memory is seen from position {this[0]} to {this[1]}, the one "
            f"before it from {before[0]} to {before[1]}; order patches by sample, and inside a "
            "sample as its images stand in it"
        )


def _stairs(local: Segments, owner_M: torch.Tensor, visible_from_M: torch.Tensor) -> list[Stairs]:
    """The steps of every sample of `local`; `owner_M` counts in the whole stream."""
    pairs = torch.stack((owner_M, visible_from_M), 1)
    images, count = torch.unique_consecutive(pairs, dim=0, return_counts=True)
    table = zip(*images.T.tolist(), count.tolist(), strict=True)
    starts, lengths = local.starts.tolist(), local.lengths.tolist()
    found: list[Stairs] = [[] for _ in starts]
    for owner, group in groupby(table, key=lambda image: image[0]):
        n = owner - local.first
        if not 0 <= n < local.count:
            continue
        of_sample, patches = list(group), 0
        end = starts[n] + lengths[n]
        since = [start - local.origin for _, start, _ in of_sample]
        for (_, _, more), start, until in zip(of_sample, since, [*since[1:], end], strict=True):
            patches += more
            start, until = max(start, starts[n]), min(until, end)
            if start < until:
                found[n].append(Step(start, until - start, patches))
    return found


def _ends(steps: Sequence[tuple[int, Step]], rows: int) -> torch.Tensor:
    """int32 [2, segments + 1], on the CPU: where the queries and the patches of each segment of a
    round end. Patches that nobody sees in it are segments without queries, so that none is copied.

    Args:
        steps: (first patch of the sample, its step), in the order of the memory.
        rows: of the memory.
    """
    queries, patches = [0], [0]
    for first, step in steps:
        if first > patches[-1]:
            queries.append(queries[-1])
            patches.append(first)
        queries.append(queries[-1] + step.queries)
        patches.append(first + step.patches)
    if rows > patches[-1]:
        queries.append(queries[-1])
        patches.append(rows)
    return torch.tensor([queries, patches], dtype=torch.int32)
