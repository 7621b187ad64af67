"""Tensor files in megatron-core's distributed format, written whole or not at all. The folder
around them is described in sharded.py.

`megatron.core.dist_checkpointing` ("torch_dist") can load these files. Its `save` is not used: it
starts a manager process even for a synchronous save (filesystem_async.py:65), which a daemonic
process may not do, and if rank 0 fails in its last lines (serialization.py:436) the other ranks
wait in a barrier for ever. torch's writer, on which it builds, reports failures on every rank.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.checkpointable import CheckpointableShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.futures import Future

from megatron_mm.checkpoint import sealed
from megatron_mm.checkpoint.collective import one_line
from megatron_mm.errors import CheckpointError

METADATA = ".metadata"
INDEX_FILES = (CONFIG_FNAME, METADATA)


class Writer(FileSystemWriter):
    """torch's writer with clear disk errors: its zip writer hides an OSError such as a full disk
    behind "unexpected pos"."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            hidden: BaseException | None = error
            while hidden is not None and not isinstance(hidden, OSError):
                hidden = hidden.__cause__ or hidden.__context__
            raise (hidden or error) from None


def write_tensors(shards: Iterable[ShardedTensor], folder: Path, group: dist.ProcessGroup) -> None:
    """Writes each rank's shards to `__<rank>_0.distcp`; rank 0 adds the index. Every rank calls it.

    Raises:
        CheckpointException: torch's, on every rank; a rank failed, or the shards of all ranks do
            not tile the whole tensors exactly once.
    """
    items: dict[str, Any] = {s.key: CheckpointableShardedTensor.from_sh_ten(s) for s in shards}
    if group.rank() == 0:
        common = io.BytesIO()
        torch.save([{}], common)  # dist_checkpointing.load needs it; we use run.json
        items[ShardedObject("common_state", None, (1,), (0,)).unique_key] = common
    checkpoint.save(
        items,
        storage_writer=Writer(folder, sync_files=True, thread_count=1),
        planner=MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        process_group=group,
    )


def write_format(folder: Path) -> dict[str, int]:
    """Writes megatron-core's description of the format. Returns index file -> CRC-32."""
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    return {name: zlib.crc32((folder / name).read_bytes()) for name in INDEX_FILES}


class _IndexUnpickler(pickle.Unpickler):
    """Unpickler that allows only the types of an index, since a pickle may run any code."""

    ALLOWED = {
        "torch": {"Size"},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "pathlib": {"PosixPath"},
        "pathlib._local": {"PosixPath"},
    }

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index needs")
        return super().find_class(module, name)


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


def _in_place(content: torch.Tensor) -> torch.Tensor:
    """Returns the one tensor in the bytes of a `torch.save`, as a view; checks the checksums.

    The pickle is read only for shape and strides, by torch's restricted unpickler.
    """
    found = None
    with zipfile.ZipFile(_View(content)) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith("/data/0"):
                found = entry
            else:
                archive.read(entry)  # raises BadZipFile for a wrong checksum
    if found is None:
        raise CheckpointError("it holds no tensor")
    # A local header has 30 bytes, followed by a name and padding of the lengths it gives.
    head = content[found.header_offset : found.header_offset + 30].numpy().tobytes()
    begin = found.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
    data = content[begin : begin + found.file_size]
    if found.compress_type or len(data) != found.file_size:
        raise CheckpointError("it is not stored as torch stores it")
    if zlib.crc32(data.numpy()) != found.CRC:
        raise CheckpointError("its checksum is another")
    meta = torch.load(_View(content), map_location="meta", weights_only=True)
    whole = data.clone() if begin % meta.element_size() else data
    whole = whole.view(meta.dtype)
    return whole.as_strided(
        meta.size(), meta.stride(), whole.storage_offset() + meta.storage_offset()
    )


