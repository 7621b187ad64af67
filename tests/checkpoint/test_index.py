"""The index of a checkpoint is read as plain values: nothing in it acts, whatever it holds."""

from __future__ import annotations

import collections
import decimal
import io
import os
import pathlib
import pickle
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, StorageMeta

from megatron_mm.checkpoint import folders
from megatron_mm.checkpoint.index import Block, Entry, Index, Place, check_whole
from megatron_mm.errors import CheckpointError
from support.indices import IDENTITY, load, name, refused, small, text, whole


def test_a_good_index_is_read_exactly(tmp_path):
    made = small()
    shapes, index = load(tmp_path, made)
    assert shapes == {"model.a": (4, 6), "model.b": (4, 6), "model.c": (8,)}
    assert index.identity == IDENTITY
    for key, entry in index.tensors.items():
        theirs = made.state_dict_metadata[key]
        assert entry.dtype == torch.float32 and type(entry.shape) is tuple
        assert [(b.offset, b.sizes) for b in entry.blocks] == [
            (tuple(c.offsets), tuple(c.sizes)) for c in theirs.chunks
        ]
        for block in entry.blocks:
            info = made.storage_data[MetadataIndex(key, block.offset)]
            found = (block.place.file, block.place.begin, block.place.length)
            assert found == (info.relative_path, info.offset, info.length)
    end = max(info.offset + info.length for info in made.storage_data.values())
    assert index.needed == {"__0_0.distcp": end}


# ---- objects of the file ----

RAN = Path("/tmp/megatron_mm_index_ran")
PATH = name("pathlib", "PosixPath")
STATES = {
    "of a path's class": PATH + b"N}" + text("suffix") + text(".partial") + b"s\x86b",
    "of a path": PATH + b")\x81N}" + text("_raw_paths") + b"]" + text("/etc") + b"as\x86b",
    "of a path that was called": PATH + text("/etc") + b"\x85R}" + text("x") + b"Nsb",
    "of a class of the index": name("torch.distributed.checkpoint.metadata", "Metadata")
    + b"N}" + text("__init__") + b"Ns\x86b",
    "of Size": name("torch", "Size") + b"}" + text("x") + b"Nsb",
    "of a function": name("torch.serialization", "_get_layout")
    + b"N}" + text("__defaults__") + b"Ns\x86b",
    "of a dtype": name("torch", "float32") + b"}" + text("x") + b"Nsb",
    "of a list": b"]}" + text("x") + b"Nsb",
    "twice": name("torch.distributed.checkpoint.metadata", "StorageMeta")
    + b")\x81}" + text("save_id") + b"Nsb}" + text("modules") + b"Nsb",
}  # fmt: skip


@pytest.mark.parametrize("what", STATES)
def test_no_object_gets_a_state_that_is_not_its_own(tmp_path, what):
    names = {cls: dict(vars(cls)) for cls in (pathlib.PosixPath, MetadataIndex, StorageMeta)}
    defaults = torch.serialization._get_layout.__defaults__
    try:
        refused(tmp_path, whole(STATES[what]))
        assert Path("model.pt").suffix == ".pt"
        for cls, before in names.items():
            assert dict(vars(cls)) == before
        assert torch.serialization._get_layout.__defaults__ == defaults
    finally:
        if "suffix" in vars(pathlib.PosixPath):  # so that the next tests delete nothing
            del pathlib.PosixPath.suffix


def test_the_forged_path_deletes_nothing_at_the_next_save(tmp_path):
    """The fault was: PosixPath.suffix set to ".partial" made the clean-up remove every folder."""
    saved, forged = tmp_path / "saved", tmp_path / "forged"
    for path in (saved / "iter_0000001", saved / "iter_0000002", forged):
        path.mkdir(parents=True)
    try:
        refused(forged, whole(STATES["of a path's class"]))
        folders.clear_leftovers(saved)
    finally:
        if "suffix" in vars(pathlib.PosixPath):
            del pathlib.PosixPath.suffix
    assert sorted(path.name for path in saved.iterdir()) == ["iter_0000001", "iter_0000002"]


class Call:
    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


CALLS = {
    "system": Call(os.system, f"touch {RAN}"),
    "rmtree": Call(shutil.rmtree, "/tmp/megatron_mm_no_such"),
    "open": Call(open, str(RAN), "w"),
    "eval": Call(eval, f"open({str(RAN)!r}, 'w')"),
    "a path": Path("/etc/passwd"),
    "a method": Call(Path.touch, RAN),
    "torch.load": Call(torch.load, str(RAN)),
    "bytes": Call(bytes, 2**40),
    "counted": collections.Counter("abc"),
    "ordered": collections.OrderedDict(a=1),
    "decimal": decimal.Decimal("1e1000000"),
    "a tensor": torch.zeros(2),
    "a device": torch.device("cpu"),
    "bytearray": bytearray(b"x"),
    "a set": {1, 2},
    "a float": 1.5,
    "complex": 1j,
    "an exception": ValueError("x"),
}


