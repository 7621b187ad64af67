"""Image files of every format, with damage."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from random import Random

from megatron_mm.data.images import Decoder, ImageFile, choose_grid
from megatron_mm.errors import DataError
from support.images import SMALL, png, progressive, tiff_chain
from tests.hostile.mutate import EDGES, mutated_bytes

NAME = "images"
ALLOWED = (DataError,)
BOXES = ((0.0, 0.0, 1.0, 1.0), (0.25, 0.5, 0.75, 0.9), (0.0, 1 - 2**-53, 5e-324, 1.0))
_decoder = Decoder()
_decoder.size(ImageFile("image 0", held=SMALL["PNG"]), "rows:0")


def make(rng: Random, folder: Path) -> ImageFile:
    """Writes a file, or holds its bytes."""
    match rng.randrange(8):
        case 0:
            size = rng.choice((1, 3, 70, 5000, 2**16)), rng.choice((1, 2, 70, 5000, 2**16))
            pixels = zlib.compress(bytes(rng.choice((0, 100, 10**6))), 1)
            data = png(*size, pixels, colour=rng.choice((0, 2, 3, 4, 6)))
        case 1:
            data = tiff_chain(rng.choice((1, 2, 300)), rng.choice((1, 8, 9)), rng.choice((1, 8)))
        case 2:
            data = progressive(64, 64, rng.choice((1, 5, 100)))
        case _:
            data = rng.choice(list(SMALL.values()))
    if rng.random() < 0.3:  # the head, where sizes stand
        at, edge = rng.randrange(min(64, len(data))), struct.pack("<I", rng.choice(EDGES) % 2**32)
        data = data[:at] + edge + data[at + 4 :]
    if rng.random() < 0.8:
        data = mutated_bytes(rng, data)
    box = rng.choice(BOXES) if rng.random() < 0.3 else None
    if rng.random() < 0.5:
        return ImageFile("image 1", held=data, box=box)
    path = folder / rng.choice(("a.png", "a.jpg", "a.eps", "a"))
    path.write_bytes(data)
    return ImageFile(f"image {path}", path, box=box)


def read(value: ImageFile) -> None:
    """Reads the size and cuts the tiles."""
    width, height = _decoder.size(value, "rows:1")
    grid = choose_grid(width, height, image_size=32, max_num_tiles=6, use_thumbnail=True)
    cut = _decoder.tiles(value, "rows:1", grid, 32, list(range(grid.num_tiles)))
    assert cut.shape == (grid.num_tiles, 32, 32, 3)
