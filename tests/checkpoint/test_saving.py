"""A save happens on all ranks or on none, and never harms the checkpoint before it."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_mm.checkpoint import sealed, sharded
from megatron_mm.errors import CheckpointError
from support.checkpoint_runs import create, load_whole, tiny_run, train, train_and_save
from support.fingerprints import parameter_hash


def fails_after_a_good_one(run, folder: Path, how: str, culprit: int) -> tuple[str, bool]:
    """(the error of the second save, whether the first one still loads)."""
    engine = create(run)
    train(engine, range(1))
    sharded.save(engine, {}, folder, 1)
    good = parameter_hash(engine)
    train(engine, range(1, 2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    write = sealed.write_bytes
    try:
        if dist.get_rank() == culprit and how == "disk full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # EFBIG from write()
        elif dist.get_rank() == culprit:
            sealed.write_bytes = _broken
        with pytest.raises(CheckpointError) as caught:
            sharded.save(engine, {}, folder, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        sealed.write_bytes = write
    assert not (folder / "iter_0000002").exists()
    again = create(run, engine.groups)
    state = sharded.load(again, folder)
    first = state["iteration"] == 1 and parameter_hash(again) == good
    # The failure was not for ever: the next save succeeds over the remains.
    sharded.save(engine, {}, folder, 2)
    sharded.load(again, folder)
    return str(caught.value), first and parameter_hash(again) == parameter_hash(engine)


def _broken(*args) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("how", ["disk full", "small file"])
def test_a_failure_on_one_rank_is_everyones(ranks, tmp_path, how, culprit):
    run = tiny_run(dict(pp=2))
    messages = ranks(2, fails_after_a_good_one, run, tmp_path, how, culprit)
    assert all(intact for _, intact in messages)
    assert len({message for message, _ in messages}) == 1
    message = messages[0][0]
    assert message.startswith(f"cannot save {tmp_path / 'iter_0000002'}: ")
    assert "\n" not in message
    assert "No space left" in message if how == "small file" else "too large" in message.lower()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000001", "iter_0000002", "latest"]


def killed_while_saving(run, folder: Path) -> None:
    engine = create(run)
    sharded.save(engine, {}, folder, 1)
    write = sealed.write_json

    def killed(*args):
        raise SystemExit  # no clean-up of ours runs

    sealed.write_json = killed
    try:
        with pytest.raises(SystemExit):
            sharded.save(engine, {}, folder, 2)
    finally:
        sealed.write_json = write


def test_a_killed_save_leaves_the_one_before(ranks, tmp_path):
    ranks(1, killed_while_saving, tiny_run(), tmp_path)
    assert (tmp_path / "iter_0000002.partial").is_dir()
    state, _ = ranks(1, load_whole, tiny_run(), tmp_path)[0]
    assert state["iteration"] == 1


def test_saving_an_iteration_again_replaces_it(ranks, tmp_path):
    ranks(1, train_and_save, tiny_run(seed=1), tmp_path)
    expected = ranks(1, train_and_save, tiny_run(seed=2), tmp_path)[0]
    state, tensors = ranks(1, load_whole, tiny_run(), tmp_path)[0]
    assert state["iteration"] == 2
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000002", "latest"]


def test_a_loader_state_that_json_lacks(ranks, tmp_path):
    (message,) = ranks(1, saves_a_set, tiny_run(), tmp_path)
    assert "TypeError: Object of type set is not JSON serializable" in message
    assert not (tmp_path / "latest").exists()


def saves_a_set(run, folder: Path) -> str:
    engine = create(run)
    with pytest.raises(CheckpointError) as caught:
        sharded.save(engine, {"order": {1, 2}}, folder, 1)
    return str(caught.value)
