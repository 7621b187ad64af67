"""Packs samples end to end into a microbatch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_mm.data.batch import Microbatch
from megatron_mm.data.images import normalise
from megatron_mm.data.sample import Sample
from megatron_mm.data.tiles import ImageSettings
from megatron_mm.errors import DataError


def collate(
    samples: Sequence[Sample],
    *,
    settings: ImageSettings | None,
    pad_id: int,
    pad_multiple: int = 1,
    skipped: Sequence[str] = (),
) -> Microbatch:
    """Joins `samples` into one stream of tokens; see `Microbatch` for the shapes.

    If the total is not a multiple of `pad_multiple`, pad tokens follow as a segment of their own
    without supervision. No samples give `pad_multiple` pad tokens.

    Args:
        settings: None for a model without vision.
        skipped: rows left out, with the reason.

    Raises:
        DataError: `pad_multiple` is below 1.
    """
    if pad_multiple < 1:
        raise DataError(f"pad_multiple is {pad_multiple}; it must be at least 1")
    lengths = [len(sample.tokens_T) for sample in samples]
    num_real = sum(lengths)
    tail = -num_real % pad_multiple if num_real else pad_multiple
    segments = [*lengths, tail] if tail else lengths
    pad_T = torch.full((tail,), pad_id, dtype=torch.int64)
    return Microbatch(
        tokens_T=torch.cat([*(s.tokens_T for s in samples), pad_T]),
        labels_T=torch.cat([*(s.labels_T for s in samples), pad_T]),
        loss_mask_T=torch.cat([*(s.loss_mask_T for s in samples), torch.zeros(tail)]),
        position_ids_T=torch.cat([torch.arange(n) for n in segments]),
        cu_seqlens=torch.tensor([0, *np.cumsum(segments)], dtype=torch.int64),
        num_real_tokens=num_real,
        **_image_tensors(samples, lengths, settings),
        samples=[sample.where for sample in samples],
        skipped=list(skipped),
    )


def _image_tensors(
    samples: Sequence[Sample], lengths: list[int], settings: ImageSettings | None
) -> dict[str, torch.Tensor]:
    size = settings.image_size if settings else 1
    tokens_per_tile = settings.tokens_per_tile if settings else 1
    tiles: list[np.ndarray] = []
    stream_tiles: list[int] = []
    stream_positions: list[torch.Tensor] = []
    memory_tiles: list[int] = []
    coordinates: list[torch.Tensor] = []
    visible: list[torch.Tensor] = []
    # Completions of a prompt share its image objects, so each image is computed once. The key is
    # the image, not its tiles: a cache decides whether two rows share tiles, and microbatches must
    # not depend on it.
    first_tile: dict[int, int] = {}
    num_tiles, offset = 0, 0
    for sample, length in zip(samples, lengths, strict=True):
        for image in sample.images:
            start = offset + image.start
            after = start + len(image.stream) * tokens_per_tile  # the image's </img>
            first = first_tile.setdefault(id(image), num_tiles)
            if first == num_tiles:
                tiles.append(image.tiles)
                num_tiles += len(image.tiles)
            stream_tiles += [first + tile for tile in image.stream]
            stream_positions.append(torch.arange(start, after))
            memory_tiles += [first + tile for tile in image.memory]
            coordinates.append(image.memory_coordinates_M2)
            span = torch.tensor([[after, offset + length]])
            visible.append(span.expand(len(image.memory_coordinates_M2), 2))
        offset += length
    if tiles:
        pixels = normalise(np.concatenate(tiles), settings.mean, settings.std)
    else:
        pixels = torch.zeros(0, 3, size, size)
    return {
        "pixels_NCHW": pixels,
        "stream_tiles": torch.tensor(stream_tiles, dtype=torch.int64),
        "stream_positions": torch.cat([torch.zeros(0, dtype=torch.int64), *stream_positions]),
        "memory_tiles": torch.tensor(memory_tiles, dtype=torch.int64),
        "memory_coordinates_M2": torch.cat([torch.zeros(0, 2), *coordinates]),
        "memory_visible_M2": torch.cat([torch.zeros(0, 2, dtype=torch.int64), *visible]),
    }
