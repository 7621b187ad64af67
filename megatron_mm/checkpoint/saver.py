"""Saving while training goes on: a snapshot in this thread, the writing in another one.

The background threads of all ranks write and agree by themselves, on a gloo group that
nobody else uses, running the very code that a synchronous save runs. They wait for each
other only, never for a training thread; a training thread waits for its own background
thread only. So neither can hold up the other's collectives, whatever order they come in,
and a rank that dies ends the wait with an error: at once where its connections break, at
the latest after `distributed_timeout_minutes`. (Finishing in the training thread instead
would need an agreement at every step, and a state machine for saves half agreed upon.)

Threads, not processes: a fork would copy locks that gloo's or CUDA's threads hold.
"""

from __future__ import annotations

import datetime
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mm.checkpoint import snapshot
from megatron_mm.engine.engine import Engine


class Saver:
    """Saves the checkpoints of one run; at most one is being written at a time.

    When `save` returns, the save before it is published: a kill at any later moment loses
    the steps since that one at most.
    """

    def __init__(self, engine: Engine, *, asynchronous: bool, keep_last: int | None):
        """Every rank calls it: asynchronous saving makes a group."""
        self._engine, self._keep_last = engine, keep_last
        self._group, self._thread = engine.groups.world, None
        self._writing: Future | None = None
        if asynchronous:
            timeout = datetime.timedelta(minutes=engine.run.parallel.distributed_timeout_minutes)
            self._group = dist.new_group(timeout=timeout, backend="gloo")
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def save(self, loader_state: dict, folder: Path, iteration: int, extra: dict) -> float:
        """Save, or start to, once the save before is finished. Every rank calls it.

        Returns:
            Seconds for which training stood still.

        Raises:
            CheckpointError: on every rank, the failure of this save or of the one before.
        """
        begin = time.perf_counter()
        self.finish()
        taken = snapshot.take(self._engine, loader_state, iteration, extra)
        job = (snapshot.write, taken, folder, self._group, self._keep_last)
        if self._thread is None:
            job[0](*job[1:])
        else:
            self._writing = self._thread.submit(*job)
        return time.perf_counter() - begin

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed; `finish` says how. Waits for nobody."""
        return (
            self._writing is not None
            and self._writing.done()
            and self._writing.exception() is not None
        )

    def finish(self) -> None:
        """Wait until nothing is being written. Raises CheckpointError if that failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """`finish` where another error is under way already: this one is only told."""
        try:
            self.finish()
        except (Exception, CheckpointException) as error:
            if dist.get_rank() == 0:
                print(f"warning: {error}", file=sys.stderr)
        if self._thread is not None:
            self._thread.shutdown()
