"""Samples with images, and microbatches packed from them.

They are written independently of the package's collation.

A sample is text, image, text, image, ..., text. An image is `tiles` tiles and, if there are
several, a thumbnail after them; which of these enter the stream and which the memory follows
the model's settings. Stream positions hold transformers' image token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from megatron_mm.benchmark.hf_weights import IMAGE_TOKEN
from megatron_mm.config import ModelConfig
from megatron_mm.data.batch import Microbatch


@dataclass
class Sample:
    tokens: list[int]
    pixels: torch.Tensor  # [tiles, 3, side, side]
    stream_tiles: list[int] = field(default_factory=list)
    stream_positions: list[int] = field(default_factory=list)
    memory_tiles: list[int] = field(default_factory=list)
    coordinates: list[torch.Tensor] = field(default_factory=list)  # one [P * P, 2] per tile
    visible_from: list[int] = field(default_factory=list)  # one per memory patch
    image_ends: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)


def chosen(setting: str, tiles: list[int], thumbnail: int) -> list[int]:
    """Returns the tiles of an image that a setting names; a lone tile is its own thumbnail."""
    tiles = tiles or [thumbnail]
    pick = {"none": [], "thumbnail": [thumbnail], "tiles": tiles}
    pick["all"] = tiles + [thumbnail] if thumbnail not in tiles else tiles
    return pick[setting]


def sample(
    model: ModelConfig,
    seed: int,
    images: tuple[int, ...] = (),
    text: int = 6,
    first: int | None = None,
) -> Sample:
    """Returns a sample with an image for each entry of `images`, which counts its tiles.

    `text` tokens stand before, between and after the images; `first`, if given, before the first.
    """
    g = torch.Generator().manual_seed(seed)
    vision, fusion = model.vision, model.fusion
    side = vision.image_size // vision.patch_size
    per_tile = (side // fusion.pixel_shuffle_factor) ** 2

    def words(count: int) -> list[int]:
        return torch.randint(0, IMAGE_TOKEN, (count,), generator=g).tolist()

    tokens = words(text if first is None else first)
    count = sum(n + (n > 1) for n in images)
    made = Sample(tokens, torch.randn(count, 3, vision.image_size, vision.image_size, generator=g))
    tile = 0
    for split in images:
        tiles = list(range(tile, tile + split)) if split > 1 else []
        thumbnail = tile + len(tiles)
        tile = thumbnail + 1
        stream = chosen(fusion.image_stream, tiles, thumbnail)
        memory = chosen(fusion.vision_memory, tiles, thumbnail)
        made.stream_tiles += stream
        made.stream_positions += range(len(tokens), len(tokens) + per_tile * len(stream))
        tokens += [IMAGE_TOKEN] * (per_tile * len(stream))
        made.image_ends.append(len(tokens))
        made.memory_tiles += memory
        made.visible_from += [len(tokens)] * (side * side * len(memory))
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        for column in range(len(memory)):  # side by side over the image's width
            grid = torch.stack(
                ((y + 0.5) / side, (x / side + column + 0.5 / side) / len(memory)), -1
            )
            made.coordinates.append(grid.reshape(-1, 2))
        tokens += words(text)
    return made


def pack(model: ModelConfig, samples: list[Sample], pad_multiple: int = 1) -> Microbatch:
    """Returns the samples end to end; the second half of each is supervised."""
    size = model.vision.image_size
    tokens, labels, mask, positions, cu = [], [], [], [], [0]
    stream_tiles, stream_positions, memory_tiles, visible = [], [], [], []
    tiles = 0
    for s in samples:
        start, length = cu[-1], len(s)
        tokens += s.tokens
        labels += [*s.tokens[1:], 0]
        mask += [float(length // 2 <= i < length - 1) for i in range(length)]
        positions += range(length)
        cu.append(start + length)
        stream_tiles += [tiles + t for t in s.stream_tiles]
        memory_tiles += [tiles + t for t in s.memory_tiles]
        stream_positions += [start + p for p in s.stream_positions]
        visible += [(start + p, cu[-1]) for p in s.visible_from]
        tiles += len(s.pixels)
    real = cu[-1]
    tail = -real % pad_multiple
    if tail:
        cu.append(real + tail)
    coordinates = [c for s in samples for c in s.coordinates]
    return Microbatch(
        tokens_T=torch.tensor(tokens + [0] * tail),
        labels_T=torch.tensor(labels + [0] * tail),
        loss_mask_T=torch.tensor(mask + [0.0] * tail),
        position_ids_T=torch.tensor(positions + [0] * tail),
        cu_seqlens=torch.tensor(cu),
        num_real_tokens=real,
        pixels_NCHW=torch.cat([s.pixels for s in samples] or [torch.zeros(0, 3, size, size)]),
        stream_tiles=torch.tensor(stream_tiles, dtype=torch.int64),
        stream_positions=torch.tensor(stream_positions, dtype=torch.int64),
        memory_tiles=torch.tensor(memory_tiles, dtype=torch.int64),
        memory_coordinates_M2=torch.cat(coordinates) if coordinates else torch.zeros(0, 2),
        memory_visible_M2=torch.tensor(visible, dtype=torch.int64).reshape(-1, 2),
        samples=[f"synthetic:{i}" for i in range(len(samples))],
    )


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns ||a - b|| / ||b||."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    return float((a - b).detach().norm() / b.detach().norm())
