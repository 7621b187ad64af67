"""A pool of processes that stay alive for the whole test session and act as ranks.

`RankPool.run(n, function, *args)` calls a module-level function on the first n of them inside a new
job of n ranks, gloo's on the CPU, and returns what each rank returned. Processes start, and import
torch and megatron-core, once for all tests.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait

MAX_RANKS = 4
TIMEOUT_SECONDS = 240  # for one call: a hang is a failure, not a stuck suite
JOIN_TRIES = 4


def _forget_models() -> None:
    """Frees what the last call built, process groups above all.

    megatron-core's DDP is kept alive by its own hooks on autograd nodes, a circle that
    Python's collector cannot see. Each model would leave some sixty gloo threads behind; they
    poll, and after a hundred tests the machine would do little else.
    """
    from megatron.core.distributed import DistributedDataParallel

    for thing in gc.get_objects():
        if type(thing) is DistributedDataParallel:
            vars(thing).clear()
    gc.collect()
    gc.freeze()  # what is left is modules: the collector need not walk them for every test


def _join(path: str, rank: int, size: int, timeout) -> None:
    """Starts the job's group, and starts it again if gloo could not connect all ranks.

    On a busy machine a rank that gives up closes connections that others still wait on
    ("Connection closed by peer" in connectFullMesh), and some ranks have a group that others
    lack. So each rank writes its outcome to a second store, and all try again if one failed. Each
    try has a new store, since the old one holds the addresses of dead sockets.
    """
    import torch.distributed as dist

    from megatron_mm import platform

    words = dist.FileStore(path + "-joined", size)
    words.set_timeout(timeout)
    for number in range(JOIN_TRIES):
        problem = None
        try:
            dist.init_process_group(
                platform.backend(),
                store=dist.FileStore(f"{path}-{number}", size),
                rank=rank,
                world_size=size,
                timeout=timeout,
            )
        except RuntimeError as error:  # DistNetworkError and the like
            problem = error
        words.set(f"{number}/{rank}", str(problem or ""))
        problems = [words.get(f"{number}/{other}").decode() for other in range(size)]
        if not any(problems):
            return
        if dist.is_initialized():
            dist.destroy_process_group()
    raise RuntimeError(f"{JOIN_TRIES} tries to connect failed: {problems}")


def _serve(rank: int, pipe, prepare: Callable[[], object] | None) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"  # a job's 25 groups connect when they are used
    import datetime
    import warnings

    warnings.simplefilter("ignore")
    import torch
    import torch.distributed as dist

    if prepare is not None:
        prepare()
    from megatron_mm import cli, platform

    cli.setup_logging(rank)
    platform.install()
    from megatron.core import parallel_state

    torch.set_num_threads(1)
    while (task := pipe.recv()) is not None:
        store, size, function, args = task
        torch.manual_seed(0)  # a call draws the same whatever this process did before
        try:
            _join(store, rank, size, datetime.timedelta(seconds=TIMEOUT_SECONDS))
            answer = ("ok", function(*args))
        except BaseException as error:
            answer = ("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        finally:
            if parallel_state.model_parallel_is_initialized():
                parallel_state.destroy_model_parallel()
            if dist.is_initialized():
                dist.destroy_process_group()
            _forget_models()
        pipe.send(answer)


class RankPool:
    """
    Args:
        prepare: a module-level function that every rank calls before it imports megatron-core.
    """

    def __init__(self, prepare: Callable[[], object] | None = None):
        self._prepare = prepare
        self._context = multiprocessing.get_context("spawn")
        self._ranks: list = []

    def _start(self, size: int) -> None:
        while len(self._ranks) < size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_serve, args=(len(self._ranks), theirs, self._prepare), daemon=True
            )
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def run(self, size: int, function: Callable, *args) -> list:
        """Returns what each of `size` ranks returned from function(*args).

        Raises:
            AssertionError: a rank raised (its traceback is in the message), died, or took longer
                than TIMEOUT_SECONDS; the pool is then restarted.
        """
        assert size <= MAX_RANKS, f"the pool has at most {MAX_RANKS} ranks, not {size}"
        self._start(size)
        answers: list = [None] * size
        with tempfile.TemporaryDirectory() as folder:
            for _, pipe in self._ranks[:size]:
                pipe.send((os.path.join(folder, "store"), size, function, args))
            pending = {pipe: rank for rank, (_, pipe) in enumerate(self._ranks[:size])}
            while pending:
                ready = wait(list(pending), timeout=TIMEOUT_SECONDS)
                failed = None if ready else f"no answer in {TIMEOUT_SECONDS} s"
                for pipe in ready:
                    rank = pending.pop(pipe)
                    try:
                        status, value = pipe.recv()
                    except EOFError:
                        status, value = "error", "the process died"
                    answers[rank] = value
                    if status == "error":
                        failed = f"rank {rank}: {value}"
                if failed:  # the others may wait for this one for ever
                    if any(v is None for v in answers) and not self._drain(pending, answers):
                        self.stop()
                    raise AssertionError(failed)
        return answers

    def _drain(self, pending: dict, answers: list) -> bool:
        """Gives the other ranks a moment to fail by themselves; returns whether all of them did."""
        while pending:
            ready = wait(list(pending), timeout=5)
            if not ready:
                return False
            for pipe in ready:
                pending.pop(pipe)
                try:
                    pipe.recv()
                except EOFError:
                    return False
        return True

    def stop(self) -> None:
        for process, _ in self._ranks:
            process.kill()
            process.join()
        self._ranks.clear()
