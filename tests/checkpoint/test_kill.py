"""SIGKILL at any moment of saving and deleting: a whole checkpoint, one interval old at most.

`KILLS=200 python -m pytest tests/checkpoint/test_kill.py -s` kills 200 times and more; the
default is what fits into a test run.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_mm.checkpoint import folders, sharded
from support.checkpoint_runs import create, scramble, tiny_run, train
from support.checkpoint_victims import INTERVAL, STEPS, Life
from support.fingerprints import state_hash

pytestmark = pytest.mark.kills

KILLS = int(os.environ.get("KILLS", "10"))
CHAIN = 30  # iterations; a folder that got further starts anew, to bound the reference run
LAYOUTS = {"1": (1, {}), "PP2": (2, dict(pp=2)), "DP2": (2, {})}


def uninterrupted(run, folder: Path) -> tuple[list[str], list[float]]:
    """A checkpoint before the first step; state and next loss after 0, 1, 2... steps."""
    engine = create(run)
    scramble()
    sharded.save(engine, {"consumed_samples": 0}, folder, 0)
    states, losses = [], []
    for step in range(CHAIN + STEPS + 1):
        states.append(state_hash(engine))
        losses += train(engine, range(step, step + 1))
    return states, losses


def goes_on(run, copies: list[Path], states: list, losses: list) -> list[tuple[int, str]]:
    """(iteration, what is wrong) of the checkpoint in each folder."""
    engine, found = create(run), []
    for folder in copies:
        state = sharded.load(engine, folder)
        now, wrong = state["iteration"], ""
        if state["loader"] != {"consumed_samples": now}:
            wrong = "another data position"
        elif state_hash(engine) != states[dist.get_rank()][now]:
            wrong = "another state"
        elif train(engine, range(now, now + 1)) != losses[now : now + 1]:
            wrong = "another loss"
        found.append((now, wrong))
    return found


def seen(folder: Path) -> set[str]:
    """Names the phase that the kill interrupted, as far as it shows."""
    names = {path.name for path in folder.iterdir()}
    marks = {Path(name).suffix for name in names if name.startswith("iter_")} - {""}
    whole = max(name for name in names if folders.NAME.fullmatch(name))
    if (folder / "latest").read_text().strip() != whole:
        marks.add("latest behind")
    return marks


def deletions(folder: Path) -> set[str]:
    return {path.name for path in folder.glob(f"*{folders.DELETED}")}


def kill_often(ranks, folder: Path, name: str, kills: int, slow: bool = False) -> Counter:
    """Kill, look, resume, kill... Every rank that was not killed must end by itself.

    A save is accepted when the one before is published, so what is found is at most one
    interval older than the last that was accepted; one newer if the kill came before its word.
    """
    size, parallel = LAYOUTS[name]
    chance = random.Random(f"{name} {slow} {kills}")
    start, here = folder / "start", folder / "here"
    reference = ranks(size, uninterrupted, tiny_run(parallel), start)
    states, losses = [part[0] for part in reference], reference[0][1]
    marks, copies, lasts = Counter(), [], []
    for number in range(kills):
        if not here.exists():
            shutil.copytree(start, here)
        victims = chance.choice([[r] for r in range(size)] + [list(range(size))])
        life = Life(LAYOUTS[name], here, folder / f"store{number}", slow)
        old = deletions(here)
        last = life.kill(
            victims,
            saves=chance.randrange(2 if slow else 4),
            seconds=chance.uniform(0, 0.3),
            until=lambda here=here, old=old: not slow or deletions(here) - old,
        )
        marks.update(seen(here) or {"nothing"})
        copies.append(shutil.copytree(here, folder / f"copy{number}"))
        lasts.append(last)
        if last > CHAIN:
            shutil.rmtree(here)
        if len(copies) == 25 or number == kills - 1:
            results = ranks(size, goes_on, tiny_run(parallel), copies, states, losses)
            for result in results:
                for (iteration, wrong), accepted in zip(result, lasts, strict=True):
                    assert not wrong, f"{wrong} at iteration {iteration}"
                    assert accepted - INTERVAL <= iteration <= accepted + INTERVAL
            for copy in copies:
                shutil.rmtree(copy)
            marks["steps"] += sum(lasts)
            copies, lasts = [], []
    print(f"{name}, {kills} kills{', slow deletes' * slow}: {dict(marks)}")
    return marks


def test_killed_while_saving(ranks, tmp_path):
    marks = kill_often(ranks, tmp_path, "1", KILLS)
    assert marks[".partial"] >= KILLS // 10, "kills missed the saves"


def test_killed_while_deleting(ranks, tmp_path):
    kills = max(5, KILLS // 4)
    marks = kill_often(ranks, tmp_path, "1", kills, slow=True)
    assert marks[".deleted"] >= kills // 3, "kills missed the deletions"


@pytest.mark.parametrize("name", ["PP2", "DP2"])
def test_one_or_both_of_two_ranks_killed(ranks, tmp_path, name):
    kill_often(ranks, tmp_path, name, max(3, KILLS // 5))
