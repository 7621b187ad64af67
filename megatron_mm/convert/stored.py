"""A checkpoint's tensor files, block by block: written without holding more than one block,
and read the same way.

The files are those of `checkpoint.storage`, to the byte what torch's writer makes of the
same blocks; only its way of collecting a rank's whole state first is not taken.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
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

from megatron_mm.checkpoint import sealed, storage
from megatron_mm.convert.spool import Spool
from megatron_mm.errors import ConvertError
from megatron_mm.model.families.transforms import Shape

# A block of a stacked tensor holds as many experts as fit. Small enough to hold several at
# once, large enough that what a block costs beside its bytes (about 1 KB) is nothing.
BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Block:
    """A written block: of which tensor, from where, and where it lies."""

    key: str
    shape: Shape  # of the whole tensor
    offset: Shape
    sizes: Shape
    dtype: torch.dtype
    info: _StorageInfo


class _Stream:
    """A file that only grows, in the words of `torch.save`."""

    def __init__(self, spool: Spool, path: Path):
        self._spool, self._file, self.size = spool, spool.open(path), 0
        self._error: OSError | None = None

    def write(self, content: memoryview | bytes) -> int:
        if self._error is None:
            try:
                self._spool.write(self._file, memoryview(content), self.size)
            except OSError as error:  # torch's zip writer would hide it behind one of its own
                self._error = error
        self.size += len(content)
        return len(content)

    def flush(self) -> None:
        """Raises the first OSError there was."""
        if self._error is not None:
            raise self._error


class BlockWriter(AbstractContextManager):
    """One rank's file. `finish` makes it durable and returns what is in it."""

    def __init__(self, folder: Path, rank: int):
        self._name, self._spool = f"__{rank}_0.distcp", Spool()
        self._stream = _Stream(self._spool, folder / self._name)
        self._blocks: list[Block] = []

    def add(self, key: str, tensor: torch.Tensor, shape: Shape, first: int = 0) -> None:
        """Write indices `first`... of the first dimension of the tensor `key`, or all of it."""
        begin = self._stream.size
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # else all that the view is a part of would be written
        torch.save(tensor.contiguous(), self._stream)
        self._stream.flush()
        offset = (first, *(0 for _ in shape[1:])) if shape else ()
        info = _StorageInfo(self._name, begin, self._stream.size - begin)
        self._blocks.append(
            Block(key, tuple(shape), offset, tuple(tensor.shape), tensor.dtype, info)
        )

    def finish(self) -> list[Block]:
        """Raises OSError."""
        self._spool.finish()
        return self._blocks

    def __exit__(self, *_) -> None:
        self._spool.__exit__()


def write_common(folder: Path) -> tuple[str, _StorageInfo]:
    """What `dist_checkpointing.load` asks of every checkpoint: objects common to all ranks."""
    content = io.BytesIO()
    torch.save([{}], content)
    sealed.write_bytes(folder / "__common.distcp", content.getvalue())
    key = ShardedObject("common_state", None, (1,), (0,)).unique_key
    return key, _StorageInfo("__common.distcp", 0, content.getbuffer().nbytes)


def write_index(folder: Path, blocks: Sequence[Block]) -> None:
    """The index over all ranks' blocks, which tile every tensor exactly."""
    key, info = write_common(folder)
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    tensors[key] = BytesStorageMetadata()
    places = {MetadataIndex(key): info}
    for block in blocks:
        entry = tensors.get(block.key)
        if entry is None:
            properties = TensorProperties(dtype=block.dtype)
            entry = TensorStorageMetadata(properties, torch.Size(block.shape), [])
            tensors[block.key] = entry
        offset = torch.Size(block.offset)
        places[MetadataIndex(block.key, offset, len(entry.chunks))] = block.info
        entry.chunks.append(ChunkStorageMetadata(offset, torch.Size(block.sizes)))
    metadata = Metadata(
        state_dict_metadata=tensors,
        storage_data=places,
        storage_meta=StorageMeta(),
        version=CURRENT_DCP_VERSION,
    )
    sealed.write_bytes(folder / storage.METADATA, pickle.dumps(metadata))


class BlockReader:
    """Tensors of a checkpoint, whole or by blocks of their first dimension."""

    def __init__(self, folder: Path, index: Metadata):
        self._reader, self._index = storage.Reader(folder, index), index
        self._places = index.storage_data

    def dtype(self, key: str) -> torch.dtype:
        return self._index.state_dict_metadata[key].properties.dtype

    def shape(self, key: str) -> Shape:
        return tuple(self._index.state_dict_metadata[key].size)

    def ranges(self, key: str) -> Iterator[tuple[int, int]]:
        """(first, last) of the first dimension, in order, such that no block crosses a border:
        reading range by range reads every block once."""
        begin = end = 0
        chunks = self._index.state_dict_metadata[key].chunks
        for first, last in sorted((c.offsets[0], c.offsets[0] + c.sizes[0]) for c in chunks):
            if first >= end > begin:
                yield begin, end
                begin = first
            end = max(end, last)
        yield begin, end

    def read(self, key: str, first: int | None = None, last: int | None = None) -> torch.Tensor:
        """The tensor, or its indices first..last-1. Raises CheckpointError for damage,
        ConvertError where blocks are missing."""
        entry = self._index.state_dict_metadata[key]
        shape = tuple(entry.size)
        if first is None:
            first, last = 0, shape[0] if shape else 0
        wanted = [
            c for c in entry.chunks if c.offsets[0] < last and c.offsets[0] + c.sizes[0] > first
        ]
        if len(wanted) == 1 and tuple(wanted[0].sizes) == (last - first, *shape[1:]):
            return self._block(key, wanted[0])
        whole, filled = torch.empty((last - first, *shape[1:]), dtype=self.dtype(key)), 0
        for chunk in wanted:
            block = self._block(key, chunk)
            low, high = max(first, chunk.offsets[0]), min(last, chunk.offsets[0] + chunk.sizes[0])
            block = block[low - chunk.offsets[0] : high - chunk.offsets[0]]
            inner = zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)
            place = (slice(low - first, high - first), *(slice(o, o + n) for o, n in inner))
            whole[place] = block
            filled += block.numel()
        if filled != whole.numel():
            raise ConvertError(f"{key}: its blocks hold {filled} of {whole.numel()} elements")
        return whole

    def _block(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        tensor = self._reader.tensor(self._places[MetadataIndex(key, chunk.offsets)])
        if not torch.is_tensor(tensor) or tensor.shape != chunk.sizes:
            raise ConvertError(f"{key}: the block at {list(chunk.offsets)} is not what it says")
        return tensor
