"""Asynchronous saving: a snapshot in the training thread, the writing in another thread.

The background threads of all ranks run the code of a synchronous save, on a gloo group of their
own. They wait only for each other, and a training thread waits only for its own background
thread. So neither can delay the other's collectives, in whatever order they come. A rank that dies
ends the wait with an error: at once when its connections break, at the latest after
`distributed_timeout_minutes`. (Finishing in the training thread instead would need an agreement at
every step and a state machine for half-agreed saves.)

Threads, not processes: a fork would copy locks that threads of gloo or CUDA hold.
"""

from __future__ import annotations

import datetime
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mm.checkpoint import snapshot
from megatron_mm.checkpoint.lock import hold
from megatron_mm.engine.engine import Engine

logger = logging.getLogger(__name__)


class Saver:
    """Saves the checkpoints of one run; at most one is being written at a time.

    When `save` returns, the previous save is published, so a kill at any later moment loses at
    most the steps since then.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        asynchronous: bool,
        keep_last: int | None,
        folder: Path | None = None,
    ):
        """Every rank calls it.

        Args:
            folder: is held until `close`, so that no second job saves there.

        Raises:
            CheckpointError: on every rank; `folder` cannot be held.
        """
        self._lock = hold(folder, engine.groups.world)
        self._engine, self._keep_last = engine, keep_last
        self._group, self._thread = engine.groups.world, None
        self._writing: Future | None = None
        if asynchronous:
            timeout = datetime.timedelta(minutes=engine.run.parallel.distributed_timeout_minutes)
            self._group = dist.new_group(timeout=timeout, backend="gloo")
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def save(self, loader_state: dict, folder: Path, iteration: int, extra: dict) -> float:
        """Waits for the previous save, then saves or starts to. Every rank calls it.

        Returns:
            Seconds for which training stood still.

        Raises:
            CheckpointError: on every rank; this save or the previous one failed.
        """
        begin = time.perf_counter()
        self.finish()
        taken = snapshot.take(self._engine, loader_state, iteration, extra)
        args = (taken, folder, self._group, self._keep_last)
        if self._thread is None:
            snapshot.write(*args)
        else:
            self._writing = self._thread.submit(snapshot.write, *args)
        return time.perf_counter() - begin

    @property
    def failed(self) -> bool:
        """Whether a background save has failed; `finish` raises its error. Does not wait."""
        return (
            self._writing is not None
            and self._writing.done()
            and self._writing.exception() is not None
        )

    def finish(self) -> None:
        """Waits until nothing is being written.

        Raises:
            CheckpointError: on every rank; the save failed.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Finishes while another error may be on its way: a failed save is only logged. Other jobs
        may save to the folder from now on."""
        try:
            self.finish()
        except (Exception, CheckpointException) as error:
            logger.warning("%s", error)
        if self._thread is not None:
            self._thread.shutdown()
        if self._lock is not None:
            self._lock.release()
