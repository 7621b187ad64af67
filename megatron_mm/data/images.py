"""Decodes image files safely and cuts them into tiles by InternVL's dynamic tiling.

An image is stretched to the grid of square tiles with the closest aspect ratio and cut. If there
is more than one tile, a thumbnail of the whole image follows (Chen et al. 2024, arXiv:2404.16821).
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
from PIL import ExifTags, Image, ImageOps

from megatron_mm.errors import DataError

# Larger images are rejected before decoding: a small compressed file can claim gigapixels.
MAX_PIXELS = 2**26


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
    """Place of an image's bytes: a file, or the row itself."""

    name: str  # for messages
    path: Path | None = None
    held: bytes | None = None

    def open(self) -> BinaryIO:
        """Opens the bytes for reading.

        Raises:
            DataError: the file is missing or empty; the message does not name the row.
        """
        if self.held is not None:
            self._require(len(self.held))
            return io.BytesIO(self.held)
        assert self.path is not None  # one of the two is given
        if not self.path.is_file():
            raise DataError(f"{self.name} does not exist; correct the path in the row")
        self._require(self.path.stat().st_size)
        return self.path.open("rb")

    def _require(self, size: int) -> None:
        if not size:
            raise DataError(f"{self.name} has 0 bytes; write the file again")


def find_image(image: str | bytes, number: int, folder: Path, where: str) -> ImageFile:
    """Returns the image that a row names by a path below `folder`, or holds as bytes. `number`
    counts from 1."""
    if isinstance(image, bytes):
        return ImageFile(f"image {number} (in the row)", held=image)
    path = resolve_image_path(folder, image, where)
    return ImageFile(f"image {path}", path)


def load_image(image: ImageFile | Path, where: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image as 8-bit RGB, as a viewer shows it: turned as its EXIF orientation says,
    transparency over white. CMYK and palettes are converted.

    Raises:
        DataError: the image cannot be used; names `where`.
    """
    with _opened(image, where, max_pixels) as opened:
        return shown(opened)


def image_size(
    image: ImageFile | Path, where: str, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Returns (width, height) in pixels as `load_image` would, without decoding.

    Raises:
        DataError: as `load_image`, for everything that the header shows.
    """
    with _opened(image, where, max_pixels) as opened:
        turned = orientation(opened) in (5, 6, 7, 8)
        return opened.size[::-1] if turned else opened.size


def shown(image: Image.Image) -> Image.Image:
    """Returns an image as a viewer shows it, in RGB: turned as its EXIF orientation says,
    transparency over white."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8, by which `shown` will turn an opened image. Pixels are
    decoded only for a PNG whose EXIF stands behind them."""
    if image.format == "TIFF":
        return 1  # it is opened with the size of the turned image
    late = image.format == "PNG" and "exif" not in image.info and _has_late_exif(image)
    exif = image.getexif() if late else Image.Image.getexif(image)
    return exif.get(ExifTags.Base.Orientation, 1)


def _has_late_exif(image: Image.Image) -> bool:
    """Whether a chunk behind a PNG's first pixels may hold EXIF or XMP."""
    file = image.fp
    begin = file.tell()
    try:
        file.seek(len(b"\x89PNG\r\n\x1a\n"))
        behind = False
        while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
            if behind and head[4:] in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            behind |= head[4:] == b"IDAT"
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)  # the chunk, its checksum
        return False
    finally:
        file.seek(begin)


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
    # PIL chooses a decoder by content, and decoders raise exceptions of any kind.
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
    # PIL would clip these to white instead of scaling them, or silently drop the lower bits.
    deep = any(str(part.args).endswith((";16B", ";16L", ";16N")) for part in image.tile)
    if image.mode[0] in "IF" or deep:
        raise DataError(
            f"{name} has mode {image.mode} (more than 8 bits a channel); save it with 8 bits"
        )
    # The question does not say which frame it means. An MPO holds one photo several times.
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise DataError(f"{name} has {frames} frames, 1 is allowed; save the frame you mean")


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
    canvas = np.asarray(_resize(image, grid.cols * size, grid.rows * size))
    tiles = (
        canvas.reshape(grid.rows, size, grid.cols, size, 3)
        .transpose(0, 2, 1, 3, 4)
        .reshape(grid.rows * grid.cols, size, size, 3)
    )
    if grid.thumbnail:
        tiles = np.concatenate([tiles, np.asarray(_resize(image, size, size))[None]])
    return np.ascontiguousarray(tiles)


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


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)
