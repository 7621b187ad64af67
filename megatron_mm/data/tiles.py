"""Chooses the tiles of an image for the token stream and for each vision memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from megatron_mm.config.families import vision_family
from megatron_mm.config.memories import IMAGES, Memory, memories
from megatron_mm.config.settings import RunConfig
from megatron_mm.data.images import TileGrid, choose_grid
from megatron_mm.errors import DataError


@dataclass(frozen=True)
class ImageSettings:
    """The settings of the vision side that cutting and placing images depends on. Sizes are
    pixels."""

    image_size: int
    patch_size: int
    pixel_shuffle_factor: int
    max_num_tiles: int
    max_image_tokens: int | None
    use_thumbnail: bool
    image_stream: str
    memories: tuple[Memory, ...]
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
    """Returns the image half of a run's settings, checked; None for a model without vision.

    Raises:
        DataError: for sizes that do not divide, or a thumbnail that is asked for but never made.
    """
    vision, fusion, data = run.model.vision, run.model.fusion, run.data
    if vision is None:
        return None
    patches = vision_family(run.model).grid(vision, None)
    unit = patches.patch * fusion.pixel_shuffle_factor
    if unit < 1 or patches.height % unit:
        raise DataError(
            f"image_size {patches.height} is not a multiple of patch_size "
            f"{patches.patch} x pixel_shuffle_factor {fusion.pixel_shuffle_factor} = {unit}"
        )
    held = memories(run.model, data.memory_images)
    chosen = {"image_stream": fusion.image_stream} | {m.tiles_setting: m.tiles for m in held}
    for name, value in chosen.items():
        if value in ("thumbnail", "pyramid") and not data.use_thumbnail and data.max_num_tiles > 1:
            raise DataError(
                f"{name} is {value!r} but use_thumbnail is false while max_num_tiles is "
                f"{data.max_num_tiles}; set use_thumbnail or max_num_tiles 1"
            )
    if len(data.image_mean) != 3 or len(data.image_std) != 3 or min(data.image_std) <= 0:
        raise DataError("image_mean and image_std need 3 numbers each, image_std above 0")
    return ImageSettings(
        image_size=patches.height,
        patch_size=patches.patch,
        pixel_shuffle_factor=fusion.pixel_shuffle_factor,
        max_num_tiles=data.max_num_tiles,
        max_image_tokens=data.max_image_tokens,
        use_thumbnail=data.use_thumbnail,
        image_stream=fusion.image_stream,
        memories=held,
        mean=tuple(data.image_mean),
        std=tuple(data.image_std),
    )


def select_tiles(grid: TileGrid, choice: str) -> list[int]:
    """Returns ascending indices into the grid's tiles for none / thumbnail / tiles / all / pyramid:
    the last two are all of them, and a pyramid needs the thumbnail.

    An image of one tile has no separate thumbnail; the tile itself is used in its place.

    Raises:
        DataError: the choice needs a thumbnail and the grid has none.
    """
    cells = grid.rows * grid.cols
    if choice == "none":
        return []
    if choice == "all" or (choice == "pyramid" and grid.thumbnail):
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
    """Returns the tiles that the ViT sees: those of the stream and of every memory, ascending."""
    choices = (settings.image_stream, *(memory.tiles for memory in settings.memories))
    return sorted({tile for choice in choices for tile in select_tiles(grid, choice)})


def tiles_by_images(grid: TileGrid, settings: ImageSettings) -> dict[str, list[int]]:
    """Returns the tiles that the ViT sees of the images under each key of a row, ascending; the
    stream's key comes first."""
    choices = {IMAGES: {settings.image_stream}}
    for memory in settings.memories:
        choices.setdefault(memory.images, set()).add(memory.tiles)
    return {
        key: sorted({tile for choice in chosen for tile in select_tiles(grid, choice)})
        for key, chosen in choices.items()
    }


def tiles_seen(grid: TileGrid, settings: ImageSettings) -> int:
    """Counts the tiles of one image that the ViT sees, those of other images that stand for it in a
    memory included."""
    return sum(map(len, tiles_by_images(grid, settings).values()))


def choose_grids(
    sizes: Sequence[tuple[int, int]], settings: ImageSettings | None, where: str
) -> list[TileGrid]:
    """Returns the grid of every image of a row, from their (width, height). `settings` may be
    None if there is no image.

    If the tiles that the ViT sees cost more than `max_image_tokens`, all images are tiled
    again as if `max_num_tiles` were lower, down to 1, until they fit: the largest such limit
    counts, and it is the same for all of them.

    Raises:
        DataError: if even 1 tile each is too much.
    """
    if not sizes:
        return []
    assert settings is not None
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
        cost = per_tile * sum(tiles_seen(grid, settings) for grid in grids)
        if cost <= budget:
            return grids
    raise DataError(
        f"{where}: {len(sizes)} images need {cost} tokens at 1 tile each, max_image_tokens is "
        f"{budget}; use fewer images or raise max_image_tokens"
    )


@lru_cache(maxsize=1024)
def memory_extents(grid: TileGrid, memory: Memory, patches_per_side: int) -> torch.Tensor:
    """Returns the sides of the patches in a memory, tile by tile, in shares of the image's, float32
    [M]; of patches that are not square in it, the geometric mean. One tensor is shared by all
    images of the same grid: not to be written to."""
    cells, count = grid.rows * grid.cols, patches_per_side**2
    tiles = select_tiles(grid, memory.tiles)
    sides = [(cells if tile < cells else 1) ** -0.5 / patches_per_side for tile in tiles]
    return torch.tensor(sides, dtype=torch.float32).repeat_interleave(count)


@lru_cache(maxsize=1024)
def memory_coordinates(grid: TileGrid, memory: Memory, patches_per_side: int) -> torch.Tensor:
    """Returns the centres (y, x) of the patches in a memory, tile by tile, float32 [M, 2]. One
    tensor is shared by all images of the same grid: not to be written to."""
    tiles = select_tiles(grid, memory.tiles)
    return torch.cat([patch_centres(grid, tile, patches_per_side) for tile in tiles])


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
