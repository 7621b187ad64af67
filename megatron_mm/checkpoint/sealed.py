"""Small files of a checkpoint: on disk when the call returns, and any wrong bit is seen.

`run.json` carries a checksum of its own content and those of the other small files; the
tensor files have one per tensor (storage.py). All are CRC-32, which no single wrong bit
and no burst of up to 32 bits escapes.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from megatron_mm.errors import CheckpointError

KEY = "checksum"


def _checksum(content: dict) -> int:
    """Of what is said, not of how it is laid out."""
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def write_bytes(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Raises TypeError for a value that JSON does not have."""
    text = json.dumps(content | {KEY: _checksum(content)}, indent=1, sort_keys=True)
    write_bytes(path, f"{text}\n".encode())


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError if the file is not what `write_json` wrote."""
    try:
        content = json.loads(path.read_bytes())
        found = content.pop(KEY)
    except KeyError as error:
        raise CheckpointError(f"{path} has no {KEY}: damaged, or of another version") from error
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if found != (expected := _checksum(content)):
        raise CheckpointError(f"{path} is damaged: its checksum is {expected}, not {found!r}")
    return content


def read_bytes(path: Path, checksum: int | None) -> bytes:
    """Raises CheckpointError if the content has another CRC-32 than `checksum`."""
    content = path.read_bytes()
    if checksum is None:
        raise CheckpointError(f"{path} was not there when the checkpoint was made")
    if (found := zlib.crc32(content)) != checksum:
        raise CheckpointError(f"{path} is damaged: its checksum is {found}, not {checksum}")
    return content


def sync_folder(folder: Path) -> None:
    """Make names in a folder (new files, renames) survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
