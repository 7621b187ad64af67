"""The microbatch that a plan is made for: every sample full, every image as large as allowed."""

from __future__ import annotations

from typing import Any

import torch

from megatron_mm.config import ConfigError, RunConfig, hops, route_width, token_multiple
from megatron_mm.config.layers.cascade import second_hop_share
from megatron_mm.config.layers.queries import query_settings
from megatron_mm.config.memories import most_tiles
from megatron_mm.config.objectives import declaration
from megatron_mm.data.batch import BatchMemory, BatchQueries, Microbatch
from megatron_mm.data.images import TileGrid
from megatron_mm.data.tiles import (
    image_settings,
    memory_coordinates,
    memory_extents,
    select_tiles,
    used_tiles,
)
from megatron_mm.model.routing import NOT_HANDED
from megatron_mm.preference.settings import DPOConfig

PatchGrid = tuple[int, int]  # rows and columns of tiles


def paired(run: RunConfig) -> DPOConfig | None:
    """The settings of training on preference pairs; None for another objective."""
    if DPOConfig not in declaration(run).sections.values():
        return None
    return run.section(DPOConfig)


def samples_of_one(run: RunConfig) -> int:
    """How many samples stand for one of `micro_batch_size`: the two sides of a pair, which share
    its images; otherwise 1."""
    return 1 if paired(run) is None else 2


def check_content(images: int, supervised: float) -> None:
    """Raises ConfigError if no sample can have so many images, or such a share of its text in the
    loss."""
    if images < 0:
        raise ConfigError(f"--images is {images}; allowed: 0 or more")
    if not 0 < supervised <= 1:
        raise ConfigError(f"--supervised is {supervised:g}; allowed: above 0, at most 1")


