"""Invertible rearrangements between hf tensors and an mcore tensor.

A transform describes two things: the shapes of the hf tensors, and the order in which their rows
stand in the mcore tensor. Both directions follow from this one description, so they cannot
disagree: a permutation is inverted by sorting it. Values are only moved, never changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """Identity: one hf tensor is the mcore tensor. Base class of the other transforms."""

    def hf_shapes(self, shape: Shape) -> list[Shape]:
        """Shapes of the hf tensors of an mcore tensor of `shape`.

        Raises:
            ValueError: no mcore tensor has this shape.
        """
        return [shape]

    def order(self) -> torch.Tensor | None:
        """int64: index of each mcore row among the rows of all hf tensors, concatenated. None where
        elements keep their order."""
        return None

    def to_mcore(
        self, hf: Sequence[torch.Tensor], shape: Shape, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Makes the mcore tensor of `shape` from the hf tensors, in `out` if given."""
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
        """Makes the hf tensors from the mcore tensor; inverse of `to_mcore`."""
        shapes = self.hf_shapes(tuple(mcore.shape))
        flat, order = mcore.reshape(-1), self.order()
        if order is not None:
            flat = flat.view(len(order), -1).index_select(0, order.argsort()).view(-1)
        parts = flat.split([math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


@dataclass(frozen=True)
class Stacked(Transform):
    """Stack: `count` hf tensors lie along the first dimension of the mcore tensor."""

    count: int

    def hf_shapes(self, shape: Shape) -> list[Shape]:
        if shape[0] != self.count:
            raise ValueError(f"{self.count} tensors do not make {list(shape)}")
        return [shape[1:]] * self.count


@dataclass(frozen=True)
class Joined(Transform):
    """Concatenation: the first two mcore dimensions are one of the hf tensor (gate and up)."""

    def hf_shapes(self, shape: Shape) -> list[Shape]:
        return [(shape[0] * shape[1], *shape[2:])]


@dataclass(frozen=True)
class ByHead(Transform):
    """Permutation: rows are grouped by head in mcore, by kind (all queries, all keys, ...) in hf.

    Attributes:
        heads: number of heads.
        rows: rows per head of each kind.
        fused: number of kinds, from the first, that are concatenated in one hf tensor; each of the
            others has a tensor of its own.
        unit: whether the hf tensors have an extra dimension of size 1 after the first.
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
