"""Microbatch: several samples packed end to end in one stream of tokens.

There is one form only. Samples are never padded to a rectangle; `cu_seqlens` marks
where each begins, and every layer that mixes positions respects it. Shape letters:
T tokens in the stream, N tiles, M patches of a memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any, Self

import torch

from megatron_mm import platform

# Shapes follow from these, and reading them from a GPU would stall it; of sizes of patches only
# glimpses ask.
ON_CPU = ("cu_seqlens", "stream_positions", "visible_M2", "extents_M")


@dataclass(frozen=True)
class BatchMemory:
    """The patches that one vision memory holds of a microbatch's images, ordered by sample."""

    tiles: torch.Tensor  # int64, tile by tile of the memory: its place among the N tiles
    coordinates_M2: torch.Tensor  # float32 (y, x) of each patch centre, 0..1 of its image
    extents_M: torch.Tensor  # float32, the side of each patch, in shares of its image's
    visible_M2: torch.Tensor  # int64 [from, to): the positions that may see each patch

    @classmethod
    def build(
        cls,
        tiles: Sequence[int] = (),
        coordinates: Sequence[torch.Tensor] = (),
        extents: Sequence[torch.Tensor] = (),
        visible: Sequence[torch.Tensor] = (),
    ) -> BatchMemory:
        """Joins the patches of several images.

        Args:
            coordinates, visible: of each image, [its patches, 2].
            extents: of each image, [its patches].
        """
        return cls(
            torch.tensor(tiles, dtype=torch.int64),
            torch.cat([torch.zeros(0, 2), *coordinates]),
            torch.cat([torch.zeros(0), *extents]),
            torch.cat([torch.zeros(0, 2, dtype=torch.int64), *visible]),
        )

    def to(self, device: torch.device | str) -> BatchMemory:
        """Moves what is computed with; see `Microbatch.to`."""
        return replace(self, **_moved(self, device))


def _places(targets: Sequence[Sequence[float] | None]) -> torch.Tensor:
    """float32 [N, 3] of places, NaN where there is none."""
    rows = [(math.nan,) * 3 if target is None else target for target in targets]
    return torch.tensor(rows, dtype=torch.float32).view(-1, 3)


@dataclass(frozen=True)
class BatchQueries:
    """The queries of a microbatch: tokens that ask for a place of an image (letter Q). The slots
    of each stand behind it. All of it is on the CPU; a layer that asks for it moves what it needs.

    Attributes:
        positions_N: int64, where in the stream, ascending.
        targets_N3: float32, the place (y, x, scale) that each should ask for; NaN: any.
        rows_BM3: float32, of each sample the same for all queries of its row, those of an answer to
            a prompt too; None: not known.
    """

    positions_N: torch.Tensor
    targets_N3: torch.Tensor
    rows_BM3: torch.Tensor | None = None

    @classmethod
    def build(
        cls,
        positions: Sequence[int] = (),
        targets: Sequence[Sequence[float] | None] = (),
        rows: Sequence[Sequence[Sequence[float] | None]] | None = None,
    ) -> BatchQueries:
        """
        Args:
            targets: (y, x, scale) of each; None: any.
            rows: of each sample those of its row.
        """
        whole = None
        if rows is not None:
            most = max(map(len, rows))
            padded = [target for row in rows for target in [*row, *[None] * (most - len(row))]]
            whole = _places(padded).view(len(rows), most, 3)
        return cls(torch.tensor(positions, dtype=torch.int64), _places(targets), whole)

    def slots(self, each: int) -> torch.Tensor:
        """Returns the positions of all slots, int64, ascending.

        Args:
            each: slots behind a query.
        """
        return (self.positions_N.unsqueeze(1) + torch.arange(1, each + 1)).flatten()


@dataclass(frozen=True)
class Dealt:
    """The tiles of a microbatch as they are dealt to ranks, one by one, in turn.

    Attributes:
        first: number of its first tile, counted over the microbatches that came with it.
        count: how many it has.
    """

    first: int
    count: int

    def of(self, owner: int, owners: int) -> range:
        """The tiles of one of the ranks, by their places in the microbatch."""
        return range((owner - self.first) % owners, self.count, owners)


