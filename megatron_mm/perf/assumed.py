"""The microbatch that a plan is made for: every sample full, every image as large as it may be."""

from __future__ import annotations

import torch

from megatron_mm.config import ConfigError, RunConfig, token_multiple
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.images import TileGrid
from megatron_mm.data.tiles import image_settings, memory_coordinates, select_tiles, used_tiles

Grid = tuple[int, int]  # rows and columns of tiles


def planned_batch(run: RunConfig, images: int = 1, supervised: float = 1.0) -> Microbatch:
    """`micro_batch_size` samples of `seq_length` tokens, on the CPU; pixels have no memory.

    Args:
        images: in every sample, first in it, each of `max_num_tiles` tiles in one row and, where
            the run makes one, a thumbnail.
        supervised: share of the tokens after the images whose logits the loss needs, the last.
    Raises:
        ConfigError: the images do not fit into a sample.
    """
    settings = image_settings(run)
    count = run.training.micro_batch_size
    length, multiple = run.data.seq_length, token_multiple(run)
    stream, memory, pixels, grid = [], [], 0, None
    if settings is not None and images:
        tiles = run.data.max_num_tiles
        grid = TileGrid(1, tiles, run.data.use_thumbnail and tiles > 1)
        used = used_tiles(grid, settings)
        stream = [used.index(tile) for tile in select_tiles(grid, settings.image_stream)]
        memory = [used.index(tile) for tile in select_tiles(grid, settings.vision_memory)]
        pixels = len(used)
    per_image = 0 if settings is None else len(stream) * settings.tokens_per_tile
    text = length - images * (per_image + 2)
    if text < 1:
        raise ConfigError(
            f"seq_length {length} holds no text beside {images} images of {per_image} tokens; "
            "allowed: a longer seq_length, fewer max_num_tiles or fewer --images"
        )
    patches = 0 if settings is None else len(memory) * settings.patches_per_side**2
    wanted = torch.zeros(length)
    wanted[length - max(1, round(text * supervised)) :] = 1
    wanted[-1] = 0  # nothing follows the last token
    positions, visible, stream_tiles, memory_tiles = [], [], [], []
    for sample in range(count):
        for image in range(images):
            number = sample * images + image
            begin = sample * length + image * (per_image + 2) + 1
            positions.append(torch.arange(begin, begin + per_image))
            span = torch.tensor([begin + per_image, (sample + 1) * length])
            visible.append(span.expand(patches, 2))
            stream_tiles += [number * pixels + tile for tile in stream]
            memory_tiles += [number * pixels + tile for tile in memory]
    tokens = count * length
    tail = -tokens % multiple
    ends = [length * n for n in range(count + 1)] + ([tokens + tail] if tail else [])
    total, none = tokens + tail, torch.zeros(0, dtype=torch.int64)
    size = 1 if settings is None else settings.image_size
    coordinates = torch.zeros(0, 2) if grid is None else memory_coordinates(grid, settings)
    return Microbatch(
        tokens_T=torch.zeros(total, dtype=torch.int64),
        labels_T=torch.zeros(total, dtype=torch.int64),
        loss_mask_T=torch.cat((wanted.repeat(count), torch.zeros(tail))),
        position_ids_T=torch.cat((torch.arange(length).repeat(count), torch.arange(tail))),
        cu_seqlens=torch.tensor(ends),
        num_real_tokens=tokens,
        pixels_NCHW=torch.empty(count * images * pixels, 3, size, size, device="meta"),
        stream_tiles=torch.tensor(stream_tiles, dtype=torch.int64),
        stream_positions=torch.cat([*positions, none]),
        memory_tiles=torch.tensor(memory_tiles, dtype=torch.int64),
        memory_coordinates_M2=coordinates.repeat(count * images, 1),
        memory_visible_M2=torch.cat([*visible, none.reshape(0, 2)]),
    )


def balanced_routes(tokens: int, top_k: int, experts: int) -> torch.Tensor:
    """int16 [T, k]: slot j of position p takes expert (p k + j) mod E, so that counts of any two
    experts differ by at most 1 over any run of positions."""
    slots = torch.arange(tokens * top_k).view(tokens, top_k)
    return (slots % experts).to(torch.int16)


def expert_counts(positions: range, top_k: int, experts: int) -> torch.Tensor:
    """int64 [E]: how many rows `balanced_routes` sends to each expert from these positions."""
    first, last = positions.start * top_k, positions.stop * top_k
    expert = torch.arange(experts)
    below = [
        (end - expert + experts - 1).div(experts, rounding_mode="floor") for end in (first, last)
    ]
    return below[1] - below[0]
