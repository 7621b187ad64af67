"""SIGKILL during a rollout, an update or a save: the resumed run takes the very same steps."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_mm.config import CheckpointConfig, RunConfig
from megatron_mm.parallel import groups
from megatron_mm.report.metrics_log import read_metrics
from megatron_mm.train.loop import train
from support import rl_victim
from support.fingerprints import parameter_hash
from support.forked import context
from support.grpo_runs import grpo_run, trainer_of
from support.trainers import PP2

pytestmark = pytest.mark.kills

PATIENCE = 120  # seconds for what takes about ten
ROLLOUT = 2  # steps, and a checkpoint after each
STEPS = 6


def on_rank_begin(run: RunConfig) -> None:
    """Saves a checkpoint before the first step."""
    trainer = trainer_of(replace(run, checkpoint=CheckpointConfig(save=run.checkpoint.save)))
    trainer.save()
    trainer.saver.finish()
    trainer.source.close()


def on_rank_run(run: RunConfig) -> str:
    multiprocessing.current_process()._config["daemon"] = False  # it starts reward workers
    return parameter_hash(train(run, groups.build(run.parallel)).engine)


def placed(run: RunConfig, folder: Path) -> RunConfig:
    """Returns the same run with its files in a folder."""
    checkpoint = CheckpointConfig(
        save=str(folder / "saved"), load=str(folder / "saved"), save_interval=ROLLOUT
    )
    return replace(
        run,
        checkpoint=checkpoint,
        logging=replace(run.logging, output_dir=str(folder / "out")),
    )


def written(folder: Path) -> tuple[list[dict], list[dict]]:
    """Returns the logged metrics of every step but times, and the completions."""
    steps = [
        {k: v for k, v in record.items() if not re.search("time|timing|stall", k)}
        for record in read_metrics(folder / "out" / "metrics.jsonl")
    ]
    lines = (folder / "out" / "completions.jsonl").read_text().splitlines()
    return steps, [json.loads(line) for line in lines]


def kill(run: RunConfig, store: Path, point: str, victim: int) -> None:
    """Runs two ranks until one of them comes to the point and is killed. The other must end by
    itself, and so must the processes that the killed one has started."""
    forks, processes, pipes = context(), [], []
    for rank in range(2):
        ours, theirs = forks.Pipe(duplex=False)
        where = point if rank == victim else None
        args = (theirs, str(store), rank, 2, run, where)
        processes.append(forks.Process(target=rl_victim.live, args=args))
        processes[-1].start()
        pipes.append(ours)
    try:
        assert pipes[victim].poll(PATIENCE), f"{point} is never reached"
        children = pipes[victim].recv()
        deadline = time.monotonic() + PATIENCE
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
        assert codes[victim] == -9 and codes[1 - victim] not in (0, None), codes
        left = children
        while left and time.monotonic() < deadline:
            left = [pid for pid in left if psutil.pid_exists(pid) and not is_zombie(pid)]
            time.sleep(0.05)
        assert not left, f"{len(left)} of {len(children)} children live on"
    finally:
        for process in processes:
            process.kill()


def is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(
    ("sizes", "kills"), [(PP2, [("rollout", 1), ("save", 0)]), ({}, [("update", 1)])]
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(ranks, scenes, tmp_path, sizes, kills):
    folders = [tmp_path / "whole", *(tmp_path / point for point, _ in kills)]
    run = grpo_run(scenes, train_iters=STEPS, **sizes)
    ranks(2, on_rank_begin, placed(run, tmp_path / "start"))
    for folder in folders:
        shutil.copytree(tmp_path / "start", folder)
    for folder, (point, victim) in zip(folders[1:], kills, strict=True):
        kill(placed(run, folder), folder / "store", point, victim)
        assert (folder / "saved" / "latest").read_text().strip() == f"iter_{ROLLOUT:07d}"
    ends = [ranks(2, on_rank_run, placed(run, folder)) for folder in folders]
    logs = [written(folder) for folder in folders]
    steps, _ = logs[0]
    assert [step["iteration"] for step in steps] == list(range(1, STEPS + 1))
    for end, (new_steps, completions) in zip(ends[1:], logs[1:], strict=True):
        assert end == ends[0]
        assert new_steps == steps  # the same prompts, tokens, rewards and gradients, each once
        assert completions == logs[0][1]
