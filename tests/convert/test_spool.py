"""Bytes arrive where they belong, past the page cache or through it, or an error does."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import threading

import pytest

from megatron_mm.convert import spool
from megatron_mm.convert.spool import ALIGNED, Spool

SIZE = 3_000_017  # of each file: several of the small pieces below, and no multiple of anything


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(spool, "PIECE", 64 * ALIGNED)


@pytest.fixture(params=["direct", "no direct writes", "other blocks"])
def disk(request, monkeypatch):
    """A file system as it is here; one that refuses O_DIRECT; one that wants larger blocks."""
    opened, written, direct = os.open, os.pwrite, set()

    def open_file(path, flags, *more):
        if flags & os.O_DIRECT and request.param == "no direct writes":
            raise OSError(errno.EINVAL, "Invalid argument")
        handle = opened(path, flags, *more)
        (direct.add if flags & os.O_DIRECT else direct.discard)(handle)
        return handle

    def write(handle, content, at):
        if handle in direct and request.param == "other blocks":
            raise OSError(errno.EINVAL, "Invalid argument")
        return written(handle, content, at)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "pwrite", write)


def pieces(chance: random.Random) -> list[tuple[int, int]]:
    """(first, last) of parts that tile the file, mostly but not always in order."""
    cuts = {0, SIZE, ALIGNED, 5 * ALIGNED, *(chance.randrange(SIZE) for _ in range(40))}
    near = chance.randrange(SIZE - 2)
    cuts = sorted(cuts | {near, near + 1, near + 2})
    parts = list(zip(cuts, cuts[1:], strict=False))
    for _ in range(8):
        i, j = chance.randrange(len(parts)), chance.randrange(len(parts))
        parts[i], parts[j] = parts[j], parts[i]
    return parts


def test_every_byte_in_its_place(tmp_path, small_pieces, disk):
    """Two files by turns, parts of all sizes, one file made before at its full size."""
    for seed in range(5):
        chance = random.Random(seed)
        contents = [chance.randbytes(SIZE) for _ in range(2)]
        paths = [tmp_path / f"{seed}-{number}" for number in range(2)]
        paths[0].write_bytes(b"\1" * SIZE)
        with Spool() as out:
            files = [out.open(path) for path in paths]
            todo = [(n, part) for n in range(2) for part in pieces(chance)]
            if seed % 2:
                chance.shuffle(todo)
            for number, (first, last) in todo:
                buffer = bytearray(contents[number][first:last])
                out.write(files[number], memoryview(buffer), first)
                buffer[:] = bytes(len(buffer))  # it has been copied, and may be used again
            out.write(files[0], memoryview(b""), SIZE)  # a tensor without elements
            out.finish()
        for path, content in zip(paths, contents, strict=True):
            assert path.read_bytes() == content


def test_a_full_disk_is_raised_where_writing_was_asked_for(tmp_path, small_pieces):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        content = memoryview(bytes(SIZE))
        with Spool() as out, pytest.raises(OSError, match="No space left on device"):
            file = out.open(folder / "file")
            for number in range(20):  # an error while many wait must not stop anyone
                out.write(file, content, number * SIZE)
        (folder / "file").unlink()
        with Spool() as out:
            out.write(out.open(folder / "last"), content[: ALIGNED * 5], 2**20 - 3 * ALIGNED)
            with pytest.raises(OSError, match="No space left on device"):
                out.finish()  # the first piece, which nobody had to wait for
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    assert not [t for t in threading.enumerate() if t.name == "spool"]
