"""Blocks of a tensor file: written with the mark of their save, read with suspicion.

A block is the zip archive that `torch.save` writes for one tensor. Its comment is its mark: the
identity of the save, the tensor's key and the block's offset. Other readers pass over it. A block
of another save, or of another place, so has the wrong mark, whatever its checksum says.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from megatron_mm.checkpoint.collective import one_line
from megatron_mm.checkpoint.index import Block, Entry, Place, Shape
from megatron_mm.checkpoint.plain_pickle import shown
from megatron_mm.errors import CheckpointError

END = struct.Struct("<4s8x8xH")  # end of a zip archive: signature, sizes, length of the comment
MOST_MARK = 65_535  # bytes of a zip archive's comment
SMALL = 1 << 16  # bytes of all in a block that is not the tensor


def mark(identity: str, key: str, offset: Shape | None) -> bytes:
    """Returns what a block says of itself."""
    at = "-" if offset is None else ",".join(map(str, offset))
    return f"megatron_mm save={identity} key={key} offset={at}".encode()


class MarkedStream:
    """Passes one zip archive on to a stream, with a comment. `finish` writes its end."""

    def __init__(self, raw: Any, comment: bytes):
        if len(comment) > MOST_MARK:
            raise CheckpointError(f"a mark has {len(comment)} bytes, {MOST_MARK} are allowed")
        self._raw, self._comment, self._end = raw, comment, b""

    def write(self, content: Any) -> int:
        """Writes all but the last bytes, which `finish` may have to change."""
        view = memoryview(content).cast("B")
        cut = len(view) - END.size
        if cut >= 0:
            self._raw.write(self._end)
            self._raw.write(view[:cut])
            self._end = bytes(view[cut:])
        else:
            both = self._end + bytes(view)
            cut = max(0, len(both) - END.size)
            self._raw.write(both[:cut])
            self._end = both[cut:]
        return len(view)

    def flush(self) -> None:
        self._raw.flush()

    def finish(self) -> None:
        """Writes the end of the archive, which says how long the comment is, and the comment."""
        signature, length = END.unpack(self._end)
        if signature != b"PK\x05\x06" or length:
            raise CheckpointError("torch.save did not end with a zip archive without a comment")
        self._raw.write(self._end[:-2] + struct.pack("<H", len(self._comment)) + self._comment)
        self._raw.flush()


class _View(io.RawIOBase):
    """Read-only file over the bytes of a tensor, without a copy."""

    def __init__(self, content: torch.Tensor):
        self._bytes, self._at = memoryview(content.numpy()), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {0: 0, 1: self._at, 2: len(self._bytes)}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        part = self._bytes[self._at : self._at + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


class Reader:
    """Reader of the blocks of one save.

    torch writes checksums but does not check them when it reads, so a flipped bit would go
    unnoticed. Nothing is unpickled: dtype and sizes are those of the index.
    """

    def __init__(self, folder: Path, identity: str):
        self._folder, self._identity = folder, identity

    def read(self, key: str, entry: Entry, block: Block) -> torch.Tensor:
        """Reads a block, without a copy.

        Raises:
            CheckpointError: it is damaged, of another save, or of another place.
        """
        place = block.place
        assert place is not None  # `check_whole` has refused an index without it
        where = f"{place.file} is damaged in the chunk at byte {place.begin}"
        try:
            content = self._content(place)
            data, found = _open(content)
            _check_mark(found, self._identity, key, block.offset, place)
            begin, size = data
            values = content[begin : begin + size]
            values = values.clone() if begin % entry.dtype.itemsize else values
            return values.view(entry.dtype).view(block.sizes)
        except (OSError, Misplaced):
            raise
        # A wrong bit in a length or offset makes zipfile and torch fail in many ways.
        except Exception as error:
            raise CheckpointError(f"{where}: {one_line(error)}") from error

    def _content(self, place: Place) -> torch.Tensor:
        with (self._folder / place.file).open("rb") as file:
            file.seek(place.begin)
            content = torch.empty(place.length, dtype=torch.uint8)
            if file.readinto(content.numpy()) != place.length:
                raise CheckpointError("the file ends in it")
        return content


class Misplaced(CheckpointError):
    """A block is whole but belongs elsewhere."""


def _open(content: torch.Tensor) -> tuple[tuple[int, int], bytes]:
    """Returns (begin and size of the tensor's bytes in a block, its mark); checks the checksums."""
    found, others = None, 0
    with zipfile.ZipFile(_View(content)) as archive:
        for entry in archive.infolist():
            if entry.compress_type or entry.file_size != entry.compress_size:
                raise CheckpointError("it is not stored as torch stores it")
            if entry.filename.endswith("/data/0"):
                found = entry
                continue
            others += entry.file_size
            if others > SMALL:
                raise CheckpointError("it holds more than a tensor")
            archive.read(entry)  # raises BadZipFile for a wrong checksum
        comment = archive.comment
    if found is None:
        raise CheckpointError("it holds no tensor")
    # A local header has 30 bytes, followed by a name and padding of the lengths it gives.
    head = content[found.header_offset : found.header_offset + 30].numpy().tobytes()
    begin = found.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
    data = content[begin : begin + found.file_size]
    if len(data) != found.file_size:
        raise CheckpointError("it is not stored as torch stores it")
    # torch writes it behind the tensor too ("data descriptor"), where other readers look for it.
    behind = content[begin + len(data) : begin + len(data) + 8].numpy().tobytes()
    crc = zlib.crc32(data.numpy())
    if crc != found.CRC or (
        found.flag_bits & 8 and behind != struct.pack("<4sI", b"PK\7\x08", crc)
    ):
        raise CheckpointError("its checksum is another")
    return (begin, found.file_size), comment


def _check_mark(found: bytes, identity: str, key: str, offset: Shape, place: Place) -> None:
    expected = mark(identity, key, offset)
    if found == expected:
        return
    where = f"{place.file} has at byte {place.begin}"
    words = found.decode("utf-8", "backslashreplace").split(" ", 2)
    if len(words) != 3 or words[0] != "megatron_mm" or not words[1].startswith("save="):
        raise Misplaced(f"{where} a block without an identity")
    save = words[1].removeprefix("save=")
    if save != identity:
        raise Misplaced(
            f"{where} a block of another save: its identity is {shown(save)}, the checkpoint's is "
            f"{identity}"
        )
    raise Misplaced(f"{where} a block of another place: {shown(words[2])}, not {shown(key)}")
