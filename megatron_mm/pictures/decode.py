"""Opens an image file, checks its header, and decodes it as a viewer shows it. Imports no numpy.

It runs in the process of serve.py, which the kernel ends at limits of memory and time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from megatron_mm.errors import DataError
from megatron_mm.pictures.boxes import Box, pixel_box

# Of all that PIL can open, what training images are. A PostScript file would start Ghostscript.
FORMATS = tuple(
    plugin.format
    for plugin in (
        JpegImagePlugin.JpegImageFile,  # also opens MPO, the photo of a phone
        PngImagePlugin.PngImageFile,
        WebPImagePlugin.WebPImageFile,
        GifImagePlugin.GifImageFile,
        BmpImagePlugin.BmpImageFile,
        TiffImagePlugin.TiffImageFile,
    )
)


def load(file: BinaryIO, name: str, max_pixels: int, box: Box | None = None) -> Image.Image:
    """Decodes an image as 8-bit RGB, as a viewer shows it: turned as its EXIF orientation says,
    transparency over white. CMYK and palettes are converted.

    Args:
        box: the part of the shown image to return; None: all of it.

    Raises:
        DataError: the image cannot be used; names `name`.
    """
    with _opened(file, name, max_pixels) as opened:
        image = shown(opened)
    return image if box is None else image.crop(pixel_box(box, *image.size))


def size(file: BinaryIO, name: str, max_pixels: int, box: Box | None = None) -> tuple[int, int]:
    """Returns (width, height) in pixels as `load` would, without decoding.

    Raises:
        DataError: as `load`, for everything that the header shows.
    """
    with _opened(file, name, max_pixels) as opened:
        turned = orientation(opened) in (5, 6, 7, 8)
        width, height = opened.size[::-1] if turned else opened.size
    if box is None:
        return width, height
    left, top, right, bottom = pixel_box(box, width, height)
    return right - left, bottom - top


def scaled(image: Image.Image, width: int, height: int) -> Image.Image:
    """Returns an image stretched to another size by bicubic interpolation."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)


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
    """Returns the orientation, 1 to 8, by which `shown` will turn an opened image, of its EXIF or
    else of its XMP. Pixels are decoded only for a PNG that may have them behind its pixels."""
    tiff = isinstance(image, TiffImagePlugin.TiffImageFile)
    if tiff and ExifTags.Base.Orientation in image.tag_v2:
        return 1  # it is opened with the size of the turned image
    if image.format == "PNG" and _has_late_exif(image):
        image.load()
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)


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
def _opened(file: BinaryIO, name: str, max_pixels: int) -> Iterator[Image.Image]:
    try:
        with Image.open(file, formats=FORMATS) as opened:
            _check_header(opened, name, max_pixels)
            yield opened
    except (DataError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise DataError(f"{name} is beyond the limit of {max_pixels} pixels; shrink it") from None
    except Image.UnidentifiedImageError:
        allowed = ", ".join(FORMATS)
        raise DataError(f"{name} cannot be decoded (none of {allowed}); replace the file") from None
    # PIL chooses a decoder by content, and decoders raise exceptions of any kind.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{name} cannot be decoded ({reason}); replace the file") from error


def _is_deep(args: object) -> bool:
    """Whether a decoder's arguments, a raw mode or a tuple that begins with one, mean 16 bits a
    channel."""
    raw = args[0] if isinstance(args, tuple) and args else args
    return str(raw).endswith((";16B", ";16L", ";16N"))


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
    if image.mode[0] in "IF" or any(_is_deep(part.args) for part in image.tile):
        raise DataError(
            f"{name} has mode {image.mode} (more than 8 bits a channel); save it with 8 bits"
        )
    # The question does not say which frame it means. An MPO holds one photo several times. Frames
    # are not counted: PIL would walk the whole file.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise DataError(f"{name} has more than 1 frame, 1 is allowed; save the frame you mean")
