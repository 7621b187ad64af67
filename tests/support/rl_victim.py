"""A rank of a run of reinforcement learning that kills itself at a point of its choice."""

from __future__ import annotations

import os
import signal
import sys

import psutil
import torch
import torch.distributed as dist

from megatron_mm import platform
from support.forked import is_clean

platform.install()

from megatron_mm.checkpoint import folders  # noqa: E402
from megatron_mm.config import RunConfig, validate  # noqa: E402
from megatron_mm.engine.engine import Engine  # noqa: E402
from megatron_mm.generation import generate  # noqa: E402
from megatron_mm.parallel import groups  # noqa: E402
from megatron_mm.train.loop import train  # noqa: E402

SERVER = os.getpid()  # where this module was imported
# Where a rank can be killed: what is called there, and how often it comes back from it.
POINTS = {
    "rollout": (generate._Generation, "step", 14),  # within the second rollout
    "update": (Engine, "update", 3),  # between the two steps of the second rollout
    "save": (folders, "publish", 1),  # the second checkpoint has no name yet
}


def kill_at(point: str, pipe) -> None:
    """SIGKILL for this process when it comes to the point. It tells of its children first."""
    owner, name, calls = POINTS[point]
    original, left = getattr(owner, name), [calls]

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            pipe.send([child.pid for child in psutil.Process().children(recursive=True)])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def live(pipe, store: str, rank: int, size: int, run: RunConfig, point: str | None) -> None:
    """The run from its checkpoint on; with a point, as far as there."""
    assert is_clean(SERVER), "the server that forks did not import this, or has threads"
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # a peer's death is no news
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    validate(run, size)
    if point is not None:
        kill_at(point, pipe)
    train(run, groups.build(run.parallel))
