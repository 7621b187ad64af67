"""The picture that a viewer shows is the picture that the model sees."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin
from transformers.image_utils import load_image as transformers_load

from megatron_mm.data.files.rows import open_row_files
from megatron_mm.data.images import ImageFile, image_size, load_image
from megatron_mm.data.loading.shuffle import RowGroupCache
from megatron_mm.data.sample import SampleBuilder
from megatron_mm.pictures import decode

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "MPO")


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, orientation: int | None = None) -> bytes:
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    buffer = BytesIO()
    image.save(buffer, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def with_late_exif(png: bytes, orientation: int) -> bytes:
    """Moves the EXIF of a PNG behind its pixels, where cameras' software may write it."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    body = exif.tobytes().removeprefix(b"Exif\x00\x00")
    chunk = b"eXIf" + body
    chunk = struct.pack(">I", len(body)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    end = png.index(b"IEND") - 4
    return png[:end] + chunk + png[end:]


def of(data: bytes) -> ImageFile:
    return ImageFile("image 1", held=data)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", FORMATS)
def test_a_turned_photo(tmp_path, kind, orientation):
    """It is shown as by transformers' own loader; its size is known before it is decoded."""
    data = encoded(Image.fromarray(noise(64, 32)), kind, orientation)
    (tmp_path / "image").write_bytes(data)
    expected = transformers_load(str(tmp_path / "image"))
    assert expected.size == ((64, 32) if orientation < 5 else (32, 64))
    image = load_image(of(data), "row")
    assert image.size == image_size(of(data), "row") == expected.size
    assert np.array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_behind_the_pixels(orientation):
    pixels = noise(64, 32)
    data = with_late_exif(encoded(Image.fromarray(pixels), "PNG"), orientation)
    image = load_image(of(data), "row")
    assert image.size == image_size(of(data), "row")
    turns = {3: 2, 6: 3}[orientation]  # counterclockwise quarters
    assert np.array_equal(np.asarray(image), np.rot90(pixels, turns))


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("exif", [None, "without orientation", "with orientation"])
@pytest.mark.parametrize("kind", ["TIFF", "JPEG", "WEBP", "PNG", "PNG, behind the pixels"])
def test_xmp_turns_where_exif_does_not(kind, exif):
    """Pillow's `exif_transpose` does so. Its sizes before decoding know nothing of XMP."""
    own = Image.Exif()
    if exif is not None:
        own[ExifTags.Base.Software] = "x"
    if exif == "with orientation":
        own[ExifTags.Base.Orientation] = 3
    buffer, image = BytesIO(), Image.fromarray(noise(64, 32))
    if kind.startswith("PNG"):
        text = b"XML:com.adobe.xmp" + bytes(5) + XMP
        chunk = b"iTXt" + text
        chunk = struct.pack(">I", len(text)) + chunk + struct.pack(">I", zlib.crc32(chunk))
        image.save(buffer, "PNG", exif=own)
        png = buffer.getvalue()
        at = png.index(b"IEND" if "behind" in kind else b"IDAT") - 4
        data = png[:at] + chunk + png[at:]
    else:
        if kind == "TIFF":  # in a tag of its own
            own[700] = XMP
        image.save(buffer, kind, exif=own, xmp=XMP)
        data = buffer.getvalue()
    expected = (64, 32) if exif == "with orientation" else (32, 64)
    assert load_image(of(data), "row").size == image_size(of(data), "row") == expected


def test_a_png_without_exif_is_not_decoded_for_its_size(monkeypatch):
    buffer, about = BytesIO(), PngImagePlugin.PngInfo()
    about.add_text("Software", "x")
    Image.fromarray(noise(64, 32)).save(buffer, "PNG", pnginfo=about)
    data = buffer.getvalue()
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert decode.size(BytesIO(data), "image", 2**20) == (64, 32)


def test_a_turned_photo_is_tiled_as_it_is_seen(run, tokenizer, write_rows, make_row):
    """Red above blue, stored as red left of blue: two tiles, one above the other."""
    run.data.max_num_tiles = 2
    path = write_rows(make_row("<image>?", images=["photo.png"]))
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :8, 0], pixels[:, 8:, 2] = 255, 255
    (path.parent / "photo.png").write_bytes(encoded(Image.fromarray(pixels), "PNG", 6))
    rows, _ = open_row_files(path, RowGroupCache()).locate(0)
    builder = SampleBuilder(run, tokenizer)
    sample = builder.training(rows[0], rows.where(0), rows.folder)
    (image,) = sample.images
    assert (image.grid.rows, image.grid.cols) == (2, 1)
    assert (image.tiles[0] == [255, 0, 0]).all() and (image.tiles[1] == [0, 0, 255]).all()
    assert builder.measure(rows[0], rows.where(0), rows.folder).tiles == len(image.tiles)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "tRNS", "palette"])
def test_transparency_is_shown_over_white(mode):
    """Black drawings on nothing stay readable."""
    alpha = np.tile(np.array([0, 255], dtype=np.uint8), (4, 2))
    if mode in ("RGBA", "LA", "PA"):
        image = Image.fromarray(np.zeros((4, 4, 4 if mode == "RGBA" else 2), np.uint8), mode)
        image.putalpha(Image.fromarray(alpha))
        data = encoded(image, "TIFF" if mode == "PA" else "PNG")
    elif mode == "tRNS":
        grey = np.where(alpha[..., None] == 0, 7, 0).repeat(3, -1).astype(np.uint8)
        buffer = BytesIO()
        Image.fromarray(grey).save(buffer, "PNG", transparency=(7, 7, 7))
        data = buffer.getvalue()
    else:
        image = Image.fromarray((alpha == 0).astype(np.uint8), "P")
        image.putpalette([0, 0, 0, 9, 9, 9])
        buffer = BytesIO()
        image.save(buffer, "GIF", transparency=1)
        data = buffer.getvalue()
    seen = np.asarray(load_image(of(data), "row"))
    assert np.array_equal(seen, np.where(alpha[..., None] == 0, 255, 0).repeat(3, -1))


def test_half_transparent_pixels_are_mixed():
    pixels = np.full((2, 2, 4), (200, 100, 0, 128), dtype=np.uint8)
    seen = np.asarray(load_image(of(encoded(Image.fromarray(pixels), "PNG")), "row"))
    expected = np.array([200, 100, 0]) * (128 / 255) + 255 * (127 / 255)
    assert np.abs(seen[0, 0] - expected).max() <= 1  # eight bits
    opaque = noise(3, 3, 4)
    opaque[..., 3] = 255
    seen = np.asarray(load_image(of(encoded(Image.fromarray(opaque), "PNG")), "row"))
    assert np.array_equal(seen, opaque[..., :3])
