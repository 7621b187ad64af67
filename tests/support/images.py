"""Image files made byte by byte, to be as no program would write them."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image


def _saved(kind: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


# By format, noise of 24 x 16 pixels.
SMALL = {kind: _saved(kind) for kind in ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF")}


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, data: bytes, colour: int = 2, before: bytes = b"", times: int = 1
) -> bytes:
    """A PNG of 8 bits a channel whose pixels are `data`, compressed; `before` stands `times` before
    them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", header, before * times, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    )


def tiff_chain(frames: int, width: int = 8, height: int = 8) -> bytes:
    """A TIFF of grey frames that all have the same pixels."""
    pixels = bytes(64)
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (278, height)]
    tags += [(277, 1), (279, 64)]
    each = 2 + 12 * len(tags) + 4
    parts, at = [], 8 + len(pixels)
    for frame in range(frames):
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags))
        after = at + each if frame < frames - 1 else 0
        parts.append(struct.pack("<H", len(tags)) + entries + struct.pack("<I", after))
        at += each
    return struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + b"".join(parts)


def deep_tiff(channels: int, photometric: int) -> bytes:
    """A TIFF of 4x4 pixels with 16 bits a channel, which PIL reads and does not write."""
    pixels = b"\x12\x34" * 16 * channels
    depths = 8 + 2 + 12 * 9 + 4
    tags = [
        (256, 3, 1, 4),
        (257, 3, 1, 4),
        (258, 3, channels, 16 if channels == 1 else depths),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, 1, depths + 2 * channels),
        (277, 3, 1, channels),
        (278, 3, 1, 4),
        (279, 4, 1, len(pixels)),
    ]
    header = b"II*\0" + struct.pack("<IH", 8, len(tags))
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return header + entries + struct.pack(f"<I{channels}H", 0, *[16] * channels) + pixels


def progressive(width: int, height: int, scans: int) -> bytes:
    """A JPEG whose last scan stands `scans` times: each costs a pass over all pixels."""
    buffer = BytesIO()
    Image.new("L", (width, height), 128).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at:-2] * scans + data[-2:]