def planned_batch(run: RunConfig, images: int = 1, supervised: float = 1.0) -> Microbatch:
    """Returns `micro_batch_size` samples, or pairs of them, of `seq_length` tokens, on the CPU;
    pixels have no memory.

    Args:
        images: in every sample, first in it, each of the most tiles in one row and, where
            the run makes one, a thumbnail. A model that glimpses has a query for each of them.
        supervised: share of the tokens after the images whose logits the loss needs, the last.
    Raises:
        ConfigError: the images do not fit into a sample.
    """
    settings = image_settings(run)
    of_one = samples_of_one(run)
    count = run.training.micro_batch_size * of_one
    length, multiple = run.data.seq_length, token_multiple(run)
    stream, pixels, size = [], 0, 1
    # By memory: tiles, patch centres and sides.
    held: dict[str, tuple[list[int], torch.Tensor, torch.Tensor]] = {}
    if settings is not None:
        size = settings.image_size
        held = {
            memory.name: ([], torch.zeros(0, 2), torch.zeros(0)) for memory in settings.memories
        }
    if settings is not None and images:
        tiles = most_tiles(run, images)
        grid = TileGrid(1, tiles, run.data.use_thumbnail and tiles > 1)
        used = used_tiles(grid, settings)
        stream = [used.index(tile) for tile in select_tiles(grid, settings.image_stream)]
        for memory in settings.memories:
            chosen = [used.index(tile) for tile in select_tiles(grid, memory.tiles)]
            centres = memory_coordinates(grid, memory, settings.patches_per_side)
            sides = memory_extents(grid, memory, settings.patches_per_side)
            held[memory.name] = (chosen, centres, sides)
        pixels = len(used)
    per_image = 0 if settings is None else len(stream) * settings.tokens_per_tile
    text = length - images * (per_image + 2)
    if text < 1:
        raise ConfigError(
            f"seq_length {length} holds no text beside {images} images of {per_image} tokens; "
            "allowed: a longer seq_length, fewer max_num_tiles or fewer --images"
        )
    wanted = torch.zeros(length)
    wanted[length - max(1, round(text * supervised)) :] = 1
    wanted[-1] = 0  # nothing follows the last token
    positions, spans, stream_tiles = [torch.zeros(0, dtype=torch.int64)], [], []
    firsts: list[int] = []  # the first tile of every image that a sample has
    for sample in range(count):
        for image in range(images):
            begin = sample * length + image * (per_image + 2) + 1
            positions.append(torch.arange(begin, begin + per_image))
            spans.append(torch.tensor([begin + per_image, (sample + 1) * length]))
            firsts.append((sample // of_one * images + image) * pixels)
            stream_tiles += [firsts[-1] + tile for tile in stream]
    queries: list[int] = []
    asking = query_settings(run.model)
    if asking is not None:  # one for each image, behind all of them
        each = 1 + asking.slots
        begins = range(count * length)[images * (per_image + 2) :: length]
        fit = min(images, (text - 1) // each)
        queries = [begin + number * each for begin in begins for number in range(fit)]
    memories = {
        name: BatchMemory.build(
            [first + tile for first in firsts for tile in chosen],
            [centres] * len(spans),
            [sides] * len(spans),
            [span.expand(len(centres), 2) for span in spans],
        )
        for name, (chosen, centres, sides) in held.items()
    }
    return Microbatch.build(
        torch.zeros(count * length, dtype=torch.int64),
        [length] * count,
        loss_mask_T=wanted.repeat(count),
        pad_multiple=multiple,
        pixels_NCHW=torch.empty(
            count // of_one * images * pixels, 3, size, size, dtype=torch.uint8, device="meta"
        ),
        stream_tiles=stream_tiles,
        stream_positions=torch.cat(positions),
        memories=memories,
        queries=BatchQueries.build(queries, [None] * len(queries)),
    )


def their_completions(run: RunConfig, batch: Microbatch) -> dict[str, Any]:
    """Returns the fields that a `CompletionBatch` has beside `batch`, whose supervised tokens were
    sampled."""
    sampled = batch.loss_mask_T > 0
    count = run.training.micro_batch_size * samples_of_one(run)
    sample_T = torch.arange(len(sampled)) // run.data.seq_length
    return {
        "members": list(range(count)),
        "completion_T": torch.where(sampled, sample_T, -1),
        "lengths_N": torch.bincount(sample_T[sampled], minlength=count),
    }


def balanced_routes(tokens: int, top_k: int, experts: int) -> torch.Tensor:
    """int16 [T, k]: slot j of position p takes expert (p k + j) mod E, so that counts of any two
    experts differ by at most 1 over any run of positions."""
    slots = torch.arange(tokens * top_k).view(tokens, top_k)
    return (slots % experts).to(torch.int16)


def routes_of_layer(run: RunConfig, moe_index: int, tokens: int) -> torch.Tensor:
    """int16 [T, k]: balanced routes of all hops of a layer, as wide as all routes of the model.

    To the second hop every rank hands the first of its positions, as many as the settings say.
    """
    model, parallel = run.model, run.parallel
    first, *second = hops(model)[moe_index]
    experts = model.language.num_experts
    routes = torch.full((tokens, route_width(model)), NOT_HANDED, dtype=torch.int16)
    routes[:, :first] = balanced_routes(tokens, first, experts)
    if second:
        shards = parallel.tensor_model_parallel_size * parallel.context_parallel_size
        part = tokens // shards
        here = round(second_hop_share(run) * part)
        k = sum(second)
        handed = balanced_routes(here * shards, k, experts).view(shards, here, k)
        routes.view(shards, part, -1)[:, :here, first:] = handed
    return routes


def expert_counts(positions: range, top_k: int, experts: int) -> torch.Tensor:
    """int64 [E]: how many rows `balanced_routes` sends to each expert from these positions."""
    first, last = positions.start * top_k, positions.stop * top_k
    expert = torch.arange(experts)
    below = [
        (end - expert + experts - 1).div(experts, rounding_mode="floor") for end in (first, last)
    ]
    return below[1] - below[0]
