"""Processes of a visit: one that runs checks on the GPU, one that computes on the CPU beside it.

A failed kernel may end CUDA for a whole process. Checks therefore run in a process that the command
can replace, and say how they ended through a pipe. Nothing here imports torch before a GPU was
hidden or fake.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_mm.benchmark.gpu.checks import Check
from megatron_mm.benchmark.gpu.visit import CPU_LOG, Row, Skip, Visit, cpu_files
from megatron_mm.outputs import whole_file

# Makes torch, in a process that has not imported it, say that there is a GPU; returns what counts.
Pretend = Callable[[], Any] | None
NO_GPU = "there is no CUDA device; --dry runs the checks in small on a fake one"


def serve(pipe: Connection, log: Path, visit: Visit, pretend: Pretend) -> None:
    """Answers each (check, seconds that it may take) with its row, until it is told None. The first
    answer is why there is no GPU, or None. Ends after a check that leaves CUDA unusable."""
    _write_to(log)
    if pretend is not None:
        visit.fake = pretend()
    import torch

    from megatron_mm import cli, platform

    cli.setup_logging(0)
    platform.quiet()
    if not torch.cuda.is_available():
        pipe.send(NO_GPU)
        return
    platform.install()
    from megatron_mm.config import RunConfig
    from megatron_mm.engine.kernels import choose_kernels

    choose_kernels(RunConfig())  # as every run does
    pipe.send(None)
    while (task := pipe.recv()) is not None:
        check, seconds = task
        # Before the command takes it for hung, so that a check can say what it waits for.
        visit.deadline = time.monotonic() + 0.9 * seconds
        row = run(check, visit)
        usable = _usable(row)
        pipe.send((row, usable))
        if not usable:
            return


def run(check: Check, visit: Visit) -> Row:
    """Runs a check; whatever it raises is in the row."""
    row, begin = Row(check.name), time.monotonic()
    try:
        _part(check.part)(visit, row)
    except Skip as why:
        row.skipped = str(why)
    # A check may fail in any way, and the next ones run all the same.
    except Exception as error:
        row.problems.append(f"{type(error).__name__}: {_first_line(error)}")
        row.error = traceback.format_exc()
    row.seconds = time.monotonic() - begin
    return row


def _usable(row: Row) -> bool:
    """Frees what the check held; whether CUDA still works."""
    import torch

    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:  # torch.AcceleratorError is one
        row.problems.append(f"CUDA is unusable after it: {_first_line(error)}")
        return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def compute_on_cpu(parts: list[str], visit: Visit, _alive: Connection) -> None:
    """Calls functions of this folder without a GPU and writes what they return, or their traceback.

    Args:
        _alive: the pipe's end that is open as long as this process lives; `Visit.helper` is the
            other.
    """
    try:
        _write_to(visit.folder / CPU_LOG)
        _without_gpu()
    # Whatever it is, the checks that wait say so.
    except Exception:
        for part in parts:
            cpu_files(visit.folder, part)[1].write_text(traceback.format_exc(), encoding="utf-8")
        raise
    import torch

    for part in parts:
        result, problem = cpu_files(visit.folder, part)
        try:
            with whole_file(result) as partial:
                torch.save(_part(part)(visit.dry), partial)
        except Exception:
            problem.write_text(traceback.format_exc(), encoding="utf-8")


def _without_gpu() -> None:
    """Hides GPUs from this process."""
    from megatron_mm import cli, platform

    cli.setup_logging(0)
    platform.quiet()
    platform.hide_gpus()
    platform.install()
    _leave_cores()


def _leave_cores() -> None:
    """Leaves two cores to the process that measures on the GPU: its launches need one at once."""
    import torch

    others = len(os.sched_getaffinity(0)) - 2
    torch.set_num_threads(max(1, min(torch.get_num_threads(), others)))


def _part(path: str) -> Callable:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"megatron_mm.benchmark.gpu.{module}"), name)


def _write_to(log: Path) -> None:
    """Sends what this process prints to a file: the console is for rows."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout.flush()
    sys.stderr.flush()
    for stream in (1, 2):
        os.dup2(target, stream)
    os.close(target)