@dataclass
class Microbatch:
    """Every tensor of a microbatch. `Microbatch.build` makes it."""

    tokens_T: torch.Tensor  # int64
    labels_T: torch.Tensor  # int64, the next token of the same sample
    loss_mask_T: torch.Tensor  # float32, 1 where the label is supervised
    position_ids_T: torch.Tensor  # int64, 0 at the start of every sample
    cu_seqlens: torch.Tensor  # int64 [samples + 1], from 0 to T
    num_real_tokens: int  # tokens before the padding tail (a segment of its own)
    pixels_NCHW: torch.Tensor  # uint8; the model normalises them
    stream_tiles: torch.Tensor  # int64, the tiles whose shuffled features enter the stream
    stream_positions: torch.Tensor  # int64, where in T, tile by tile, row by row
    memories: dict[str, BatchMemory] = field(default_factory=dict)  # by name; none in a step
    queries: BatchQueries = field(default_factory=BatchQueries.build)  # none in a step
    samples: list[str] = field(default_factory=list)  # "file:row" of each sample
    skipped: list[str] = field(default_factory=list)  # rows left out, with the reason
    # int64, the skill (its number in the run's skill map) that each position exercises when it
    # predicts the next token; -1: none. None in a run without a skill map.
    skill_T: torch.Tensor | None = None
    # float32, what a supervised token counts in the number that the loss is divided by, at every
    # position of its sample; it weighs layers' losses that are sums over positions. None: 1.
    position_weight_T: torch.Tensor | None = None
    # With it `pixels_NCHW` holds only the tiles dealt to this rank.
    dealt: Dealt | None = None
    # Experts to use at every position, MoE index -> int16 [T, k] of all hops (model/routing.py),
    # for the layers of this rank's stages. None: routers choose.
    routes: dict[int, torch.Tensor] | None = None
    # Noise added to the logits of routers that choose, MoE index -> float32 [T, E]; same layers.
    route_noise: dict[int, torch.Tensor] | None = None

    @classmethod
    def build(
        cls,
        tokens_T: torch.Tensor,
        lengths: Sequence[int],
        *,
        labels_T: torch.Tensor | None = None,
        loss_mask_T: torch.Tensor | None = None,
        skill_T: torch.Tensor | None = None,
        position_ids_T: torch.Tensor | None = None,
        pad_id: int = 0,
        pad_multiple: int = 1,
        pixels_NCHW: torch.Tensor | None = None,
        stream_tiles: Sequence[int] = (),
        stream_positions: torch.Tensor | None = None,
        memories: Mapping[str, BatchMemory] | None = None,
        queries: BatchQueries | None = None,
        samples: Sequence[str] = (),
        skipped: Sequence[str] = (),
    ) -> Microbatch:
        """Completes a microbatch from its samples' tokens, which are laid end to end.

        If the total is no multiple of `pad_multiple`, tokens of `pad_id` follow as a segment of
        their own that is not supervised. No tokens at all give `pad_multiple` of them.

        Args:
            lengths: of the samples; they add up to T.
            labels_T: default: zeros.
            loss_mask_T: default: nothing is supervised.
            skill_T: default: None. The tail exercises no skill.
            position_ids_T: default: counted from 0 in every sample.
            pixels_NCHW: default: no tiles.
            stream_positions: default: none.
            queries: default: none.
        """
        real = len(tokens_T)
        tail = -real % pad_multiple if real else pad_multiple
        segments = [*lengths, tail] if tail else list(lengths)
        if labels_T is None:
            labels_T = torch.zeros_like(tokens_T)
        if loss_mask_T is None:
            loss_mask_T = torch.zeros(real)
        if skill_T is not None:
            skill_T = torch.cat([skill_T, torch.full((tail,), -1)])
        if position_ids_T is None:
            position_ids_T = torch.cat([torch.zeros(0).long(), *map(torch.arange, lengths)])
        pad_T = torch.full((tail,), pad_id, dtype=torch.int64)
        none = torch.zeros(0, dtype=torch.int64)
        no_pixels = torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
        return cls(
            tokens_T=torch.cat([tokens_T, pad_T]),
            labels_T=torch.cat([labels_T, pad_T]),
            loss_mask_T=torch.cat([loss_mask_T, torch.zeros(tail)]),
            position_ids_T=torch.cat([position_ids_T, torch.arange(tail)]),
            cu_seqlens=torch.tensor([0, *accumulate(segments)], dtype=torch.int64),
            num_real_tokens=real,
            pixels_NCHW=no_pixels if pixels_NCHW is None else pixels_NCHW,
            stream_tiles=torch.tensor(stream_tiles, dtype=torch.int64),
            stream_positions=none if stream_positions is None else stream_positions,
            memories=dict(memories or {}),
            queries=queries or BatchQueries.build(),
            samples=list(samples),
            skipped=list(skipped),
            skill_T=skill_T,
        )

    @property
    def num_tiles(self) -> int:
        """Tiles of its images, on whichever ranks they are."""
        return len(self.pixels_NCHW) if self.dealt is None else self.dealt.count

    @property
    def supervised(self) -> torch.Tensor:
        """The positions whose labels are supervised; int64, ascending."""
        return self.loss_mask_T.nonzero().flatten()

    @property
    def loss_weight(self) -> torch.Tensor:
        """This microbatch's part of the number that the loss is divided by, a scalar on the
        device of its tensors. It weighs the balancing loss of its routers."""
        return self.loss_mask_T.sum()

    def to(self, device: torch.device | str) -> Self:
        """Moves everything that is computed with; lengths and positions are read on the CPU."""
        moved = _moved(self, device)
        moved["memories"] = {name: held.to(device) for name, held in self.memories.items()}
        for name in ("routes", "route_noise"):
            if (by_layer := getattr(self, name)) is not None:
                moved[name] = {i: platform.moved(values, device) for i, values in by_layer.items()}
        return replace(self, **moved)


def _moved(value: Microbatch | BatchMemory, device: torch.device | str) -> dict[str, Any]:
    """The tensors of a value, and what else moves itself, on another device."""
    moved = {}
    for name in (f.name for f in fields(value) if f.name not in ON_CPU):
        held = getattr(value, name)
        if isinstance(held, torch.Tensor):
            moved[name] = platform.moved(held, device)
        elif hasattr(held, "to"):
            moved[name] = held.to(device)
    return moved
