"""Reads the image files of rows and cuts them into tiles by InternVL's dynamic tiling.

An image is stretched to the grid of square tiles with the closest aspect ratio and cut. If there
is more than one tile, a thumbnail of the whole image follows (Chen et al. 2024, arXiv:2404.16821).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_mm.data.files.forms import HeldImage, held_and_box
from megatron_mm.errors import DataError
from megatron_mm.pictures.boxes import Box
from megatron_mm.pictures.decode import scaled
from megatron_mm.pictures.process import MAX_PIXELS, PictureProcess


@dataclass(frozen=True)
class TileGrid:
    """Grid of `rows` x `cols` tiles, followed by the thumbnail if there is one."""

    rows: int
    cols: int
    thumbnail: bool

    @property
    def num_tiles(self) -> int:
        """Number of tiles, including the thumbnail."""
        return self.rows * self.cols + int(self.thumbnail)


def resolve_image_path(folder: Path, name: str, where: str) -> Path:
    """Returns the file behind a row's image path.

    Only the path is checked: a link inside the folder is followed.

    Raises:
        DataError: the path points outside `folder`.
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
    """Place of an image's bytes: a file, or the row itself; and the part of the image that is
    shown."""

    name: str  # for messages
    path: Path | None = None
    held: bytes | None = None
    box: Box | None = None  # None: all of the image

    def held_or_path(self) -> Path | bytes:
        """Returns the bytes, or the file that holds them.

        Raises:
            DataError: the file is missing or empty; the message does not name the row.
        """
        if self.held is not None:
            self._require(len(self.held))
            return self.held
        assert self.path is not None  # one of the two is given
        # Nor may it be a pipe or a device, whose bytes need not come.
        try:
            exists = self.path.is_file()
            size = self.path.stat().st_size if exists else 0
        except OSError as error:  # a name of thousands of letters, a folder that may not be read
            raise DataError(f"{self.name} cannot be read ({error.strerror})") from None
        if not exists:
            raise DataError(f"{self.name} does not exist; correct the path in the row")
        self._require(size)
        return self.path

    def _require(self, size: int) -> None:
        if not size:
            raise DataError(f"{self.name} has 0 bytes; write the file again")


def find_image(image: HeldImage, number: int, folder: Path, where: str) -> ImageFile:
    """Returns the image that a row names by a path below `folder`, or holds as bytes. `number`
    counts from 1."""
    held, box = held_and_box(image)
    if isinstance(held, bytes):
        return ImageFile(f"image {number} (in the row)", held=held, box=box)
    path = resolve_image_path(folder, held, where)
    return ImageFile(f"image {path}", path, box=box)


