"""The index of a checkpoint: good pickles of torch, damaged, and opcodes that act."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path

from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_mm.checkpoint import storage
from megatron_mm.checkpoint.index import check_whole
from megatron_mm.errors import CheckpointError
from support.indices import grid, name, place, text, whole
from support.mutations import NUMBERS, TEXTS, damaged

NAME = "index"
ALLOWED = (CheckpointError,)

META = "torch.distributed.checkpoint.metadata"
PIECES = (
    *(bytes([code]) for code in b"()]}aesutbRNhjKMJ0123.\x81\x85\x86\x87\x88\x89\x93\x94"),
    *(text(value) for value in TEXTS),
    *(b"\x8a\x09" + (n % 2**71).to_bytes(9, "little") for n in NUMBERS),
    *(b"J" + (n % 2**32).to_bytes(4, "little") for n in NUMBERS),
    *(b"\x8c" + bytes([n]) for n in (0, 1, 255)),
    *(code + b"\xff\xff\xff\x7f" for code in (b"X", b"r", b"j", b"\x8b", b"B")),
    name("pathlib", "PosixPath") + b"N}" + text("suffix") + text(".partial") + b"s\x86b",
    name("posix", "system") + text("touch /tmp/megatron_mm_fuzz_ran") + b"\x85R",
    name("torch", "Size") + b"](K\x01e\x85R",
    name(META, "Metadata") + b")\x81",
    name(META, "ChunkStorageMetadata") + b")\x81}" + text("offsets") + b")sb",
    name("torch", "float32"),
    b"h\x00h\x00\x86\x94" * 30,
    b"]\x94h\x00a" * 30,
)


def make(rng: random.Random, folder: Path) -> Path:
    """A folder with an index."""
    shapes = [((4, 6), (2, 3)), ((8,), (4,)), ((), ()), ((3, 2, 2), (3, 1, 2)), ((0, 4), (1, 1))]
    made = grid({f"model.{n}": rng.choice(shapes) for n in range(rng.randrange(1, 6))})
    for _ in range(rng.choice((0, 0, 1, 2))):
        target = rng.choice(list(made.storage_data.values()))
        field = rng.choice(("relative_path", "offset", "length"))
        setattr(target, field, rng.choice((*NUMBERS, *TEXTS, None)))
    if rng.random() < 0.2:
        made.storage_data[MetadataIndex("model.0", (7, 7))] = None
    content = pickle.dumps(made, rng.choice((4, 4, 4, 5, 2, 0)))
    how = rng.randrange(10)
    if how < 8:
        content = damaged(rng, content, PIECES)
    elif how == 8:
        content = whole(*rng.choices(PIECES, k=rng.randrange(40)))
    place(folder, content)
    with (folder / "__0_0.distcp").open("wb") as stream:
        stream.truncate(10**6)
    return folder


def read(folder: Path) -> None:
    """Reads it as a load does, with the checksums that are right for it."""
    content = (folder / storage.METADATA).read_bytes()
    before = sorted(os.listdir(folder))
    try:
        _, index = storage.read_index(folder, place(folder, content))
        check_whole(index)
        storage.check_files(folder, index)
    finally:
        assert sorted(os.listdir(folder)) == before, "a file came or went"
        assert Path("model.pt").suffix == ".pt", "a class was changed"
        assert not os.path.exists("/tmp/megatron_mm_fuzz_ran"), "it ran a program"
