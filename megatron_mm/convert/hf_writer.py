"""Writes folders of sharded safetensors from any number of ranks.

Names, shapes and dtypes are known beforehand. Headers and index are written first and the files get
their full size; then any rank can write any part of any tensor at its place.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_mm.checkpoint import sealed
from megatron_mm.convert.hf_files import INDEX, NAMES, SINGLE
from megatron_mm.convert.spool import OutFile, Spool
from megatron_mm.convert.work import nbytes
from megatron_mm.model.families.transforms import Shape

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Place:
    """Place of a tensor: file, offset in bytes, dtype and shape."""

    file: str
    offset: int
    dtype: torch.dtype
    shape: Shape


def lay_out(
    tensors: Sequence[tuple[str, Shape, torch.dtype]], shard_bytes: int = SHARD_BYTES
) -> tuple[dict[str, Place], dict[str, bytes], dict[str, int]]:
    """Assigns tensors to files in their order. A file exceeds `shard_bytes` only if it holds one
    tensor.

    Returns:
        (name -> place, file -> header, file -> size in bytes).
    """
    shards: list[list[tuple[str, Shape, torch.dtype]]] = [[]]
    held = 0
    for name, shape, dtype in tensors:
        size = nbytes(shape, dtype.itemsize)
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append((name, shape, dtype))
        held += size
    places, heads, sizes = {}, {}, {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header: dict = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, shape, dtype in shard:
            end = at + nbytes(shape, dtype.itemsize)
            header[name] = {
                "dtype": NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [at, end],
            }
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
        heads[file] = len(text).to_bytes(8, "little") + text
        sizes[file] = len(heads[file]) + at
        for name, shape, dtype in shard:
            begin = len(heads[file]) + header[name]["data_offsets"][0]
            places[name] = Place(file, begin, dtype, tuple(shape))
    return places, heads, sizes


# What posix_fallocate says where a file system cannot reserve space. Where glibc would write zeros
# instead, it must read the file, and says EBADF of one that is only open for writing.
CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)


def create_files(folder: Path, heads: dict[str, bytes], sizes: dict[str, int]) -> None:
    """Creates every file at its full size.

    Raises:
        OSError: the disk is too small.
    """
    for file, head in heads.items():
        with (folder / file).open("wb") as stream:
            stream.write(head)
            stream.flush()
            try:
                os.posix_fallocate(stream.fileno(), 0, sizes[file])
            except OSError as error:
                if error.errno not in CANNOT_RESERVE:
                    raise
                stream.truncate(sizes[file])


def write_index(folder: Path, places: dict[str, Place]) -> None:
    """Writes the index, which a folder with a single file does not need."""
    files = sorted({place.file for place in places.values()})
    if files == [SINGLE]:
        return
    total = sum(nbytes(p.shape, p.dtype.itemsize) for p in places.values())
    content = {
        "metadata": {"total_size": total},
        "weight_map": {name: place.file for name, place in sorted(places.items())},
    }
    sealed.write_bytes(folder / INDEX, (json.dumps(content, indent=2) + "\n").encode())


class TensorWriter(AbstractContextManager):
    """Writer of one rank. What it wrote is on disk after `finish`."""

    def __init__(self, folder: Path, places: dict[str, Place]):
        self._folder, self._places = folder, places
        self._spool = Spool()
        self._open: dict[str, OutFile] = {}

    def write(self, name: str, tensor: torch.Tensor, first: int = 0) -> None:
        """Writes a tensor, or its rows from `first` on, converted to the file's dtype."""
        place = self._places[name]
        if place.file not in self._open:
            self._open[place.file] = self._spool.open(self._folder / place.file)
        row = nbytes(place.shape[1:], place.dtype.itemsize)
        content = tensor.to(place.dtype).contiguous().view(-1).view(torch.uint8).numpy()
        self._spool.write(self._open[place.file], memoryview(content), place.offset + first * row)

    def finish(self) -> None:
        """Waits until everything is on disk.

        Raises:
            OSError: a write failed.
        """
        self._spool.finish()

    def __exit__(self, *_) -> None:
        self._spool.__exit__()
