"""From an image file to square tiles: safe decoding and InternVL's dynamic tiling.

Tiling: an image is stretched to a grid of square tiles whose aspect ratio is closest to
its own, cut, and (when there is more than one tile) joined by a thumbnail of the whole.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from megatron_mm.errors import DataError

# A small compressed file can claim to hold gigapixels; nothing is decoded beyond this.
MAX_PIXELS = 2**26


@dataclass(frozen=True)
class TilePlan:
    """A grid of `rows` x `cols` tiles, then the thumbnail if there is one."""

    rows: int
    cols: int
    thumbnail: bool

    @property
    def num_tiles(self) -> int:
        """Tiles in all, the thumbnail included."""
        return self.rows * self.cols + int(self.thumbnail)


def resolve_image_path(folder: Path, name: str, where: str) -> Path:
    """The file behind a row's image path; raises DataError if it points outside `folder`.

    The check reads the path only: a link placed inside the folder by its owner is followed.
    """
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: image path {name!r} is not a file name; write it as text")
    relative = os.path.normpath(name)
    if os.path.isabs(name) or relative == ".." or relative.startswith(".." + os.sep):
        raise DataError(
            f"{where}: image path {name!r} leaves the data folder; "
            "use a path relative to the data file"
        )
    return folder / relative


@dataclass(frozen=True)
class ImageFile:
    """Where the bytes of an image are: a file of its own, or inside a row."""

    name: str  # for messages
    path: Path | None = None
    held: bytes | None = None

    def open(self) -> BinaryIO:
        """Raises DataError (without the row) for a file that is absent or empty."""
        if self.held is None and not self.path.is_file():
            raise DataError(f"{self.name} does not exist; correct the path in the row")
        size = self.path.stat().st_size if self.held is None else len(self.held)
        if not size:
            raise DataError(f"{self.name} has 0 bytes; write the file again")
        return self.path.open("rb") if self.held is None else io.BytesIO(self.held)


def find_image(image: str | bytes, number: int, folder: Path, where: str) -> ImageFile:
    """The image that a row names by a path below `folder`, or holds. `number` counts from 1."""
    if isinstance(image, bytes):
        return ImageFile(f"image {number} (in the row)", held=image)
    path = resolve_image_path(folder, image, where)
    return ImageFile(f"image {path}", path)


def load_image(image: ImageFile | Path, where: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode `image` completely as 8-bit RGB (CMYK and palettes are converted, transparency is
    dropped); every failure is a DataError naming `where`."""
    with _opened(image, where, max_pixels) as opened:
        return opened.convert("RGB")


def image_size(
    image: ImageFile | Path, where: str, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """(width, height), read from the header: no pixel is decoded. Raises as `load_image` does
    for all that the header tells."""
    with _opened(image, where, max_pixels) as opened:
        return opened.size


@contextmanager
def _opened(image: ImageFile | Path, where: str, max_pixels: int) -> Iterator[Image.Image]:
    if isinstance(image, Path):
        image = ImageFile(f"image {image}", image)
    try:
        with image.open() as file, Image.open(file) as opened:
            _check_header(opened, image.name, max_pixels)
            yield opened
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{where}: {image.name} is beyond the limit of {max_pixels} pixels; shrink it"
        ) from error
    # PIL goes by the content, not the name, and its decoders raise whatever they like.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{where}: {image.name} cannot be decoded ({reason}); replace the file"
        ) from error


def _check_header(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(
            f"{name} has {width}x{height} = {width * height} pixels, the limit is {max_pixels}; "
            "shrink the image"
        )
    if width < 1 or height < 1:
        raise DataError(f"{name} is {width}x{height}; it holds no pixel")
    # PIL would clip these to white instead of scaling them, or drop the lower bits unasked.
    deep = any(str(part.args).endswith((";16B", ";16L", ";16N")) for part in image.tile)
    if image.mode[0] in "IF" or deep:
        raise DataError(
            f"{name} has mode {image.mode} (more than 8 bits a channel); save it with 8 bits"
        )
    # Which frame does the question mean? A camera's MPO holds the same photo several times.
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise DataError(f"{name} has {frames} frames, 1 is allowed; save the frame you mean")


@lru_cache(maxsize=4096)
def plan_tiles(
    width: int, height: int, *, image_size: int, max_num_tiles: int, use_thumbnail: bool
) -> TilePlan:
    """Choose the grid for an image of `width` x `height` pixels.

    Every grid of 1 to `max_num_tiles` tiles is a candidate and the closest aspect ratio
    wins. Grids of the same ratio (1x1, 2x2, 3x3) tie: a larger one wins only if the image
    has more than half the pixels that the grid would show, so small images are not blown up.
    """
    if width < 1 or height < 1 or image_size < 1 or max_num_tiles < 1:
        raise DataError(
            f"cannot tile {width}x{height} pixels into 1..{max_num_tiles} tiles of {image_size}; "
            "all four must be at least 1"
        )
    grids = [
        (rows, cols)
        for cols in range(1, max_num_tiles + 1)
        for rows in range(1, max_num_tiles // cols + 1)
    ]
    grids.sort(key=lambda grid: (grid[0] * grid[1], grid[1]))
    aspect = width / height
    best, best_distance = (1, 1), float("inf")
    for rows, cols in grids:
        distance = abs(aspect - cols / rows)
        fills = width * height > 0.5 * image_size**2 * rows * cols
        if distance < best_distance or (distance == best_distance and fills):
            best, best_distance = (rows, cols), distance
    rows, cols = best
    return TilePlan(rows, cols, thumbnail=use_thumbnail and rows * cols > 1)


def cut_tiles(image: Image.Image, plan: TilePlan, image_size: int) -> np.ndarray:
    """Tiles of an RGB image as uint8 [N, image_size, image_size, 3], row by row, then the
    thumbnail."""
    size = image_size
    canvas = np.asarray(_resize(image, plan.cols * size, plan.rows * size))
    tiles = (
        canvas.reshape(plan.rows, size, plan.cols, size, 3)
        .transpose(0, 2, 1, 3, 4)
        .reshape(plan.rows * plan.cols, size, size, 3)
    )
    if plan.thumbnail:
        tiles = np.concatenate([tiles, np.asarray(_resize(image, size, size))[None]])
    return np.ascontiguousarray(tiles)


def normalise(tiles: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W], (value / 255 - mean) / std per channel."""
    pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2).to(torch.float32) / 255.0
    mean_C11 = torch.tensor(mean, dtype=torch.float32).view(3, 1, 1)
    std_C11 = torch.tensor(std, dtype=torch.float32).view(3, 1, 1)
    return ((pixels - mean_C11) / std_C11).contiguous()


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)
