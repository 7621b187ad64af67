"""Launches with faults: a killed rank, one that fails, a taken port, ranks that disagree."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mm.config import dump_yaml
from support.launches import ALONE, ROOT, TIMEOUT, environment, free_port
from support.trainers import digits_run

pytestmark = pytest.mark.launches

OUR_CODE = str(ROOT / "megatron_mm")

# A rank that runs the trainer with a fault of its own.
RANK = """
import os, signal, sys

fault, when = sys.argv.pop(1), 3
from megatron_mm.train import __main__ as command

if os.environ["RANK"] == "1":
    if fault == "--lr":
        sys.argv += ["--lr", "0.5"]
    else:
        from megatron_mm import platform
        platform.install()
        from megatron_mm.train.trainer import Trainer
        step = Trainer.step

        def faulty(trainer):
            if trainer.iteration == when:
                if fault == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ZeroDivisionError("a fault of this rank")
            return step(trainer)

        Trainer.step = faulty
sys.exit(command.main(sys.argv[1:]))
"""


@pytest.fixture
def config(tmp_path, scenes) -> Path:
    run = digits_run(scenes, train_iters=500, valid_data=None, output_dir=str(tmp_path / "out"))
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(run))
    (tmp_path / "rank.py").write_text(RANK)
    return path


def job(config: Path, fault: str, *flags: str) -> list[tuple[int, str]]:
    """Returns (exit code, stderr) of two ranks that nothing but the trainer ends."""
    port, ranks = str(free_port()), []
    for rank in range(2):
        words = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        words |= {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": ROOT}
        env = environment() | {key: str(value) for key, value in words.items()}
        command = [sys.executable, str(config.parent / "rank.py"), fault, "--config", str(config)]
        ranks.append(
            subprocess.Popen(
                [*command, *flags], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        return [(p.communicate(timeout=TIMEOUT)[1], p.returncode)[::-1] for p in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("kill", "has ended without a word"),
        ("raise", "failed: ZeroDivisionError: a fault of this rank"),
    ],
)
def test_a_failed_rank_leaves_one_line_on_the_other(config, fault, words):
    (code, said), (other, shown) = job(config, fault)
    host = socket.gethostname()
    assert (code, other) == (1, -signal.SIGKILL if fault == "kill" else 1)
    (line,) = errors(said)
    assert line.startswith(f"error: rank 1 on {host} {words}"), line
    assert "rank 0 cannot go on without it" in line
    assert "Traceback" not in said and OUR_CODE not in said
    assert ("ZeroDivisionError" in shown) == (fault == "raise")  # its own traceback stays


def test_ranks_that_disagree_do_not_start(config):
    (code, said), (other, shown) = job(config, "--lr")
    assert (code, other) == (2, 2)
    (line,) = errors(said)
    assert line.startswith("error: setting optimizer.lr differs: rank 1 on ")
    assert "step 1/" not in said and not errors(shown) and "Traceback" not in said + shown


BAD_PLACES = {
    "a port that is taken": (
        {},
        r"rank 0 cannot listen on MASTER_PORT \d+: another program has it",
    ),
    "a port that is none": ({"MASTER_PORT": "http"}, r"rank 0 of 2 cannot join the job at .*http"),
    "a port beyond all": ({"MASTER_PORT": "99999"}, r"rank 0 of 2 cannot join the job at .*99999"),
    "no port": ({"MASTER_PORT": None}, r"rank 0 of 2 cannot join the job at .*MASTER_PORT none"),
    "a rank that is none": ({"RANK": "first"}, r"rank first of 2 cannot join the job at "),
    "a rank beyond all": ({"RANK": "5"}, r"rank 5 of 2 cannot join the job at "),
}


@pytest.mark.parametrize("case", BAD_PLACES)
def test_a_job_that_cannot_be_joined_is_one_line(config, case):
    words, expected = BAD_PLACES[case]
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        place |= {"MASTER_PORT": str(taken.getsockname()[1])} | words
        env = environment() | {k: v for k, v in place.items() if v is not None}
        done = subprocess.run(
            [*ALONE, "--config", str(config)],
            cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT,
        )  # fmt: skip
    assert done.returncode == 1
    (line,) = errors(done.stderr)
    assert re.match("error: " + expected, line), line
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk, which takes root")
def test_a_full_output_disk_costs_the_run_nothing(config, tmp_path):
    """TensorBoard, the record and the console's own file are on a disk of 64 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)])
    if mounted.returncode:
        pytest.skip("this machine mounts nothing")
    try:
        flags = ["--output-dir", disk / "out", "--save", tmp_path / "saved", "--tensorboard"]
        (disk / "filler").write_bytes(b"x" * 40_000)
        command = [*ALONE, "--config", config, *flags, "--train-iters", 60, "--save-interval", 50]
        with (disk / "console.log").open("w") as console:
            done = subprocess.run(
                [*map(str, command)], cwd=ROOT, env=environment(), stdout=console, stderr=console,
                timeout=TIMEOUT,
            )  # fmt: skip
        assert done.returncode == 0
        assert (tmp_path / "saved" / "latest").read_text() == "iter_0000060\n"
        assert "cannot be written" in (disk / "console.log").read_text(errors="replace")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_bad_settings_of_one_rank_are_said(config):
    env = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run(
        [*ALONE, "--config", str(config), "--lr", "-1"],
        cwd=ROOT, env=environment() | env, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: rank 1: optimizer.lr is -1")
