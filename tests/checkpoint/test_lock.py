"""Two jobs never save to one folder, and a job that died keeps nobody out."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_mm.checkpoint import lock, sharded
from megatron_mm.checkpoint.merge import merge_adapters
from megatron_mm.checkpoint.saver import Saver
from megatron_mm.config import LoraConfig
from megatron_mm.errors import CheckpointError
from support.checkpoint_runs import create, tiny_run
from support.exports import converted, exported, save_origin
from support.folders import one_rank_job


class Owner:
    """Another process that holds a folder until it is told to leave or killed."""

    def __init__(self, folder: Path, heir: bool = False):
        """`heir`: it forks a child of its own that lives on."""
        read, write = os.pipe()
        self.child = os.fork()
        if not self.child:
            try:
                held = lock.Lock(folder)
                if heir and not os.fork():
                    time.sleep(60)
                    os._exit(0)
                signal.signal(signal.SIGTERM, lambda *_: (held.release(), os._exit(0)))
                os.write(write, b"x")
                time.sleep(60)
            finally:
                os._exit(1)
        os.close(write)
        assert os.read(read, 1) == b"x"
        os.close(read)

    def end(self, how: int) -> None:
        os.kill(self.child, how)
        os.waitpid(self.child, 0)


@pytest.fixture
def owned(tmp_path):
    owner = Owner(tmp_path)
    yield owner
    owner.end(signal.SIGKILL)


def test_a_second_job_is_one_line_that_names_the_first(owned, tmp_path):
    for _ in range(3):  # a job that was refused takes nothing away
        with pytest.raises(CheckpointError) as caught:
            lock.Lock(tmp_path)
        assert f"another job saves to {tmp_path}: process {owned.child} on " in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM])
def test_a_job_that_ended_however_is_gone(tmp_path, how):
    owner = Owner(tmp_path)
    owner.end(how)
    assert (tmp_path / ".lock").exists() == (how != signal.SIGTERM)
    lock.Lock(tmp_path).release()
    assert not (tmp_path / ".lock").exists()


def test_what_a_dead_job_forked_keeps_nobody_out(tmp_path):
    """A reader or a reward process that outlives it for a moment."""
    owner = Owner(tmp_path, heir=True)
    owner.end(signal.SIGKILL)
    lock.Lock(tmp_path).release()


def test_a_folder_is_made_and_left_clean(tmp_path):
    held = lock.Lock(tmp_path / "a" / "b")
    assert f"process {os.getpid()} on " in (tmp_path / "a" / "b" / ".lock").read_text()
    held.release()
    held.release()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_what_an_owner_s_file_says_is_shown_escaped(tmp_path):
    owner = Owner(tmp_path)
    (tmp_path / ".lock").write_bytes(b"\x1b[31m\n\xff" + b"x" * 500)
    with pytest.raises(CheckpointError) as caught:
        lock.Lock(tmp_path)
    owner.end(signal.SIGKILL)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_a_stranger_s_lock_that_leads_elsewhere(tmp_path):
    """A folder that was downloaded, and in which a run is to go on."""
    (tmp_path / "precious").write_text("mine")
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        lock.Lock(saved)
    (saved / ".lock").unlink()
    (saved / ".lock").symlink_to(tmp_path / "new")
    with pytest.raises(OSError, match="symbolic links"):
        lock.Lock(saved)
    (saved / ".lock").unlink()
    os.mkfifo(saved / ".lock")  # opening it would wait for ever
    with pytest.raises(OSError):
        lock.Lock(saved)
    assert (tmp_path / "precious").read_text() == "mine" and not (tmp_path / "new").exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog, code):
    def without(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", without)
    with caplog.at_level(logging.WARNING):
        lock.Lock(tmp_path).release()
    assert f"the file system of {tmp_path} has no locks" in caplog.text


def opens(run, folders: list, action: str) -> str:
    """The error of one rank of a job that begins to save."""
    engine = create(run)
    folder = folders[dist.get_rank() % len(folders)]
    with pytest.raises(CheckpointError) as caught:
        if action == "merge":
            sharded.save(engine, {}, folder.parent / "adapted", 1)
            merge_adapters(engine, folder.parent / "adapted", folder)
        else:
            Saver(engine, asynchronous=action == "async", keep_last=None, folder=folder)
    return str(caught.value)


@pytest.mark.parametrize("action", ["sync", "async", "merge"])
def test_a_job_is_refused_on_every_rank(ranks, tmp_path, action):
    folder, run = tmp_path / "saved", tiny_run()
    run.lora = LoraConfig(lora_rank=2) if action == "merge" else LoraConfig()
    owner = Owner(folder)
    try:
        found = ranks(2, opens, run, [folder], action)
    finally:
        owner.end(signal.SIGKILL)
    assert len(set(found)) == 1
    assert found[0].startswith(f"cannot save to {folder}: another job saves to {folder}: process")
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_second_export_to_one_folder_is_refused_and_deletes_nothing(tmp_path):
    """It would take the first one's half-written files for those of a killed run."""
    partial = tmp_path / "hf.partial"
    with one_rank_job():
        origin = save_origin(tmp_path / "origin", fused=True)
        base = converted(origin, tmp_path / "base", looks=False)
        owner = Owner(partial)
        (partial / "model.safetensors").write_text("half of the first one's")
        with pytest.raises(CheckpointError, match="another job saves to .*hf.partial: process"):
            exported(base, tmp_path / "hf")
        assert (partial / "model.safetensors").exists() and not (tmp_path / "hf").exists()
        owner.end(signal.SIGKILL)
        exported(base, tmp_path / "hf")  # what a killed one leaves
    assert not partial.exists() and not (tmp_path / "hf" / ".lock").exists()


@pytest.mark.parametrize("names", [("a", "b"), ("a", None), (None, "a"), ("a", "a/"), ("a", "A")])
def test_ranks_with_other_folders_are_one_line(ranks, tmp_path, names):
    given = [None if name is None else Path(f"{tmp_path}/{name}") for name in names]
    if given[0] == given[1]:  # one folder, written in two ways
        assert ranks(2, closes, tiny_run(), given) == [None, None]
        return
    found = ranks(2, opens, tiny_run(), given, "sync")
    assert len(set(found)) == 1 and "\n" not in found[0]
    expected = f"rank 0 to {given[0] or 'none'}, rank 1 to {given[1] or 'none'}"
    assert f"ranks save to different folders: {expected}; give all the same --save" == found[0]
    assert list(tmp_path.iterdir()) == []


def closes(run, folders: list) -> None:
    folder = folders[dist.get_rank()]
    Saver(create(run), asynchronous=False, keep_last=None, folder=folder).close()


@pytest.mark.parametrize("what", ["a file", "below a file", "a dead link", "a long name"])
def test_a_folder_that_cannot_be_made(ranks, tmp_path, what):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    folder = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "saved",
        "a dead link": tmp_path / "link",
        "a long name": tmp_path / ("x" * 300),
    }[what]
    (message,) = ranks(1, opens, tiny_run(), [folder], "sync")
    assert message.startswith(f"cannot save to {folder}: ") and "\n" not in message
