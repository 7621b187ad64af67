"""Indices of checkpoints for tests: good ones as torch writes them, and forged ones."""

from __future__ import annotations

import itertools
import json
import pickle
import zlib
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_mm.checkpoint import storage
from megatron_mm.checkpoint.index import Index, check_whole
from megatron_mm.errors import CheckpointError

IDENTITY = "0123456789abcdef" * 2


def grid(tensors: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> Metadata:
    """Returns the index of fp32 tensors: key -> (shape, blocks along each dimension)."""
    entries: dict = {"common/shard_0_1": BytesStorageMetadata()}
    places = {MetadataIndex("common/shard_0_1"): _StorageInfo("__0_0.distcp", 0, 100)}
    at = 100
    for key, (shape, counts) in tensors.items():
        sizes = torch.Size(n // c for n, c in zip(shape, counts, strict=True))
        chunks = []
        for cell in itertools.product(*map(range, counts)):
            offset = torch.Size(i * n for i, n in zip(cell, sizes, strict=True))
            length = 1500 + 4 * sizes.numel()
            places[MetadataIndex(key, offset, len(chunks))] = _StorageInfo(
                "__0_0.distcp", at, length
            )
            chunks.append(ChunkStorageMetadata(offset, sizes))
            at += length
        properties = TensorProperties(dtype=torch.float32)
        entries[key] = TensorStorageMetadata(properties, torch.Size(shape), chunks)
    return Metadata(
        state_dict_metadata=entries,
        storage_data=places,
        storage_meta=StorageMeta(save_id=IDENTITY),
        version=CURRENT_DCP_VERSION,
    )


def small() -> Metadata:
    return grid({"model.a": ((4, 6), (2, 3)), "model.b": ((4, 6), (1, 1)), "model.c": ((8,), (4,))})


def place(folder: Path, content: bytes | Metadata) -> dict[str, int]:
    """Writes an index, with the file beside it. Returns the checksums that go with them."""
    content = content if isinstance(content, bytes) else pickle.dumps(content)
    (folder / storage.METADATA).write_bytes(content)
    about = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}).encode()
    (folder / "metadata.json").write_bytes(about)
    return {storage.METADATA: zlib.crc32(content), "metadata.json": zlib.crc32(about)}


def text(value: str) -> bytes:
    """Opcode that pushes a text."""
    raw = value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def name(module: str, found: str) -> bytes:
    """Opcodes that push what a module holds."""
    return text(module) + text(found) + b"\x93"


def whole(*opcodes: bytes) -> bytes:
    """A pickle of some opcodes."""
    return b"\x80\x04" + b"".join(opcodes) + b"."


def load(folder: Path, content: bytes | Metadata) -> tuple[dict, Index]:
    """Writes an index and reads it as a load does. Returns (shapes, index)."""
    shapes, index = storage.read_index(folder, place(folder, content))
    check_whole(index)
    return shapes, index


def refused(folder: Path, content: bytes | Metadata) -> str:
    """Writes an index that is refused in one line. Returns the line."""
    with pytest.raises(CheckpointError) as caught:
        load(folder, content)
    message = str(caught.value)
    assert ".metadata" in message or "stored" in message or "block" in message
    assert "\n" not in message and message.isprintable() and len(message) < 600
    return message
