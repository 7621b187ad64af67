"""Names on disk: what is found, what is deleted, and a kill between any two operations."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path

import pytest

from megatron_mm.checkpoint import folders, sealed, storage
from megatron_mm.errors import CheckpointError


def checkpoint(folder: Path, iteration: int, name: str = "", mark: str = "") -> Path:
    path = folder / (name or folders.name_of(iteration))
    path.mkdir(parents=True)
    (path / "tensors").write_text(mark)
    run = {key: kind() for key, kind in folders.KINDS.items()}
    run |= {"format": folders.FORMAT, "iteration": iteration, "mark": mark, "identity": "0" * 32}
    run["config"] = {"model": {}, "training": {}}
    sealed.write_json(path / "run.json", run)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def point(folder: Path, iteration: int) -> None:
    (folder / "latest").write_text(f"{folders.name_of(iteration)}\n")


@pytest.mark.parametrize(
    ("keep", "left"), [(1, [4]), (2, [3, 4]), (3, [2, 3, 4]), (9, [1, 2, 3, 4])]
)
def test_the_last_ones_are_kept(tmp_path, keep, left):
    for iteration in (2, 4, 1, 3):
        checkpoint(tmp_path, iteration)
    point(tmp_path, 4)
    folders.prune(tmp_path, keep, 4)
    assert names(tmp_path) == [folders.name_of(i) for i in left] + ["latest"]


def test_what_latest_names_stays_whatever_its_number(tmp_path):
    for iteration in range(1, 5):
        checkpoint(tmp_path, iteration)
    point(tmp_path, 1)
    folders.prune(tmp_path, 1, 4)
    assert names(tmp_path) == ["iter_0000001", "iter_0000004", "latest"]


def test_later_ones_of_another_attempt_are_left_alone(tmp_path):
    for iteration in (10, 20, 30, 12, 14):
        checkpoint(tmp_path, iteration)
    point(tmp_path, 14)
    folders.prune(tmp_path, 2, 14)
    left = [folders.name_of(i) for i in (12, 14, 20, 30)]
    assert names(tmp_path) == [*left, "latest"]


def test_nothing_but_our_checkpoints_is_deleted(tmp_path):
    folder = tmp_path / "saved"
    for iteration in (5, 6):
        checkpoint(folder, iteration)
    point(folder, 6)
    (folder / "iter_0000001").mkdir()  # no run.json
    checkpoint(folder, 7, "iter_0000002")  # another's run.json
    (folder / "iter_0000003").symlink_to(checkpoint(tmp_path, 3, "elsewhere"))
    (checkpoint(folder, 4) / "run.json").write_text("{}")  # cannot be read
    checkpoint(folder, 1, "iter_1")
    checkpoint(folder, 1, "best")
    (folder / "notes.txt").write_text("mine")
    before = names(folder)
    folders.prune(folder, 1, 6)
    assert names(folder) == [name for name in before if name != "iter_0000005"]
    assert (tmp_path / "elsewhere" / "tensors").is_file()


def test_leftovers_go_and_nothing_else(tmp_path):
    checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2)
    for name in ("iter_0000003.partial", "iter_0000001.deleted", "iter_0000002.replaced"):
        checkpoint(tmp_path, 9, name)
    checkpoint(tmp_path, 4, "iter_0000004.replaced", mark="moved aside")
    for name in ("mine.partial", "iter_0000005.backup"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest.partial").write_text("")
    folders.clear_leftovers(tmp_path)
    ours = [folders.name_of(i) for i in (1, 2, 4)]
    assert names(tmp_path) == [*ours, "iter_0000005.backup", "mine.partial"]
    assert (tmp_path / "iter_0000004" / "tensors").read_text() == "moved aside"


def test_a_link_in_the_place_of_a_checkpoint_is_replaced_and_not_followed(tmp_path):
    folder = tmp_path / "saved"
    checkpoint(tmp_path, 3, "elsewhere", mark="old")
    partial = checkpoint(folder, 3, "iter_0000003.partial", mark="new")
    (folder / "iter_0000003").symlink_to(tmp_path / "elsewhere")
    folders.publish(partial, folder / "iter_0000003")
    assert names(folder) == ["iter_0000003", "latest"]
    assert (folder / "iter_0000003" / "tensors").read_text() == "new"
    assert (tmp_path / "elsewhere" / "tensors").read_text() == "old"


@pytest.mark.parametrize("content", ["", "iter_2", "../iter_0000001", "iter_0000001 x", "\xff"])
def test_a_damaged_pointer(tmp_path, content):
    checkpoint(tmp_path, 1)
    (tmp_path / "latest").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match="^latest names no checkpoint but"):
        folders.resolve(tmp_path)


# ---- a kill between any two operations ----


class Killed(BaseException):
    pass


def killed_at(monkeypatch, number: int) -> None:
    """The call number `number` of anything that changes the disk does not happen, nor do later."""
    count = iter(range(1_000_000))

    def guard(function):
        def call(*args, **kwargs):
            if next(count) >= number:
                raise Killed
            return function(*args, **kwargs)

        return call

    for owner, name in (
        (os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "fsync"),
        (sealed, "write_bytes"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, guard(getattr(owner, name)))


@pytest.mark.parametrize("iteration", [2, 3])
@pytest.mark.parametrize("pointed", [1, 2])
def test_a_kill_at_any_operation_leaves_a_whole_checkpoint(tmp_path, iteration, pointed):
    """Saving anew (3), and again an iteration that is there already (2)."""
    found = []
    for number in range(100):
        folder = tmp_path / str(number)
        for old in (1, 2):
            checkpoint(folder, old, mark="old")
        point(folder, pointed)
        final = folder / folders.name_of(iteration)
        partial = checkpoint(folder, iteration, final.name + folders.PARTIAL, mark="new")
        done = False
        with pytest.MonkeyPatch.context() as patch:
            killed_at(patch, number)
            try:
                folders.publish(partial, final)
                folders.prune(folder, 1, iteration)
                done = True
            except Killed:
                pass
        path, run = folders.resolve(folder)
        assert (path / "tensors").read_text() == run["mark"]  # nothing is half there
        whole = (run["iteration"], run["mark"])
        assert whole in {(pointed, "old"), (iteration, "new")}
        found.append(whole)
        folders.clear_leftovers(folder)  # what the next save begins with
        path, run = folders.resolve(folder)
        assert (run["iteration"], run["mark"]) == whole
        assert all(folders.NAME.fullmatch(name) for name in names(folder) if name != "latest")
        if done:
            break
    assert done and number > 8
    assert found[0] == (pointed, "old") and found[-1] == (iteration, "new")
    assert found == sorted(found, key=lambda w: w == (iteration, "new")), "it went back in time"


def test_leftovers_that_cannot_be_removed_are_named_and_end_no_save(tmp_path, monkeypatch, caplog):
    """Another user's, or one whose files are still open on NFS."""
    for name in ("iter_0000001.partial", "iter_0000002.deleted"):
        (tmp_path / name).mkdir()
    remove = shutil.rmtree

    def refuses(path):
        if path.name.startswith("iter_0000001"):
            raise PermissionError(errno.EACCES, "Permission denied")
        remove(path)

    monkeypatch.setattr(folders.shutil, "rmtree", refuses)
    monkeypatch.setattr(logging.getLogger("megatron_mm"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        folders.clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000001.partial"]
    assert "iter_0000001.partial was left by an earlier save and stays: Permission" in caplog.text


def test_nothing_is_copied_ahead_of_a_write(tmp_path):
    """Or torch would make a context on the node's first GPU in every rank's thread, and wait for
    its stream."""
    assert storage.Writer(tmp_path, "mine").per_thread_copy_ahead == 0
