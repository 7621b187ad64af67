"""How tensors of Hugging Face's lie in ours: rearrangements that know their own inverse.

Every transform says two things about a tensor of ours: the shapes of theirs, and, where rows
change places, in which order theirs follow in ours. `ours` and `theirs` are both made of
that one description, so neither can be right while the other is wrong: a permutation is
inverted by sorting it. No value is ever computed with, only moved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """One tensor of theirs is one of ours as it stands. Base of those that do more."""

    def shapes(self, shape: Shape) -> list[Shape]:
        """Of their tensors, for ours of `shape`. Raises ValueError where `shape` cannot be one."""
        return [shape]

    def order(self) -> torch.Tensor | None:
        """int64: for each of our rows, its number among the rows of theirs laid end to end.
        None where the elements keep their order."""
        return None

    def ours(
        self, theirs: Sequence[torch.Tensor], shape: Shape, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Our tensor of `shape`, made of theirs; in `out` if that is given."""
        order = self.order()
        if order is None and out is not None:
            sizes = [tensor.numel() for tensor in theirs]
            for part, tensor in zip(out.view(-1).split(sizes), theirs, strict=True):
                part.copy_(tensor.reshape(-1))
            return out
        flat = theirs[0].reshape(-1)
        if len(theirs) > 1:
            flat = torch.cat([tensor.reshape(-1) for tensor in theirs])
        if order is not None:
            flat = flat.view(len(order), -1).index_select(0, order)
        return flat.view(shape) if out is None else out.copy_(flat.view(shape))

    def theirs(self, ours: torch.Tensor) -> list[torch.Tensor]:
        """Their tensors, made of ours. The inverse of `ours`."""
        shapes = self.shapes(tuple(ours.shape))
        flat, order = ours.reshape(-1), self.order()
        if order is not None:
            flat = flat.view(len(order), -1).index_select(0, order.argsort()).view(-1)
        parts = flat.split([math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


@dataclass(frozen=True)
class Stacked(Transform):
    """`count` tensors of theirs are ours at index 0, 1, ... of our first dimension."""

    count: int

    def shapes(self, shape: Shape) -> list[Shape]:
        if shape[0] != self.count:
            raise ValueError(f"{self.count} tensors do not make {list(shape)}")
        return [shape[1:]] * self.count


@dataclass(frozen=True)
class Joined(Transform):
    """Our first two dimensions are one of theirs: gate above up in a single tensor."""

    def shapes(self, shape: Shape) -> list[Shape]:
        return [(shape[0] * shape[1], *shape[2:])]


@dataclass(frozen=True)
class ByHead(Transform):
    """Rows that are grouped by head in ours, and by kind (all queries, all keys, ...) in theirs.

    Attributes:
        heads: how many there are.
        rows: of one head, for each kind in turn.
        fused: their kinds are parts of a single tensor, one below the other.
        unit: their tensor has a further dimension of size 1 after the first.
    """

    heads: int
    rows: tuple[int, ...]
    fused: bool = False
    unit: bool = False

    def shapes(self, shape: Shape) -> list[Shape]:
        if shape[0] != self.heads * sum(self.rows):
            raise ValueError(f"{self.heads} heads of {sum(self.rows)} rows are not {list(shape)}")
        rest = (1, *shape[1:]) if self.unit else shape[1:]
        if self.fused:
            return [(shape[0], *rest)]
        return [(self.heads * rows, *rest) for rows in self.rows]

    def order(self) -> torch.Tensor:
        total = self.heads * sum(self.rows)
        kinds = torch.arange(total).split([self.heads * rows for rows in self.rows])
        return torch.cat([kind.view(self.heads, -1) for kind in kinds], dim=1).flatten()
