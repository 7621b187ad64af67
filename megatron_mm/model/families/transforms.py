"""Rearrangements of the tensors in Hugging Face folders that make megatron-core's, and back.

A transform says two things about one of our tensors: the shapes of the tensors in the folder, and,
where rows change places, in which order those follow in ours. Both directions are made of that one
description, so neither can be right while the other is wrong: a permutation is inverted by sorting
it. No value is ever computed with, only moved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """One tensor of the folder is one of ours as it stands. Base of those that do more."""

    def hf_shapes(self, shape: Shape) -> list[Shape]:
        """Shapes of the folder's tensors, for ours of `shape`. Raises ValueError where `shape`
        cannot be one."""
        return [shape]

    def order(self) -> torch.Tensor | None:
        """int64: for each of our rows, its number among the folder's rows laid end to end. None
        where the elements keep their order."""
        return None

    def to_mcore(
        self, hf: Sequence[torch.Tensor], shape: Shape, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Our tensor of `shape`, made of the folder's; in `out` if that is given."""
        order = self.order()
        if order is None and out is not None:
            sizes = [tensor.numel() for tensor in hf]
            for part, tensor in zip(out.view(-1).split(sizes), hf, strict=True):
                part.copy_(tensor.reshape(-1))
            return out
        flat = hf[0].reshape(-1)
        if len(hf) > 1:
            flat = torch.cat([tensor.reshape(-1) for tensor in hf])
        if order is not None:
            flat = flat.view(len(order), -1).index_select(0, order)
        return flat.view(shape) if out is None else out.copy_(flat.view(shape))

    def to_hf(self, mcore: torch.Tensor) -> list[torch.Tensor]:
        """The folder's tensors, made of ours. The inverse of `to_mcore`."""
        shapes = self.hf_shapes(tuple(mcore.shape))
        flat, order = mcore.reshape(-1), self.order()
        if order is not None:
            flat = flat.view(len(order), -1).index_select(0, order.argsort()).view(-1)
        parts = flat.split([math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


@dataclass(frozen=True)
class Stacked(Transform):
    """`count` tensors of the folder are ours at index 0, 1, ... of our first dimension."""

    count: int

    def hf_shapes(self, shape: Shape) -> list[Shape]:
        if shape[0] != self.count:
            raise ValueError(f"{self.count} tensors do not make {list(shape)}")
        return [shape[1:]] * self.count


@dataclass(frozen=True)
class Joined(Transform):
    """Our first two dimensions are one of the folder's: gate above up in a single tensor."""

    def hf_shapes(self, shape: Shape) -> list[Shape]:
        return [(shape[0] * shape[1], *shape[2:])]


@dataclass(frozen=True)
class ByHead(Transform):
    """Rows that are grouped by head in ours, and by kind (all queries, all keys, ...) in the
    folder.

    Attributes:
        heads: number of heads.
        rows: rows of one head, for each kind in turn.
        fused: so many kinds, from the first, lie in one tensor, one below the other; each of the
            others has a tensor of its own.
        unit: the folder's tensors have a further dimension of size 1 after the first.
    """

    heads: int
    rows: tuple[int, ...]
    fused: int = 1
    unit: bool = False

    def hf_shapes(self, shape: Shape) -> list[Shape]:
        if shape[0] != self.heads * sum(self.rows):
            raise ValueError(f"{self.heads} heads of {sum(self.rows)} rows are not {list(shape)}")
        rest = (1, *shape[1:]) if self.unit else shape[1:]
        tensors = [sum(self.rows[: self.fused]), *self.rows[self.fused :]]
        return [(self.heads * rows, *rest) for rows in tensors]

    def order(self) -> torch.Tensor:
        total = self.heads * sum(self.rows)
        kinds = torch.arange(total).split([self.heads * rows for rows in self.rows])
        return torch.cat([kind.view(self.heads, -1) for kind in kinds], dim=1).flatten()
