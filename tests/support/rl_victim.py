"""A rank of a reinforcement learning run that kills itself at a given point."""

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
# Where a rank can be killed: the function called there, and how many of its calls return before.
POINTS = {
    "rollout": (generate._Generation, "step", 14),  # within the second rollout
    "update": (Engine, "update", 3),  # between the two steps of the second rollout
    "save": (folders, "publish", 1),  # the second checkpoint has no name yet
}


def kill_at(point: str, pipe) -> None:
    """Makes this process send the ids of its children and kill itself at the point."""
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
    """Continues the run from its checkpoint, to its end or to `point`."""
    assert is_clean(SERVER), "the server that forks did not import this, or has threads"
    torch.set_num_threads(1)
    # Errors about dead peers are expected.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    validate(run, size)
    if point is not None:
        kill_at(point, pipe)
    train(run, groups.build(run.parallel))
