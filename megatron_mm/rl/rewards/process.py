"""The trainer's side of one reward worker: its start, its time limits, its end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import Any

from megatron_mm.plugins import Spec
from megatron_mm.rl.rewards.worker import Lost, work

START_SECONDS = 120.0  # for a worker to import the functions' modules; sympy alone takes 2 s


class RewardProcess:
    """One worker.

    Attributes:
        task: the task that it works on; None while it waits for one.
        ready: whether it has sent its first answer.
    """

    def __init__(self, context: Any, specs: Sequence[Spec]) -> None:
        self.pipe, theirs = context.Pipe()
        # This end closes when this process ends, in whatever way; see `end_with_parent`.
        their_lifeline, self.lifeline = context.Pipe(duplex=False)
        self.process = context.Process(
            target=work, args=(theirs, their_lifeline, specs), name="reward worker"
        )
        try:
            self.process.start()
        finally:
            theirs.close()
            their_lifeline.close()
        self.ready = False
        self.task: Any = None
        self.since = time.monotonic()  # when its task was sent
        self.set_limit(START_SECONDS)

    def set_limit(self, seconds: float) -> None:
        """Sets the time for its next answer, from now."""
        self.limit, self.deadline = seconds, time.monotonic() + seconds

    def kill(self) -> None:
        """Ends it, and whatever its functions started."""
        gone = contextlib.suppress(ProcessLookupError, PermissionError)
        with gone:  # it may not have a process group yet
            os.killpg(self.process.pid, signal.SIGKILL)
        with gone:
            self.process.kill()
        self.process.join(timeout=10)
        self.pipe.close()
        self.lifeline.close()

    def how_it_ended(self) -> str:
        self.process.join(timeout=1)
        code = self.process.exitcode
        if code is None:
            return "closed its pipe"
        return f"ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"


def answers(workers: Sequence[RewardProcess]) -> list[tuple[RewardProcess, Any]]:
    """Returns the answers of workers, a Lost for one that died or ran out of time; waits until
    there is at least one, or a time limit has passed."""
    if not workers:
        return []
    first = min(worker.deadline for worker in workers)
    pipes = [worker.pipe for worker in workers]
    readable = wait(pipes, timeout=max(0.0, first - time.monotonic()))
    found: list[tuple[RewardProcess, Any]] = []
    for worker in workers:
        if worker.pipe in readable:
            try:
                found.append((worker, worker.pipe.recv()))
            except Exception:  # the pipe has closed, perhaps in the middle of an answer
                found.append((worker, Lost(f"the worker {worker.how_it_ended()}")))
        elif time.monotonic() >= worker.deadline:
            late = Lost(f"took longer than {worker.limit:g} s", timed_out=True)
            found.append((worker, late))
    return found
