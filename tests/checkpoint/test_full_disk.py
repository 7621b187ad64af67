"""A file system that is full, wherever in the save that shows."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_mm.checkpoint import sharded
from megatron_mm.checkpoint.saver import Saver
from megatron_mm.errors import CheckpointError
from support.checkpoint_runs import create, tiny_run, train
from support.fingerprints import state_hash


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def saves_into_less_and_less(run, disk: Path, asynchronous: bool) -> list[str]:
    """The error of each save, "" for a success, with more and more room left for it.

    Asserts after each one that the good checkpoint is intact and nothing else is there.
    """
    engine = create(run)
    folder, filler = disk / "saved", disk / "filler"
    keeper = Saver(engine, asynchronous=asynchronous, keep_last=None)
    keeper.save({}, folder, 1, {})
    keeper.finish()
    good = state_hash(engine)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    errors = []
    for share in (0.0, 0.02, 0.3, 0.6, 0.9, 0.96, 0.98, 1.0, 1.1):
        train(engine, range(1))
        if dist.get_rank() == 0:
            fill(filler, leave=int(share * size))
        dist.barrier()
        try:
            keeper.save({}, folder, 2, {})
            keeper.finish()
            errors.append("")
        except CheckpointError as error:
            errors.append(str(error))
            dist.barrier()  # rank 0 cleans up before its own error is raised
            names = sorted(path.name for path in folder.iterdir())
            assert names in (["iter_0000001", "latest"], ["iter_0000001", "iter_0000002", "latest"])
            assert (folder / "latest").read_text() == "iter_0000001\n"
            sharded.load(engine, folder)
            assert state_hash(engine) == good
        dist.barrier()
    assert sharded.load(engine, folder)["iteration"] == 2
    return errors


def fill(path: Path, leave: int) -> None:
    """Write until only `leave` bytes of the file system are free."""
    path.unlink(missing_ok=True)
    disk = os.statvfs(path.parent)
    with path.open("wb") as stream:
        stream.write(b"x" * max(0, disk.f_bavail * disk.f_frsize - leave))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_one_error_and_costs_nothing(ranks, small_disk, asynchronous):
    run = tiny_run(dict(pp=2))
    first, second = ranks(2, saves_into_less_and_less, run, small_disk, asynchronous)
    assert first == second
    assert first[-1] == "" and all(first[:4]), "the room was not what it should have been"
    for message in filter(None, first):
        assert message.startswith(f"cannot save {small_disk / 'saved' / 'iter_0000002'}: ")
        assert "No space left on device" in message
        assert "\n" not in message