class Reader(FileSystemReader):
    """torch's reader with a known index and verified zip checksums: torch writes them but does not
    check them when it reads, so a flipped bit would go unnoticed."""

    def __init__(self, folder: Path, index: Metadata):
        super().__init__(folder)
        self._index = index
        self._chunk = "no chunk"

    def _slice_file(self, file: io.IOBase, info: Any) -> io.BytesIO:
        self._chunk = f"{info.relative_path} is damaged in the chunk at byte {info.offset}"
        content = io.BytesIO(super()._slice_file(file, info).read())
        with zipfile.ZipFile(content) as archive:
            if archive.testzip():
                raise CheckpointError(self._chunk)
        content.seek(0)
        return content

    def tensor(self, info: Any) -> torch.Tensor:
        """Reads the stored tensor at a place in a file, without a copy.

        Raises:
            CheckpointError: it is damaged.
        """
        self._chunk = f"{info.relative_path} is damaged in the chunk at byte {info.offset}"
        content = torch.empty(info.length, dtype=torch.uint8)
        try:
            path = Path(self.path) / info.relative_path
            with path.open("rb") as file:
                file.seek(info.offset)
                if file.readinto(content.numpy()) != info.length:
                    raise CheckpointError("the file ends in it")
            return _in_place(content)
        except OSError:
            raise
        except Exception as error:
            raise CheckpointError(f"{self._chunk}: {one_line(error)}") from error

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future:
        try:
            return super().read_data(plan, planner)
        except (CheckpointError, OSError):
            raise
        # A wrong bit in a length or offset makes zipfile and torch fail in many ways.
        except Exception as error:
            raise CheckpointError(f"{self._chunk}: {one_line(error)}") from error

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


def read_index(
    folder: Path, checksums: dict[str, int]
) -> tuple[dict[str, tuple[int, ...]], Metadata]:
    """Returns (key -> whole shape of every stored tensor, the index).

    Raises:
        CheckpointError: the checkpoint is incomplete or the index is damaged.
    """
    for name in INDEX_FILES:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {name}")
    content = {n: sealed.read_bytes(folder / n, checksums.get(n)) for n in INDEX_FILES}
    try:
        index = _IndexUnpickler(io.BytesIO(content[METADATA])).load()
        entries = index.state_dict_metadata.items()
        shapes = {k: tuple(e.size) for k, e in entries if isinstance(e, TensorStorageMetadata)}
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, ValueError) as error:
        raise CheckpointError(f"{folder / METADATA} is damaged: {error}") from error
    return shapes, index


def check_files(folder: Path, index: Metadata, rank: int = 0, ranks: int = 1) -> None:
    """Checks presence and size of every `ranks`-th shard file, starting with number `rank`.

    Raises:
        CheckpointError: a file is missing, too short, or outside of the folder.
    """
    needed: dict[str, int] = {}
    for info in index.storage_data.values():
        if Path(info.relative_path).name != info.relative_path:
            raise CheckpointError(f"{folder / METADATA} names {info.relative_path!r}, not a file")
        end = info.offset + info.length
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), end)
    wrong = []
    for name, size in sorted(needed.items())[rank::ranks]:
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif (found := path.stat().st_size) < size:
            wrong.append(f"{name} has {found} of {size} bytes")
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(f"{folder}: of {len(needed)} shard files {wrong[0]}{more}")


def check_whole(shards: dict[str, ShardedTensor], index: Metadata) -> None:
    """Checks that the stored chunks cover every shard: torch reads those that there are, and would
    leave the rest of a shard as it was.

    Raises:
        CheckpointError: names the first tensor of which numbers are missing.
    """
    for key, shard in shards.items():
        begin, size = shard.global_offset, shard.local_shape
        found = 0
        for chunk in index.state_dict_metadata[key].chunks:
            sides = zip(chunk.offsets, chunk.sizes, begin, size, strict=True)
            found += math.prod(max(0, min(a + n, b + m) - max(a, b)) for a, n, b, m in sides)
        if found < math.prod(size):
            raise CheckpointError(
                f"of {key}, {found} of the {math.prod(size)} numbers that a rank holds are stored"
            )


def read_tensors(shards: dict[str, ShardedTensor], folder: Path, index: Metadata) -> None:
    """Fills the shards' data from the checkpoint. Local: no rank waits for another."""
    items = {key: CheckpointableShardedTensor.from_sh_ten(s) for key, s in shards.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it reads without collectives
        checkpoint.load(
            items,
            storage_reader=Reader(folder, index),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=True,
        )
