"""The index of a checkpoint's tensor files: which block of which tensor lies where.

On disk it is the pickle `.metadata` of `torch.distributed.checkpoint`, so that torch and
megatron-core load the files. Here it is read as plain values (plain_pickle.py) and made into
values of our own, of which every number is checked. No path of it is used but the names of files
beside it, which have one form.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_mm.checkpoint.plain_pickle import MOST_NUMBER, Record, read, shape, shown
from megatron_mm.errors import CheckpointError

Shape = tuple[int, ...]

MOST_BYTES = 128 * 2**20  # of an index; about 500,000 blocks
MOST_CUTS = 4  # dimensions along which one tensor is cut; experts and tensor parallelism make 2
# The form of a tensor file's name: as torch names them, and as a conversion does.
FILE = re.compile(r"__(\d{1,9}_\d{1,9}|common)\.distcp", re.ASCII)
_DCP = "torch.distributed.checkpoint"
_RECORDS = frozenset(
    [f"{_DCP}.filesystem._StorageInfo"]
    + [
        f"{_DCP}.metadata.{name}"
        for name in (
            *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex"),
            *("StorageMeta", "TensorProperties", "TensorStorageMetadata"),
        )
    ]
)
_CONSTANTS = frozenset(["torch.serialization._get_layout", f"{_DCP}.metadata._MEM_FORMAT_ENCODING"])
_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


@dataclass(frozen=True)
class Place:
    """Bytes begin..begin+length-1 of a file."""

    file: str
    begin: int
    length: int


@dataclass(frozen=True)
class Block:
    """Stored block of a tensor: its offset and sizes within the tensor, and its place on disk."""

    offset: Shape
    sizes: Shape
    place: Place | None


@dataclass(frozen=True)
class Entry:
    """Stored tensor. `check_whole` says whether its blocks are there and tile it."""

    dtype: torch.dtype
    shape: Shape
    blocks: list[Block]


@dataclass(frozen=True)
class Index:
    """
    Attributes:
        tensors: by key.
        needed: tensor file -> bytes it must have.
        identity: the save that the index belongs to; "" if it does not say.
    """

    tensors: dict[str, Entry]
    needed: dict[str, int] = field(default_factory=dict)
    identity: str = ""


def parse(content: bytes) -> Index:
    """Returns the index in the bytes of a `.metadata`.

    Raises:
        CheckpointError: it is damaged, or has something that no index needs.
    """
    if len(content) > MOST_BYTES:
        raise CheckpointError(f"it has {len(content)} bytes; an index has up to {MOST_BYTES}")
    tree = read(content, _RECORDS, frozenset(_DTYPES), _CONSTANTS)
    fields = _fields(tree, "Metadata", "state_dict_metadata", "storage_data", "storage_meta")
    entries, placed, about = fields
    if type(entries) is not dict or type(placed) is not dict:
        raise CheckpointError("it lists no tensors")
    places = _places(placed)
    needed: dict[str, int] = {}
    for place in places.values():
        end = place.begin + place.length
        needed[place.file] = max(needed.get(place.file, 0), end)
    tensors = {}
    left = 1000 + 2 * len(places)  # blocks: without a limit many tensors could share a long list
    for key, entry in entries.items():
        if type(key) is not str or not key.isprintable() or not 0 < len(key) <= 1000:
            raise CheckpointError(f"{shown(key)} is no name of a tensor")
        if type(entry) is Record and entry.kind == f"{_DCP}.metadata.BytesStorageMetadata":
            continue
        tensors[key] = _entry(key, entry, places, left)
        left -= len(tensors[key].blocks)
    (identity,) = _fields(about, "StorageMeta", "save_id") if about is not None else ("",)
    return Index(tensors, needed, identity if type(identity) is str else "")


def _fields(record: Any, kind: str, *names: str) -> list[Any]:
    """The named fields of a record of a kind."""
    if type(record) is not Record or record.kind.rpartition(".")[2] != kind:
        raise CheckpointError(f"it has something else where a {kind} belongs")
    if type(record.fields) is not dict or any(name not in record.fields for name in names):
        raise CheckpointError(f"a {kind} of it lacks one of {', '.join(names)}")
    return [record.fields[name] for name in names]


def _whole(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < MOST_NUMBER:
        raise CheckpointError(f"{what} is no number of bytes")
    return value


def _places(placed: dict) -> dict[tuple[str, Shape | None], Place]:
    found: dict[tuple[str, Shape | None], Place] = {}
    for where, info in placed.items():
        (key,) = _fields(where, "MetadataIndex", "fqn")
        offset = where.fields.get("offset")  # left out for what is no tensor
        file, begin, length = _fields(info, "_StorageInfo", "relative_path", "offset", "length")
        if type(file) is not str or not FILE.fullmatch(file):
            raise CheckpointError(f"it names {shown(repr(file)[:200])}, not a file of tensors")
        if type(key) is not str:
            raise CheckpointError("it places something without a name")
        at = key, None if offset is None else shape(offset)
        if at in found:
            raise CheckpointError(f"it places {shown(key)} at {offset} twice")
        found[at] = Place(file, _whole(begin, "an offset"), _whole(length, "a length"))
    return found


def _entry(
    key: str, record: Any, places: dict[tuple[str, Shape | None], Place], most: int
) -> Entry:
    properties, size, chunks = _fields(
        record, "TensorStorageMetadata", "properties", "size", "chunks"
    )
    size = shape(size)
    if type(properties) is not Record or properties.kind.rpartition(".")[2] != "TensorProperties":
        raise CheckpointError(f"{shown(key)} has no properties")
    said = properties.fields
    # TensorProperties writes its fields as a tuple, dtype first (metadata.py, __getstate__).
    dtype = _DTYPES.get(said[0]) if type(said) is tuple and said and _is_name(said[0]) else None
    if dtype is None:
        raise CheckpointError(f"{shown(key)} has no dtype that is known")
    if type(chunks) is not list or len(chunks) > most:
        raise CheckpointError(f"{shown(key)} has no list of up to {most} blocks")
    blocks = []
    for chunk in chunks:
        offset, sizes = map(shape, _fields(chunk, "ChunkStorageMetadata", "offsets", "sizes"))
        blocks.append(Block(offset, sizes, places.get((key, offset))))
    return Entry(dtype, size, blocks)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value in _DTYPES


def check_whole(index: Index) -> None:
    """Checks that every tensor is stored: its blocks are in files, large enough, and tile it.

    Raises:
        CheckpointError: names the first tensor that is not.
    """
    for key, entry in index.tensors.items():
        volume = 0
        for block in entry.blocks:
            if block.place is None:
                raise CheckpointError(f"{shown(key)} has a block at {block.offset} in no file")
            count = math.prod(block.sizes)
            if block.place.length < count * entry.dtype.itemsize:
                raise CheckpointError(
                    f"{shown(key)}: {block.place.length} bytes hold no block of {count} "
                    f"{entry.dtype}"
                )
            if not _is_inside(block, entry.shape):
                raise CheckpointError(
                    f"{shown(key)} of shape {list(entry.shape)} has a block of "
                    f"{list(block.sizes)} at {list(block.offset)}"
                )
            volume += count
        if volume != math.prod(entry.shape):
            raise CheckpointError(
                f"of {shown(key)}, {volume} of the {math.prod(entry.shape)} numbers are stored"
            )
        _check_apart(key, entry)


def _is_inside(block: Block, size: Shape) -> bool:
    if not len(block.offset) == len(block.sizes) == len(size):
        return False
    return all(a + n <= m for a, n, m in zip(block.offset, block.sizes, size, strict=True))


def _check_apart(key: str, entry: Entry) -> None:
    """Checks that no two blocks share an element, in a time linear in their number.

    The number of blocks at each element is a function that its differences along all dimensions
    determine. Those of one block are 1 or -1 at its corners and 0 elsewhere, so blocks tile the
    whole if their corners add up to those of the whole.
    """
    blocks = [block for block in entry.blocks if math.prod(block.sizes)]
    whole = Block((0,) * len(entry.shape), entry.shape, None)
    cut = [d for d, n in enumerate(entry.shape) if any(block.sizes[d] != n for block in blocks)]
    if len(cut) > MOST_CUTS:
        raise CheckpointError(f"{shown(key)} is cut into blocks along {len(cut)} dimensions")
    left: dict[tuple, int] = {}
    for block, sign in [*((block, 1) for block in blocks), *([(whole, -1)] if blocks else [])]:
        for ends in itertools.product((0, 1), repeat=len(cut)):
            # The key is hashed with a secret: no choice of offsets makes the dict slow.
            at = (
                key,
                *(block.offset[d] + e * block.sizes[d] for d, e in zip(cut, ends, strict=True)),
            )
            left[at] = left.get(at, 0) + sign * (-1) ** sum(ends)
    wrong = next((at for at, count in left.items() if count), None)
    if wrong is not None:
        raise CheckpointError(f"blocks of {shown(key)} overlap at {list(wrong[1:])}")
