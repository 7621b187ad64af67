"""Writes and reads a checkpoint's tensor files chunk by chunk, with one chunk in memory at a time.

The files are in the form that `checkpoint.storage` writes, block by block, but torch's writer
needs a rank's whole state in memory.
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
from megatron_mm.checkpoint.blocks import MarkedStream, Reader, mark
from megatron_mm.checkpoint.index import Block, Entry, Index, Shape
from megatron_mm.convert.spool import Spool
from megatron_mm.errors import ConvertError

# Most bytes of a chunk of stacked experts, unless one expert has more: small enough to hold several
# in memory, large enough that the overhead of a chunk (about 1 KB) does not matter.
CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Chunk:
    """Written chunk of a tensor: its offset and sizes within the tensor, and its place on disk."""

    key: str
    shape: Shape  # of the whole tensor
    offset: Shape
    sizes: Shape
    dtype: torch.dtype
    info: _StorageInfo


class _Stream:
    """Append-only file object for `torch.save`."""

    def __init__(self, spool: Spool, path: Path):
        self._spool, self._file, self.size = spool, spool.open(path), 0
        self._error: OSError | None = None

    def write(self, content: memoryview | bytes) -> int:
        if self._error is None:
            try:
                self._spool.write(self._file, memoryview(content), self.size)
            except OSError as error:  # torch's zip writer would hide it behind another error
                self._error = error
        self.size += len(content)
        return len(content)

    def flush(self) -> None:
        """Raises the first OSError of a write, if there was one."""
        if self._error is not None:
            raise self._error


class ChunkWriter(AbstractContextManager):
    """Writer of one rank's file. `finish` makes it durable and returns its chunks."""

    def __init__(self, folder: Path, rank: int, identity: str):
        self._identity = identity
        self._name, self._spool = f"__{rank}_0.distcp", Spool()
        self._stream = _Stream(self._spool, folder / self._name)
        self._chunks: list[Chunk] = []

    def add(self, key: str, tensor: torch.Tensor, shape: Shape, first: int = 0) -> None:
        """Appends a chunk: the rows from `first` on of the tensor `key`, which has `shape`."""
        begin = self._stream.size
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch.save writes the whole storage of a view
        offset = (first, *(0 for _ in shape[1:])) if shape else ()
        marked = MarkedStream(self._stream, mark(self._identity, key, offset))
        torch.save(tensor.contiguous(), marked)
        marked.finish()
        info = _StorageInfo(self._name, begin, self._stream.size - begin)
        self._chunks.append(
            Chunk(key, tuple(shape), offset, tuple(tensor.shape), tensor.dtype, info)
        )

    def finish(self) -> list[Chunk]:
        """Waits until everything is on disk.

        Raises:
            OSError: a write failed.
        """
        self._spool.finish()
        return self._chunks

    def __exit__(self, *_) -> None:
        self._spool.__exit__()


def write_common(folder: Path, identity: str) -> tuple[str, _StorageInfo]:
    """Writes the objects common to all ranks, which `dist_checkpointing.load` needs."""
    key = ShardedObject("common_state", None, (1,), (0,)).unique_key
    content = io.BytesIO()
    marked = MarkedStream(content, mark(identity, key, None))
    torch.save([{}], marked)
    marked.finish()
    sealed.write_bytes(folder / "__common.distcp", content.getvalue())
    return key, _StorageInfo("__common.distcp", 0, content.getbuffer().nbytes)


def write_index(folder: Path, chunks: Sequence[Chunk], identity: str) -> None:
    """Writes the index of all ranks' chunks, which tile every tensor exactly once."""
    key, info = write_common(folder, identity)
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    tensors[key] = BytesStorageMetadata()
    places = {MetadataIndex(key): info}
    for written in chunks:
        entry = tensors.get(written.key)
        if entry is None:
            properties = TensorProperties(dtype=written.dtype)
            entry = TensorStorageMetadata(properties, torch.Size(written.shape), [])
            tensors[written.key] = entry
        offset = torch.Size(written.offset)
        places[MetadataIndex(written.key, offset, len(entry.chunks))] = written.info
        entry.chunks.append(ChunkStorageMetadata(offset, torch.Size(written.sizes)))
    metadata = Metadata(
        state_dict_metadata=tensors,
        storage_data=places,
        storage_meta=StorageMeta(save_id=identity),
        version=CURRENT_DCP_VERSION,
    )
    sealed.write_bytes(folder / storage.METADATA, pickle.dumps(metadata))


class ChunkReader:
    """Reader of a checkpoint's tensors, whole or by ranges of rows. The chunk of which a part was
    read last stays in memory: experts are asked for one by one.

    Attributes:
        identity: of the checkpoint.
    """

    def __init__(self, folder: Path, index: Index, identity: str):
        self._reader, self._tensors = Reader(folder, identity), index.tensors
        self.identity = identity
        self._held: tuple[Block, torch.Tensor] | None = None

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def shape(self, key: str) -> Shape:
        return self._tensors[key].shape

    def ranges(self, key: str) -> Iterator[tuple[int, int]]:
        """Yields row ranges (first, last) in order, such that no chunk crosses a border: reading
        range by range reads every chunk once."""
        begin = end = 0
        for first, last in sorted(map(_rows, self._tensors[key].blocks)):
            if first >= end > begin:
                yield begin, end
                begin = first
            end = max(end, last)
        yield begin, end

    def read(self, key: str, first: int | None = None, last: int | None = None) -> torch.Tensor:
        """Reads the tensor, or its rows first..last-1.

        Raises:
            CheckpointError: a chunk is damaged or of another save.
            ConvertError: chunks are missing.
        """
        entry = self._tensors[key]
        if not entry.shape:
            return self._reader.read(key, entry, entry.blocks[0])
        if first is None:
            first, last = 0, entry.shape[0]
        assert last is not None  # the two come together
        sizes = (last - first, *entry.shape[1:])
        wanted = [b for b in entry.blocks if _rows(b)[0] < last and _rows(b)[1] > first]
        if len(wanted) == 1 and wanted[0].sizes == sizes:
            return self._reader.read(key, entry, wanted[0])
        whole, filled = torch.empty(sizes, dtype=entry.dtype), 0
        for block in wanted:
            part = self._part(key, entry, block)
            begin, end = _rows(block)
            low, high = max(first, begin), min(last, end)
            part = part[low - begin : high - begin]
            inner = zip(block.offset[1:], block.sizes[1:], strict=True)
            place = (slice(low - first, high - first), *(slice(o, o + n) for o, n in inner))
            whole[place] = part
            filled += part.numel()
        if filled != whole.numel():
            raise ConvertError(f"{key}: its chunks hold {filled} of {whole.numel()} elements")
        return whole

    def _part(self, key: str, entry: Entry, block: Block) -> torch.Tensor:
        if self._held is None or self._held[0] is not block:
            self._held = None  # no two at a time
            self._held = block, self._reader.read(key, entry, block)
        return self._held[1]


def _rows(block: Block) -> tuple[int, int]:
    return block.offset[0], block.offset[0] + block.sizes[0]