class Decoder:
    """Reads images in a process of its own (megatron_mm/pictures), which starts with the first."""

    def __init__(self) -> None:
        self._process = PictureProcess()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()

    def size(self, image: ImageFile, where: str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
        """Returns (width, height) in pixels as a viewer shows the image, or the part in its box,
        without decoding it.

        Args:
            max_pixels: of the whole image.

        Raises:
            DataError: the image cannot be used, as far as its header shows; names `where`.
            DecoderError: the machine cannot decode images.
        """
        with _named(where):
            return self._process.size(image.held_or_path(), image.name, max_pixels, image.box)

    def pixels(self, image: ImageFile, where: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Returns an image as a viewer shows it, uint8 [H, W, 3]: turned as its EXIF orientation
        says, transparency over white, then cropped to its box. CMYK and palettes are converted.
        Raises as `size`, also for pixels that cannot be decoded."""
        with _named(where):
            source, sizes = image.held_or_path(), [None]
            return self._process.scaled(source, image.name, sizes, max_pixels, image.box)[0]

    def tiles(
        self, image: ImageFile, where: str, grid: TileGrid, image_size: int, used: Sequence[int]
    ) -> np.ndarray:
        """Returns the tiles `used` (ascending) of an image, uint8 [N, image_size, image_size, 3].
        Raises as `pixels`."""
        cells, side = grid.rows * grid.cols, image_size
        in_grid = [tile for tile in used if tile < cells]
        sizes = [(grid.cols * side, grid.rows * side)] if in_grid else []
        sizes += [(side, side)] if len(in_grid) < len(used) else []
        with _named(where):
            source = image.held_or_path()
            found = self._process.scaled(source, image.name, sizes, box=image.box)
        parts = [_cells(found[0], grid, side)[in_grid]] if in_grid else []
        parts += [found[-1][None]] if len(in_grid) < len(used) else []
        return np.concatenate(parts)


def load_image(image: ImageFile | Path, where: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes one image as 8-bit RGB, in a process that ends with it; see `Decoder.pixels`."""
    with Decoder() as decoder:
        return Image.fromarray(decoder.pixels(_as_file(image), where, max_pixels))


def image_size(
    image: ImageFile | Path, where: str, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Returns (width, height) in pixels as `load_image` would, without decoding; see
    `Decoder.size`."""
    with Decoder() as decoder:
        return decoder.size(_as_file(image), where, max_pixels)


def _as_file(image: ImageFile | Path) -> ImageFile:
    return ImageFile(f"image {image}", image) if isinstance(image, Path) else image


@contextmanager
def _named(where: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


@lru_cache(maxsize=4096)
def choose_grid(
    width: int, height: int, *, image_size: int, max_num_tiles: int, use_thumbnail: bool
) -> TileGrid:
    """Chooses the grid for an image of `width` x `height` pixels.

    Candidates are all grids of 1 to `max_num_tiles` tiles; the closest aspect ratio wins. Among
    grids of equal ratio (1x1, 2x2, 3x3) a larger one wins only if the image has more than half
    the pixels of the grid, so small images are not enlarged much.

    Raises:
        DataError: an argument is below 1.
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
    return TileGrid(rows, cols, thumbnail=use_thumbnail and rows * cols > 1)


def cut_tiles(image: Image.Image, grid: TileGrid, image_size: int) -> np.ndarray:
    """Returns the tiles of an RGB image, uint8 [N, image_size, image_size, 3], row by row, then
    the thumbnail."""
    size = image_size
    tiles = _cells(np.asarray(scaled(image, grid.cols * size, grid.rows * size)), grid, size)
    if grid.thumbnail:
        tiles = np.concatenate([tiles, np.asarray(scaled(image, size, size))[None]])
    return np.ascontiguousarray(tiles)


def _cells(canvas: np.ndarray, grid: TileGrid, size: int) -> np.ndarray:
    """Cuts uint8 [rows * size, cols * size, 3] to [rows * cols, size, size, 3], row by row."""
    cut = canvas.reshape(grid.rows, size, grid.cols, size, 3).transpose(0, 2, 1, 3, 4)
    return cut.reshape(grid.rows * grid.cols, size, size, 3)


def channels_first(tiles: np.ndarray) -> torch.Tensor:
    """Converts tiles [N, H, W, 3], as `cut_tiles` gives them, to a tensor [N, 3, H, W]."""
    return torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous()


def normalise(
    pixels_NCHW: torch.Tensor,
    mean: Sequence[float] | torch.Tensor,
    std: Sequence[float] | torch.Tensor,
) -> torch.Tensor:
    """Converts uint8 [N, 3, H, W] to float32, on the same device: (value / 255 - mean) / std.

    Args:
        mean, std: of each channel; tensors are float32 [3] on that device.

    Raises:
        ValueError: the pixels are not uint8.
    """
    if pixels_NCHW.dtype != torch.uint8:
        raise ValueError(f"pixels are {pixels_NCHW.dtype}; give them as uint8, not yet normalised")
    like = {"dtype": torch.float32, "device": pixels_NCHW.device}
    mean_C11, std_C11 = (torch.as_tensor(x, **like).view(3, 1, 1) for x in (mean, std))
    # A tensor, since CUDA multiplies by the reciprocal of a number: the last bit would differ.
    whole = torch.full_like(mean_C11, 255.0)
    return (pixels_NCHW.to(torch.float32) / whole - mean_C11) / std_C11
