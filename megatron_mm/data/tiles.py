"""Selects the tiles of an image for the token stream and for the vision memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from megatron_mm.config.families import vision_family
from megatron_mm.config.settings import RunConfig
from megatron_mm.data.images import TileGrid, choose_grid
from megatron_mm.errors import DataError


@dataclass(frozen=True)
class ImageSettings:
    """Image settings of a run. Sizes are in pixels."""

    image_size: int
    patch_size: int
    pixel_shuffle_factor: int
    max_num_tiles: int
    max_image_tokens: int | None
    use_thumbnail: bool
    image_stream: str
    vision_memory: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """Stream tokens of one tile, after the pixel shuffle."""
        return (self.patches_per_side // self.pixel_shuffle_factor) ** 2


def image_settings(run: RunConfig) -> ImageSettings | None:
    """Returns the checked image settings of a run; None for a model without vision.

    Raises:
        DataError: sizes do not divide, or a thumbnail is used but never made.
    """
    vision, fusion, data = run.model.vision, run.model.fusion, run.data
    if vision is None:
        return None
    grid = vision_family(run.model).grid(vision, None)
    unit = grid.patch * fusion.pixel_shuffle_factor
    if unit < 1 or grid.height % unit:
        raise DataError(
            f"image_size {grid.height} is not a multiple of patch_size "
            f"{grid.patch} x pixel_shuffle_factor {fusion.pixel_shuffle_factor} = {unit}"
        )
    for name, value in (
        ("image_stream", fusion.image_stream),
        ("vision_memory", fusion.vision_memory),
    ):
        if value == "thumbnail" and not data.use_thumbnail and data.max_num_tiles > 1:
            raise DataError(
                f"{name} is 'thumbnail' but use_thumbnail is false while max_num_tiles is "
                f"{data.max_num_tiles}; set use_thumbnail or max_num_tiles 1"
            )
    if len(data.image_mean) != 3 or len(data.image_std) != 3 or min(data.image_std) <= 0:
        raise DataError("image_mean and image_std need 3 numbers each, image_std above 0")
    return ImageSettings(
        image_size=grid.height,
        patch_size=grid.patch,
        pixel_shuffle_factor=fusion.pixel_shuffle_factor,
        max_num_tiles=data.max_num_tiles,
        max_image_tokens=data.max_image_tokens,
        use_thumbnail=data.use_thumbnail,
        image_stream=fusion.image_stream,
        vision_memory=fusion.vision_memory,
        mean=tuple(data.image_mean),
        std=tuple(data.image_std),
    )


def select_tiles(grid: TileGrid, choice: str) -> list[int]:
    """Returns indices of the grid's tiles for a choice: none, thumbnail, tiles or all.

    An image of one tile has no separate thumbnail; the tile itself is used in its place.

    Raises:
        DataError: the choice is "thumbnail" and the grid has none.
    """
    cells = grid.rows * grid.cols
    if choice == "none":
        return []
    if choice == "all":
        return list(range(grid.num_tiles))
    if choice == "tiles" or cells == 1:
        return list(range(cells))
    if choice == "thumbnail" and grid.thumbnail:
        return [cells]
    raise DataError(
        f"cannot take {choice!r} from a {grid.rows}x{grid.cols} grid without a thumbnail; "
        "set use_thumbnail"
    )


def used_tiles(grid: TileGrid, settings: ImageSettings) -> list[int]:
    """Returns indices of the tiles the ViT sees: those of the stream and of the memory."""
    stream = select_tiles(grid, settings.image_stream)
    return sorted({*stream, *select_tiles(grid, settings.vision_memory)})


def choose_grids(
    sizes: Sequence[tuple[int, int]], settings: ImageSettings | None, where: str
) -> list[TileGrid]:
    """Chooses the grid of every image of a row.

    If the tiles that the ViT sees exceed `max_image_tokens`, one lower `max_num_tiles` is used for
    all images: the largest with which they fit.

    Args:
        sizes: (width, height) of each image in pixels.
        settings: may be None if there is no image.

    Raises:
        DataError: the images do not fit with 1 tile each.
    """
    if not sizes:
        return []
    budget, per_tile = settings.max_image_tokens, settings.tokens_per_tile
    cost = 0
    for most in range(settings.max_num_tiles, 0, -1):
        grids = [
            choose_grid(
                *size,
                image_size=settings.image_size,
                max_num_tiles=most,
                use_thumbnail=settings.use_thumbnail,
            )
            for size in sizes
        ]
        if budget is None:
            return grids
        cost = per_tile * sum(len(used_tiles(grid, settings)) for grid in grids)
        if cost <= budget:
            return grids
    raise DataError(
        f"{where}: {len(sizes)} images need {cost} tokens at 1 tile each, max_image_tokens is "
        f"{budget}; use fewer images or raise max_image_tokens"
    )


@lru_cache(maxsize=1024)
def memory_coordinates(grid: TileGrid, settings: ImageSettings) -> torch.Tensor:
    """Returns the centres (y, x) of the memory's patches, tile by tile, float32 [M, 2]. All images
    of the same grid share the tensor, so it must not be changed."""
    tiles = select_tiles(grid, settings.vision_memory)
    centres = [patch_centres(grid, tile, settings.patches_per_side) for tile in tiles]
    return torch.cat([torch.zeros(0, 2), *centres])


def patch_centres(grid: TileGrid, tile: int, patches_per_side: int) -> torch.Tensor:
    """Returns the centres (y, x) of a tile's patches in fractions of the whole image, float32
    [P*P, 2], row by row. The thumbnail covers the whole image."""
    if tile < grid.rows * grid.cols:
        rows, cols, (row, col) = grid.rows, grid.cols, divmod(tile, grid.cols)
    else:
        rows, cols, row, col = 1, 1, 0, 0
    centres = (torch.arange(patches_per_side, dtype=torch.float32) + 0.5) / patches_per_side
    y, x = torch.meshgrid((row + centres) / rows, (col + centres) / cols, indexing="ij")
    return torch.stack([y.flatten(), x.flatten()], dim=-1)
