"""tools/pass_rate.py as a user starts it, and killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_mm.checkpoint import sharded
from megatron_mm.config import RunConfig
from support.launches import ROOT, TIMEOUT, environment, launch
from support.rated_runs import read_rows, write_rows
from support.trainers import digits_run
from support.weights import random_engine

TOOL = ["tools/pass_rate.py"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ROWS, EACH = 12, 2


def on_rank_save(run: RunConfig, folder: str) -> None:
    sharded.save(random_engine(run), {}, Path(folder), 1)


@pytest.fixture(scope="module")
def place(ranks, scenes, tmp_path_factory) -> Path:
    """A folder with a checkpoint, images and rows."""
    folder = tmp_path_factory.mktemp("launched")
    ranks(1, on_rank_save, digits_run(scenes), str(folder / "model"))
    (folder / "images").symlink_to(scenes / "images")
    write_rows(folder / "rows.jsonl", read_rows(scenes / "mix.jsonl")[:ROWS])
    return folder


def measuring(place: Path, out: str, *more: str) -> list[str]:
    flags = ["measure", "--checkpoint", place / "model", "--data", place / "rows.jsonl"]
    flags += ["--out", place / out, "--rows-per-round", EACH, "--num-generations", 4]
    # Uneven ends of a model that has learnt nothing: some answers hold a digit.
    flags += ["--max-completion-length", 8, "--reward-funcs", "pattern(pattern='.*[0-9].*')"]
    return [*map(str, flags), *more]


@pytest.fixture(scope="module")
def whole(place) -> bytes:
    """The file that one rank makes, not ended by anyone."""
    done = launch([sys.executable, *TOOL], *measuring(place, "whole.jsonl"))
    assert done.returncode == 0, done.stderr
    assert f"row {ROWS} of {ROWS}: " in done.stderr and "completions right" in done.stdout
    return (place / "whole.jsonl").read_bytes()


@pytest.mark.launches
@pytest.mark.slow
def test_two_ranks_write_the_same_and_pairs_follow(place, whole):
    pp = ("--pipeline-model-parallel-size", "2")
    done = launch([*TORCHRUN, *TOOL], *measuring(place, "two.jsonl", *pp))
    assert done.returncode == 0, done.stderr
    assert (place / "two.jsonl").read_bytes() == whole
    rates = {row["accuracy"] for row in read_rows(place / "two.jsonl")}
    assert len(rates) > 1
    flags = ["drop-images", "--checkpoint", place / "model", "--data", place / "rows.jsonl"]
    flags += ["--out", place / "pairs.jsonl", "--max-completion-length", 8, "--unfinished", *pp]
    done = launch([*TORCHRUN, *TOOL], *flags)
    assert done.returncode == 0 and "pairs; left out" in done.stdout, done.stderr
    assert len(read_rows(place / "pairs.jsonl")) > ROWS / 2


@pytest.mark.kills
@pytest.mark.slow
def test_a_killed_command_makes_the_same_file(place, whole):
    """SIGKILL as soon as two rounds are written."""
    out, command = (
        place / "killed.jsonl",
        [sys.executable, *TOOL, *measuring(place, "killed.jsonl")],
    )
    written = place / "killed.jsonl.partial"
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        deadline = time.monotonic() + TIMEOUT
        while not written.exists() or written.read_bytes().count(b"\n") < 2 * EACH:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
    assert not out.exists()
    done = launch([sys.executable, *TOOL], *measuring(place, "killed.jsonl"))
    assert done.returncode == 0 and "going on behind row" in done.stderr, done.stderr
    assert out.read_bytes() == whole
    assert not [name for name in os.listdir(place) if name.startswith("killed.jsonl.")]
