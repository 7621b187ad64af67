"""Tensor files in megatron-core's distributed format, written whole or not at all. The folder
around them is described in sharded.py.

`megatron.core.dist_checkpointing` ("torch_dist") can load these files. Its `save` is not used: it
starts a manager process even for a synchronous save (filesystem_async.py:65), which a daemonic
process may not do, and if rank 0 fails in its last lines (serialization.py:436) the other ranks
wait in a barrier for ever. torch's writer, on which it builds, reports failures on every rank.
"""

from __future__ import annotations

import io
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
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.futures import Future

from megatron_mm.checkpoint import index as indices
from megatron_mm.checkpoint import sealed
from megatron_mm.checkpoint.blocks import MarkedStream, Reader, mark
from megatron_mm.checkpoint.index import Block, Index, Shape
from megatron_mm.checkpoint.plain_pickle import shown
from megatron_mm.errors import CheckpointError

METADATA = ".metadata"
INDEX_FILES = (CONFIG_FNAME, METADATA)


class _Marks:
    """Marks every block that torch's writer writes, in the place of its transforms
    (filesystem.py:233)."""

    def __init__(self, identity: str):
        self._identity = identity

    def transform_save_stream(self, item: WriteItem, stream: Any) -> tuple[Any, list[str]]:
        key, offset = item.index.fqn, item.index.offset
        comment = mark(self._identity, key, None if offset is None else tuple(offset))
        return _Closing(stream, comment), []


class _Closing(MarkedStream):
    """Stream that torch's writer closes when a block is written; the file stays open."""

    def close(self) -> None:
        self.finish()


class Writer(FileSystemWriter):
    """torch's writer with the save's identity on the index and on every block, and with clear disk
    errors: its zip writer hides an OSError such as a full disk behind "unexpected pos"."""

    def __init__(self, folder: Path, identity: str):
        # Nothing is copied ahead: the tensors are in host memory, and torch would wait for a stream
        # of the thread's GPU, which in a new thread is the first of the node.
        super().__init__(folder, sync_files=True, thread_count=1, per_thread_copy_ahead=0)
        self._identity, self.transforms = identity, _Marks(identity)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self._identity)  # torch's would name this machine's folder

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            hidden: BaseException | None = error
            while hidden is not None and not isinstance(hidden, OSError):
                hidden = hidden.__cause__ or hidden.__context__
            raise (hidden or error) from None


def write_tensors(
    shards: Iterable[ShardedTensor], folder: Path, group: dist.ProcessGroup, identity: str
) -> None:
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
        storage_writer=Writer(folder, identity),
        planner=MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        process_group=group,
    )


def write_format(folder: Path) -> dict[str, int]:
    """Writes megatron-core's description of the format. Returns index file -> CRC-32."""
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    about = folder / CONFIG_FNAME
    sealed.write_bytes(about, about.read_bytes())  # megatron-core leaves it to the cache
    return {name: zlib.crc32((folder / name).read_bytes()) for name in INDEX_FILES}


def read_index(
    folder: Path, checksums: dict[str, int], identity: str | None = None
) -> tuple[dict[str, Shape], Index]:
    """Returns (key -> whole shape of every stored tensor, the index).

    Args:
        identity: the save that the index must belong to; None: any.

    Raises:
        CheckpointError: the checkpoint is incomplete, or the index is damaged or of another save.
    """
    for name in INDEX_FILES:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {name}")
    most = indices.MOST_BYTES
    content = {n: sealed.read_bytes(folder / n, checksums.get(n), most) for n in INDEX_FILES}
    try:
        index = indices.parse(content[METADATA])
    except CheckpointError as error:
        raise CheckpointError(f"{folder / METADATA} is damaged: {error}") from error
    if identity is not None and index.identity != identity:
        raise CheckpointError(
            f"{folder / METADATA} is of another save: its identity is "
            f"{shown(index.identity or 'none')}, the checkpoint's is {identity}"
        )
    return {key: entry.shape for key, entry in index.tensors.items()}, index


def check_files(folder: Path, index: Index, rank: int = 0, ranks: int = 1) -> None:
    """Checks presence and size of every `ranks`-th shard file, starting with number `rank`.

    Raises:
        CheckpointError: a file is missing or too short.
    """
    wrong = []
    for name, size in sorted(index.needed.items())[rank::ranks]:
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif (found := path.stat().st_size) < size:
            wrong.append(f"{name} has {found} of {size} bytes")
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(f"{folder}: of {len(index.needed)} shard files {wrong[0]}{more}")


def read_tensors(
    shards: dict[str, ShardedTensor], folder: Path, index: Index, identity: str
) -> None:
    """Fills the shards' data from the checkpoint. Local: no rank waits for another.

    Raises:
        CheckpointError: a block is damaged or of another save, or numbers of a shard are missing.
    """
    reader = Reader(folder, identity)
    filled = dict.fromkeys(shards, 0)
    needed = []
    for key, shard in shards.items():
        for block in index.tensors[key].blocks:
            shared = _overlap(shard, block)
            if shared is not None and block.place is not None:
                needed.append((block.place.file, block.place.begin, key, block, shared))
    needed.sort(key=lambda found: found[:2])  # as they lie on disk
    for _, _, key, block, (begin, size) in needed:
        shard, part = shards[key], reader.read(key, index.tensors[key], block)
        for d, (start, count) in enumerate(zip(begin, size, strict=True)):
            part = part.narrow(d, start - block.offset[d], count)
        box = zip(begin, size, shard.global_offset, strict=True)
        shard.data[tuple(slice(a - b, a - b + n) for a, n, b in box)].copy_(part)
        filled[key] += part.numel()
    for key, shard in shards.items():
        if filled[key] != shard.data.numel():
            raise CheckpointError(
                f"of {key}, {filled[key]} of the {shard.data.numel()} numbers that a rank holds "
                "are stored"
            )


def _overlap(shard: ShardedTensor, block: Block) -> tuple[list[int], list[int]] | None:
    """Returns (offset, sizes) of what a shard and a block share; None for nothing."""
    begin, size = [], []
    sides = zip(shard.global_offset, shard.local_shape, block.offset, block.sizes, strict=True)
    for a, n, b, m in sides:
        begin.append(max(a, b))
        size.append(min(a + n, b + m) - begin[-1])
    return (begin, size) if all(n > 0 for n in size) else None
