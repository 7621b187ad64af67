"""One wrong bit anywhere in a checkpoint: refused by name on every rank, or without effect.

`FLIPS=2000 python -m pytest tests/checkpoint/test_bit_flips.py -s` tries more of them.
"""

from __future__ import annotations

import os
import pickle
import random
from collections import Counter
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_mm.checkpoint import sharded
from megatron_mm.errors import CheckpointError
from support.checkpoint_runs import create, scramble, tiny_run, train
from support.fingerprints import state_hash

FLIPS = int(os.environ.get("FLIPS", "96"))
EDGE = 400  # bytes at both ends of a block, where its names, lengths and offsets are


def places(folder: Path, count: int) -> list[tuple[Path, int, int]]:
    """(file, byte, bit): as many in each file, half of a tensor file's at the edges of blocks."""
    chance = random.Random(count)
    path = folder / "iter_0000001"
    files = sorted(file for file in [*path.iterdir(), folder / "latest"] if file.is_file())
    blocks: dict[str, list[tuple[int, int]]] = {}
    for info in pickle.loads((path / ".metadata").read_bytes()).storage_data.values():
        blocks.setdefault(info.relative_path, []).append((info.offset, info.length))
    found = []
    for number in range(count):
        file = files[number % len(files)]
        byte = chance.randrange(file.stat().st_size)
        if file.name in blocks and number // len(files) % 2:
            start, length = chance.choice(sorted(blocks[file.name]))
            inside = chance.randrange(min(EDGE, length))
            byte = start + chance.choice([inside, length - 1 - inside])
        found.append((file, byte, chance.randrange(8)))
    return found


def flip(place: tuple[Path, int, int]) -> None:
    file, byte, bit = place
    with file.open("r+b") as stream:
        stream.seek(byte)
        (value,) = stream.read(1)
        stream.seek(byte)
        stream.write(bytes([value ^ 1 << bit]))


def attempts(run, folder: Path, count: int) -> list[tuple[str, bool, str]]:
    """Per flip: the file's name, whether the engine is what it may be, and the error or ""."""
    engine = create(run)
    scramble()
    train(engine, range(1))
    sharded.save(engine, {"consumed_samples": 1}, folder, 1)
    good = before = state_hash(engine)
    found, others = [], 1
    for place in places(folder, count):
        if before == good:  # what is loaded must differ from what is there
            train(engine, range(others, others + 1))
            before, others = state_hash(engine), others + 1
        if dist.get_rank() == 0:
            flip(place)
        dist.barrier()
        try:
            sharded.load(engine, folder)
            error, expected = "", good
        except CheckpointError as problem:
            error, expected = str(problem), before
        dist.barrier()
        if dist.get_rank() == 0:
            flip(place)
        now = state_hash(engine)
        found.append((place[0].name, now == expected, error))
        before = now
    dist.barrier()
    sharded.load(engine, folder)
    assert state_hash(engine) == good, "the flips were not undone"
    return found


@pytest.mark.parametrize(("size", "parallel"), [(2, dict(pp=2)), (2, {})])
def test_a_flipped_bit_is_refused_or_has_no_effect(ranks, tmp_path, size, parallel):
    parts = ranks(size, attempts, tiny_run(parallel), tmp_path, FLIPS // 2)
    refused, harmless = Counter(), Counter()
    for rank_wise in zip(*parts, strict=True):
        (name, _, error), errors = rank_wise[0], {error for _, _, error in rank_wise}
        assert len(errors) == 1, "the ranks say different things"
        assert all(intact for _, intact, _ in rank_wise), f"{name}: {error or 'loaded'}"
        if error:
            assert name in error and "\n" not in error, f"{name}: {error}"
        (refused if error else harmless)[name] += 1
    print(f"refused {dict(refused)}, harmless {dict(harmless)}")
    for name in (".metadata", "metadata.json", "rng_00000.pt", "rng_00001.pt"):
        assert not harmless[name]  # the others have padding or white space
    for name in ("__0_0.distcp", "__1_0.distcp", "run.json", "latest"):
        assert refused[name]
