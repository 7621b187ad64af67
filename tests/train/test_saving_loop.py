"""The loop with saves in the background: the same run, and no error is lost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megatron_mm.checkpoint import sealed
from megatron_mm.errors import CheckpointError
from megatron_mm.parallel import groups
from megatron_mm.report.metrics_log import read_metrics
from megatron_mm.train import loop
from megatron_mm.train.trainer import Trainer
from support.fingerprints import state_hash
from support.trainers import PP2, digits_run


def saving_run(scenes: Path, folder: Path, **settings):
    run = digits_run(scenes, **PP2, valid_data=None, save_interval=2, **settings)
    run.checkpoint.save = str(folder / "saved")
    run.logging.output_dir = str(folder / "out")
    return run


def names(folder: Path) -> list[str]:
    found = {path.name for path in (folder / "saved").iterdir()}
    return sorted(found - {".lock"})  # which rank 0 may be removing


def on_rank_both_ways(behind, in_front) -> tuple[str, str, str]:
    """State at the end of a run that saves behind its back, of one that does not, and loaded."""
    made = groups.build(behind.parallel)
    ends = [
        state_hash(loop.train(run, made).engine, generators=False) for run in (behind, in_front)
    ]
    behind.checkpoint.load = behind.checkpoint.save
    again = Trainer(behind, made)
    assert again.iteration == 5
    again.saver.close()
    return *ends, state_hash(again.engine, generators=False)


def test_saving_behind_changes_nothing(ranks, scenes, tmp_path):
    runs = [
        saving_run(scenes, tmp_path / str(behind), async_save=behind, keep_last_checkpoints=2,
                   train_iters=5)
        for behind in (True, False)
    ]  # fmt: skip
    for behind, in_front, loaded in ranks(2, on_rank_both_ways, *runs):
        assert behind == in_front == loaded
    for folder in (tmp_path / "True", tmp_path / "False"):
        assert names(folder) == ["iter_0000004", "iter_0000005", "latest"]
        records = read_metrics(folder / "out" / "metrics.jsonl")
        assert [r["iteration"] for r in records] == [1, 2, 3, 4, 5]
        assert [r["iteration"] for r in records if r.get("checkpoint/save_stall", 0) > 0] == [2, 4]


def on_rank_fails_behind(run) -> tuple[str, int]:
    """(the error, steps done) where rank 1 cannot write; both wait until it is known there."""
    made = groups.build(run.parallel)
    write, step, seen = sealed.write_bytes, Trainer.step, []

    def broken(*_):
        raise OSError(28, "No space left on device")

    def step_and_wait(trainer):
        seen.append(trainer)
        deadline = time.monotonic() + 60
        while trainer.iteration == 2 and not trainer.saver.failed and time.monotonic() < deadline:
            time.sleep(0.01)
        return step(trainer)

    Trainer.step = step_and_wait
    if made.world.rank() == 1:
        sealed.write_bytes = broken
    try:
        with pytest.raises(CheckpointError) as caught:
            loop.train(run, made)
    finally:
        Trainer.step, sealed.write_bytes = step, write
    return str(caught.value), seen[-1].iteration


def test_a_failure_behind_ends_the_run_at_the_next_step(ranks, scenes, tmp_path):
    run = saving_run(scenes, tmp_path, async_save=True)
    found = ranks(2, on_rank_fails_behind, run)
    assert len({message for message, _ in found}) == 1
    (message, steps) = found[0]
    assert message.startswith(f"cannot save {tmp_path / 'saved' / 'iter_0000002'}: ")
    assert "No space left" in message and "\n" not in message
    assert steps == 2
    assert names(tmp_path) == []


def on_rank_error_elsewhere(run) -> list[str]:
    made = groups.build(run.parallel)
    step = Trainer.step

    def step_or_fail(trainer):
        if trainer.iteration == 2:  # a save is in flight
            raise ZeroDivisionError
        return step(trainer)

    Trainer.step = step_or_fail
    try:
        with pytest.raises(ZeroDivisionError):
            loop.train(run, made)
    finally:
        Trainer.step = step
    return names(Path(run.checkpoint.save).parent)


def test_an_error_elsewhere_does_not_cost_the_save(ranks, scenes, tmp_path):
    run = saving_run(scenes, tmp_path, async_save=True)
    assert ranks(2, on_rank_error_elsewhere, run) == [["iter_0000002", "latest"]] * 2


def on_rank_ends_in_time(run) -> list[bool]:
    """Whether the time is up: after what a first job trained, at the start of a second one that
    resumes, and once that one has trained as long."""
    made, found = groups.build(run.parallel), []
    trainer = Trainer(run, made)
    trainer.step()
    trainer.seconds, trainer.opened = 100.0, trainer.opened - 100.0
    found.append(trainer.time_is_up())
    trainer.save()
    trainer.saver.close()
    run.checkpoint.load = run.checkpoint.save
    again = Trainer(run, made)
    assert again.seconds == 100.0
    found.append(again.time_is_up())
    again.opened -= 60.0
    found.append(again.time_is_up())
    again.saver.close()
    return found


def test_every_job_of_a_chain_has_its_time(ranks, scenes, tmp_path):
    """As in Megatron: jobs of four hours, each with --exit-duration-in-mins, go on and on."""
    run = saving_run(scenes, tmp_path, exit_duration_in_mins=1.0, train_iters=5)
    for found in ranks(2, on_rank_ends_in_time, run):
        assert found == [True, False, True]
