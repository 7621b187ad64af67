"""Ranks that train and save in the background until a test kills them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mm import platform
from support.forked import context, is_clean

platform.install()

from megatron_mm.checkpoint import sharded  # noqa: E402
from megatron_mm.checkpoint.saver import Saver  # noqa: E402
from support.checkpoint_runs import create, tiny_run, train  # noqa: E402

INTERVAL = 2  # steps between saves
KEEP = 2
STEPS = 12  # of one life, unless it is killed before
PATIENCE = 60  # seconds for anything that should take about one
SERVER = os.getpid()  # where this module was imported


def _slowly(function):
    def slow(*args, **kwargs):
        time.sleep(0.05)
        return function(*args, **kwargs)

    return slow


def live(pipe: Connection, store: str, rank: int, parallel: list, folder: Path, slow: bool):
    """Resumes from `folder`, trains and saves; sends the iteration of each accepted save."""
    torch.set_num_threads(1)
    # Errors about dead peers are expected.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    clean = is_clean(SERVER)
    if slow:
        os.unlink = _slowly(os.unlink)  # rmtree calls it
    size, sizes = parallel
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    engine = create(tiny_run(sizes))
    start = sharded.load(engine, folder)["iteration"]
    background = Saver(engine, asynchronous=True, keep_last=KEEP)
    pipe.send(("born", start, clean))
    try:
        for step in range(start, start + STEPS):
            train(engine, range(step, step + 1))
            if (step + 1) % INTERVAL == 0:
                background.save({"consumed_samples": step + 1}, folder, step + 1, {})
                pipe.send(("saving", step + 1))
    finally:
        background.close()
    dist.destroy_process_group()


class Life:
    """The processes of one short job, a rank each."""

    def __init__(self, parallel: tuple[int, dict], folder: Path, store: Path, slow: bool = False):
        forks = context()
        self.processes, self._pipes = [], []
        for rank in range(parallel[0]):
            ours, theirs = forks.Pipe(duplex=False)
            process = forks.Process(
                target=live, args=(theirs, str(store), rank, parallel, folder, slow), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)
        for pipe in self._pipes:
            assert pipe.poll(PATIENCE), "a victim does not start"
            _, self.start, clean = pipe.recv()
            assert clean, "the server that forks did not import this, or has threads"

    def kill(
        self, ranks: list[int], saves: int, seconds: float, until: Callable[[], object]
    ) -> int:
        """Kills ranks `saves` saves from now, `seconds` after `until` has become true.

        The others must end by themselves.

        Returns:
            The last iteration whose save rank 0 reported as begun.
        """
        last = self.start
        for _ in range(saves):
            assert self._pipes[0].poll(PATIENCE), "a victim hangs"
            last = self._pipes[0].recv()[1]
        deadline = time.monotonic() + PATIENCE
        while not until():
            assert time.monotonic() < deadline, "what the kill waits for does not happen"
            time.sleep(0.002)
        time.sleep(seconds)
        for rank in ranks:
            self.processes[rank].kill()
        deadline = time.monotonic() + PATIENCE
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        stuck = [process for process in self.processes if process.is_alive()]
        for process in stuck:
            process.kill()
        assert not stuck, f"{len(stuck)} survivors hang"
        while wait([self._pipes[0]], timeout=0):
            try:
                last = self._pipes[0].recv()[1]
            except EOFError:
                break
        return last
