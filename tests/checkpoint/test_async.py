"""Saving in the background: what is written is what was, and its failures are everyone's."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_mm.checkpoint import sealed, sharded, snapshot
from megatron_mm.checkpoint.saver import Saver
from megatron_mm.errors import CheckpointError
from support.checkpoint_runs import create, scramble, tiny_run, train
from support.fingerprints import state_hash

OVERLAP = dict(overlap_grad_reduce=True, overlap_param_gather=True)


def saver(engine, keep_last=None) -> Saver:
    return Saver(engine, asynchronous=True, keep_last=keep_last)


class Gate:
    """Holds back the background thread of this rank until it is opened."""

    def __init__(self):
        self.opened, self._write = threading.Event(), snapshot.write

    def __enter__(self):
        def write(*args):
            assert self.opened.wait(60), "nobody opened the gate"
            return self._write(*args)

        snapshot.write = write
        return self

    def __exit__(self, *_):
        self.opened.set()
        snapshot.write = self._write


def trained_meanwhile(run, folder: Path) -> tuple[str, str, bool]:
    """(state at the save, state loaded, whether it was there before the gate opened).

    Nothing is written before three more steps and a scrambled generator lie behind.
    """
    engine = create(run)
    scramble()
    train(engine, range(2))
    loader = {"consumed_samples": 4, "inner": [1]}
    with Gate() as gate:
        background = saver(engine)
        background.save(loader, folder, 2, {})
        saved = state_hash(engine)
        train(engine, range(2, 5))
        scramble()
        loader["inner"].append(2)
        early = folder.exists()
        dist.barrier()  # the other rank has looked too
        gate.opened.set()
        background.finish()
    assert state_hash(engine) != saved
    state = sharded.load(engine, folder)
    assert state["loader"] == {"consumed_samples": 4, "inner": [1]}
    return saved, state_hash(engine), early


@pytest.mark.parametrize(
    ("size", "parallel", "training"),
    [
        (1, {}, {}),
        (1, dict(use_distributed_optimizer=False), dict(bf16=True)),
        (2, dict(pp=2), {}),
        (2, OVERLAP, dict(bf16=True)),
        (2, dict(ep=2), {}),
    ],
)
def test_steps_taken_meanwhile_do_not_enter(ranks, tmp_path, size, parallel, training):
    run = tiny_run(parallel, **training)
    for saved, loaded, early in ranks(size, trained_meanwhile, run, tmp_path / "new"):
        assert loaded == saved
        assert not early


def two_saves(run, folder: Path) -> tuple[list[str], bool]:
    """Returns the folders there when the second save returns, and whether it waited for the
    first."""
    engine = create(run)
    with Gate() as gate:
        background = saver(engine)
        background.save({}, folder, 1, {})
        opener = threading.Timer(0.5, gate.opened.set)
        opener.start()
        begin = time.perf_counter()
        background.save({}, folder, 2, {})
        waited = time.perf_counter() - begin
        first = (folder / "iter_0000001" / "run.json").is_file()
        opener.join()
        background.finish()
    return sorted(path.name for path in folder.iterdir()), first and waited > 0.4


def test_one_save_at_a_time(ranks, tmp_path):
    for names, in_turn in ranks(2, two_saves, tiny_run(), tmp_path):
        assert names == ["iter_0000001", "iter_0000002", "latest"]
        assert in_turn


def stalls(run, folder: Path, repeat: int) -> tuple[list[float], list[float]]:
    """Seconds that training stood still, saving behind its back and in front of it."""
    engine = create(run)
    train(engine, range(1))
    found = []
    for behind in (True, False):
        keeper = Saver(engine, asynchronous=behind, keep_last=2)
        times = []
        for iteration in range(1, repeat + 2):
            times.append(keeper.save({}, folder, iteration, {}))
            keeper.finish()
        found.append(times[1:])  # first use imports and allocates
    return tuple(found)


def test_the_stall_is_a_part_of_the_save(ranks, tmp_path):
    """0.1 of it was measured on one rank; the bound leaves room for a busy machine."""
    behind, in_front = ranks(1, stalls, tiny_run(), tmp_path, 5)[0]
    print(f"stall {min(behind):.4f} s of {min(in_front):.4f} s")
    assert min(behind) < 0.5 * min(in_front)


def fails_behind(run, folder: Path, culprit: int, how: str) -> tuple[str, bool]:
    """(the error, whether it was known before anyone waited for it)."""
    engine = create(run)
    background = saver(engine)
    background.save({}, folder, 1, {})
    background.finish()
    good = state_hash(engine)
    write = sealed.write_bytes
    if dist.get_rank() == culprit:
        if how == "folder removed":
            sealed.write_bytes = removes_folder
        else:
            sealed.write_bytes = no_space
    background.save({}, folder, 2, {})
    train(engine, range(1))  # training goes on: no collective of its own is disturbed
    deadline = time.monotonic() + 60
    while not background.failed and time.monotonic() < deadline:
        time.sleep(0.01)
    known = background.failed
    sealed.write_bytes = write
    with pytest.raises(CheckpointError) as caught:
        background.save({}, folder, 3, {})
    assert not background.failed
    state = sharded.load(engine, folder)
    assert state["iteration"] == 1 and state_hash(engine) == good
    background.save({}, folder, 4, {})  # it was not for ever
    background.finish()
    assert sharded.load(engine, folder)["iteration"] == 4
    return str(caught.value), known


def no_space(*_) -> None:
    raise OSError(28, "No space left on device")


def removes_folder(path: Path, content: bytes) -> None:
    path.parent.rename(path.parent.parent.parent / "removed")  # at once, unlike rmtree
    path.write_bytes(content)


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("how", ["disk full", "folder removed"])
def test_a_failure_behind_is_everyones(ranks, tmp_path, culprit, how):
    folder = tmp_path / "saved"
    found = ranks(2, fails_behind, tiny_run(dict(pp=2)), folder, culprit, how)
    messages = {message for message, _ in found}
    assert len(messages) == 1
    assert all(known for _, known in found)
    (message,) = messages
    assert message.startswith(f"cannot save {folder / 'iter_0000002'}: ")
    assert "\n" not in message
    assert ("No space left" if how == "disk full" else "No such file") in message
    assert sorted(p.name for p in folder.iterdir()) == ["iter_0000001", "iter_0000004", "latest"]


def closed_on_the_way_out(run, folder: Path) -> bool:
    """An error elsewhere: what is being written is finished before the error is seen."""
    engine = create(run)
    background = saver(engine)
    background.save({}, folder, 1, {})
    try:
        raise KeyError
    except KeyError:
        background.close()
    return (folder / "latest").is_file()


def test_closing_finishes_the_save(ranks, tmp_path):
    assert ranks(2, closed_on_the_way_out, tiny_run(), tmp_path) == [True, True]


def many_saves_while_training(run, folder: Path) -> tuple[str, list[str]]:
    """Both threads of every rank use collectives all the time, at paces of their own."""
    engine = create(run)
    background = saver(engine, keep_last=2)
    pace = random.Random(os.getpid())
    for step in range(12):
        train(engine, range(step, step + 1))
        time.sleep(pace.uniform(0, 0.05))
        background.save({}, folder, step + 1, {})
    background.finish()
    saved = state_hash(engine)
    again = create(run, engine.groups)
    sharded.load(again, folder)
    assert state_hash(again) == saved
    return saved, sorted(path.name for path in folder.iterdir())


def test_collectives_of_the_two_threads_do_not_meet(ranks, tmp_path):
    for _, names in ranks(2, many_saves_while_training, tiny_run(dict(tp=2)), tmp_path):
        assert names == ["iter_0000011", "iter_0000012", "latest"]
