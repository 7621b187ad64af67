"""Packs samples end to end into a microbatch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from megatron_mm.data.batch import BatchMemory, BatchQueries, Microbatch
from megatron_mm.data.images import channels_first
from megatron_mm.data.sample import Sample, SampleImage
from megatron_mm.data.tiles import ImageSettings
from megatron_mm.errors import DataError


def collate(
    samples: Sequence[Sample],
    *,
    settings: ImageSettings | None,
    pad_id: int,
    pad_multiple: int = 1,
    skipped: Sequence[str] = (),
    labelled: bool = False,
) -> Microbatch:
    """Joins `samples` into one stream of tokens; see `Microbatch` for the shapes.

    If the total is not a multiple of `pad_multiple`, pad tokens follow as a segment of their own
    without supervision. No samples give `pad_multiple` pad tokens.

    Args:
        settings: None for a model without vision.
        skipped: rows left out, with the reason.
        labelled: whether the microbatch has `skill_T`: that of its samples, -1 where one has none.

    Raises:
        DataError: `pad_multiple` is below 1.
    """
    if pad_multiple < 1:
        raise DataError(f"pad_multiple is {pad_multiple}; it must be at least 1")
    none = torch.zeros(0, dtype=torch.int64)
    lengths = [len(sample.tokens_T) for sample in samples]
    return Microbatch.build(
        torch.cat([none, *(s.tokens_T for s in samples)]),
        lengths,
        labels_T=torch.cat([none, *(s.labels_T for s in samples)]),
        loss_mask_T=torch.cat([torch.zeros(0), *(s.loss_mask_T for s in samples)]),
        skill_T=_skills(samples) if labelled else None,
        pad_id=pad_id,
        pad_multiple=pad_multiple,
        **({} if settings is None else _images(samples, lengths, settings)),
        queries=_queries(samples, lengths),
        samples=[sample.where for sample in samples],
        skipped=skipped,
    )


def _queries(samples: Sequence[Sample], lengths: list[int]) -> BatchQueries:
    """The queries of all samples, at their positions in the stream."""
    starts = accumulate(lengths, initial=0)
    pairs = zip(samples, starts, strict=False)
    positions = [start + position for sample, start in pairs for position in sample.queries]
    own = [t for sample in samples for t in sample.targets[: len(sample.queries)]]
    ahead = any(len(sample.targets) > len(sample.queries) for sample in samples)
    return BatchQueries.build(positions, own, [s.targets for s in samples] if ahead else None)


def _skills(samples: Sequence[Sample]) -> torch.Tensor:
    """Skills of all positions, int64 [T]."""
    none = torch.zeros(0, dtype=torch.int64)
    known = (
        torch.full_like(sample.tokens_T, -1) if sample.skill_T is None else sample.skill_T
        for sample in samples
    )
    return torch.cat([none, *known])


def _images(
    samples: Sequence[Sample], lengths: list[int], settings: ImageSettings
) -> dict[str, Any]:
    """Pixels, and the tiles and positions of the stream and of every memory."""
    tiles: list[np.ndarray] = []
    stream_tiles: list[int] = []
    stream_positions = [torch.zeros(0, dtype=torch.int64)]
    shown: list[tuple[SampleImage, int, torch.Tensor]] = []  # its first tile, who may see it
    # Completions of a prompt share its images, which are then computed once. Not by their tiles:
    # whether two rows' tiles are one object depends on a cache, and microbatches must not.
    first_tile: dict[int, int] = {}
    num_tiles, offset = 0, 0
    for sample, length in zip(samples, lengths, strict=True):
        for image in sample.images:
            start = offset + image.start
            after = start + len(image.stream) * settings.tokens_per_tile  # the image's </img>
            first = first_tile.setdefault(id(image), num_tiles)
            if first == num_tiles:
                tiles.append(image.tiles)
                num_tiles += len(image.tiles)
            stream_tiles += [first + tile for tile in image.stream]
            stream_positions.append(torch.arange(start, after))
            shown.append((image, first, torch.tensor([[after, offset + length]])))
        offset += length
    none = np.zeros((0, settings.image_size, settings.image_size, 3), dtype=np.uint8)
    return {
        "pixels_NCHW": channels_first(np.concatenate([none, *tiles])),
        "stream_tiles": stream_tiles,
        "stream_positions": torch.cat(stream_positions),
        "memories": {memory.name: _memory(memory.name, shown) for memory in settings.memories},
    }


def _memory(name: str, shown: Sequence[tuple[SampleImage, int, torch.Tensor]]) -> BatchMemory:
    """The memory of this name over all images."""
    tiles: list[int] = []
    coordinates, extents, visible = [], [], []
    for image, first, span in shown:
        held = image.memories[name]
        tiles += [first + tile for tile in held.tiles]
        coordinates.append(held.coordinates_M2)
        extents.append(held.extents_M)
        visible.append(span.expand(len(held.coordinates_M2), 2))
    return BatchMemory.build(tiles, coordinates, extents, visible)