@pytest.mark.parametrize("what", CALLS)
def test_an_object_that_no_index_needs(tmp_path, what):
    RAN.unlink(missing_ok=True)
    made = small()
    made.planner_data = CALLS[what]  # a field that is not even looked at
    assert "which no index needs" in refused(tmp_path, made)
    assert not RAN.exists()


OPCODES = {
    "GLOBAL": b"cposix\nsystem\n",
    "INST": b"(" + text("true") + b"iposix\nsystem\n",
    "OBJ": b"(" + name("posix", "system") + text("true") + b"o",
    "NEWOBJ_EX": name("torch", "Size") + b")}\x92",
    "EXT1": b"\x82\x01",
    "PERSID": b"P1\n",
    "BINPERSID": b"NQ",
    "a put of 2^31": b"Nr\xff\xff\xff\x7f",
    "a text of 4 GB": b"X\xff\xff\xff\xff",
    "bytes of 2^62": b"\x8e" + (2**62).to_bytes(8, "little"),
    "a bytearray of 2^62": b"\x96" + (2**62).to_bytes(8, "little"),
    "a number of 2^31 bytes": b"\x8b\xff\xff\xff\x7f",
    "a number of 255 bytes": b"\x8a\xff" + b"\x01" * 255,
    "5000 digits": b"L" + b"9" * 5000 + b"L\n",
    "a recall of nothing": b"h\x05",
    "a pop": b"NN0",
    "nothing to take": b"\x85",
    "a mark in the middle": b"(N",
    "two values": b"NN",
    "a dict with a list for a key": b"}]Ns",
    "a dict with a tuple for a key": b"})Ns",
    "no text": b"X\x01\x00\x00\x00\xff",
    "appended to a dict": b"}Na",
    "set in a list": b"]NNs",
    "an odd number of items": b"}(" + text("a") + b"u",
    "a frame that is cut": b"\x95\x00",
    "1000 marks": b"(" * 1000,
    "stack of 10^6": b"N" * 10**6,
}


@pytest.mark.parametrize("what", OPCODES)
def test_an_opcode_that_no_index_has(tmp_path, what):
    refused(tmp_path, whole(OPCODES[what]))


def test_every_cut_and_every_other_protocol(tmp_path):
    content = pickle.dumps(small())
    for end in range(0, len(content), 7):
        refused(tmp_path, content[:end])
    for protocol in (0, 1, 2, 3):
        refused(tmp_path, pickle.dumps(small(), protocol))
    load(tmp_path, pickle.dumps(small(), 5))


# ---- values ----


def with_file(file):
    made = small()
    next(iter(made.storage_data.values())).relative_path = file
    return made


@pytest.mark.parametrize(
    "file",
    [
        *("..", "../__0_0.distcp", "/etc/passwd", "a/b", "", ".", "__0_0.distcp\0", "\x1b[31m"),
        *("__0_0.distcp/../../x", "__0_0.distcp\n", "__٣_0.distcp", "run.json", "latest"),
        *(Path("__0_0.distcp"), None, 5, b"__0_0.distcp"),
    ],
)  # fmt: skip
def test_a_name_that_is_no_tensor_file(tmp_path, file):
    refused(tmp_path, with_file(file))


def changed(key: str = "model.a", **fields):
    made = small()
    for field, value in fields.items():
        setattr(made.state_dict_metadata[key], field, value)
    return made


def moved(number: int, offset, sizes):
    made = small()
    kept = made.state_dict_metadata["model.a"].chunks[number]
    info = made.storage_data.pop(MetadataIndex("model.a", kept.offsets))
    offset, sizes = (v if isinstance(v, torch.Size) else torch.Size(v) for v in (offset, sizes))
    made.storage_data[MetadataIndex("model.a", offset)] = info
    made.state_dict_metadata["model.a"].chunks[number] = ChunkStorageMetadata(offset, sizes)
    return made


def placed(**fields):
    made = small()
    for field, value in fields.items():
        setattr(list(made.storage_data.values())[1], field, value)
    return made


class Fake(tuple):
    """Pickled as a torch.Size of anything."""

    def __reduce__(self):
        return torch.Size, (tuple(self),)


