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
from megatron_mm.config import DataConfig, ModelConfig, memories
from megatron_mm.data.batch import BatchMemory, Microbatch
from megatron_mm.data.images import normalise


@dataclass
class MemoryPart:
    """The part of a sample that one memory holds."""

    tiles: list[int] = field(default_factory=list)
    coordinates: list[torch.Tensor] = field(default_factory=list)  # one [P * P, 2] per tile
    extents: list[torch.Tensor] = field(default_factory=list)  # one [P * P] per tile
    visible_from: list[int] = field(default_factory=list)  # one per patch


@dataclass
class Sample:
    tokens: list[int]
    pixels: torch.Tensor  # uint8 [tiles, 3, side, side]
    stream_tiles: list[int] = field(default_factory=list)
    stream_positions: list[int] = field(default_factory=list)
    memories: dict[str, MemoryPart] = field(default_factory=dict)
    image_ends: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)


def chosen(setting: str, tiles: list[int], thumbnail: int) -> list[int]:
    """Returns the tiles of an image that a setting names; a lone tile is its own thumbnail."""
    tiles = tiles or [thumbnail]
    pick = {"thumbnail": [thumbnail], "tiles": tiles}
    pick["all"] = tiles + [thumbnail] if thumbnail not in tiles else tiles
    pick["pyramid"] = pick["all"]
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
    made = Sample(tokens, random_pixels(count, vision.image_size, g))
    made.memories = {memory.name: MemoryPart() for memory in memories(model)}
    tile = 0
    for split in images:
        tiles = list(range(tile, tile + split)) if split > 1 else []
        thumbnail = tile + len(tiles)
        tile = thumbnail + 1
        stream = chosen(fusion.image_stream, tiles, thumbnail)
        made.stream_tiles += stream
        made.stream_positions += range(len(tokens), len(tokens) + per_tile * len(stream))
        tokens += [IMAGE_TOKEN] * (per_tile * len(stream))
        made.image_ends.append(len(tokens))
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        for memory in memories(model):
            part, held = made.memories[memory.name], chosen(memory.tiles, tiles, thumbnail)
            part.tiles += held
            part.visible_from += [len(tokens)] * (side * side * len(held))
            for column, of in enumerate(held):  # side by side over the image's width
                columns, column = (1, 0) if of == thumbnail else (split, column)
                right = (x / side + column + 0.5 / side) / columns
                part.coordinates.append(torch.stack(((y + 0.5) / side, right), -1).reshape(-1, 2))
                part.extents.append(torch.full((side * side,), columns**-0.5 / side))
        tokens += words(text)
    return made


def pack(model: ModelConfig, samples: list[Sample], pad_multiple: int = 1) -> Microbatch:
    """Returns the samples end to end; the second half of each is supervised."""
    size = model.vision.image_size
    tokens, labels, mask, lengths = [], [], [], []
    stream_tiles, stream_positions = [], []
    held = {memory.name: ([], [], [], []) for memory in memories(model)}
    tiles = start = 0
    for s in samples:
        length = len(s)
        tokens += s.tokens
        labels += [*s.tokens[1:], 0]
        mask += [float(length // 2 <= i < length - 1) for i in range(length)]
        lengths.append(length)
        stream_tiles += [tiles + t for t in s.stream_tiles]
        stream_positions += [start + p for p in s.stream_positions]
        for name, part in s.memories.items():
            chosen_tiles, coordinates, extents, visible = held[name]
            chosen_tiles += [tiles + t for t in part.tiles]
            coordinates += part.coordinates
            extents += part.extents
            visible += [torch.tensor([[start + p, start + length]]) for p in part.visible_from]
        tiles += len(s.pixels)
        start += length
    return Microbatch.build(
        torch.tensor(tokens),
        lengths,
        labels_T=torch.tensor(labels),
        loss_mask_T=torch.tensor(mask),
        pad_multiple=pad_multiple,
        pixels_NCHW=torch.cat([torch.zeros(0, 3, size, size).byte(), *(s.pixels for s in samples)]),
        stream_tiles=stream_tiles,
        stream_positions=torch.tensor(stream_positions, dtype=torch.int64),
        memories={name: BatchMemory.build(*parts) for name, parts in held.items()},
        samples=[f"synthetic:{i}" for i in range(len(samples))],
    )


def random_pixels(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """uint8 [count, 3, size, size]."""
    shape = (count, 3, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Returns pixels as transformers wants them, by the default mean and deviation."""
    data = DataConfig()
    return normalise(pixels, data.image_mean, data.image_std).to(torch.get_default_dtype())


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns ||a - b|| / ||b||."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    return float((a - b).detach().norm() / b.detach().norm())
