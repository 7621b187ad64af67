"""A tensor file with damage: every block is what was written, or refused."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from megatron_mm.checkpoint.blocks import MarkedStream, Reader, mark
from megatron_mm.checkpoint.index import Block, Entry, Place
from megatron_mm.errors import CheckpointError
from support.indices import IDENTITY
from support.mutations import damaged

NAME = "blocks"
ALLOWED = (CheckpointError,)
FILE = "__0_0.distcp"
PIECES = (
    *(b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x07\x08"),
    *(b"\xff" * 4, b"\xff" * 8, bytes(4), b"\x08\x00", b"megatron_mm save=", b"archive/data/0"),
)

Written = list[tuple[str, Entry, torch.Tensor]]


def make(rng: random.Random, folder: Path) -> tuple[Path, Written]:
    """A folder with a damaged file, and what was written."""
    written: Written = []
    with (folder / FILE).open("wb") as raw:
        for number in range(rng.randrange(1, 5)):
            shape = tuple(rng.randrange(1, 5) for _ in range(rng.randrange(4)))
            dtype = rng.choice((torch.float32, torch.bfloat16, torch.int64, torch.uint8))
            tensor = torch.randint(0, 100, shape).to(dtype)
            key, offset, begin = f"model.{number}", (0,) * len(shape), raw.tell()
            stream = MarkedStream(raw, mark(IDENTITY, key, offset))
            torch.save(tensor, stream)
            stream.finish()
            place = Place(FILE, begin, raw.tell() - begin)
            written.append((key, Entry(dtype, shape, [Block(offset, shape, place)]), tensor))
    path = folder / FILE
    if rng.random() < 0.95:
        path.write_bytes(damaged(rng, path.read_bytes(), PIECES))
    if len(written) > 1 and rng.random() < 0.1:  # an index that swaps two
        (a, _, x), (b, other, y) = written[:2]
        written[:2] = [(a, other, x), (b, other, y)]
    return folder, written


def read(made: tuple[Path, Written]) -> None:
    folder, written = made
    reader, problem = Reader(folder, IDENTITY), None
    for key, entry, tensor in written:
        try:
            found = reader.read(key, entry, entry.blocks[0])
        except CheckpointError as error:
            problem = error
            continue
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), f"{key} is another"
    if problem is not None:
        raise problem
