"""Small files of a checkpoint: durable when the call returns, and checked when read.

`run.json` holds the checksum of its own content and those of the other small files; the tensor
files have one per tensor (storage.py). All are CRC-32, which detects every single wrong bit and
every burst of up to 32 bits.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from pathlib import Path
from typing import Any

from megatron_mm.checkpoint.plain_pickle import shown
from megatron_mm.errors import CheckpointError

KEY = "checksum"
MOST_BYTES = 32 * 2**20  # of a small file


def _checksum(content: dict) -> int:
    """CRC-32 of the content in canonical form, so that formatting does not matter."""
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file; it is on disk when this returns."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes an object with its checksum.

    Raises:
        TypeError: a value has no JSON form.
    """
    text = json.dumps(content | {KEY: _checksum(content)}, indent=1, sort_keys=True)
    write_bytes(path, f"{text}\n".encode())


def read_all(path: Path, most: int = MOST_BYTES) -> bytes:
    """Reads a file of `most` bytes at most.

    Raises:
        CheckpointError: it is larger, or no file, such as a pipe, which might never end.
        OSError: it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a file")
    if status.st_size > most:
        raise CheckpointError(
            f"{path} is damaged: it has {status.st_size} bytes, up to {most} are allowed"
        )
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """Reads what `write_json` wrote.

    Raises:
        CheckpointError: the file is damaged or of another version.
    """
    try:
        content = json.loads(read_all(path))
        found = content.pop(KEY)
        expected = _checksum(content)
    except KeyError as error:
        raise CheckpointError(f"{path} has no {KEY}: damaged, or of another version") from error
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {shown(error)}") from error
    if found != expected:
        raise CheckpointError(
            f"{path} is damaged: its checksum is {expected}, not {shown(repr(found)[:200])}"
        )
    return content


def read_bytes(path: Path, checksum: int | None, most: int = MOST_BYTES) -> bytes:
    """Reads a file whose CRC-32 is known.

    Raises:
        CheckpointError: the CRC-32 is not `checksum`, or the file has more than `most` bytes.
    """
    content = read_all(path, most)
    if checksum is None:
        raise CheckpointError(f"{path} was not there when the checkpoint was made")
    if (found := zlib.crc32(content)) != checksum:
        raise CheckpointError(f"{path} is damaged: its checksum is {found}, not {checksum}")
    return content


def sync_folder(folder: Path) -> None:
    """Makes new and renamed entries of a folder survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
