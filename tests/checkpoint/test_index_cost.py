"""No index of a checkpoint makes its reader work, or wait, without end."""

from __future__ import annotations

import os
import time

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from megatron_mm.checkpoint import storage
from megatron_mm.errors import CheckpointError
from support.indices import grid, load, place, refused, small, whole

SECONDS = 20  # for what takes 3 here: many times more work would end the test, not a busy machine


def test_shared_values_cost_no_more_than_their_bytes(tmp_path):
    """30 lists of 30 times the one before: 30^30 values for who walks them."""
    bomb: list = []
    for _ in range(30):
        bomb = [bomb] * 30
    made = small()
    made.planner_data = {"bomb": bomb}
    begin = time.perf_counter()
    load(tmp_path, made)
    made.state_dict_metadata["model.b"].chunks = bomb
    refused(tmp_path, made)
    # A tuple of twice the one before, 40 times, as a key: 2^40 values for who hashes it.
    twice = b"".join(bytes([*b"h", n, *b"h", n, 0x86, 0x94]) for n in range(40))
    refused(tmp_path, whole(b"})\x94" + twice + b"Ns"))
    assert time.perf_counter() - begin < SECONDS


def test_one_list_of_blocks_for_many_tensors(tmp_path):
    made = grid({"model.a": ((2000, 1), (2000, 1))})
    for number in range(2000):
        made.state_dict_metadata[f"model.{number}"] = made.state_dict_metadata["model.a"]
    begin = time.perf_counter()
    refused(tmp_path, made)
    assert time.perf_counter() - begin < SECONDS


def test_blocks_that_all_meet_along_the_way(tmp_path):
    """Columns below and rows right of a diagonal: they tile, but a sweep meets 4,000 at once."""
    count = 4_000
    made = grid({"model.a": ((2 * count, 1), (2 * count, 1))})
    entry = made.state_dict_metadata["model.a"]
    entry.size = torch.Size((count, count))
    for number, chunk in enumerate(entry.chunks[:]):
        info = made.storage_data.pop(MetadataIndex("model.a", chunk.offsets))
        at, right = number // 2, number % 2
        offset = torch.Size((at, at + right))
        info.length = 10**6
        made.storage_data[MetadataIndex("model.a", offset)] = info
        sizes = torch.Size((1, count - at - 1) if right else (count - at, 1))
        entry.chunks[number] = ChunkStorageMetadata(offset, sizes)
    begin = time.perf_counter()
    load(tmp_path, made)
    last = entry.chunks[-4]  # one column further left, where another is
    info = made.storage_data.pop(MetadataIndex("model.a", last.offsets))
    offset = torch.Size((last.offsets[0], last.offsets[1] - 1))
    made.storage_data[MetadataIndex("model.a", offset)] = info
    entry.chunks[-4] = ChunkStorageMetadata(offset, last.sizes)
    assert "overlap" in refused(tmp_path, made)
    assert time.perf_counter() - begin < SECONDS


def test_a_deep_pickle(tmp_path):
    begin = time.perf_counter()
    refused(tmp_path, whole(b")" + b"\x85" * 10**6))
    refused(tmp_path, whole(b"]\x94" + b"]\x94h\x00a" * 1000 + b"h\x00"))
    assert time.perf_counter() - begin < SECONDS


def test_a_large_index_is_read_in_time_and_a_huge_one_not_at_all(tmp_path):
    """A fifth of the blocks of 80 billion parameters on 512 GPUs."""
    made = grid({f"model.layers.{n}.weight": ((6400, 64), (100, 1)) for n in range(100)})
    begin = time.perf_counter()
    _, index = load(tmp_path, made)
    assert sum(len(entry.blocks) for entry in index.tensors.values()) == 10_000
    assert time.perf_counter() - begin < SECONDS
    checksums = place(tmp_path, b"")
    with (tmp_path / ".metadata").open("wb") as stream:
        stream.truncate(2**40)  # no byte of it is on the disk
    with pytest.raises(CheckpointError, match="has 1099511627776 bytes"):
        storage.read_index(tmp_path, checksums)


def test_a_pipe_in_the_place_of_a_file(tmp_path):
    checksums = place(tmp_path, small())
    (tmp_path / ".metadata").unlink()
    os.mkfifo(tmp_path / ".metadata")  # a reader would wait for ever
    with pytest.raises(CheckpointError, match=r"no \.metadata"):
        storage.read_index(tmp_path, checksums)