VALUES = {
    "no tensors": lambda: changed(chunks=[]),
    "a size of 2^70": lambda: changed(size=Fake((2**70, 6))),
    "a negative size": lambda: changed(size=torch.Size((-4, -6))),
    "a bool for a size": lambda: changed(size=Fake((True, 6))),
    "a text for a size": lambda: changed(size="46"),
    "no size": lambda: changed(size=None),
    "1000 dimensions": lambda: changed(size=torch.Size([1] * 1000)),
    "one dimension more": lambda: changed(size=torch.Size((4, 6, 1))),
    "a larger whole": lambda: changed(size=torch.Size((4, 8))),
    "a smaller whole": lambda: changed(size=torch.Size((4, 5))),
    "chunks that are a dict": lambda: changed(chunks={}),
    "chunks of something else": lambda: changed(chunks=[StorageMeta()]),
    "a dtype that is none": lambda: changed(properties=StorageMeta()),
    "a hole and an overlap": lambda: moved(1, (0, 1), (2, 2)),
    "a block outside": lambda: moved(5, (2, 5), (2, 2)),
    "a block of other dimensions": lambda: moved(5, (2,), (2,)),
    "a negative offset": lambda: placed(offset=-1),
    "an offset of 2^70": lambda: placed(offset=2**70),
    "a length of 2^63": lambda: placed(length=2**63),
    "a length that is too small": lambda: placed(length=3),
    "a length that is a float": lambda: placed(length=1600.0),
    "a length that is a text": lambda: placed(length="1600"),
    "no place": lambda: placed(offset=None),
}


@pytest.mark.parametrize("what", VALUES)
def test_a_value_that_no_index_has(tmp_path, what):
    refused(tmp_path, VALUES[what]())


@pytest.mark.parametrize("key", ["", "a" * 100_000, "\x1b]0;x\x07", "a\nb", 5, None, ("a",)])
def test_a_name_that_no_tensor_has(tmp_path, key):
    made = small()
    made.state_dict_metadata[key] = made.state_dict_metadata.pop("model.b")
    refused(tmp_path, made)


@pytest.mark.parametrize(
    "content", [b"", b".", b"\x80", whole(b"N"), whole(b"}"), b"PK\x03\x04", bytes(10_000)]
)
def test_no_index_at_all(tmp_path, content):
    refused(tmp_path, content)


def pieces(rng: random.Random, offset: list[int], sizes: list[int], depth: int) -> list[Block]:
    """Cuts a box at random places, each piece by itself: not a grid."""
    d = rng.randrange(len(sizes))
    if not depth or sizes[d] < 2:
        return [Block(tuple(offset), tuple(sizes), Place("__0_0.distcp", 0, 10**6))]
    at = rng.randrange(1, sizes[d])
    low, high, right = [*sizes], [*sizes], [*offset]
    low[d], high[d], right[d] = at, sizes[d] - at, offset[d] + at
    return pieces(rng, offset, low, depth - 1) + pieces(rng, right, high, depth - 1)


@pytest.mark.parametrize("shape", [(8,), (6, 4), (4, 4, 4), (3, 2, 3, 2)])
def test_a_tiling_is_told_from_what_looks_like_one(shape):
    """Blocks whose volumes add up, some moved, against counting the elements."""
    rng, outcomes = random.Random(0), set()
    for _ in range(300):
        blocks = pieces(rng, [0] * len(shape), [*shape], 4)
        for _ in range(rng.randrange(3)):
            number, d = rng.randrange(len(blocks)), rng.randrange(len(shape))
            moved = [*blocks[number].offset]
            moved[d] = rng.randrange(shape[d] - blocks[number].sizes[d] + 1)
            blocks[number] = replace(blocks[number], offset=tuple(moved))
        seen = torch.zeros(shape)
        for block in blocks:
            box = zip(block.offset, block.sizes, strict=True)
            seen[tuple(slice(o, o + n) for o, n in box)] += 1
        index = Index({"model.a": Entry(torch.float32, shape, blocks)})
        tiles = bool((seen == 1).all())
        if tiles:
            check_whole(index)
        else:
            with pytest.raises(CheckpointError, match="overlap"):
                check_whole(index)
        outcomes.add(tiles)
    assert outcomes == {True, False}


def test_our_reader_agrees_with_pickle_on_what_both_read():
    """Strings, numbers, tuples, lists and dicts, at every size of every opcode."""
    from megatron_mm.checkpoint import plain_pickle

    value = {
        "text": ["", "é" * 300, "x" * 255, "x" * 256],
        "numbers": [0, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -1, -(2**40), 2**62],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ("a", None, True, False)],
        "long": [str(n) for n in range(3000)],
        "wide": {str(n): n for n in range(3000)},
        "one": {"x": {"y": {"z": []}}},
    }
    value["again"] = value["text"]
    for protocol in (4, 5):
        content = pickle.dumps(value, protocol)
        none = frozenset()
        assert plain_pickle.read(content, none, none, none) == pickle.load(io.BytesIO(content))
