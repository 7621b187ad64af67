"""Measures what faults cost a run: useful time over wall time, steps lost, seconds to resume.

Two agents of one rank each train as examples/launch/node.sh starts them, on this machine. Every so
many steps a rank is killed, frozen or slowed down, its disk is full, or a loss is not a number.
Nobody helps: the agents start their ranks again, which resume from the newest checkpoint. The save
interval is the one that costs least by Young's estimate (1974), sqrt(2 stall / failure rate), from
the pause of a save and the time of a step in a short run without faults.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_mm.benchmark.fault_job import FaultJob, Step
from megatron_mm.benchmark.planted import NAN_FILE, OBJECTIVE
from megatron_mm.errors import LaunchError

QUIET_STEPS = 40  # of the run without faults, of which the first quarter warms up
QUIET_SAVES = 10  # steps between its saves
DISK_BYTES = 256 * 2**20  # of the small file system that runs full
SLOW = 0.02  # seconds that a slow rank stands still, and then runs, in turn
FROZEN_MINUTES = 1  # after which a collective gives up: a frozen rank is found no sooner


@dataclass(frozen=True)
class Fault:
    """A fault and what it cost.

    Attributes:
        step: the last one seen before it.
        steps_again: that were trained once more after it.
        resumed: seconds until the first step after it was done.
    """

    kind: str
    step: int
    rank: int
    steps_again: int
    resumed: float


def measure(
    flags: Sequence[str], kinds: Sequence[str], every: int, count: int, folder: Path | None = None
) -> dict[str, Any]:
    """Trains with `count` faults, `every` steps apart, of the kinds in turn.

    Args:
        flags: of the trainer; the run's own folders and intervals are replaced.
        folder: for logs and checkpoints; None: a temporary one.

    Raises:
        LaunchError: the run does not start, or does not go on after a fault.
    """
    with contextlib.ExitStack() as at_end:
        if folder is None:
            folder = Path(at_end.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        quiet = _quiet([*flags], folder / "quiet")
        interval = save_interval(quiet["stall_seconds"], quiet["step_seconds"], every)
        small = folder / "saved"
        if "disk" in kinds:
            at_end.enter_context(_small_file_system(small))
        steps = every * (count + 1)
        job = FaultJob(
            folder / "faulty",
            [
                *(*flags, "--objective", OBJECTIVE, "--train-iters", str(steps)),
                *("--save", str(small), "--save-interval", str(interval), "--async-save"),
                *("--keep-last-checkpoints", "2"),
                *("--distributed-timeout-minutes", str(FROZEN_MINUTES)),
            ],
            restarts=2 * count,  # with a full disk there may be two
        )
        at_end.callback(job.stop)
        done = job.steps_until(every)
        faults = []
        for number in range(count):
            kind, rank = kinds[number % len(kinds)], number % 2
            cause, stops = KINDS[kind]
            at = time.monotonic()
            with cause(job, rank, small):
                new = job.steps_after_restart() if stops else job.steps_until(every * (number + 2))
            before = (done + new)[-2].iteration if stops else done[-1].iteration
            after = new[-1] if stops else new[0]
            done += new
            again = max(0, before - after.iteration + 1)
            faults.append(Fault(kind, before, rank, again, after.seen - at))
            done += job.steps_until(every * (number + 2))
        job.finish()
        named = sum("is slow" in line for line in job.said().splitlines())
    return {
        "quiet": quiet,
        "every": every,
        "save_interval": interval,
        "faults": [asdict(fault) for fault in faults],
        "slow_ranks_named": named,
        **cost(done),
    }


def save_interval(stall: float, step: float, every: int) -> int:
    """Returns the steps between two saves that cost least, with a failure every `every` steps: a
    save costs `stall` seconds, a failure half an interval of steps of `step` seconds. At least 1,
    at most half of `every`."""
    least = math.sqrt(2 * stall * every * step) / step
    return max(1, min(round(least), every // 2))


def cost(done: Sequence[Step]) -> dict[str, Any]:
    """Returns what the wall time went into, from every step that was done, in order. A step that
    was trained again counts as useful once."""
    last = {step.iteration: step for step in done}
    useful = sum(step.seconds for step in last.values())
    wall = done[-1].seen - done[0].seen + done[0].seconds
    return {
        "steps": len(last),
        "steps_trained_again": len(done) - len(last),
        "useful_seconds": useful,
        "wall_seconds": wall,
        "goodput": useful / wall,
    }


def _quiet(flags: list[str], folder: Path) -> dict[str, float]:
    """A run without faults: its median step, the pause of a save, the seconds of its start."""
    begin = time.monotonic()
    saves = ["--save", str(folder / "saved"), "--save-interval", str(QUIET_SAVES), "--async-save"]
    few = ["--train-iters", str(QUIET_STEPS), "--lr-warmup-iters", "0"]
    job = FaultJob(folder, [*flags, *saves, *few], restarts=0)
    try:
        done = job.steps_until(QUIET_STEPS)
        job.finish()
    finally:
        job.stop()
    warm = done[len(done) // 4 :]
    return {
        "start_seconds": done[0].seen - begin,
        "step_seconds": statistics.median(step.seconds for step in warm),
        "stall_seconds": statistics.median(step.stall for step in done if step.stall is not None),
    }


@contextlib.contextmanager
def _small_file_system(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        raise LaunchError(
            f"no small file system for the fault disk: {' '.join(made.stderr.split())}; run as "
            "root, or leave disk out of --kinds"
        )
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


@contextlib.contextmanager
def _killed(job: FaultJob, rank: int, saved: Path) -> Iterator[None]:
    job.signal(rank, signal.SIGKILL)
    yield


@contextlib.contextmanager
def _frozen(job: FaultJob, rank: int, saved: Path) -> Iterator[None]:
    job.signal(rank, signal.SIGSTOP)
    yield


@contextlib.contextmanager
def _slowed(job: FaultJob, rank: int, saved: Path) -> Iterator[None]:
    process = job.signal(rank, signal.SIGCONT)
    turns = f"while kill -STOP {process}; do sleep {SLOW}; kill -CONT {process}; sleep {SLOW}; done"
    with subprocess.Popen(["bash", "-c", turns], stderr=subprocess.DEVNULL) as slowing:
        try:
            yield
        finally:
            slowing.kill()
            slowing.wait()
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


@contextlib.contextmanager
def _full(job: FaultJob, rank: int, saved: Path) -> Iterator[None]:
    """Fills the disk until the ranks have ended because of it."""
    filler, process = saved / "filler", job.process(rank)
    with filler.open("wb") as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(2**16))
            stream.flush()
    job.wait_for(lambda: job.process(rank) != process, "ranks that end on a full disk")
    filler.unlink()
    yield


@contextlib.contextmanager
def _not_a_number(job: FaultJob, rank: int, saved: Path) -> Iterator[None]:
    (job.output / NAN_FILE).touch()
    yield


# What causes it, and whether it stops the run; what does not lasts until the next fault.
KINDS: dict[str, tuple[Callable[..., contextlib.AbstractContextManager[None]], bool]] = {
    "kill": (_killed, True),
    "freeze": (_frozen, True),
    "slow": (_slowed, False),
    "disk": (_full, True),
    "nan": (_not_a_number, True),
}


def text(result: dict[str, Any]) -> str:
    """The result in words."""
    quiet = result["quiet"]
    lines = [
        f"a step takes {quiet['step_seconds']:.3f} s, a save stops it for "
        f"{quiet['stall_seconds']:.3f} s, a start takes {quiet['start_seconds']:.1f} s; saved "
        f"every {result['save_interval']} steps",
        *(
            f"{fault['kind']} of rank {fault['rank']} at step {fault['step']}: next step after "
            f"{fault['resumed']:.1f} s, {fault['steps_again']} trained again"
            for fault in result["faults"]
        ),
    ]
    if any(fault["kind"] == "slow" for fault in result["faults"]):
        lines.append(f"slow ranks named: {result['slow_ranks_named']}")
    return "\n".join(
        [
            *lines,
            f"{result['steps']} steps, {result['steps_trained_again']} of them trained again; "
            f"useful {result['useful_seconds']:.1f} s of {result['wall_seconds']:.1f} s: goodput "
            f"{result['goodput']:.3f} with a fault every {result['every']} steps",
        ]
    )
